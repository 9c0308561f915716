"""Speed of the local pool against what the machine gives in the same run.

``python benchmarks/pool.py [--quick] [--out FOLDER] [--ssd-dir FOLDER]``

DRAM: put and get of batches of 128 objects, verification on, against the same copies by bare ``numpy.copyto`` with one
thread and with as many threads as the pool has.  SSD: put until it is on the disk, and get of what is there only,
against a loop of direct reads or writes of the same sizes with the same number of threads.  All ways take turns.
Restart: how long a pool takes to open that finds 100 000 objects on SSD.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import _peers
import _report
import numpy as np
import pool_ssd
from _pool import BATCH, Batch, Keys, Memory, check, open_pool, size_name

from umbp_connectors.pool.local import GetStatus, PutStatus

SIZES = (64 << 10, 256 << 10, 1 << 20, 4 << 20)
ROUND_BYTES = 2 << 30
TARGET_RATIO = 0.85
TARGET_EXISTS_US = 30.0
TARGET_EXISTS_MANY_US = 200.0
MANY_KEYS = 2048
TARGET_RESTART_S = 2.0
RESTART_OBJECTS = 100_000


def copy_all(executor: ThreadPoolExecutor, threads: int, targets: Batch, sources: Batch) -> None:
    """Copy all ``sources``, split over ``threads`` threads: the ceiling."""

    def share(number: int) -> None:
        for target, source in zip(targets[number::threads], sources[number::threads], strict=True):
            np.copyto(target, source)

    list(executor.map(share, range(threads)))


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
            "object": size_name(nbytes),
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


def main() -> None:
    """Run everything and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="few rounds, small objects only")
    parser.add_argument("--threads", type=int, default=2, help="copy threads of the pool")
    parser.add_argument("--out", type=Path, default=_report.OUT)
    parser.add_argument("--ssd-dir", type=Path, default=None, help="a folder on the disk to measure")
    arguments = parser.parse_args()
    count, ssd_count = (3, 3) if arguments.quick else (9, 15)
    sizes, ssd_sizes = (SIZES[:2], pool_ssd.SIZES[:1]) if arguments.quick else (SIZES, pool_ssd.SIZES)
    with tempfile.TemporaryDirectory(dir=arguments.ssd_dir, prefix="umbp-bench-") as folder:
        sections = {
            "DRAM, batches of 128": [row for nbytes in sizes for row in dram(nbytes, count, arguments.threads)],
            "exists": [
                *exists(count, BATCH, TARGET_EXISTS_US),
                *exists(count, MANY_KEYS, TARGET_EXISTS_MANY_US),
            ],
            "SSD, batches of 128": pool_ssd.ssd(ssd_sizes, ssd_count, Path(folder)),
            "restart": restart(RESTART_OBJECTS // (10 if arguments.quick else 1), 3, Path(folder) / "restart"),
            **_peers.rows(),
        }
    notes = [
        f"Targets: put and get {TARGET_RATIO} of the copy from 256 KiB on, exists {TARGET_EXISTS_US:.0f} us.",
        f"The copy that the targets are of is that by one thread; put and get copy with {arguments.threads}.",
        f"Exists of {MANY_KEYS} keys: {TARGET_EXISTS_MANY_US:.0f} us; a restart: {TARGET_RESTART_S:.0f} s.",
        f"SSD: {pool_ssd.TARGET} of direct I/O by as many threads; a virtual machine's disk is not the same twice.",
        "Medians of interleaved rounds; ratios are medians of each round's ratio.",
        "The pool verifies every object (xxh3-128); the copies and the direct I/O it is compared with do not.",
        "Core seconds count all threads of the process: they say most on a machine that others use too.",
        "SSD put counts until the bytes are on the device (fdatasync on both sides) and catalogued.",
        f"A put is of {pool_ssd.PUT_BYTES >> 20} MiB at least, then a flush; where a batch has less, of one batch too.",
    ]
    print(_report.write("pool", "The local pool", sections, notes, arguments.out))


if __name__ == "__main__":
    main()
