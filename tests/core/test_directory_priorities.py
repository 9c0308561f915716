"""What a directory evicts first when objects have priorities, in every tier that they come to."""

from __future__ import annotations

import pytest

from umbp_core.directory import Directory, TierSpace
from umbp_core.eviction import EvictionPolicy, LruPolicy, PriorityLruPolicy
from umbp_core.pages import PageAllocator
from umbp_core.tiers import Tier


def directory(dram: EvictionPolicy | None = None, ssd: EvictionPolicy | None = None) -> Directory:
    """Two pages of each tier."""
    return Directory(
        [
            TierSpace(Tier.DRAM, PageAllocator(1, [2]), dram or PriorityLruPolicy()),
            TierSpace(Tier.SSD, PageAllocator(1, [2]), ssd or PriorityLruPolicy()),
        ]
    )


def put(node: Directory, tier: Tier, *keys: bytes) -> None:
    for key in keys:
        assert node.reserve("put", key, tier, 1) is not None
        node.commit_many("put", {key: b""}, tier)


@pytest.mark.statement("connector", 76)
def test_the_lowest_priority_is_evicted_first_though_it_was_used_last() -> None:
    node = directory()
    put(node, Tier.DRAM, b"high", b"low")
    node.prioritise({b"high": 80, b"low": 10, b"gone": 5}, Tier.DRAM)
    node.touch([b"low"])
    put(node, Tier.DRAM, b"new")
    assert sorted(node.keys(Tier.DRAM)) == [b"high", b"new"]
    node.pin("op", [b"new"])
    put(node, Tier.DRAM, b"other")
    assert sorted(node.keys(Tier.DRAM)) == [b"new", b"other"], "a pinned object stays, whatever its priority"


@pytest.mark.statement("connector", 76)
@pytest.mark.parametrize(("first", "then"), [(Tier.DRAM, Tier.SSD), (Tier.SSD, Tier.DRAM)])
@pytest.mark.parametrize("together", [True, False])
def test_a_copy_in_another_tier_has_the_same_priority(first: Tier, then: Tier, together: bool) -> None:
    node = directory()
    put(node, first, b"high", b"low")
    node.prioritise({b"high": 80, b"low": 10}, first)
    for key in (b"low", b"high"):
        assert node.reserve("copy", key, then, 1) is not None
    if together:
        node.commit_many("copy", {b"high": b"", b"low": b""}, then)
    else:
        node.commit("copy", b"high", then, b"")
        node.commit("copy", b"low", then, b"")
    put(node, then, b"new")
    assert sorted(node.keys(then)) == [b"high", b"new"]


def test_tiers_whose_policy_knows_no_priority_ignore_them() -> None:
    node = directory(LruPolicy(), LruPolicy())
    assert not node.knows_priorities
    put(node, Tier.DRAM, b"low", b"high")
    node.prioritise({b"high": 80, b"low": 10}, Tier.DRAM)
    node.touch([b"low"])
    put(node, Tier.DRAM, b"new")
    assert sorted(node.keys(Tier.DRAM)) == [b"low", b"new"]
    mixed = directory(LruPolicy())
    assert mixed.knows_priorities
    put(mixed, Tier.DRAM, b"a")
    put(mixed, Tier.SSD, b"a")
    assert sorted(mixed.keys(Tier.SSD)) == [b"a"]
