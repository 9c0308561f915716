"""Matches by position, and pages, of the external index."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from umbp_core.index import ExternalKvIndex, PositionMatch

A, B, C = b"a", b"b", b"c"
NODES = ("n1", "n2", "n3")
TIERS = (1, 2, 3, 0, 7)


def positions(match: PositionMatch, tier: int, count: int) -> list[int]:
    """Those whose bit is set; every other bit of the bitmap has to be zero."""
    bitmap = match.tiers[tier]
    assert len(bitmap) == (count + 7) // 8
    number = int.from_bytes(bitmap, "little")
    assert number < 1 << count
    return [position for position in range(count) if number >> position & 1]


def check(index: ExternalKvIndex, query: Sequence[bytes]) -> None:
    """Both kinds of match say the same."""
    expected = {match.node: match for match in index.match(query)}
    found = index.match_positions(query)
    assert sorted(match.node for match in found) == sorted(expected)
    for match in found:
        other = expected[match.node]
        assert list(match.tiers) == list(other.tiers)
        for tier, hashes in other.tiers.items():
            assert [query[position] for position in positions(match, tier, len(query))] == hashes
        held = {position for tier in match.tiers for position in positions(match, tier, len(query))}
        assert match.matched() == other.matched == len(held)


def test_a_bitmap_names_positions_from_the_lowest_bit() -> None:
    index = ExternalKvIndex()
    index.report("n1", [A, C], 1)
    index.report("n1", [B], 2)
    query = [A, B, A, b"x", b"x", b"x", b"x", b"x", C]
    (match,) = index.match_positions(query)
    assert match == PositionMatch("n1", {1: bytes([0b101, 1]), 2: bytes([0b10, 0])})
    assert match.matched() == 4


@pytest.mark.parametrize("count", [1, 7, 8, 9, 128])
def test_a_query_that_one_node_holds_as_a_whole(count: int) -> None:
    index = ExternalKvIndex()
    keys = [b"%d" % number for number in range(count)]
    index.report("n1", keys, 1)
    index.report("n2", keys, 2)
    found = {
        match.node: positions(match, tier, count)
        for match, tier in zip(index.match_positions(keys), (1, 2), strict=True)
    }
    assert found == {"n1": list(range(count)), "n2": list(range(count))}


def test_what_nobody_holds_is_not_answered() -> None:
    index = ExternalKvIndex()
    index.report("n1", [A], 1)
    assert index.match_positions([]) == []
    assert index.match_positions([B]) == index.match_positions([B, C]) == []
    index.clear_node("n1")
    assert index.match_positions([A]) == index.match_positions([A, B]) == []


def test_hits_count_as_in_a_match() -> None:
    index = ExternalKvIndex()
    index.report("n1", [A], 1)
    index.report("n2", [A], 1)
    index.match_positions([A, A, B], True, 1.0)
    index.match_positions([], True, 1.0)
    index.count_hits([A, B], index.places_of([A, B]), 2.0)
    assert index.hits.counts([A, B]) == {A: 2}


@pytest.mark.parametrize("placements", [3, 200, 600])
def test_few_and_very_many_placements(placements: int) -> None:
    rng = random.Random(placements)
    index = ExternalKvIndex()
    keys = [b"%d" % number for number in range(placements)]
    for node in range(12):
        index.report(f"n{node}", rng.sample(keys, placements // 2), rng.choice(TIERS))
    index.report("cleared", keys, 1)
    index.clear_node("cleared")
    check(index, keys)


reports = st.lists(st.tuples(st.sampled_from(NODES), st.sampled_from(TIERS), st.sets(st.integers(0, 30))))


@given(told=reports, cleared=st.none() | st.sampled_from(NODES), query=st.lists(st.integers(0, 35), max_size=70))
def test_both_matches_say_the_same(
    told: list[tuple[str, int, set[int]]], cleared: str | None, query: list[int]
) -> None:
    index = ExternalKvIndex()
    for node, tier, keys in told:
        index.report(node, [b"%d" % key for key in keys], tier)
    if cleared is not None:
        index.clear_node(cleared)
    check(index, [b"%d" % key for key in query])


# Pages.


@given(
    count=st.integers(0, 60),
    limit=st.integers(1, 20),
    between=st.lists(st.tuples(st.booleans(), st.sets(st.integers(0, 90))), max_size=12),
)
def test_what_stays_is_listed_whatever_changes_between_two_pages(
    count: int, limit: int, between: list[tuple[bool, set[int]]]
) -> None:
    index = ExternalKvIndex()
    index.report("n", [b"%d" % key for key in range(count)], 1)
    staying, ever = set(range(count)), set(range(count))
    listed: set[int] = set()
    cursor, changes = 0, iter(between)
    while True:
        keys, cursor = index.page("n", 1, cursor, limit)
        assert len(keys) <= limit
        listed |= set(map(int, keys))
        if not cursor:
            break
        adds, changed = next(changes, (True, set()))
        if adds:
            index.report("n", [b"%d" % key for key in changed], 1)
            ever |= changed
        else:
            index.revoke("n", [b"%d" % key for key in changed], 1)
            staying -= changed
    assert staying <= listed <= ever


def test_a_tier_that_is_not_there_has_no_pages() -> None:
    index = ExternalKvIndex()
    assert index.page("n", 1) == ([], 0)
    index.report("n", [A], 1)
    assert index.page("n", 1, cursor=99) == ([A], 0)
    assert index.page("n", 2) == ([], 0)


def test_a_tiers_life_changes_when_it_is_cleared_or_empty() -> None:
    index = ExternalKvIndex()
    assert index.life("n", 1) == 0
    index.report("n", [A], 1)
    first = index.life("n", 1)
    index.report("n", [B], 1)
    assert index.life("n", 1) == first != 0
    index.clear_tier("n", 1)
    assert index.life("n", 1) == 0
    index.report("n", [A], 1)
    second = index.life("n", 1)
    index.revoke("n", [A], 1)
    index.report("n", [A], 1)
    assert len({first, second, index.life("n", 1), 0}) == 4
