"""The external KV index: what the original's checklist asks, case by case, and what goes beyond it."""

from __future__ import annotations

import threading
import tracemalloc
from collections.abc import Iterator
from typing import Any

import pytest

from umbp_core.index import ExternalKvIndex, TierRun
from umbp_core.index_feed import ChangeFeed
from umbp_core.placements import IndexStats
from umbp_core.tiers import Tier

HBM, DRAM, SSD, UNKNOWN = Tier.HBM, Tier.DRAM, Tier.SSD, Tier.UNKNOWN
A, B, C, Z = b"a", b"b", b"c", b"zz"

Answer = dict[str, dict[int, list[bytes]]]


def answer(index: ExternalKvIndex, hashes: list[bytes]) -> Answer:
    return {match.node: match.tiers for match in index.match(hashes)}


def sweep_all(index: ExternalKvIndex) -> None:
    while index.sweep():
        pass


def many(count: int, start: int = 0) -> list[bytes]:
    return [b"%019d" % number for number in range(start, start + count)]


@pytest.fixture
def index() -> ExternalKvIndex:
    """Two nodes, as in the original's recorded session."""
    index = ExternalKvIndex()
    index.report("n1", [A, B, C], HBM)
    index.report("n1", [A, B], DRAM)
    index.report("n2", [A], SSD)
    return index


# The original's checklist.


def test_report_and_match() -> None:
    index = ExternalKvIndex()
    assert index.report("n", [A, B], HBM) == 2
    assert answer(index, [A, Z, B]) == {"n": {HBM: [A, B]}}


def test_reports_are_additive_across_tiers(index: ExternalKvIndex) -> None:
    assert index.tiers_of("n1", A) == [HBM, DRAM]
    assert index.counts("n1") == {HBM: 3, DRAM: 2}


def test_a_report_that_is_repeated_changes_nothing(index: ExternalKvIndex) -> None:
    before = index.stats()
    assert index.report("n1", [A, B, C], HBM) == 0
    assert index.stats() == before
    assert answer(index, [A])["n1"] == {HBM: [A], DRAM: [A]}


def test_revoke_removes_one_tier_only(index: ExternalKvIndex) -> None:
    assert index.revoke("n1", [A], HBM) == 1
    assert answer(index, [A, B]) == {"n1": {HBM: [B], DRAM: [A, B]}, "n2": {SSD: [A]}}


def test_revoke_of_the_last_tier_drops_the_hash(index: ExternalKvIndex) -> None:
    index.revoke("n1", [C], HBM)
    assert index.match([C]) == []
    assert index.stats().keys == 2


def test_revoke_of_what_is_not_there_is_no_error(index: ExternalKvIndex) -> None:
    before = index.stats()
    assert index.revoke("n1", [A], SSD) == 0
    assert index.revoke("n1", [Z], HBM) == 0
    assert index.revoke("n2", [B], SSD) == 0
    assert index.revoke("ghost", [A], HBM) == 0
    assert index.stats() == before


def test_a_tier_is_cleared_across_hashes(index: ExternalKvIndex) -> None:
    assert index.clear_tier("n1", HBM) == 3
    assert answer(index, [A, B, C]) == {"n1": {DRAM: [A, B]}, "n2": {SSD: [A]}}


def test_a_node_is_cleared_of_all_tiers(index: ExternalKvIndex) -> None:
    assert index.clear_node("n1") == 5
    assert answer(index, [A, B, C]) == {"n2": {SSD: [A]}}
    assert index.nodes() == ["n2"]


def test_clearing_what_is_not_there_is_no_error(index: ExternalKvIndex) -> None:
    before = index.stats()
    assert index.clear_tier("n1", SSD) == 0
    assert index.clear_tier("ghost", HBM) == 0
    assert index.clear_node("ghost") == 0
    assert index.stats() == before


def test_match_groups_by_node_and_tier_in_query_order(index: ExternalKvIndex) -> None:
    assert answer(index, [C, A, Z, B]) == {"n1": {HBM: [C, A, B], DRAM: [A, B]}, "n2": {SSD: [A]}}


def test_duplicates_of_a_query_are_answered_as_often(index: ExternalKvIndex) -> None:
    assert answer(index, [A, A, A]) == {"n1": {HBM: [A] * 3, DRAM: [A] * 3}, "n2": {SSD: [A] * 3}}


def test_matched_hashes_are_counted_once_over_tiers_and_duplicates(index: ExternalKvIndex) -> None:
    match = index.match([A, B, A])[0]
    assert {tier: len(hashes) for tier, hashes in match.tiers.items()} == {HBM: 3, DRAM: 3}
    assert match.distinct() == 2


def test_match_without_hits_or_without_hashes_is_empty(index: ExternalKvIndex) -> None:
    assert index.match([Z]) == []
    assert index.match([]) == []
    assert ExternalKvIndex().match([A]) == []


def test_held_hashes_are_counted_once_over_tiers(index: ExternalKvIndex) -> None:
    assert index.count_distinct("n1") == 3
    assert index.count_distinct("n2") == 1
    assert index.count_distinct("ghost") == 0


def test_unknown_tiers_come_where_the_wire_puts_them_and_are_preferred_last() -> None:
    index = ExternalKvIndex()
    for tier in (7, SSD, UNKNOWN, HBM):
        index.report("n", [A, b""], tier)
    assert list(answer(index, [b"", A])["n"].items()) == [(tier, [b"", A]) for tier in (0, 1, 3, 7)]
    assert index.tiers_of("n", A) == [HBM, SSD, 7, UNKNOWN]


def test_a_negative_tier_is_like_unknown() -> None:
    index = ExternalKvIndex()
    for tier in (-3, UNKNOWN, SSD):
        index.report("n", [A], tier)
    assert list(answer(index, [A])["n"]) == [-3, 0, 3]
    assert index.tiers_of("n", A)[0] == SSD


def test_an_empty_report_leaves_no_node_behind() -> None:
    index = ExternalKvIndex()
    assert index.report("n", [], HBM) == 0
    assert index.nodes() == []


def test_a_report_that_names_a_hash_twice_adds_it_once() -> None:
    index = ExternalKvIndex()
    assert index.report("n", [A, B, A], HBM) == 2
    assert index.report("m", [B, A, B], HBM) == 2
    assert index.revoke("m", [B, B], HBM) == 1
    assert index.counts("m") == {HBM: 1}


def test_hits_are_counted_when_asked_once_per_hash(index: ExternalKvIndex) -> None:
    index.match([A, B], now=1.0)
    assert index.hits.counts([A, B]) == {}
    index.match([A, A, B, Z], count_as_hit=True, now=1.0)
    index.match([A], count_as_hit=True, now=2.0)
    assert index.hits.counts([Z, A, A, B]) == {A: 2, B: 1}


def test_hits_outlive_a_revoke_and_misses_add_none(index: ExternalKvIndex) -> None:
    index.match([A], count_as_hit=True)
    index.clear_node("n1")
    index.clear_node("n2")
    index.match([A], count_as_hit=True)
    sweep_all(index)
    index.match([A], count_as_hit=True)
    assert index.hits.counts([A]) == {A: 1}


def test_no_hit_is_lost_among_other_calls(index: ExternalKvIndex) -> None:
    for round_ in range(500):
        index.match([A], count_as_hit=True, now=float(round_))
        index.report("n3", [A], HBM)
        index.clear_node("n3")
        index.sweep(1)
    assert index.hits.counts([A]) == {A: 500}


# Clearing in slices.


def test_what_is_reported_after_a_clear_is_not_swept() -> None:
    index = ExternalKvIndex()
    hashes = many(1000)
    index.report("n", hashes, HBM)
    index.report("other", hashes[::3], DRAM)
    assert index.clear_tier("n", HBM) == 1000
    assert index.counts("n") == {}
    assert index.report("n", hashes[::2], HBM) == 500
    left = 1000
    while left:
        assert answer(index, hashes[:4]) == {"other": {DRAM: [hashes[0], hashes[3]]}, "n": {HBM: hashes[0:4:2]}}
        left = index.sweep(100)
    assert index.counts("n") == {HBM: 500}
    assert index.stats() == IndexStats(nodes=2, cells=2, keys=667, entries=834, backlog=0)


def test_a_sweep_passes_over_what_was_revoked_before() -> None:
    index = ExternalKvIndex()
    hashes = many(1000)
    index.report("n", hashes, HBM)
    index.report("m", hashes, HBM)
    index.revoke("n", hashes[-2:], HBM)
    index.clear_node("n")
    sweep_all(index)
    assert answer(index, hashes) == {"m": {HBM: hashes}}
    assert index.stats() == IndexStats(nodes=1, cells=1, keys=1000, entries=1000, backlog=0)


def test_a_sweep_does_as_much_as_it_is_told() -> None:
    index = ExternalKvIndex()
    for node in ("a", "b"):
        index.report(node, many(10), HBM)
        index.clear_node(node)
    assert index.stats() == IndexStats(nodes=0, cells=2, keys=10, entries=0, backlog=20)
    assert [index.sweep(8) for _ in range(4)] == [12, 4, 0, 0]
    assert index.stats().keys == 0


def test_freed_memory_is_used_again() -> None:
    index = ExternalKvIndex()
    for round_ in range(50):
        index.report("n", many(100, 100 * round_), HBM)
        index.report("m", many(100, 100 * round_ + 50), DRAM)
        assert answer(index, many(2, 100 * round_ + 49))["n"][HBM] == many(2, 100 * round_ + 49)
        index.clear_node("n")
        index.revoke("m", many(100, 100 * round_ + 50), DRAM)
        sweep_all(index)
    assert index.stats() == IndexStats(0, 0, 0, 0, 0)


def test_memory_does_not_grow_with_time() -> None:
    index = ExternalKvIndex()

    def live(first: int) -> int:
        for round_ in range(first, first + 50):
            index.report("n", many(500, 500 * round_), HBM)
            index.report("m", many(500, 500 * round_), HBM)
            index.revoke("m", many(500, 500 * round_), HBM)
            index.clear_node("n")
            sweep_all(index)
        return tracemalloc.get_traced_memory()[0]

    tracemalloc.start()
    try:
        before = live(0)
        assert live(50) - before < 100_000
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("order", [1, -1])
def test_a_node_may_report_and_revoke_for_ever(order: int) -> None:
    index = ExternalKvIndex()
    hashes = many(64)
    index.report("n", hashes, HBM)
    for round_ in range(200):
        some = hashes[round_ % 7 :: 3][::order]
        assert index.revoke("n", some, HBM) == len(some)
        assert index.counts("n") == {HBM: 64 - len(some)}
        assert index.report("n", some, HBM) == len(some)
    assert sorted(key for part in index.blocks("n", HBM, 10) for key in part) == hashes


# Many nodes, many masks.


@pytest.mark.parametrize("count", [200, 2000])
def test_match_is_right_however_many_placements_a_query_has(count: int) -> None:
    index = ExternalKvIndex()
    hashes = many(count)
    held = {node: [key for place, key in enumerate(hashes) if place >> node & 1] for node in range(11)}
    for node, keys in held.items():
        index.report(f"n{node}", keys, HBM)
        index.report(f"n{node}", keys[::2], SSD)
    index.clear_tier("n3", SSD)
    held[11] = held[0]
    index.report("n11", held[0], HBM)
    index.report("n11", held[0][::2], SSD)
    query = [*reversed(hashes), Z, hashes[1]]
    found = answer(index, query)
    for node, keys in held.items():
        if not keys:
            continue
        expected = {HBM: [key for key in query if key in set(keys)]}
        if node != 3:
            expected[SSD] = [key for key in query if key in set(keys[::2])]
        assert found[f"n{node}"] == expected


def test_equal_answers_are_one_list() -> None:
    index = ExternalKvIndex()
    for node in ("a", "b"):
        index.report(node, [A, B], HBM)
        index.report(node, [A, B], DRAM)
    first, second = index.match([A, B, Z])
    assert first.tiers[HBM] is first.tiers[DRAM] is second.tiers[HBM]


# Prefixes.


def test_the_longest_prefix_of_each_node_with_its_runs(index: ExternalKvIndex) -> None:
    index.report("n3", [A, B, C, b"d"], SSD)
    index.revoke("n3", [B], SSD)
    index.report("n4", [B, C], HBM)
    found = {match.node: (match.length, match.runs) for match in index.match_prefix([A, B, C, b"d"])}
    assert found == {
        "n1": (3, [TierRun(HBM, 3)]),
        "n2": (1, [TierRun(SSD, 1)]),
        "n3": (1, [TierRun(SSD, 1)]),
    }


def test_runs_follow_the_fastest_tier_of_each_block() -> None:
    index = ExternalKvIndex()
    hashes = many(6)
    index.report("n", hashes, SSD)
    index.report("n", hashes[1:3], HBM)
    index.report("n", hashes[2:4], DRAM)
    index.report("n", hashes[5:], UNKNOWN)
    (match,) = index.match_prefix(hashes)
    assert match.runs == [TierRun(SSD, 1), TierRun(HBM, 2), TierRun(DRAM, 1), TierRun(SSD, 2)]
    assert (match.length, match.cost) == (6, 0.0)


def test_weights_choose_the_cheapest_tier_and_add_up() -> None:
    index = ExternalKvIndex()
    hashes = many(4)
    index.report("n", hashes, DRAM)
    index.report("n", hashes[:2], HBM)
    index.report("n", hashes[2:3], SSD)
    (match,) = index.match_prefix(hashes, {HBM: 2.0, DRAM: 1.0, SSD: 0.5})
    assert match.runs == [TierRun(DRAM, 2), TierRun(SSD, 1), TierRun(DRAM, 1)]
    assert match.cost == 3.5


def test_equally_cheap_tiers_are_taken_by_speed(index: ExternalKvIndex) -> None:
    assert index.match_prefix([A], {DRAM: 1.0, HBM: 1.0, SSD: 9.0})[0].runs == [TierRun(HBM, 1)]


def test_a_tier_without_a_weight_is_not_used(index: ExternalKvIndex) -> None:
    found = index.match_prefix([A, B, C], {DRAM: 1.0})
    assert [(match.node, match.length, match.cost) for match in found] == [("n1", 2, 2.0)]
    assert index.match_prefix([A], {}) == []


def test_longer_prefixes_come_first_then_cheaper_ones() -> None:
    index = ExternalKvIndex()
    index.report("a short one", [A], HBM)
    index.report("dear", [A, B], SSD)
    index.report("free, z", [A, B], HBM)
    index.report("free, a", [A, B], HBM)
    nodes = [match.node for match in index.match_prefix([A, B, C], {HBM: 0.0, SSD: 1.0})]
    assert nodes == ["free, a", "free, z", "dear", "a short one"]


def test_a_prefix_that_nobody_begins_is_nobodys(index: ExternalKvIndex) -> None:
    assert index.match_prefix([Z, A]) == []
    assert index.match_prefix([]) == []


def test_a_chain_is_read_only_as_far_as_some_node_goes(index: ExternalKvIndex) -> None:
    read: list[int] = []

    class Chain(list[bytes]):
        def __getitem__(self, place: Any) -> Any:
            read.append(place.stop)
            return super().__getitem__(place)

        def __iter__(self) -> Iterator[bytes]:
            pytest.fail("nobody holds the last block")

    chain = Chain([A, B, C, *many(1000)])
    assert [match.length for match in index.match_prefix(chain)] == [3, 1]
    assert 3 <= max(read) < 100


def test_a_cleared_tier_ends_a_prefix_at_once(index: ExternalKvIndex) -> None:
    index.clear_tier("n1", HBM)
    found = index.match_prefix([A, B, C])
    assert [(match.node, match.runs) for match in found] == [("n1", [TierRun(DRAM, 2)]), ("n2", [TierRun(SSD, 1)])]


# Enumeration.


def test_blocks_are_listed_in_slices() -> None:
    index = ExternalKvIndex()
    index.report("n", many(10), HBM)
    index.report("m", many(10, 5), HBM)
    assert [len(part) for part in index.blocks("n", HBM, 4)] == [4, 4, 2]
    assert sorted(key for part in index.blocks("m", HBM, 3) for key in part) == many(10, 5)
    assert list(index.blocks("n", DRAM)) == []


def test_a_listing_goes_on_while_the_index_changes() -> None:
    index = ExternalKvIndex()
    index.report("n", many(6), HBM)
    listing = index.blocks("n", HBM, 2)
    first = next(listing)
    rest = [key for key in many(6) if key not in first]
    index.revoke("n", [*first, rest[0]], HBM)
    index.report("n", [A], HBM)
    assert [key for part in listing for key in part if key != A] == rest[1:]


def test_a_listing_leaves_out_slices_of_which_nothing_is_left() -> None:
    index = ExternalKvIndex()
    index.report("n", many(9), HBM)
    listing = index.blocks("n", HBM, 1)
    index.revoke("n", many(8), HBM)
    assert list(listing) == [many(1, 8)]


def test_a_listing_ends_when_the_tier_is_cleared_even_if_it_is_reported_anew() -> None:
    index = ExternalKvIndex()
    index.report("n", many(6), HBM)
    listing = index.blocks("n", HBM, 2)
    next(listing)
    index.clear_tier("n", HBM)
    sweep_all(index)
    index.report("n", many(6), HBM)
    assert list(listing) == []


def test_a_snapshot_names_the_place_in_the_feed(index: ExternalKvIndex) -> None:
    assert (index.snapshot().incarnation, index.snapshot().cursor) == (0, 0)
    followed = ExternalKvIndex(ChangeFeed(incarnation=7))
    followed.report("n", [A], HBM)
    followed.report("m", [A, B], DRAM)
    snapshot = followed.snapshot()
    assert (snapshot.incarnation, snapshot.cursor) == (7, 2)
    assert [(part.node, part.tier, sorted(part.hashes)) for part in snapshot.slices] == [
        ("n", HBM, [A]),
        ("m", DRAM, [A, B]),
    ]


def test_an_index_without_a_feed_explains_what_is_there(index: ExternalKvIndex) -> None:
    explanation = index.explain("n1", A)
    assert (explanation.tiers, explanation.changes) == ([HBM, DRAM], [])


def test_readers_and_writers_under_one_lock_never_see_a_torn_state() -> None:
    """Law L7: a clear of many hashes is seen whole, while its memory is being freed slice by slice."""
    index, lock, done = ExternalKvIndex(), threading.Lock(), threading.Event()
    hashes = many(3000)
    torn: list[int] = []

    def read() -> None:
        while not done.is_set():
            with lock:
                found = answer(index, hashes[::100])
            torn.extend(len(keys) for keys in found.get("n", {}).values() if len(keys) != 30)

    readers = [threading.Thread(target=read) for _ in range(2)]
    for reader in readers:
        reader.start()
    for _ in range(20):
        with lock:
            index.report("n", hashes, HBM)
        with lock:
            index.clear_node("n")
        left = 1
        while left:
            with lock:
                left = index.sweep(500)
    done.set()
    for reader in readers:
        reader.join(30)
    assert torn == []
    assert index.stats() == IndexStats(0, 0, 0, 0, 0)
