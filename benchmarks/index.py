"""The external KV index in one process, without a socket: match, prefix, report, memory, stalls.

    python benchmarks/index.py                 # a minute or two
    python benchmarks/index.py --quick         # fewer rounds and a tenth of the hashes

Hashes have 19 characters.  Every query is made of bytes that were never hashed before, as they come from a socket.
The figures of the original, a C++ master behind gRPC on loopback, are those of a machine of the same size; they contain
the call, ours do not.
"""

from __future__ import annotations

import argparse
import functools
import multiprocessing
import random
import resource
import statistics
import time
import tracemalloc
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import _report

from umbp_core.index import SLICE, ExternalKvIndex

NODES = 8
HBM, DRAM = 1, 2
ORIGINAL_MATCH_US = {1: (46, 47, 42), 128: (111, 122, 66), 2048: (1342, 1550, 527)}
ORIGINAL_REPORT = {1: 0.0167, 16: 0.176, 128: 0.511, 2048: 0.709, 16384: 0.726}
"""Million blocks per second of one C++ client."""
BATCH = 2048

Query = Callable[[], list[bytes]]


def hashes(count: int, start: int = 0) -> list[bytes]:
    """Hashes as a router writes them: decimal, 19 digits, scattered."""
    return [b"%019d" % ((start + number) * 6364136223846793005 % 10**19) for number in range(count)]


def fresh(keys: Sequence[bytes]) -> list[bytes]:
    """The same bytes as objects that were never hashed."""
    return [bytes(bytearray(key)) for key in keys]


def fill(index: ExternalKvIndex, node: str, keys: Sequence[bytes], tier: int) -> None:
    """Report in batches, as a node does."""
    for start in range(0, len(keys), BATCH):
        index.report(node, fresh(keys[start : start + BATCH]), tier)


def microseconds(work: Callable[[list[bytes]], object], query: Query, count: int) -> float:
    """The median time of ``work`` on a new query each time."""
    times = []
    for _ in range(count):
        keys = query()
        start = time.perf_counter()
        work(keys)
        times.append((time.perf_counter() - start) * 1e6)
    return statistics.median(times)


def match(total: int, count: int) -> list[_report.Row]:
    """Match of 1, 128 and 2048 hashes, of which one node holds all."""
    index = ExternalKvIndex()
    share = total // NODES
    held = [hashes(share, node * share) for node in range(NODES)]
    for node, keys in enumerate(held):
        fill(index, f"node-{node}", keys, HBM)
    choice = random.Random(1)
    rows = []
    for length, original in ORIGINAL_MATCH_US.items():

        def query(length: int = length) -> list[bytes]:
            keys = held[choice.randrange(NODES)]
            start = choice.randrange(max(1, len(keys) - length))
            return fresh(keys[start : start + length])

        def missing(length: int = length) -> list[bytes]:
            return [b"-%018d" % choice.randrange(10**17) for _ in range(length)]

        rows.append(
            {
                "hashes": length,
                "hit us": microseconds(index.match, query, count),
                "hit and count us": microseconds(lambda keys: index.match(keys, True, 1.0), query, count),
                "miss us": microseconds(index.match, missing, count),
                "the original's": " / ".join(map(str, original)),
            }
        )
    return rows


def spread(count: int) -> list[_report.Row]:
    """2048 hashes that 8 nodes hold on 2 tiers, in three shapes."""
    keys = hashes(BATCH)
    choice = random.Random(2)
    shapes = {
        "all of them everywhere": lambda: keys,
        "prefixes of different lengths": lambda: keys[: choice.randrange(BATCH // 2, BATCH)],
        "nine of ten, at random": lambda: choice.sample(keys, BATCH * 9 // 10),
    }
    rows = []
    for name, shape in shapes.items():
        index = ExternalKvIndex()
        for node in range(NODES):
            for tier in (HBM, DRAM):
                index.report(f"node-{node}", shape(), tier)
        rows.append(
            {
                "held": name,
                "us": microseconds(index.match, lambda: fresh(keys), count),
                "the original's": "9500 - 15200",
                "target us": 1000,
            }
        )
    return rows


def prefix(count: int) -> list[_report.Row]:
    """``match_prefix`` of 2048 hashes on 64 nodes."""
    keys = hashes(BATCH)
    choice = random.Random(3)

    def query() -> list[bytes]:
        return fresh(keys)

    shapes = {
        "every node a prefix of its own length": lambda: (keys[: choice.randrange(1, BATCH)],) * 2,
        "the same, the first half in HBM too": lambda: (keys[: choice.randrange(1, BATCH)], keys[: BATCH // 2]),
        "all of them everywhere": lambda: (keys, keys),
        "nine of ten, at random": lambda: (choice.sample(keys, BATCH * 9 // 10),) * 2,
    }
    rows = []
    for name, shape in shapes.items():
        index = ExternalKvIndex()
        for node in range(64):
            dram, hbm = shape()
            index.report(f"node-{node}", dram, DRAM)
            index.report(f"node-{node}", hbm, HBM)
        weighted = functools.partial(index.match_prefix, weights={HBM: 0.0, DRAM: 1.0})
        rows.append(
            {
                "held": name,
                "us": microseconds(index.match_prefix, query, count),
                "with weights us": microseconds(weighted, query, count),
            }
        )
    return rows


def report(total: int) -> list[_report.Row]:
    """Million blocks per second, per size of a report; the index grows from nothing to ``total`` hashes."""
    rows = []
    for size, original in ORIGINAL_REPORT.items():
        blocks = total if size >= BATCH else total // 5
        keys = hashes(blocks)
        index = ExternalKvIndex()
        rows.append(
            {
                "blocks a call": size,
                "new": _million_per_second(index.report, "a", HBM, keys, size),
                "second tier": _million_per_second(index.report, "a", DRAM, keys, size),
                "second node": _million_per_second(index.report, "b", HBM, keys, size),
                "known": _million_per_second(index.report, "b", HBM, keys, size),
                "revoke": _million_per_second(index.revoke, "b", HBM, keys, size),
                "the original's": original,
            }
        )
    return rows


def _million_per_second(
    change: Callable[[str, list[bytes], int], object], node: str, tier: int, keys: Sequence[bytes], size: int
) -> float:
    batches = [fresh(keys[start : start + size]) for start in range(0, len(keys), size)]
    start = time.perf_counter()
    for batch in batches:
        change(node, batch, tier)
    return len(keys) / (time.perf_counter() - start) / 1e6


def memory(total: int) -> list[_report.Row]:
    """Bytes per hash on four nodes, the hashes themselves included."""
    nodes = [f"node-{number}" for number in range(4)]
    share = total // 4
    rows = []
    for name, holders, tiers in (
        ("each on one node, one tier", 1, (HBM,)),
        ("each on one node, two tiers", 1, (HBM, DRAM)),
        ("each on all four nodes, one tier", 4, (HBM,)),
    ):
        # A new process each time: in an old one there is memory to be used again.
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as executor:
            traced = executor.submit(_filled, nodes, share, holders, tiers, traced=True).result()
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as executor:
            resident = executor.submit(_filled, nodes, share, holders, tiers, traced=False).result()
        rows.append(
            {
                "held": name,
                "allocated a hash": traced / (4 * share),
                "resident a hash": resident / (4 * share),
                "the original's": "404, and 47 per further tier",
                "target": 200,
            }
        )
    return rows


def _filled(nodes: Sequence[str], share: int, holders: int, tiers: Sequence[int], traced: bool) -> int:
    """Bytes that an index costs; hashes are made as they are reported, so that nothing else holds them."""
    if traced:
        tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0] if traced else _resident()
    index = ExternalKvIndex()
    for number in range(len(nodes)):
        for holder in range(holders):
            node = nodes[(number + holder) % len(nodes)]
            for tier in tiers:
                for start in range(0, share, BATCH):
                    count = min(BATCH, share - start)
                    index.report(node, hashes(count, number * share + start), tier)
    after = tracemalloc.get_traced_memory()[0] if traced else _resident()
    tracemalloc.stop()
    return after - before


def _resident() -> int:
    """Bytes of this process that are in memory now (Linux)."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def stalls(total: int) -> list[_report.Row]:
    """How long the owner of the lock is away while a quarter of everything is cleared, and what a match costs then."""
    keys = hashes(total)
    rows = []
    for name, clear in (
        ("one tier of a node", lambda index: index.clear_tier("node-1", HBM)),
        ("a whole node", lambda index: index.clear_node("node-1")),
        ("a node that does not exist", lambda index: index.clear_node("ghost")),
    ):
        index = ExternalKvIndex()
        for node in range(4):
            fill(index, f"node-{node}", keys[node * total // 4 : (node + 1) * total // 4], HBM)
        slices, worked, matches = [], [], []
        start = time.perf_counter()
        cleared = clear(index)
        at_once = (time.perf_counter() - start) * 1e3
        left = 1
        while left:
            start, begun = time.perf_counter(), time.process_time()
            left = index.sweep()
            worked.append((time.process_time() - begun) * 1e3)
            slices.append((time.perf_counter() - start) * 1e3)
            matches.append(microseconds(index.match, lambda: fresh(keys[total // 4 : total // 4 + 128]), 1))
        rows.append(
            {
                "cleared": name,
                "entries": cleared,
                "call ms": at_once,
                "slices": len(slices),
                "median slice ms": statistics.median(slices),
                "longest slice ms": max(slices),
                "longest slice, CPU ms": max(worked),
                "all ms": sum(slices),
                "match of 128 between slices us": statistics.median(matches),
                "the original's stall ms": "410 - 1289",
            }
        )
    return rows


def main() -> None:
    """Run everything and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="fewer rounds, a tenth of the hashes")
    parser.add_argument("--out", type=Path, default=_report.OUT)
    arguments = parser.parse_args()
    total, count = (100_000, 20) if arguments.quick else (1_000_000, 200)
    sections = {
        "Memory, bytes": memory(total),
        "Match, one node holds all": match(total // 5, count),
        "Match of 2048 hashes, 8 nodes, 2 tiers": spread(count // 2),
        "Longest prefix of 2048 hashes, 64 nodes, 2 tiers": prefix(count // 2),
        "Report and revoke, million blocks per second": report(total // 2),
        "Clearing a quarter of the index": stalls(total),
    }
    notes = [
        f"Medians. {total} hashes of 19 characters in memory and stalls, {total // 5} in match.",
        "In process: a call through a socket costs more; the original's figures are C++ client and master on loopback.",
        "Resident memory is what the process grew by, with what the allocator keeps after the tables were enlarged.",
        f"A slice is one call of sweep, {SLICE} entries.  CPU time leaves out what others on the machine took.",
    ]
    print(_report.write("index", "The external KV index", sections, notes, arguments.out))


if __name__ == "__main__":
    main()
