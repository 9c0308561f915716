"""Speed of a pool in the daemon against what the machine gives in the same run, and against a pool in this process.

``python benchmarks/daemon.py [--quick] [--out FOLDER]``

Put and get of batches of 128 objects, verification on, through a daemon in a process of its own, against bare copies
by ``numpy.copyto`` with one thread and with as many threads as the client has, and against the pool in this process.
Exists of 2048 keys, in microseconds per call.  All ways take turns.  Then what the leader of an engine says whose ranks
copy by themselves, in microseconds per call.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import _peers
import _report
from _pool import BATCH, Batch, Keys, Memory, check, open_pool
from pool import SIZES, copy_all

from umbp_connectors.daemon.client import DaemonClientConfig, DaemonPool
from umbp_connectors.daemon.pages import NewObject, PageClient, WantedPages, engine_token
from umbp_connectors.pool.local import LocalPool, LocalPoolConfig
from umbp_connectors.pool.outcomes import GetStatus, PutStatus
from umbp_connectors.pool.rows import ObjectRows
from umbp_core.ids import Identity, RankScope

ASKED = 2048
TARGETS = {64 << 10: 0.6}
TARGET = 0.8
TARGET_EXISTS_US = 400.0
ROUND_BYTES = 2 << 30
BUFFERS, ROWS = "buffers", "rows"
GIVEN = (BUFFERS, ROWS)
"""A list of arrays, or neighbouring rows of one array, as SGLang's storage gives the pages of its host pool."""
MANY = 4 * BATCH
IDENTITY = Identity("benchmark", bytes(32), RankScope())
PROGRAM = "from umbp_connectors.cli import main; main()"


class Daemon:
    """A daemon in a process of its own."""

    def __init__(self, folder: Path, dram_bytes: int) -> None:
        self.path = folder / "daemon.sock"
        command = [sys.executable, "-c", PROGRAM, "daemon", "--socket", str(self.path)]
        self._process = subprocess.Popen(
            [*command, "--dram-capacity", str(dram_bytes), "--set", "log_level=warning"], stdout=subprocess.PIPE
        )
        if not (self._process.stdout and self._process.stdout.readline()):
            raise OSError("the daemon does not start")

    def client(self, nbytes: int, pages: int, threads: int) -> DaemonPool:
        """A client whose memory is present."""
        config = DaemonClientConfig(self.path, nbytes, pages * nbytes, timeout_s=30, copy_threads=threads)
        pool = DaemonPool(IDENTITY, config)
        pool.open()
        pool.wait_prefaulted(120)
        return pool

    def close(self) -> None:
        """End it."""
        self._process.terminate()
        self._process.wait(60)


class Mover:
    """Put and get of one pool, of batches from memory that no cache holds, as buffers or as ``rows`` of one array."""

    def __init__(self, pool: LocalPool | DaemonPool, sources: Memory, targets: Memory, keys: Keys, rows: bool) -> None:
        self._pool, self._sources, self._targets, self._rows = pool, sources, targets, rows
        self._keys, self._stored = keys, []
        self._moved = sources.nbytes * sources.batch

    def put(self) -> float:
        """GB/s of a put of fresh keys, which evicts as many."""
        self._stored.append(self._keys.fresh(self._sources.batch))
        objects, statuses = self._batch(self._sources), []
        figure = _report.rate(self._moved, lambda: statuses.extend(self._pool.put(self._stored[-1], objects)))
        check(statuses, PutStatus.STORED)
        return figure

    def get(self) -> float:
        """GB/s of a get of what was put some batches ago."""
        age = min(len(self._stored), max(1, self._sources.batches // 2))
        buffers, statuses = self._batch(self._targets), []
        figure = _report.rate(self._moved, lambda: statuses.extend(self._pool.get(self._stored[-age], buffers)))
        check(statuses, GetStatus.DRAM)
        return figure

    def _batch(self, memory: Memory) -> Batch | ObjectRows:
        return memory.next_rows() if self._rows else memory.next()


def dram(nbytes: int, count: int, threads: int, batch: int = BATCH) -> list[_report.Row]:
    """Put and get of one size."""
    sources, targets, plain = Memory(nbytes, batch), Memory(nbytes, batch), Memory(nbytes, batch)
    keys, pages = Keys(), len(GIVEN) * sources.batches * batch
    executor = ThreadPoolExecutor(threads)
    with tempfile.TemporaryDirectory() as folder:
        daemon = Daemon(Path(folder), pages * nbytes)
        client, local = daemon.client(nbytes, pages, threads), open_pool(nbytes, pages, copy_threads=threads)
        pools = {"": client, "local ": local}
        movers = {
            (where, given): Mover(pool, sources, targets, keys, given == ROWS)
            for where, pool in pools.items()
            for given in GIVEN
        }

        def copy(number: int) -> Callable[[], float]:
            def run() -> float:
                into, out_of = plain.next(), sources.next()
                return _report.rate(nbytes * batch, lambda: copy_all(executor, number, into, out_of))

            return run

        one, many = "copy1", f"copy{threads}"
        ways = {one: copy(1)}
        ways |= {f"{where}put {given}": mover.put for (where, given), mover in movers.items()}
        ways |= {many: copy(threads)}
        ways |= {f"{where}get {given}": mover.get for (where, given), mover in movers.items()}
        turns = max(count, min(10 * count, ROUND_BYTES // (nbytes * batch)))
        figures = _report.rounds(ways, turns, back_and_forth=True)
        client.close()
        local.close()
        daemon.close()
    executor.shutdown()
    return [
        {
            "object": f"{nbytes >> 10} KiB",
            "what": what,
            "given as": given,
            "GB/s": statistics.median(figures[f"{what} {given}"]),
            "copy, 1 thread, GB/s": statistics.median(figures[one]),
            f"copy, {threads} threads, GB/s": statistics.median(figures[many]),
            "of 1 thread": _report.ratio(figures[f"{what} {given}"], figures[one]),
            f"of {threads} threads": _report.ratio(figures[f"{what} {given}"], figures[many]),
            "of the pool in this process": _report.ratio(figures[f"{what} {given}"], figures[f"local {what} {given}"]),
            "target, of 1 thread": TARGETS.get(nbytes, TARGET),
        }
        for given in GIVEN
        for what in ("put", "get")
    ]


def exists(count: int) -> list[_report.Row]:
    """Exists of many keys, in microseconds per call: through the daemon, and in this process."""
    keys = Keys()
    batches = [keys.fresh() for _ in range(ASKED // BATCH)]
    asked = [key for batch in batches for key in batch]
    rows: list[_report.Row] = []
    with tempfile.TemporaryDirectory() as folder:
        daemon = Daemon(Path(folder), 4096 * ASKED)
        pools = {"daemon": daemon.client(4096, ASKED, 1), "this process": open_pool(4096, ASKED)}
        for name, pool in pools.items():
            for batch in batches:
                check(pool.put(batch, [bytes(8)] * BATCH), PutStatus.STORED)
            times = []
            for _ in range(100 * count):
                fresh = [bytes(bytearray(key)) for key in asked]
                start = time.perf_counter()
                found = pool.exists(fresh)
                times.append((time.perf_counter() - start) * 1e6)
                check(found, True)
            rows.append(
                {
                    "where": name,
                    "keys": ASKED,
                    "p50 us": statistics.median(times),
                    "p99 us": _p99(times),
                    "target us": TARGET_EXISTS_US if name == "daemon" else TARGET_EXISTS_US / 2,
                }
            )
            pool.close()
        daemon.close()
    return rows


def pages(count: int) -> list[_report.Row]:
    """What an engine's leader says, in microseconds per call: for the blocks of one request, and for a single one."""
    rows: list[_report.Row] = []
    keys = Keys()
    with tempfile.TemporaryDirectory() as folder:
        daemon = Daemon(Path(folder), 4096 * ASKED)
        wanted = WantedPages(daemon.path, (IDENTITY,), 4096, 4096 * ASKED, engine_token("benchmark"))
        client = PageClient(wanted)
        client.connect(_soon())
        for blocks in (1, 8, 64):
            times = _talk(client, keys, blocks, 100 * count)
            rows += [
                {"call": call, "blocks": blocks, "p50 us": statistics.median(taken), "p99 us": _p99(taken)}
                for call, taken in times.items()
            ]
        client.close()
        daemon.close()
    return rows


def _talk(client: PageClient, keys: Keys, blocks: int, count: int) -> dict[str, list[float]]:
    """Microseconds of each call; in turns, as a leader makes them."""
    fresh = iter([key for _ in range(-(-blocks * count // BATCH)) for key in keys.fresh()])
    times: dict[str, list[float]] = {"look up": [], "take pages": [], "publish": [], "borrow": [], "give back": []}
    for _ in range(count):
        names = [next(fresh) for _ in range(blocks)]
        taken: list[int] = []
        loans: list[int] = []
        times["take pages"].append(_timed(lambda taken=taken: taken.extend(client.take_pages(blocks, _soon()))))
        new = [NewObject(page, key, 8, at, bytes(16)) for at, (page, key) in enumerate(zip(taken, names, strict=True))]
        times["publish"].append(_timed(lambda new=new: check(client.publish(new, _soon()), PutStatus.STORED)))
        times["look up"].append(_timed(lambda names=names: client.look_up(names, True, _soon())))
        times["borrow"].append(_timed(lambda names=names, loans=loans: loans.append(client.borrow(names, _soon())[0])))
        times["give back"].append(_timed(lambda loans=loans: client.give_back(loans[0], _soon())))
    return times


def _timed(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return (time.perf_counter() - start) * 1e6


def _p99(times: list[float]) -> float:
    return sorted(times)[len(times) * 99 // 100]


def _soon() -> float:
    return time.monotonic() + 30


def main() -> None:
    """All tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="few rounds, no objects of 4 MiB")
    parser.add_argument("--out", type=Path, default=_report.OUT)
    arguments = parser.parse_args()
    count, sizes = (5, SIZES[:3]) if arguments.quick else (15, SIZES)
    threads = LocalPoolConfig(1, 1).copy_threads
    sections = {
        f"Put and get, batches of {BATCH}": [row for nbytes in sizes for row in dram(nbytes, count, threads)],
        f"Put and get, batches of {MANY}": dram(SIZES[0], count, threads, MANY),
        "exists": exists(count),
        "An engine's leader": pages(count),
        **_peers.in_dram(),
    }
    notes = [
        f"Targets: {TARGET} of the copy from 256 KiB on, {TARGETS[64 << 10]} at 64 KiB.",
        f"The copy that the targets are of is that by one thread; put and get copy with {threads}.",
        f"Of the smallest objects, {MANY} have as many bytes as {BATCH} of {SIZES[1] >> 10} KiB.",
        "Medians of interleaved rounds, every other one backwards; ratios are medians of each round's ratio.",
        "Every object is verified (xxh3-128); the copies that it is compared with are not.",
        "Given as rows: neighbours of one array, as SGLang's storage gives the pages of its host pool.",
        "The daemon and the client are two processes on the same processors.",
    ]
    print(_report.write("daemon", "A pool in the daemon", sections, notes, arguments.out))


if __name__ == "__main__":
    main()
