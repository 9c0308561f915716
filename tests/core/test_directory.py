from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.core.small_directory import PAGE, A, B, C, D, directory, put, readable
from umbp_core.directory import Copy, Directory, DirectoryEvent, EventKind, TierSpace
from umbp_core.errors import CapacityError, StateError, UnknownOwner
from umbp_core.eviction import LruPolicy, PrefixAwareLruPolicy
from umbp_core.pages import PageAllocator
from umbp_core.tiers import Tier, TierSet


def test_nothing_is_readable_before_it_is_committed() -> None:
    """L2."""
    node = directory()
    pages = node.reserve("op", A, Tier.DRAM, 150, depth=7)
    assert readable(node) == []
    assert node.copy(A, Tier.DRAM) is None
    assert node.drain_events() == []
    node.commit("op", A, Tier.DRAM, b"sum")
    assert pages is not None
    assert node.copy(A, Tier.DRAM) == Copy(Tier.DRAM, pages, 150, b"sum", 7)
    assert node.drain_events() == [DirectoryEvent(EventKind.ADDED, A, Tier.DRAM, pages, 150, b"sum", 7)]
    assert node.drain_events() == []


def test_lookups_count_any_tier_and_stop_at_the_first_gap() -> None:
    node = directory()
    put(node, A, C)
    put(node, B, tier=Tier.SSD)
    assert node.count_prefix([A, B, C, D, A]) == 3
    assert node.count_prefix([D, A]) == 0
    assert node.count_prefix([A, B]) == 2
    assert node.count_prefix([]) == 0
    assert node.contains_many([D, A, B]) == [False, True, True]


def test_keys_are_those_that_are_published_in_the_tier() -> None:
    node = directory()
    put(node, A, C)
    put(node, B, tier=Tier.SSD)
    node.reserve("op", D, Tier.DRAM, 10)
    assert node.keys(Tier.DRAM) == [A, C]
    assert node.keys(Tier.SSD) == [B]
    assert node.keys(Tier.HBM) == []


def test_copies_in_several_tiers_are_independent() -> None:
    node = directory()
    put(node, A)
    put(node, A, tier=Tier.SSD)
    assert node.tiers_of(A) == TierSet.of(Tier.DRAM, Tier.SSD)
    assert node.fastest(A) is Tier.DRAM
    assert node.drop(A, Tier.DRAM)
    assert node.fastest(A) is Tier.SSD
    assert node.copy(A, Tier.SSD) is not None
    assert node.drop(A, Tier.SSD)
    assert node.fastest(A) is None
    assert node.tiers_of(A) == TierSet.EMPTY


def test_what_is_there_or_on_its_way_is_not_reserved_again() -> None:
    node = directory()
    node.reserve("one", A, Tier.DRAM, PAGE)
    assert node.reserve("two", A, Tier.DRAM, PAGE) is None
    assert node.is_present_or_pending(A, Tier.DRAM)
    assert not node.is_present_or_pending(A, Tier.SSD)
    node.commit("one", A, Tier.DRAM, b"")
    assert node.reserve("two", A, Tier.DRAM, PAGE) is None
    assert node.stats(Tier.DRAM).free_pages == 3
    assert node.reserve("two", A, Tier.SSD, PAGE) is not None


def test_no_room_is_told_apart_from_being_there() -> None:
    node = directory(dram=1)
    node.reserve("one", A, Tier.DRAM, PAGE)
    assert node.reserve("two", B, Tier.DRAM, PAGE) is None
    assert not node.is_present_or_pending(B, Tier.DRAM)


@pytest.mark.statement("connector", 76)
def test_a_full_tier_evicts_just_enough_of_the_least_recently_used() -> None:
    node = directory()
    put(node, A, B, C, D)
    node.touch([A])
    node.drain_events()
    assert node.reserve("op", b"e", Tier.DRAM, 2 * PAGE) is not None
    assert readable(node) == [A, D]
    assert [(event.kind, event.key) for event in node.drain_events()] == [
        (EventKind.REMOVED, B),
        (EventKind.REMOVED, C),
    ]


def test_a_large_victim_makes_room_for_several_small_ones() -> None:
    node = directory()
    put(node, A, nbytes=3 * PAGE)
    put(node, B)
    assert node.reserve("op", C, Tier.DRAM, 2 * PAGE) is not None
    assert readable(node) == [B]
    assert node.stats(Tier.DRAM).free_pages == 1


def test_a_touched_chain_loses_its_end_first() -> None:
    node = directory(dram=3)
    put(node, A, B, C)
    node.touch([A, B, C])
    put(node, D)
    assert readable(node) == [A, B, D]


def test_touching_keeps_all_copies_of_an_object() -> None:
    node = directory(dram=2, ssd=2)
    for tier in (Tier.DRAM, Tier.SSD):
        put(node, A, B, tier=tier)
    node.touch([A, D])
    for tier in (Tier.DRAM, Tier.SSD):
        put(node, C, tier=tier)
        assert node.copy(A, tier) is not None
        assert node.copy(B, tier) is None


def test_each_tier_evicts_by_its_own_policy() -> None:
    allocator = PageAllocator(PAGE, [3 * PAGE])
    node = Directory([TierSpace(Tier.DRAM, allocator, PrefixAwareLruPolicy(candidate_window=3))])
    for key, depth in ((A, 0), (B, 2), (C, 1)):
        node.reserve("op", key, Tier.DRAM, PAGE, depth)
        node.commit("op", key, Tier.DRAM, b"")
    put(node, D)
    assert readable(node) == [A, C, D]


@pytest.mark.statement("connector", 76)
def test_pinned_and_leased_objects_are_never_evicted() -> None:
    """L8."""
    node = directory(dram=3)
    put(node, A, B, C)
    node.pin("reader", [A])
    node.lease("router", [B], deadline=10.0)
    put(node, D)
    assert readable(node) == [A, B, D]
    node.pin("reader", [D])
    assert node.reserve("op", C, Tier.DRAM, PAGE) is None
    assert node.expire(9.0) == 0
    assert node.expire(10.0) == 1
    assert node.reserve("op", C, Tier.DRAM, PAGE) is not None
    assert readable(node) == [A, D]


def test_nothing_is_evicted_for_an_object_that_still_would_not_fit() -> None:
    """L8."""
    node = directory(dram=3)
    put(node, A, B, C)
    node.lease("router", [A, B], deadline=10.0)
    assert node.reserve("op", D, Tier.DRAM, 2 * PAGE) is None
    node.pin("reader", [A, B])
    assert node.reserve("op", D, Tier.DRAM, 2 * PAGE) is None
    assert readable(node) == [A, B, C]


def test_what_was_passed_over_counts_as_used() -> None:
    node = directory(dram=3)
    put(node, A, B, C)
    node.pin("reader", [A])
    put(node, D)
    node.unpin("reader")
    assert readable(node) == [A, C, D]
    put(node, B)
    assert readable(node) == [A, B, D]


def test_an_object_larger_than_the_tier_is_an_error_and_evicts_nothing() -> None:
    node = directory(dram=2)
    put(node, A)
    with pytest.raises(CapacityError, match="needs 3 pages, DRAM has 2"):
        node.reserve("op", B, Tier.DRAM, 2 * PAGE + 1)
    assert readable(node) == [A]
    assert not node.is_present_or_pending(B, Tier.DRAM)


def test_dropping_what_is_not_there_is_harmless() -> None:
    node = directory()
    node.reserve("op", A, Tier.DRAM, PAGE)
    assert not node.drop(A, Tier.DRAM)
    assert node.stats(Tier.DRAM).reserved == 1
    assert node.drain_events() == []


@pytest.mark.parametrize("owner", ["other", "op"])
def test_only_its_owner_can_settle_a_reservation(owner: str) -> None:
    node = directory()
    node.reserve("op", A, Tier.DRAM, PAGE)
    key, tier = (A, Tier.DRAM) if owner == "other" else (A, Tier.SSD)
    with pytest.raises(UnknownOwner, match="holds no reservation"):
        node.commit(owner, key, tier, b"")
    with pytest.raises(UnknownOwner, match="holds no reservation"):
        node.abort(owner, key, tier)
    assert node.stats(Tier.DRAM).reserved == 1
    assert node.drain_events() == []


def test_a_reservation_is_settled_once() -> None:
    node = directory()
    put(node, A)
    with pytest.raises(UnknownOwner):
        node.commit("writer", A, Tier.DRAM, b"")
    with pytest.raises(UnknownOwner):
        node.abort("writer", A, Tier.DRAM)
    assert readable(node) == [A]


def test_aborting_frees_only_what_was_not_published() -> None:
    node = directory()
    put(node, A)
    for key, tier in ((B, Tier.DRAM), (B, Tier.SSD), (C, Tier.DRAM)):
        node.reserve("writer", key, tier, PAGE)
    node.reserve("other", D, Tier.DRAM, PAGE)
    node.abort("writer", C, Tier.DRAM)
    assert node.stats(Tier.DRAM).reserved == 2
    node.abort_owner("writer")
    node.abort_owner("writer")
    assert readable(node) == [A]
    assert (node.stats(Tier.DRAM).reserved, node.stats(Tier.DRAM).free_pages) == (1, 2)
    assert node.stats(Tier.SSD).free_pages == 4


def test_a_restored_copy_is_like_any_other() -> None:
    node = directory()
    node.restore(A, Tier.SSD, [2, 0], 150, b"sum", depth=3)
    assert node.copy(A, Tier.SSD) == Copy(Tier.SSD, (2, 0), 150, b"sum", 3)
    assert node.drain_events() == [DirectoryEvent(EventKind.ADDED, A, Tier.SSD, (2, 0), 150, b"sum", 3)]
    assert node.reserve("op", B, Tier.SSD, 3 * PAGE) is not None
    assert readable(node) == []


@pytest.mark.parametrize(
    ("key", "pages", "nbytes"),
    [(A, [1], PAGE), (C, [1], PAGE), (B, [0], PAGE), (B, [4], PAGE), (B, [1, 1], 150), (B, [1], 150), (B, [], 0)],
    ids=["published", "pending", "taken", "no such page", "page named twice", "too few pages", "no bytes"],
)
def test_a_record_that_does_not_fit_is_refused_and_changes_nothing(key: bytes, pages: list[int], nbytes: int) -> None:
    """L9: the caller drops the record and goes on."""
    node = directory()
    node.restore(A, Tier.SSD, [0], PAGE, b"")
    node.reserve("op", C, Tier.SSD, PAGE)
    before = node.stats(Tier.SSD)
    node.drain_events()
    with pytest.raises(StateError):
        node.restore(key, Tier.SSD, pages, nbytes, b"")
    assert node.stats(Tier.SSD) == before
    assert readable(node) == [A]
    assert node.drain_events() == []


def test_a_tier_that_is_not_configured_is_empty_and_cannot_be_changed() -> None:
    node = Directory([TierSpace(Tier.DRAM, PageAllocator(PAGE, [PAGE]), LruPolicy())])
    assert node.copy(A, Tier.SSD) is None
    assert not node.is_present_or_pending(A, Tier.SSD)
    changes: list[Callable[[], object]] = [
        lambda: node.reserve("op", A, Tier.SSD, PAGE),
        lambda: node.commit("op", A, Tier.SSD, b""),
        lambda: node.drop(A, Tier.SSD),
        lambda: node.clear(Tier.SSD),
        lambda: node.restore(A, Tier.SSD, [0], PAGE, b""),
        lambda: node.stats(Tier.SSD),
    ]
    for change in changes:
        with pytest.raises(StateError, match=r"not part of this directory \(DRAM\)"):
            change()


def test_a_tier_has_one_space() -> None:
    space = TierSpace(Tier.DRAM, PageAllocator(PAGE, [PAGE]), LruPolicy())
    with pytest.raises(StateError, match="named twice"):
        Directory([space, space])


def test_an_object_of_no_bytes_is_refused() -> None:
    node = directory()
    with pytest.raises(StateError, match="0 bytes"):
        node.reserve("op", A, Tier.DRAM, 0)
    assert not node.is_present_or_pending(A, Tier.DRAM)
