"""Speed of the local pool against what the machine gives in the same run.

``python benchmarks/pool.py [--quick] [--out FOLDER] [--ssd-dir FOLDER]``

DRAM: put and get of batches of 128 objects, verification on, against the same copies by bare ``numpy.copyto`` with one
thread and with as many threads as the pool has.  SSD: put until it is on the disk, and get of what is there only,
against a loop of direct reads or writes of the same sizes with the same number of threads.  All ways take turns.
Restart: how long a pool takes to open that finds 100 000 objects on SSD.
"""

from __future__ import annotations

import argparse
import mmap
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import _peers
import _report
import numpy as np

from umbp_connectors.pool.arena import Arena
from umbp_connectors.pool.local import GetStatus, LocalPool, LocalPoolConfig, PutStatus
from umbp_connectors.pool.rows import ObjectRows
from umbp_core.ids import Identity, RankScope

BATCH = 128
SIZES = (64 << 10, 256 << 10, 1 << 20, 4 << 20)
SSD_SIZES = (256 << 10, 1 << 20, 4 << 20)
SSD_BATCHES = 5
ROUND_BYTES = 2 << 30
CACHE_BYTES = 192 << 20
"""Batches are taken in turns from at least this much memory: no processor cache holds it."""
TARGET_RATIO = 0.85
TARGET_EXISTS_US = 30.0
TARGET_EXISTS_MANY_US = 200.0
MANY_KEYS = 2048
TARGET_RESTART_S = 2.0
TARGET_SSD = 0.8
RESTART_OBJECTS = 100_000


Batch = list[np.ndarray]


class Memory:
    """Objects of one size in memory that is present: some batches, taken in turns."""

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes
        self.batches = max(2, -(-CACHE_BYTES // (nbytes * BATCH)))
        self.arena = Arena(nbytes, self.batches * BATCH, prefault=False)
        self.arena.open()
        self.arena.array[:] = np.random.default_rng(1).integers(0, 256, nbytes, dtype=np.uint8)
        self.arena.array[:, :8] = np.arange(len(self.arena.array), dtype=np.uint64)[:, None].view(np.uint8)
        self._turn = 0

    def next(self) -> Batch:
        """The next batch."""
        return list(self.next_rows())

    def next_rows(self) -> ObjectRows:
        """The next batch, as rows of one array."""
        first = self._turn % self.batches * BATCH
        self._turn += 1
        return ObjectRows(self.arena.array, range(first, first + BATCH))


class Keys:
    """Block keys as vLLM makes them, 32 bytes and a group; a fresh batch each time."""

    def __init__(self) -> None:
        self._next = 0

    def fresh(self) -> list[bytes]:
        """Keys that were never used."""
        self._next += BATCH
        return [number.to_bytes(32, "big") + bytes(4) for number in range(self._next - BATCH, self._next)]


def copy_all(executor: ThreadPoolExecutor, threads: int, targets: Batch, sources: Batch) -> None:
    """Copy all ``sources``, split over ``threads`` threads: the ceiling."""

    def share(number: int) -> None:
        for target, source in zip(targets[number::threads], sources[number::threads], strict=True):
            np.copyto(target, source)

    list(executor.map(share, range(threads)))


def open_pool(nbytes: int, pages: int, **options: object) -> LocalPool:
    """A pool whose memory is present."""
    config = LocalPoolConfig(nbytes, pages * nbytes, **options)  # type: ignore[arg-type]
    pool = LocalPool(Identity("benchmark", bytes(32), RankScope()), config)
    pool.open()
    pool.wait_prefaulted(120)
    return pool


class DramBench:
    """The pool's arena and plain memory, with objects of one size."""

    def __init__(self, nbytes: int, threads: int) -> None:
        self._sources, self._targets, self._plain = Memory(nbytes), Memory(nbytes), Memory(nbytes)
        self._pool = open_pool(nbytes, self._sources.batches * BATCH, copy_threads=threads)
        self._keys, self._stored = Keys(), []
        self._executor = ThreadPoolExecutor(threads)
        self._moved = nbytes * BATCH
        self.core_seconds: dict[str, list[float]] = {}

    def copy(self, threads: int) -> float:
        """GB/s of bare copies."""
        into, out_of = self._plain.next(), self._sources.next()
        return self._measure(f"copy{threads}", lambda: copy_all(self._executor, threads, into, out_of))

    def put(self) -> float:
        """GB/s of a put of fresh keys, which evicts as many."""
        self._stored.append(self._keys.fresh())
        objects, statuses = self._sources.next(), []
        figure = self._measure("put", lambda: statuses.extend(self._pool.put(self._stored[-1], objects)))
        check(statuses, PutStatus.STORED)
        return figure

    def get(self) -> float:
        """GB/s of a get of what was put some batches ago."""
        age = min(len(self._stored), max(1, self._sources.batches // 2))
        buffers, statuses = self._targets.next(), []
        figure = self._measure("get", lambda: statuses.extend(self._pool.get(self._stored[-age], buffers)))
        check(statuses, GetStatus.DRAM)
        return figure

    def close(self) -> None:
        """Give everything back."""
        self._pool.close()
        self._executor.shutdown()

    def _measure(self, name: str, work: Callable[[], object]) -> float:
        start = time.process_time()
        figure = _report.rate(self._moved, work)
        self.core_seconds.setdefault(name, []).append((time.process_time() - start) / self._moved * 1e9)
        return figure


def dram(nbytes: int, count: int, threads: int) -> list[_report.Row]:
    """Put and get of one size."""
    bench = DramBench(nbytes, threads)
    one, many = "copy1", f"copy{threads}"
    ways = {one: lambda: bench.copy(1), "put": bench.put, many: lambda: bench.copy(threads), "get": bench.get}
    # Small batches take a millisecond: more rounds, so that a neighbour's time slice does not decide.
    figures = _report.rounds(ways, max(count, min(10 * count, ROUND_BYTES // (nbytes * BATCH))))
    bench.close()
    best = {name: max(values) for name, values in figures.items()}
    median = {name: statistics.median(values) for name, values in figures.items()}
    core = {name: statistics.median(values[1:]) for name, values in bench.core_seconds.items()}
    return [
        {
            "object": _size(nbytes),
            "what": what,
            "GB/s": median[what],
            "copy, 1 thread, GB/s": median[one],
            f"copy, {threads} threads, GB/s": median[many],
            "of 1 thread": _report.ratio(figures[what], figures[one]),
            f"of {threads} threads": _report.ratio(figures[what], figures[many]),
            "best GB/s": best[what],
            "of best copy, 1 thread": best[what] / best[one],
            f"of best copy, {threads} threads": best[what] / best[many],
            "core s/GB": core[what],
            "copy, core s/GB": core[one],
        }
        for what in ("put", "get")
    ]


def exists(count: int, batch: int, target: float) -> list[_report.Row]:
    """Exists for a batch of keys, in microseconds per call."""
    pool = open_pool(4096, 64 * BATCH)
    keys = Keys()
    stored = [key for _ in range(64) for key in keys.fresh()]
    for start in range(0, len(stored), BATCH):
        pool.put(stored[start : start + BATCH], [bytes(8)] * BATCH)
    batches = [stored[start : start + batch] for start in range(0, len(stored), batch)]
    times = []
    for turn in range(200 * count):
        # Keys that come over a socket or from an engine were never hashed before.
        asked = [bytes(bytearray(key)) for key in batches[turn % len(batches)]]
        start = time.perf_counter()
        found = pool.exists(asked)
        times.append((time.perf_counter() - start) * 1e6)
        check(found, True)
    pool.close()
    ordered = sorted(times)
    return [
        {
            "keys": batch,
            "p50 us": statistics.median(times),
            "p99 us": ordered[len(ordered) * 99 // 100],
            "target us": target,
        }
    ]


def restart(objects: int, count: int, folder: Path) -> list[_report.Row]:
    """Seconds until a pool that finds ``objects`` objects on SSD is open, and can say what it has."""
    options = {"ssd_dir": folder, "ssd_capacity": (4 << 20) + objects * (4096 + 1024), "prefault": False}
    keys = [number.to_bytes(32, "big") + bytes(4) for number in range(objects)]
    pool = open_pool(4096, objects, **options)
    for start in range(0, objects, 1000):
        part = keys[start : start + 1000]
        check(list(pool.put(part, [bytes(64)] * len(part))), PutStatus.STORED)
    if not pool.flush(600):
        raise SystemExit("the disk refused something")
    pool.close()
    times = []
    for _ in range(count):
        start_time = time.perf_counter()
        pool = open_pool(4096, BATCH, **options)
        if pool.count_prefix(keys) != objects:
            raise SystemExit("a restart lost something")
        times.append(time.perf_counter() - start_time)
        pool.close()
    return [
        {"objects": objects, "median s": statistics.median(times), "max s": max(times), "target s": TARGET_RESTART_S}
    ]


class DirectFile:
    """A file like the pool's slab, read and written by a bare loop."""

    def __init__(self, path: Path, nbytes: int, slots: int) -> None:
        self._nbytes = nbytes
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_DIRECT, 0o600)
        os.posix_fallocate(self._fd, 0, nbytes * slots)
        self._buffers = [mmap.mmap(-1, nbytes) for _ in range(BATCH)]
        for buffer in self._buffers:
            buffer.write(os.urandom(4096) * (nbytes // 4096))

    def run(self, executor: ThreadPoolExecutor, first: int, write: bool) -> None:
        """A batch of slots from ``first`` on, split over the threads of ``executor``."""
        move: Callable[..., int] = os.pwritev if write else os.preadv

        def one(index: int) -> None:
            if move(self._fd, [self._buffers[index]], (first + index) * self._nbytes) != self._nbytes:
                raise OSError("a short transfer")

        list(executor.map(one, range(BATCH)))
        if write:
            os.fdatasync(self._fd)

    def close(self) -> None:
        """Close the file."""
        os.close(self._fd)


class SsdBench:
    """The pool and a bare file on the same disk, with objects of one size."""

    def __init__(self, nbytes: int, folder: Path) -> None:
        folder.mkdir()
        self._moved = nbytes * BATCH
        self._sources, self._targets, self._keys = Memory(nbytes), Memory(nbytes), Keys()
        self._stored: list[list[bytes]] = []
        slots = SSD_BATCHES * BATCH
        capacity = (2 << 20) + slots * (nbytes + 1024)
        # DRAM holds one batch and a quarter: what was put two batches ago is on SSD only.
        self._pool = open_pool(nbytes, BATCH + BATCH // 4, ssd_dir=folder / "pool", ssd_capacity=capacity)
        self._bare = DirectFile(folder / "bare.bin", nbytes, slots)
        threads = LocalPoolConfig(1, 1)
        self._writers = ThreadPoolExecutor(threads.demote_threads)
        self._readers = ThreadPoolExecutor(threads.io_threads)
        self._turn = 0
        for _ in range(SSD_BATCHES):
            self.put()
            self.direct(write=True)

    def put(self) -> float:
        """GB/s of a put until it is flushed to the disk and catalogued."""
        self._stored.append(self._keys.fresh())
        objects = self._sources.next()

        def work() -> list[object]:
            statuses = self._pool.put(self._stored[-1], objects)
            if not self._pool.flush(120):
                raise SystemExit("the disk refused something")
            return list(statuses)

        figure, statuses = timed(self._moved, work)
        check(statuses, PutStatus.STORED)
        return figure

    def get(self) -> float:
        """GB/s of a get from SSD."""
        buffers = self._targets.next()
        figure, statuses = timed(self._moved, lambda: list(self._pool.get(self._stored[-3], buffers)))
        check(statuses, GetStatus.SSD)
        return figure

    def direct(self, write: bool) -> float:
        """GB/s of a bare loop."""
        self._turn += 1
        first = self._turn % SSD_BATCHES * BATCH
        executor = self._writers if write else self._readers
        return _report.rate(self._moved, lambda: self._bare.run(executor, first, write))

    def close(self) -> None:
        """Give everything back."""
        self._pool.close()
        self._bare.close()
        self._writers.shutdown()
        self._readers.shutdown()


def ssd(nbytes: int, count: int, folder: Path) -> list[_report.Row]:
    """Put until on disk, and get of what is on disk only."""
    bench = SsdBench(nbytes, folder)
    ways = {
        "direct put": lambda: bench.direct(write=True),
        "put": bench.put,
        "direct get": lambda: bench.direct(write=False),
        "get": bench.get,
    }
    figures = _report.rounds(ways, count)
    bench.close()
    return [
        {
            "object": _size(nbytes),
            "what": what,
            "GB/s": statistics.median(figures[what]),
            "direct I/O, GB/s": statistics.median(figures[f"direct {what}"]),
            "of direct I/O": _report.ratio(figures[what], figures[f"direct {what}"]),
            "best GB/s": max(figures[what]),
            "of best direct I/O": max(figures[what]) / max(figures[f"direct {what}"]),
        }
        for what in ("put", "get")
    ]


def timed(moved: int, work: Callable[[], list[object]]) -> tuple[float, list[object]]:
    """GB/s of ``work``, and what it returned."""
    start = time.perf_counter()
    result = work()
    return moved / (time.perf_counter() - start) / 1e9, result


def check(found: Sequence[object], expected: object) -> None:
    """A benchmark of something that does not work is worth nothing."""
    if any(each != expected for each in found):
        raise SystemExit(f"expected {expected} throughout, got {set(found)}")


def _size(nbytes: int) -> str:
    return f"{nbytes >> 10} KiB" if nbytes < 1 << 20 else f"{nbytes >> 20} MiB"


def main() -> None:
    """Run everything and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="few rounds, small objects only")
    parser.add_argument("--threads", type=int, default=2, help="copy threads of the pool")
    parser.add_argument("--out", type=Path, default=_report.OUT)
    parser.add_argument("--ssd-dir", type=Path, default=None, help="a folder on the disk to measure")
    arguments = parser.parse_args()
    count = 3 if arguments.quick else 9
    sizes, ssd_sizes = (SIZES[:2], SSD_SIZES[:1]) if arguments.quick else (SIZES, SSD_SIZES)
    with tempfile.TemporaryDirectory(dir=arguments.ssd_dir, prefix="umbp-bench-") as folder:
        sections = {
            "DRAM, batches of 128": [row for nbytes in sizes for row in dram(nbytes, count, arguments.threads)],
            "exists": [
                *exists(count, BATCH, TARGET_EXISTS_US),
                *exists(count, MANY_KEYS, TARGET_EXISTS_MANY_US),
            ],
            "SSD, batches of 128": [
                row for nbytes in ssd_sizes for row in ssd(nbytes, count, Path(folder) / str(nbytes))
            ],
            "restart": restart(RESTART_OBJECTS // (10 if arguments.quick else 1), 3, Path(folder) / "restart"),
            **_peers.rows(),
        }
    notes = [
        f"Targets: put and get {TARGET_RATIO} of the copy from 256 KiB on, exists {TARGET_EXISTS_US:.0f} us.",
        f"The copy that the targets are of is that by one thread; put and get copy with {arguments.threads}.",
        f"Exists of {MANY_KEYS} keys: {TARGET_EXISTS_MANY_US:.0f} us; a restart: {TARGET_RESTART_S:.0f} s.",
        f"SSD: {TARGET_SSD} of direct I/O by as many threads; the disk of a virtual machine is not the same twice.",
        "Medians of interleaved rounds; ratios are medians of each round's ratio.",
        "The pool verifies every object (xxh3-128); the copies and the direct I/O it is compared with do not.",
        "Core seconds count all threads of the process: they say most on a machine that others use too.",
        "SSD put counts until the bytes are on the device (fdatasync on both sides) and catalogued.",
    ]
    print(_report.write("pool", "The local pool", sections, notes, arguments.out))


if __name__ == "__main__":
    main()
