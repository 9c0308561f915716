"""What one shard costs, measured on the real index with the content of a played group (see scaling_chains)."""

from __future__ import annotations

import gc
import hashlib
import multiprocessing
import statistics
import time
import tracemalloc
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import NamedTuple

import numpy as np
from scaling_chains import DRAM, HBM, Group, hash_of

from umbp_core.index import ExternalKvIndex, PrefixMatch

BATCH = 2048
BUCKETS = 1 << 16
"""Hashes fall into so many buckets, and buckets belong to shards; see ``bucket_of``."""


class Line(NamedTuple):
    """Seconds of a call: so many for itself and so many per hash."""

    call: float
    item: float

    def __call__(self, items: float) -> float:
        """Seconds of a call with ``items`` hashes."""
        return self.call + self.item * items


class Plane(NamedTuple):
    """Seconds of a ``match_prefix``: for itself, per block of the query, per node in the answer."""

    call: float
    block: float
    node: float

    def __call__(self, blocks: float, nodes: float) -> float:
        """Seconds of a query of ``blocks`` blocks that ``nodes`` nodes have the start of."""
        return self.call + self.block * blocks + self.node * nodes


class Costs(NamedTuple):
    """Processor time of one shard's operations, in seconds."""

    match: Plane
    answer_nodes: float
    """Nodes in an answer, of those of the played group."""
    report: Line
    sweep: float
    """One slice of a sweep."""
    merge: Line
    """At the router: to put the answers of shards together, per shard."""


class Memory(NamedTuple):
    """Of one shard."""

    bytes_per_hash: float
    hashes_per_placement: float
    placement_bytes: float
    """A placement's mask with this many nodes."""


def bucket_of(key: bytes) -> int:
    """Where a hash belongs, whatever the number of shards; the same in every process and language."""
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little") % BUCKETS


def shares(keys: Sequence[bytes], shards: int) -> list[tuple[list[bytes], list[int]]]:
    """The part of a query of every shard that has one, with the positions in the query."""
    parts: dict[int, tuple[list[bytes], list[int]]] = {}
    for position, key in enumerate(keys):
        part = parts.setdefault(bucket_of(key) % shards, ([], []))
        part[0].append(key)
        part[1].append(position)
    return list(parts.values())


def merge(answers: Sequence[tuple[Sequence[int], Sequence[PrefixMatch]]], length: int) -> dict[str, int]:
    """The longest usable prefix per node of a query of ``length`` blocks, from each shard's prefixes of its part.

    An answer is the positions that the shard was asked for, and what it said.  A node's prefix ends at the first block
    that some shard does not know of it, so it is the least of what the shards say; a shard that does not name a node
    says that the node lacks the first block of its part.  Shards that did not answer are left out.
    """
    ends: dict[str, int] | None = None
    for positions, matches in sorted(answers, key=lambda answer: answer[0][0]):
        stops = [*positions, length]
        said = {match.node: stops[match.length] for match in matches}
        before = said if ends is None else ends
        ends = {node: min(end, said.get(node, stops[0])) for node, end in before.items()}
    return ends or {}


def fill(index: ExternalKvIndex, entries: Sequence[tuple[int, int, list[bytes]]]) -> None:
    """Report everything in batches; copies of the hashes, as a socket makes them."""
    for node, tier, keys in entries:
        for start in range(0, len(keys), BATCH):
            index.report(f"node-{node}", [bytes(bytearray(key)) for key in keys[start : start + BATCH]], tier)


def memory(group: Group, nodes: int, shards: int) -> Memory:
    """What a hash costs in a shard of ``shards`` by hash, of a group with ``nodes`` nodes.

    The group that was played is a part of the larger one, and its nodes have the last of the numbers.
    """
    entries = [
        (node, tier, [key for key in keys if shards == 1 or bucket_of(key) % shards == 0])
        for node, tier, keys in group.entries()
    ]
    # A new process: the measurement must not see what this one has allocated and freed.
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as executor:
        return executor.submit(_filled, entries, max(0, nodes - len(group.caches))).result()


def _filled(entries: Sequence[tuple[int, int, list[bytes]]], others: int) -> Memory:
    index = ExternalKvIndex()
    for number in range(others):
        for tier in (HBM, DRAM):
            index.report(f"other-{number}", [b"%d-%d" % (number, tier)], tier)
    gc.collect()
    tracemalloc.start()
    fill(index, entries)
    gc.collect()
    allocated = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    held: dict[bytes, int] = {}
    for number, (_, _, keys) in enumerate(entries):
        for key in keys:
            held[key] = held.get(key, 0) | 1 << number
    placements = len(set(held.values()))
    return Memory(allocated / len(held), len(held) / placements, index.stats().cells / 8)


def measure(group: Group, count: int) -> Costs:
    """Measure all costs with ``count`` calls each."""
    index = ExternalKvIndex()
    fill(index, list(group.entries()))
    chains = [[hash_of(block) for block in chain] for chain in group.queries[:: max(1, len(group.queries) // count)]]
    match, nodes = _matches(index, chains)
    return Costs(match, nodes, _reports(index, count), _sweep(group), _merge(index, chains[: count // 4]))


def _matches(index: ExternalKvIndex, chains: Sequence[Sequence[bytes]]) -> tuple[Plane, float]:
    """What whole queries and parts of them take, and the mean number of nodes in the answer to a whole one."""
    points, nodes = [], []
    for shards in (1, 4, 16):
        for chain in chains:
            query = [bytes(bytearray(key)) for key in shares(chain, shards)[0][0]]
            # The better of two, so that what else the machine did is not taken for the work.
            seconds = min(_timed(index.match_prefix, query) for _ in range(2))
            answer = len(index.match_prefix(query))
            points.append((1.0, len(query), answer, seconds))
            if shards == 1:
                nodes.append(answer)
    table = np.array(points)
    weights = 1 / table[:, 3]
    found = np.linalg.lstsq(table[:, :3] * weights[:, None], np.ones(len(table)), rcond=None)[0]
    return Plane(*(max(0.0, float(figure)) for figure in found)), statistics.mean(nodes)


def _reports(index: ExternalKvIndex, count: int) -> Line:
    """A node reports blocks and revokes them again; the mean of the two."""
    points = {}
    for size in (4, 64, 512):
        times = []
        for turn in range(count // 4 + 1):
            # Every other block is new to the index, the rest lies elsewhere too.
            keys = [hash_of(10**9 * (1 + number % 2) + turn * size + number) for number in range(size)]
            index.report("elsewhere", keys[::2], HBM)
            times.append((_timed(index.report, "node-1", keys, DRAM) + _timed(index.revoke, "node-1", keys, DRAM)) / 2)
            index.revoke("elsewhere", keys[::2], HBM)
        points[size] = (float(size), statistics.median(times))
    return _line(points)


def _sweep(group: Group) -> float:
    """Median time of a slice after a node was lost."""
    index = ExternalKvIndex()
    fill(index, [entry for entry in group.entries() if entry[0] < 4])
    index.clear_node("node-1")
    slices = []
    while index.stats().backlog:
        slices.append(_timed(index.sweep))
    return statistics.median(slices)


def _merge(index: ExternalKvIndex, chains: Sequence[Sequence[bytes]]) -> Line:
    points = {}
    for shards in (1, 4, 16):
        times, parts = [], []
        for chain in chains:
            answers = [(positions, index.match_prefix(keys)) for keys, positions in shares(chain, shards)]
            times.append(_timed(merge, answers, len(chain)))
            parts.append(len(answers))
        points[shards] = (statistics.mean(parts), statistics.median(times))
    return _line(points)


def _timed(work: Callable[..., object], *arguments: object) -> float:
    start = time.perf_counter()
    work(*arguments)
    return time.perf_counter() - start


def _line(points: Mapping[int, tuple[float, float]]) -> Line:
    """Through the smallest and the largest of ``points`` (items, seconds); never below zero."""
    (few, short), (many, long) = min(points.values()), max(points.values())
    item = max(0.0, (long - short) / (many - few)) if many > few else 0.0
    return Line(max(0.0, short - item * few), item)
