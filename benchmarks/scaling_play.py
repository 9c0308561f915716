"""What cannot be written down as a formula: the latency of a query to many shards, and answers with a hole."""

from __future__ import annotations

import heapq
import itertools
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import _report
from scaling_chains import Group, hash_of
from scaling_costs import Costs, bucket_of
from scaling_fleet import Fleet, Load, Plan

DEADLINE = 0.005
"""Seconds after which a router goes on without the shards that have not answered."""


@dataclass(frozen=True, slots=True)
class Trip:
    """Of a message between router and shard and back: the median, and the spread of a lognormal distribution."""

    median: float = 100e-6
    sigma: float = 0.5


def latencies(
    fleet: Fleet, shard: Load, costs: Costs, *, queries: int, asked: int, lost_node: bool, seed: int = 1
) -> list[float]:
    """Seconds that each query takes until the last of the ``asked`` shards has answered; in order of size.

    Every shard is one server that takes work in order of arrival: parts of queries, reports, and with ``lost_node``
    slices of sweeps, two milliseconds apart, as after the loss of a node.
    """
    choice, trip = random.Random(seed), Trip()
    clock = 0.0
    arrivals: list[float] = []
    for _ in range(queries):
        clock += choice.expovariate(shard.queries)
        arrivals.append(clock)
    slowest = [0.0] * queries
    for _ in range(asked):
        reach = [arrival + trip.median * choice.lognormvariate(0, trip.sigma) / 2 for arrival in arrivals]
        service = fleet.call + costs.match(shard.query_blocks, shard.answer_nodes)
        parts = heapq.merge(
            sorted((time, service, query) for query, time in enumerate(reach)),
            _reports(fleet, shard, costs, clock, choice),
            _sweeps(costs, clock, choice) if lost_node else (),
        )
        free = 0.0
        for time, work, query in parts:
            free = max(free, time) + work
            if query >= 0:
                done = free + trip.median * choice.lognormvariate(0, trip.sigma) / 2
                slowest[query] = max(slowest[query], done - arrivals[query])
    router = asked * (fleet.ask + costs.merge.item) + costs.merge.call
    return sorted(time + router for time in slowest)


def _reports(
    fleet: Fleet, shard: Load, costs: Costs, until: float, choice: random.Random
) -> Iterator[tuple[float, float, int]]:
    blocks = shard.changes / shard.reports
    work = fleet.call + min(4.0, blocks) * costs.report.call + blocks * costs.report.item
    time = choice.expovariate(shard.reports)
    while time < until:
        yield time, work, -1
        time += choice.expovariate(shard.reports)


def _sweeps(costs: Costs, until: float, choice: random.Random) -> Iterator[tuple[float, float, int]]:
    for number in itertools.count():
        time = (number + choice.random()) * 0.002
        if time > until:
            return
        yield time, costs.sweep, -1


def latency_row(fleet: Fleet, plan: Plan, shard: Load, costs: Costs, queries: int, everywhere: bool) -> _report.Row:
    """One line of the table of latencies; milliseconds.  ``everywhere``: all groups are asked, not the router's own."""
    asked = plan.shards if everywhere else plan.by_hash
    calm = latencies(fleet, shard, costs, queries=queries, asked=asked, lost_node=False)
    lost = latencies(fleet, shard, costs, queries=queries, asked=asked, lost_node=True)

    def at(times: Sequence[float], share: float) -> float:
        return times[min(len(times) - 1, int(len(times) * share))] * 1e3

    return {
        "groups x shards by hash": str(plan),
        "shards asked": asked,
        "p50 ms": at(calm, 0.5),
        "p99 ms": at(calm, 0.99),
        "p99.9 ms": at(calm, 0.999),
        "a node was lost: p99 ms": at(lost, 0.99),
        f"later than {DEADLINE * 1e3:.0f} ms": f"{sum(time > DEADLINE for time in lost) / len(lost):.2%}",
    }


def hole_row(group: Group, shards: int, away: int, missing: float, sample: int) -> _report.Row:
    """What a router makes of the answers when ``away`` of ``shards`` by hash do not answer.

    It can let a node's prefix end at the first block that nobody answered for, or leave those blocks out of account:
    the prefix goes on as far as the shards that answered know the node, and the chosen node may hold a little less.
    Nodes that evict the ends of chains first have no gaps; ``missing`` is how many blocks they lack all the same.
    """
    choice = random.Random(1)
    ended = bridged = best_total = claimed = worse = asked = 0
    for query in group.queries[:: max(1, len(group.queries) // sample)]:
        masks = [_thinned(group.holders.get(block, 0), missing, choice) for block in query]
        known = [bucket_of(hash_of(block)) % shards >= away for block in query]
        best, _ = _longest(masks)
        if not best:
            continue
        asked += 1
        best_total += best
        ended += min(best, known.index(False) if False in known else len(known))
        claim, nodes = _longest([mask if sure else -1 for mask, sure in zip(masks, known, strict=True)])
        while claim and not known[claim - 1]:
            claim -= 1
        chosen = nodes & -nodes if claim else 0
        held = next((position for position, mask in enumerate(masks) if not mask & chosen), len(masks))
        bridged += held
        claimed += max(0, claim - held)
        worse += held < best
    return {
        "shards by hash": shards,
        "away": away,
        "blocks that nodes lack": f"{missing:.1%}",
        "prefix kept, ending at the hole": f"{ended / best_total:.0%}",
        "prefix kept, leaving the hole out": f"{bridged / best_total:.1%}",
        "claimed too much": f"{claimed / best_total:.1%}",
        "queries that went to a worse node": f"{worse / asked:.1%}",
    }


def _thinned(nodes: int, missing: float, choice: random.Random) -> int:
    """``nodes`` without some of them."""
    left = nodes
    while nodes and missing:
        bit = nodes & -nodes
        nodes ^= bit
        if choice.random() < missing:
            left ^= bit
    return left


def _longest(masks: Sequence[int]) -> tuple[int, int]:
    """The longest prefix that any node holds, and a mask of the nodes that do.  A mask of -1 rules nobody out."""
    nodes = -1
    for position, mask in enumerate(masks):
        if not nodes & mask:
            return position, nodes
        nodes &= mask
    return len(masks), nodes
