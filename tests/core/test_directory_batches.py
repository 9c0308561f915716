"""Reserving and publishing many objects of one page each in one call."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable

import pytest

from tests.core.small_directory import PAGE, A, B, C, D, directory, put, readable
from umbp_core.directory import Directory, EventKind, TierSpace
from umbp_core.errors import StateError, UnknownOwner
from umbp_core.eviction import LruPolicy
from umbp_core.pages import PageAllocator
from umbp_core.tiers import Tier

E = b"e" * 36


def wanted(*keys: bytes, nbytes: int = PAGE) -> list[tuple[bytes, int, int]]:
    return [(key, nbytes, depth) for depth, key in enumerate(keys)]


def test_a_batch_evicts_and_publishes_as_its_objects_alone_would() -> None:
    one, many = directory(), directory()
    for node in (one, many):
        put(node, D, C, B)
        node.pin("reader", [D])
    for depth, key in enumerate((A, E)):
        assert one.reserve("op", key, Tier.DRAM, PAGE, depth) is not None
    assert None not in many.reserve_many("op", wanted(A, E), Tier.DRAM)
    one.commit("op", A, Tier.DRAM, b"a")
    one.commit("op", E, Tier.DRAM, b"e")
    many.commit_many("op", {A: b"a", E: b"e"}, Tier.DRAM)
    told = [
        [(event.kind, event.key, event.checksum, event.depth) for event in node.drain_events()] for node in (one, many)
    ]
    assert told[0] == told[1]
    assert told[0][-2:] == [(EventKind.ADDED, A, b"a", 0), (EventKind.ADDED, E, b"e", 1)]
    assert (readable(many), many.stats(Tier.DRAM)) == (readable(one), one.stats(Tier.DRAM))


def test_what_is_there_or_asked_for_twice_is_refused() -> None:
    node = directory()
    put(node, A)
    node.reserve("other", B, Tier.DRAM, PAGE)
    places = node.reserve_many("op", wanted(A, B, C, C), Tier.DRAM)
    assert [pages is not None for pages in places] == [False, False, True, False]
    node.commit_many("op", {C: b"sum"}, Tier.DRAM)
    with pytest.raises(UnknownOwner, match="op holds no reservation"):
        node.commit_many("op", {C: b"sum"}, Tier.DRAM)


def test_a_batch_that_does_not_fit_as_a_whole_gets_what_fits() -> None:
    node = directory(dram=3)
    put(node, A, B, C)
    node.pin("reader", [B, C])
    places = node.reserve_many("op", wanted(D, A, E), Tier.DRAM)
    assert [pages is not None for pages in places] == [True, False, False]
    assert readable(node) == [B, C]


def test_more_objects_than_the_tier_has_pages_is_no_error() -> None:
    node = directory(dram=2)
    places = node.reserve_many("op", wanted(A, B, C), Tier.DRAM)
    assert [pages is not None for pages in places] == [True, True, False]


@pytest.mark.parametrize("nbytes", [0, -1, PAGE + 1])
def test_objects_of_no_page_or_several_are_reserved_alone(nbytes: int) -> None:
    node = directory()
    put(node, A)
    with pytest.raises(StateError, match=f"{nbytes} bytes"):
        node.reserve_many("op", [*wanted(B), (C, nbytes, 0)], Tier.DRAM)
    assert node.stats(Tier.DRAM).reserved == 0


def test_a_batch_is_published_as_a_whole_or_not_at_all() -> None:
    node = directory()
    node.reserve_many("op", wanted(A, B), Tier.DRAM)
    for owner, written in (("op", {A: b"", C: b""}), ("nobody", {A: b""})):
        with pytest.raises(UnknownOwner, match="holds no reservation"):
            node.commit_many(owner, written, Tier.DRAM)
    assert readable(node) == []
    node.commit_many("op", {B: b"b"}, Tier.DRAM)
    node.abort_owner("op")
    assert readable(node) == [B]
    assert node.stats(Tier.DRAM).free_pages == 3


def test_nothing_is_no_batch() -> None:
    node = directory()
    assert node.reserve_many("op", [], Tier.DRAM) == []
    node.commit_many("op", {}, Tier.DRAM)
    assert node.drain_events() == []


def test_a_tier_that_nobody_follows_makes_no_events() -> None:
    quiet = TierSpace(Tier.DRAM, PageAllocator(PAGE, [PAGE]), LruPolicy(), told=False)
    node = Directory([quiet, TierSpace(Tier.SSD, PageAllocator(PAGE, [PAGE]), LruPolicy())])
    put(node, A)
    put(node, A, tier=Tier.SSD)
    put(node, B)
    node.drop(B, Tier.DRAM)
    assert [(event.kind, event.tier) for event in node.drain_events()] == [(EventKind.ADDED, Tier.SSD)]
    assert readable(node) == [A]


def test_what_changed_together_is_told_in_one_piece() -> None:
    node = directory(dram=2)
    node.reserve_many("op", wanted(A, B), Tier.DRAM)
    node.commit_many("op", {A: b"a", B: b"b"}, Tier.DRAM)
    node.reserve_many("next", wanted(C, D), Tier.DRAM)
    node.commit_many("next", {}, Tier.DRAM)
    added, evicted = node.drain_changes()
    assert (added.kind, added.tier, list(added.keys)) == (EventKind.ADDED, Tier.DRAM, [A, B])
    assert (evicted.kind, evicted.tier, list(evicted.keys)) == (EventKind.REMOVED, Tier.DRAM, [A, B])
    assert [copy.checksum for copy in added.copies] == [copy.checksum for copy in evicted.copies] == [b"a", b"b"]
    assert (node.drain_changes(), node.drain_events()) == ([], [])


def test_a_cleared_tier_is_one_change() -> None:
    node = directory()
    put(node, A, B, C)
    node.lease("reader", [B], 1.0)
    node.drain_changes()
    assert node.clear(Tier.DRAM) == 2
    (cleared,) = node.drain_changes()
    assert (cleared.kind, list(cleared.keys)) == (EventKind.REMOVED, [A, C])
    assert (node.clear(Tier.DRAM), node.drain_changes()) == (0, [])


def one_by_one(node: Directory, owner: str) -> None:
    node.reserve(owner, A, Tier.DRAM, PAGE)
    node.commit(owner, A, Tier.DRAM, b"")


def in_a_batch(node: Directory, owner: str) -> None:
    node.reserve_many(owner, wanted(A), Tier.DRAM)
    node.commit_many(owner, {A: b""}, Tier.DRAM)


def given_up(node: Directory, owner: str) -> None:
    node.reserve_many(owner, wanted(A), Tier.DRAM)
    node.abort_owner(owner)


def pinned_and_leased(node: Directory, owner: str) -> None:
    in_a_batch(node, owner)
    node.pin(owner, [A])
    node.lease(owner, [A], 1.0)
    node.unpin(owner)
    node.release(owner)


@pytest.mark.parametrize("write", [one_by_one, in_a_batch, given_up, pinned_and_leased])
def test_nothing_is_left_of_owners_that_are_done(write: Callable[[Directory, str], None]) -> None:
    node = directory()

    def live(owners: range) -> int:
        for number in owners:
            write(node, f"op {number}")
            node.drop(A, Tier.DRAM)
            node.drain_changes()
        return tracemalloc.get_traced_memory()[0]

    tracemalloc.start()
    try:
        before = live(range(500))
        assert live(range(500, 3500)) - before < 50_000
    finally:
        tracemalloc.stop()
