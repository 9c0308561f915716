"""Tiers with watermarks: when they are emptied, how far, and what stays (laws L2 and L8)."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from umbp_core.directory import Directory, EventKind, TierSpace
from umbp_core.errors import ConfigError
from umbp_core.eviction import POLICIES
from umbp_core.grouping import block_of_text
from umbp_core.pages import PageAllocator
from umbp_core.tiers import Tier
from umbp_core.watermarks import Trimmer, Watermarks

PAGE = 100
HASH = b"0123456789abcdef" * 4


def node(dram: int, ssd: int, policy: str = "lru") -> Directory:
    return Directory(
        [
            TierSpace(tier, PageAllocator(PAGE, [PAGE * pages]), POLICIES[policy](), block_of=block_of_text)
            for tier, pages in ((Tier.DRAM, dram), (Tier.SSD, ssd))
        ]
    )


def key(number: int) -> bytes:
    return b"%03d" % number


def put(there: Directory, *keys: bytes, tier: Tier = Tier.DRAM) -> None:
    for each in keys:
        assert there.reserve("writer", each, tier, PAGE) is not None
        there.commit("writer", each, tier, b"sum")


def used(there: Directory, tier: Tier = Tier.DRAM) -> int:
    stats = there.stats(tier)
    return stats.total_pages - stats.free_pages


@pytest.mark.parametrize(("high", "low"), [(0.7, 0.9), (1.1, 0.5), (0.5, 0.0), (-0.1, -0.2), (float("nan"), 0.5)])
def test_fractions_that_do_not_go_together_are_refused(high: float, low: float) -> None:
    with pytest.raises(ConfigError, match="do not go together"):
        Watermarks(high, low)


def test_a_tier_is_emptied_from_above_high_down_to_low_and_not_before() -> None:
    level = Watermarks(0.9, 0.7).level(10)
    assert [level.excess(pages) for pages in (8, 9, 10, 9, 8, 7, 8, 9)] == [0, 0, 3, 2, 1, 0, 0, 0]
    assert Watermarks(0.29, 0.29).level(100).excess(29) == 0
    assert Watermarks(1.0, 0.5).level(10).excess(10) == 0


@pytest.mark.parametrize("policy", POLICIES)
def test_the_oldest_go_and_the_journal_says_so(policy: str) -> None:
    there = node(10, 1, policy)
    trimmer = Trimmer(there, {Tier.DRAM: Watermarks(0.8, 0.5)})
    put(there, *map(key, range(8)))
    assert not trimmer.is_due
    assert trimmer.step(4) == 0
    put(there, key(8))
    there.drain_events()
    assert [trimmer.step(3), trimmer.step(3), trimmer.step(3)] == [3, 1, 0]
    assert [(event.kind, event.key) for event in there.drain_events()] == [
        (EventKind.REMOVED, key(number)) for number in range(4)
    ]
    assert trimmer.trimmed == {Tier.DRAM: 4}


def test_each_tier_has_its_own() -> None:
    there = node(10, 10)
    trimmer = Trimmer(there, {Tier.SSD: Watermarks(0.5, 0.2)}, waiting=[key(0)])
    put(there, *map(key, range(10)))
    put(there, *map(key, range(6)), tier=Tier.SSD)
    while trimmer.step(2):
        pass
    assert (used(there), used(there, Tier.SSD)) == (10, 2)
    assert there.keys(Tier.SSD) == [key(4), key(5)]


def test_what_is_held_or_waits_stays_with_all_parts_of_its_block() -> None:
    there = node(12, 1)
    block = [HASH[:60] + b"%04d" % number for number in range(3)]
    parts = [each + suffix for each in block for suffix in (b"_k", b"_v")]
    waiting = {parts[2]}
    trimmer = Trimmer(there, {Tier.DRAM: Watermarks(0.5, 0.1)}, waiting)
    put(there, *parts, key(0), key(1))
    there.reserve("writer", b"pending", Tier.DRAM, PAGE)
    there.pin("reader", [parts[1]])
    there.lease("lender", [key(0)], 10.0)
    while trimmer.step(4):
        pass
    assert there.contains_many([*parts, key(0), key(1)]) == [True] * 4 + [False] * 2 + [True, False]
    assert trimmer.is_due
    waiting.clear()
    there.unpin("reader")
    there.release("lender")
    while trimmer.step(4):
        pass
    assert (there.keys(Tier.DRAM), trimmer.is_due) == ([], False)


def test_many_that_are_held_do_not_hide_the_others_for_long() -> None:
    there = node(100, 1)
    trimmer = Trimmer(there, {Tier.DRAM: Watermarks(0.5, 0.5)})
    put(there, *map(key, range(100)))
    there.pin("reader", map(key, range(40)))
    gone = [trimmer.step(1) for _ in range(53)]
    assert (gone[0], gone[1], sum(gone), used(there)) == (0, 0, 50, 50)


@settings(max_examples=60, deadline=None)
@given(
    marks=st.tuples(st.integers(1, 10), st.integers(1, 10)).map(sorted),
    events=st.lists(st.tuples(st.sampled_from(["put", "pin", "unpin", "step"]), st.integers(0, 19)), max_size=60),
)
def test_it_does_what_a_list_would(marks: list[int], events: list[tuple[str, int]]) -> None:
    """Beside a list in the order of use: the first that nobody holds go, as many as the marks say."""
    there = node(10, 1)
    low, high = marks
    trimmer = Trimmer(there, {Tier.DRAM: Watermarks(high / 10, low / 10)})
    order: list[bytes] = []
    pinned: set[bytes] = set()
    emptying = False
    for event, number in events:
        name = key(number)
        if event == "put" and len(order) < 10 and name not in order:
            put(there, name)
            order.append(name)
        elif event == "pin" and name in order:
            there.pin("reader", [name])
            pinned.add(name)
        elif event == "unpin":
            there.unpin("reader")
            pinned.clear()
        elif event == "step":
            emptying = len(order) > (low if emptying else high)
            free = [each for each in order if each not in pinned]
            going = free[: len(order) - low] if emptying else []
            seen = order if len(going) < len(order) - low else order[: order.index(going[-1]) + 1] if going else []
            passed = [each for each in seen if each in pinned] if emptying else []
            assert trimmer.step(10) == len(going)
            order = [each for each in order if each not in going and each not in passed] + passed
        assert set(there.keys(Tier.DRAM)) == set(order)
        emptying = len(order) > (low if emptying else high)
        assert trimmer.is_due is emptying
