"""What the index costs, in bytes and in work: bounds that hold on every machine, however busy it is."""

import gc
import sys
import tracemalloc
from collections.abc import Callable
from types import FrameType
from typing import Any

import pytest

from umbp_core import index as index_module
from umbp_core import placements as placements_module
from umbp_core.index import ExternalKvIndex
from umbp_core.tiers import Tier

HBM, DRAM, SSD = Tier.HBM, Tier.DRAM, Tier.SSD
MOST_BYTES = 200
OURS = {index_module.__file__, placements_module.__file__}


def many(count: int, start: int = 0) -> list[bytes]:
    """Hashes of 19 characters."""
    return [b"%019d" % number for number in range(start, start + count)]


def allocated(fill: Callable[[ExternalKvIndex], None]) -> int:
    """Bytes that an index has when ``fill`` is done, its hashes included."""
    gc.collect()
    tracemalloc.start()
    try:
        index = ExternalKvIndex()
        fill(index)
        gc.collect()
        return tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()


def four_nodes(index: ExternalKvIndex, count: int, tiers: tuple[Tier, ...], at_once: int = 500) -> None:
    """A quarter of the hashes on each node, some of them in one report."""
    for start in range(0, count, at_once):
        for tier in tiers:
            index.report(f"n{start // at_once % 4}", many(at_once, start), tier)


@pytest.mark.parametrize("tiers", [(HBM,), (HBM, DRAM)])
def test_a_hash_takes_at_most_200_bytes(tiers: tuple[Tier, ...]) -> None:
    count = 60_000
    assert allocated(lambda index: four_nodes(index, count, tiers)) / count <= MOST_BYTES


def test_hashes_in_the_same_places_share_their_placement_also_if_each_was_reported_alone() -> None:
    """Three tiers of four nodes: their numbers are beyond those that Python has only once anyway."""
    count = 2_000
    together, alone = (
        allocated(lambda index, n=n: four_nodes(index, count, (HBM, DRAM, SSD), n))  # type: ignore[misc]
        for n in (500, 1)
    )
    assert (alone - together) / count <= 4


def lines_of(work: Callable[[], object]) -> int:
    """Lines of the index that ``work`` runs through: work that no other load of the machine changes."""
    count = 0

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal count
        if frame.f_code.co_filename not in OURS:
            return None
        count += event == "line"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        work()
    finally:
        sys.settrace(before)
    return count


def freed(index: ExternalKvIndex) -> None:
    while index.sweep():
        pass


CLEARS: dict[str, Callable[[ExternalKvIndex], object]] = {
    "a tier": lambda index: index.clear_tier("small", HBM),
    "a node": lambda index: index.clear_node("small"),
    "nobody": lambda index: index.clear_node("nobody"),
}


@pytest.mark.parametrize("clear", CLEARS.values(), ids=CLEARS)
def test_a_bulk_revoke_costs_what_its_node_holds_whatever_others_hold(
    clear: Callable[[ExternalKvIndex], object],
) -> None:
    """The original looks at every hash of every node, also when the node is not known."""
    costs = []
    for others in (100, 20_000):
        index = ExternalKvIndex()
        four_nodes(index, others, (HBM, DRAM))
        index.report("small", many(10), HBM)
        calls = lines_of(lambda index=index: clear(index))  # type: ignore[misc]
        costs.append((calls, lines_of(lambda index=index: freed(index))))  # type: ignore[misc]
    assert costs[0] == costs[1]


def test_a_bulk_revoke_itself_costs_nothing_and_its_slices_what_they_are_told() -> None:
    costs = []
    for held in (3000, 30_000):
        index = ExternalKvIndex()
        index.report("n", many(held), HBM)
        calls = lines_of(lambda index=index: index.clear_node("n"))  # type: ignore[misc]
        costs.append((calls, lines_of(lambda index=index: index.sweep(1000))))  # type: ignore[misc]
        assert index.stats().backlog == held - 1000
    assert costs[0] == costs[1]
