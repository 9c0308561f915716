"""How the master's index goes on to 10 000 nodes and a billion hashes: the numbers of docs/scaling.md.

    python benchmarks/scaling_sim.py                          # a minute; table and JSON
    python benchmarks/scaling_sim.py --page docs/scaling.md   # also puts the tables into the page

A group of nodes is played (chains that share prompts, Zipf popularity, LRU on two tiers); the real index is filled with
the result and its operations are timed; from those, plans of shards are worked out and queries to them simulated.
Everything is seeded; what differs between two runs are the timed costs and what follows from them.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import _report
import scaling_fleet
import scaling_play
from scaling_chains import Group, Workload, play
from scaling_costs import Costs, Line, measure, memory
from scaling_fleet import Fleet, Plan

PLANS = (Plan(1, 1), Plan(1, 64), Plan(1, 256), Plan(16, 4), Plan(16, 16), Plan(64, 1), Plan(64, 4), Plan(256, 1))
QUICK = Workload(nodes=12, hbm_blocks=300, dram_blocks=900, turns=900, prompts=20, documents=10)
_PART = re.compile(r"(<!-- simulated: (?P<name>[\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)

Tables = dict[str, list[_report.Row]]


def simulate(workload: Workload, fleet: Fleet, plans: Sequence[Plan], count: int, queries: int) -> Tables:
    """All tables by name.  ``count`` is how often a cost is timed, ``queries`` how many of a plan are played."""
    group = play(workload)
    costs = measure(group, count)
    loads = {plan: scaling_fleet.load(fleet, plan, group, costs) for plan in plans}
    memories = {plan: memory(group, fleet.nodes // plan.groups, plan.by_hash) for plan in plans}
    fitting = [plan for plan in plans if loads[plan].busy < 0.9]
    rate = 0.5 / costs.report.item
    copies = sum(len(cache.blocks) for tiers in group.caches for cache in tiers.values()) / len(group.holders)
    return {
        "group": [group_row(workload, group)],
        "costs": cost_rows(costs),
        "plans": [scaling_fleet.plan_row(fleet, plan, loads[plan], memories[plan]) for plan in plans],
        "latency": [
            scaling_play.latency_row(fleet, plan, loads[plan], costs, queries, everywhere)
            for plan in fitting
            for everywhere in ((False, True) if plan == fitting[0] else (False,))
        ],
        "holes": [
            scaling_play.hole_row(group, shards, away, missing, count)
            for missing in (0.0, 0.002)
            for shards, away in ((4, 1), (16, 1), (16, 4))
        ],
        "lost": [scaling_fleet.lost_row(fleet, plan, loads[plan], copies, rate) for plan in fitting],
        "rebalance": [scaling_fleet.rebalance_row(shards, fleet, rate) for shards in (4, 16, 64)],
        "watch": [scaling_fleet.watch_row(fleet, plan, loads[plan], group) for plan in plans if plan.by_hash < 64],
    }


def group_row(workload: Workload, group: Group) -> _report.Row:
    """What was played."""
    holders = [mask.bit_count() for mask in group.holders.values()]
    return {
        "nodes": workload.nodes,
        "different hashes": len(holders),
        "nodes that hold a hash": sum(holders) / len(holders),
        "hashes on one node only": f"{holders.count(1) / len(holders):.0%}",
        "on the most": max(holders),
        "blocks a query": round(group.asked / len(group.queries)),
        "blocks computed a query": round(group.computed / len(group.queries)),
        "changes a block computed": group.changes / group.computed,
    }


def cost_rows(costs: Costs) -> list[_report.Row]:
    """The timed costs, microseconds."""
    match = costs.match
    lines = {
        "match_prefix": (Line(match.call, match.block), "block of the query"),
        "match_prefix, besides": (Line(0.0, match.node), "node that has the start of the chain"),
        "report, revoke": (costs.report, "block"),
        "merge at the router": (costs.merge, "shard"),
    }
    rows: list[_report.Row] = [
        {"operation": name, "us a call": line.call * 1e6, "us more": line.item * 1e6, "per": unit}
        for name, (line, unit) in lines.items()
    ]
    return [*rows, {"operation": "slice of a sweep", "us a call": costs.sweep * 1e6, "us more": 0.0, "per": "-"}]


def paged(text: str, tables: Mapping[str, Sequence[_report.Row]]) -> str:
    """``text`` with its simulated parts replaced by ``tables``."""
    return _PART.sub(lambda part: f"{part[1]}{_report.table(tables[part['name']])}\n{part[3]}", text)


def main() -> None:
    """Run everything and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a small group; a few seconds")
    parser.add_argument("--page", type=Path, help="a page whose simulated parts are to be replaced")
    parser.add_argument("--out", type=Path, default=_report.OUT)
    arguments = parser.parse_args()
    workload, count, queries = (QUICK, 40, 400) if arguments.quick else (Workload(), 400, 20_000)
    fleet = Fleet()
    tables = simulate(workload, fleet, PLANS, count, queries)
    notes = [
        f"Assumed, not measured: {', '.join(f'{name} {value:g}' for name, value in asdict(fleet).items())}.",
        f"Played: {', '.join(f'{name} {value:g}' for name, value in asdict(workload).items())}.",
        "All loads are those of one shard; a plan fits when one process is busy for less than 60 % of the time.",
    ]
    title = f"{fleet.nodes} nodes, {fleet.hashes:.0e} hashes: a simulation"
    print(_report.write("scaling", title, tables, notes, arguments.out))
    if arguments.page:
        text = arguments.page.read_text(encoding="utf-8")
        arguments.page.write_text(paged(text, tables), encoding="utf-8")


if __name__ == "__main__":
    main()
