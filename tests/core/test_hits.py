from __future__ import annotations

import pytest

from umbp_core.hits import HitCounters

A, B, C = b"a", b"b", b"c"


def test_counts_are_sparse_in_request_order_and_without_duplicates() -> None:
    hits = HitCounters()
    hits.record([A], 1.0)
    hits.record([A, B, A], 2.0)
    assert list(hits.counts([b"missing", B, A, A]).items()) == [(B, 1), (A, 2)]
    assert hits.counts([]) == {}
    assert len(hits) == 2


def test_counters_without_a_recent_hit_are_forgotten() -> None:
    hits = HitCounters(ttl=10.0)
    hits.record([A, B], 0.0)
    hits.record([B], 5.0)
    assert hits.collect(9.9) == 0
    assert hits.collect(10.0) == 1
    assert hits.counts([A, B]) == {B: 2}
    assert hits.collect(15.0) == 1
    assert len(hits) == 0
    hits.record([A], 16.0)
    assert hits.counts([A]) == {A: 1}


def test_the_original_forgets_after_two_hours() -> None:
    hits = HitCounters()
    hits.record([A], 0.0)
    assert hits.collect(7199.0) == 0
    assert hits.collect(7200.0) == 1


def test_a_clock_that_goes_back_makes_no_counter_older() -> None:
    hits = HitCounters(ttl=10.0)
    hits.record([A], 100.0)
    hits.record([A, B], 50.0)
    assert hits.collect(105.0) == 0
    assert hits.counts([A, B]) == {A: 2, B: 1}


@pytest.mark.parametrize("limit", [1, 2, 7])
def test_a_collection_in_small_steps_finds_all(limit: int) -> None:
    hits = HitCounters(ttl=10.0)
    keys = [b"%d" % number for number in range(20)]
    hits.record(keys, 0.0)
    hits.record(keys[::3], 8.0)
    gone = sum(hits.collect(12.0, limit) for _ in range(40 // limit))
    assert gone == 13
    assert list(hits.counts(keys)) == keys[::3]


def test_a_whole_collection_after_small_steps_misses_nothing() -> None:
    hits = HitCounters(ttl=10.0)
    hits.record([A, B, C, b"d"], 0.0)
    hits.record([C, b"d"], 5.0)
    assert hits.collect(5.0, 2) == 0
    assert hits.collect(11.0) == 2
    assert list(hits.counts([A, B, C, b"d"])) == [C, b"d"]


def test_nothing_counts_nothing() -> None:
    hits = HitCounters()
    hits.record([], 1.0)
    assert len(hits) == 0
    hits.record([A], 0.0)
    hits.record([], 2.0)
    assert hits.counts([A]) == {A: 1}
