"""What the pool's benchmark measures on SSD; ``pool.py`` runs it."""

from __future__ import annotations

import mmap
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import _report
from _pool import BATCH, Keys, Memory, check, open_pool, size_name

from umbp_connectors.pool.local import GetStatus, LocalPoolConfig, PutStatus

TARGET = 0.8
SIZES = (256 << 10, 1 << 20, 4 << 20)
PUT_BYTES = 128 << 20
"""What is put before it is flushed, at least: the start and the end of a put cost the same, however long it is."""
PASSES = 3
"""How often the sizes are gone through: what makes a machine slow for some seconds does not decide about one of them.

Each time in new files, which may lie better or worse.
"""


class DirectFile:
    """A file like the pool's slab, read and written by a bare loop."""

    def __init__(self, path: Path, nbytes: int, slots: int) -> None:
        self._nbytes = nbytes
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_DIRECT, 0o600)
        os.posix_fallocate(self._fd, 0, nbytes * slots)
        memory = mmap.mmap(-1, nbytes * BATCH)
        memory.madvise(mmap.MADV_HUGEPAGE)  # as the pool's own: a disk moves what lies in one piece faster
        memory.write(os.urandom(4096) * (nbytes * BATCH // 4096))
        self._buffers = [memoryview(memory)[first : first + nbytes] for first in range(0, nbytes * BATCH, nbytes)]

    def run(self, executor: ThreadPoolExecutor, slots: range, write: bool) -> None:
        """Write or read ``slots``, split over the threads of ``executor``."""
        move: Callable[..., int] = os.pwritev if write else os.preadv

        def one(slot: int) -> None:
            if move(self._fd, [self._buffers[slot % BATCH]], slot * self._nbytes) != self._nbytes:
                raise OSError("a short transfer")

        list(executor.map(one, slots))
        if write:
            os.fdatasync(self._fd)

    def close(self) -> None:
        """Close the file."""
        os.close(self._fd)


class SsdBench:
    """The pool and a bare file on the same disk, with objects of one size."""

    def __init__(self, nbytes: int, folder: Path) -> None:
        self.most = max(1, PUT_BYTES // (nbytes * BATCH))
        """Batches that are put before they are flushed, at most."""
        self._nbytes = nbytes * BATCH
        self._sources, self._targets, self._keys = Memory(nbytes), Memory(nbytes), Keys()
        self._stored: list[list[bytes]] = []
        # DRAM holds this many batches and a quarter: what was put before these is on SSD only.
        self._batches = 2 * self.most + 3
        slots = self._batches * BATCH
        capacity = (2 << 20) + slots * (nbytes + 1024)
        self._pool = open_pool(nbytes, self.most * BATCH + BATCH // 4, ssd_dir=folder / "pool", ssd_capacity=capacity)
        self._bare = DirectFile(folder / "bare.bin", nbytes, slots)
        threads = LocalPoolConfig(1, 1)
        self._writers = ThreadPoolExecutor(threads.demote_threads)
        self._readers = ThreadPoolExecutor(threads.io_threads)
        self._turn = 0
        for _ in range(self._batches):
            self.put(1)
            self.direct(1, write=True)

    def put(self, batches: int) -> float:
        """GB/s of a put of each of some batches until they are flushed to the disk and catalogued."""
        given = [(self._keys.fresh(), self._sources.next()) for _ in range(batches)]
        self._stored += (keys for keys, _ in given)

        def work() -> list[object]:
            statuses = [status for keys, objects in given for status in self._pool.put(keys, objects)]
            if not self._pool.flush(120):
                raise SystemExit("the disk refused something")
            return list(statuses)

        figure, statuses = timed(batches * self._nbytes, work)
        check(statuses, PutStatus.STORED)
        return figure

    def get(self) -> float:
        """GB/s of a get of a batch from SSD."""
        buffers, keys = self._targets.next(), self._stored[-self.most - 2]
        figure, statuses = timed(self._nbytes, lambda: list(self._pool.get(keys, buffers)))
        check(statuses, GetStatus.SSD)
        return figure

    def direct(self, batches: int, write: bool) -> float:
        """GB/s of a bare loop over as many objects."""
        first = self._turn % (self._batches - batches + 1) * BATCH
        self._turn += batches
        slots = range(first, first + batches * BATCH)
        executor = self._writers if write else self._readers
        return _report.rate(batches * self._nbytes, lambda: self._bare.run(executor, slots, write))

    def close(self) -> None:
        """Give everything back."""
        self._pool.close()
        self._bare.close()
        self._writers.shutdown()
        self._readers.shutdown()


def measured(nbytes: int, count: int, folder: Path) -> dict[str, list[float]]:
    """GB/s of every way, round by round."""
    bench = SsdBench(nbytes, folder)
    ways = {
        "direct put": lambda: bench.direct(bench.most, write=True),
        "put": lambda: bench.put(bench.most),
        "direct get": lambda: bench.direct(1, write=False),
        "get": bench.get,
    }
    if bench.most > 1:
        ways |= {"direct put, one batch": lambda: bench.direct(1, write=True), "put, one batch": lambda: bench.put(1)}
    figures = _report.rounds(ways, count)
    bench.close()
    return figures


def ssd(sizes: Sequence[int], count: int, folder: Path) -> list[_report.Row]:
    """Put until on disk, and get of what is on disk only."""
    found: dict[int, dict[str, list[float]]] = {nbytes: {} for nbytes in sizes}
    for _ in range(PASSES):
        for nbytes in sizes:
            with tempfile.TemporaryDirectory(dir=folder) as place:
                for what, figures in measured(nbytes, -(-count // PASSES), Path(place)).items():
                    found[nbytes].setdefault(what, []).extend(figures)
    return [
        {
            "object": size_name(nbytes),
            "what": what,
            "GB/s": statistics.median(figures[what]),
            "direct I/O, GB/s": statistics.median(figures[f"direct {what}"]),
            "of direct I/O": _report.ratio(figures[what], figures[f"direct {what}"]),
            "best GB/s": max(figures[what]),
            "of best direct I/O": max(figures[what]) / max(figures[f"direct {what}"]),
        }
        for nbytes, figures in found.items()
        for what in figures
        if not what.startswith("direct")
    ]


def timed(moved: int, work: Callable[[], list[object]]) -> tuple[float, list[object]]:
    """GB/s of ``work``, and what it returned."""
    start = time.perf_counter()
    result = work()
    return moved / (time.perf_counter() - start) / 1e9, result
