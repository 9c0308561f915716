"""Arithmetic of a fleet: what every shard has to do, what routers read, what moves when shards come or go."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import _report
import numpy as np
import numpy.typing as npt
from scaling_chains import Group
from scaling_costs import BUCKETS, Costs, Memory


@dataclass(frozen=True, slots=True)
class Fleet:
    """What is to be served, and what is assumed rather than measured."""

    nodes: int = 10_000
    hashes: int = 1_000_000_000
    computed_per_second: float = 625.0
    """Blocks that a node computes: 10 000 tokens a second in blocks of 16."""
    flush: float = 0.5
    """Seconds for which a node gathers its reports."""
    heartbeat: float = 5.0
    call: float = 20e-6
    """Seconds of a shard's processor per message: socket, frame, codec."""
    ask: float = 15e-6
    """The same of a router's processor."""
    hash_bytes: int = 20
    """Of a hash on the wire, with its part of the frame."""
    routers_per_group: int = 4


@dataclass(frozen=True, slots=True)
class Plan:
    """So many groups of nodes, each with so many shards by hash."""

    groups: int
    by_hash: int

    @property
    def shards(self) -> int:
        """All of them."""
        return self.groups * self.by_hash

    def __str__(self) -> str:
        """As the tables name it."""
        return f"{self.groups} x {self.by_hash}"


@dataclass(frozen=True, slots=True)
class Load:
    """Of one shard."""

    nodes: int
    hashes: float
    queries: float
    """A second."""
    query_blocks: float
    """Of a query that are this shard's."""
    answer_nodes: float
    """In the answer to a query."""
    reports: float
    """Messages a second."""
    changes: float
    """Blocks reported or revoked, a second."""
    busy: float
    """Processors: above 1, one process cannot do it."""


def touched(shards: int, blocks: float) -> float:
    """How many of ``shards`` have a part in something of ``blocks`` blocks."""
    return shards * (1 - (1 - 1 / shards) ** blocks)


def load(fleet: Fleet, plan: Plan, group: Group, costs: Costs) -> Load:
    """What one shard of ``plan`` does.  Every turn of a node's computing asks once, in its group."""
    nodes = fleet.nodes // plan.groups
    blocks = group.asked / len(group.queries)
    # The prompts that everybody uses are on every node, however many there are.
    answer_nodes = costs.answer_nodes * nodes / len(group.caches)
    turns = nodes * fleet.computed_per_second / (group.computed / len(group.queries))
    parts = touched(plan.by_hash, blocks) / plan.by_hash
    changes = nodes * fleet.computed_per_second * group.changes / group.computed
    bundle = changes / nodes * fleet.flush
    messages = nodes / fleet.flush * touched(plan.by_hash, bundle) / plan.by_hash
    # A bundle names up to four actions: reports and revokes, of two tiers.
    actions = min(4.0, bundle / plan.by_hash)
    busy = (
        turns * parts * (fleet.call + costs.match(blocks / plan.by_hash / parts, answer_nodes))
        + messages * (fleet.call + actions * costs.report.call)
        + changes / plan.by_hash * costs.report.item
        + nodes / fleet.heartbeat * fleet.call
    )
    return Load(
        nodes,
        fleet.hashes / plan.shards,
        turns * parts,
        blocks / plan.by_hash / parts,
        answer_nodes,
        messages,
        changes / plan.by_hash,
        busy,
    )


def plan_row(fleet: Fleet, plan: Plan, shard: Load, memory: Memory) -> _report.Row:
    """One line of the table of plans."""
    return {
        "groups x shards by hash": str(plan),
        "nodes a group": shard.nodes,
        "nodes in an answer": round(shard.answer_nodes),
        "bytes a hash": round(memory.bytes_per_hash),
        "hashes a placement": round(memory.hashes_per_placement),
        "GB a shard": shard.hashes * memory.bytes_per_hash / 1e9,
        "GB in all": round(fleet.hashes * memory.bytes_per_hash / 1e9),
        "queries/s": round(shard.queries),
        "reports/s": round(shard.reports),
        "heartbeats/s": round(shard.nodes / fleet.heartbeat),
        "blocks changed/s": round(shard.changes),
        "busy cores": round(shard.busy, 2),
        "fits": "yes" if shard.busy < 0.6 else "no",
    }


def watch_row(fleet: Fleet, plan: Plan, shard: Load, group: Group) -> _report.Row:
    """What a router reads that follows a group's index, against one that asks."""
    changes = shard.changes * plan.by_hash
    queries = shard.queries / fleet.routers_per_group * plan.by_hash / touched(plan.by_hash, shard.query_blocks)
    turns = queries if plan.by_hash == 1 else shard.queries / fleet.routers_per_group
    blocks = group.asked / len(group.queries)
    return {
        "groups x shards by hash": str(plan),
        "routers a group": fleet.routers_per_group,
        "following: blocks/s a router": round(changes),
        "following: MB/s a router": changes * fleet.hash_bytes / 1e6,
        "following: MB/s sent in all": changes * fleet.hash_bytes * fleet.routers_per_group * plan.groups / 1e6,
        "asking: queries/s a router": round(turns),
        "asking: MB/s a router": turns * blocks * fleet.hash_bytes / 1e6,
        "asking: router cores": turns * plan.by_hash * fleet.ask,
    }


def owners(shards: Sequence[int], buckets: int = BUCKETS) -> list[int]:
    """The shard of every bucket by rendezvous: the one whose hash with the bucket is the greatest."""
    bucket = np.arange(buckets, dtype=np.uint64)
    weights = np.stack([_mixed(bucket << np.uint64(32) | np.uint64(shard)) for shard in shards])
    return [shards[place] for place in weights.argmax(axis=0).tolist()]


def _mixed(numbers: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """splitmix64."""
    numbers = numbers + np.uint64(0x9E3779B97F4A7C15)
    numbers = (numbers ^ numbers >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    numbers = (numbers ^ numbers >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return numbers ^ numbers >> np.uint64(31)


def rebalance_row(shards: int, fleet: Fleet, rate: float, buckets: int = BUCKETS) -> _report.Row:
    """What it takes to add a shard to ``shards``; ``rate`` is how many blocks a second a shard takes in."""
    before, after = owners(range(shards), buckets), owners(range(shards + 1), buckets)
    moved = sum(old != new for old, new in zip(before, after, strict=True)) / buckets
    counts = [after.count(shard) for shard in range(shards + 1)]
    naive = sum(bucket % shards != bucket % (shards + 1) for bucket in range(buckets)) / buckets
    to_new = sum(old != new and new == shards for old, new in zip(before, after, strict=True)) / buckets
    return {
        "shards before": shards,
        "moved": f"{moved:.1%}",
        "to the new one": f"{to_new / moved:.0%}",
        "least possible": f"{1 / (shards + 1):.1%}",
        "moved by modulo": f"{naive:.0%}",
        "fullest over mean": max(counts) / statistics.mean(counts),
        "s to fill the new one": fleet.hashes * moved / rate,
    }


def lost_row(fleet: Fleet, plan: Plan, shard: Load, copies: float, rate: float) -> _report.Row:
    """What it takes to get a shard back that was lost with all it knew: its nodes report everything again."""
    entries = shard.hashes * copies
    return {
        "groups x shards by hash": str(plan),
        "entries lost": f"{entries / 1e6:.3g} M",
        "of all": f"{1 / plan.shards:.2%}",
        "nodes that report again": shard.nodes,
        "of a node's entries": f"{1 / plan.by_hash:.0%}",
        "MB to send a node": entries / shard.nodes * fleet.hash_bytes / 1e6,
        "s until it knows all": entries / rate,
        "queries asked meanwhile": round(shard.queries * entries / rate),
    }
