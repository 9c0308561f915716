"""What pins and leases promise (law L8)."""

from __future__ import annotations

import pytest

from tests.core.small_directory import PAGE, A, B, C, D, directory, put, readable
from umbp_core.directory import EventKind
from umbp_core.errors import UnknownOwner
from umbp_core.tiers import Tier


def test_pins_of_several_owners_are_counted() -> None:
    node = directory(dram=1)
    put(node, A)
    assert [copy.tier for copy in node.pin("one", [A, A])] == [Tier.DRAM, Tier.DRAM]
    node.pin("two", [A])
    assert node.stats(Tier.DRAM).pinned == 1
    node.unpin("one")
    node.unpin("one")
    assert node.reserve("op", B, Tier.DRAM, PAGE) is None
    node.unpin("two")
    assert node.stats(Tier.DRAM).pinned == 0
    assert node.reserve("op", B, Tier.DRAM, PAGE) is not None


def test_a_pin_takes_the_fastest_copy_or_the_one_asked_for() -> None:
    node = directory()
    put(node, A, tier=Tier.SSD)
    assert node.pin("reader", [A])[0].tier is Tier.SSD
    put(node, A)
    assert node.pin("reader", [A])[0].tier is Tier.DRAM
    assert node.pin("reader", [A], tier=Tier.SSD)[0].tier is Tier.SSD


@pytest.mark.parametrize(("tier", "place"), [(None, "any tier"), (Tier.SSD, "SSD"), (Tier.HBM, "HBM")])
def test_a_pin_is_all_or_nothing(tier: Tier | None, place: str) -> None:
    node = directory()
    put(node, A, B)
    put(node, A, tier=Tier.SSD)
    wanted = [A, D] if tier is None else [A, B]
    with pytest.raises(UnknownOwner, match=place):
        node.pin("reader", wanted, tier)
    assert node.stats(Tier.DRAM).pinned == node.stats(Tier.SSD).pinned == 0


def test_a_pin_of_nothing_is_nothing() -> None:
    node = directory()
    assert node.pin("reader", []) == []
    node.unpin("reader")


def test_dropping_a_pinned_copy_hides_it_at_once_and_frees_it_at_the_last_unpin() -> None:
    node = directory(dram=2)
    put(node, A)
    node.pin("one", [A])
    node.pin("two", [A])
    node.drain_events()
    assert node.drop(A, Tier.DRAM)
    assert readable(node) == []
    assert [event.kind for event in node.drain_events()] == [EventKind.REMOVED]
    node.unpin("one")
    assert node.stats(Tier.DRAM).free_pages == 1
    node.unpin("two")
    assert node.stats(Tier.DRAM).free_pages == 2
    assert node.drain_events() == []


def test_a_new_copy_does_not_inherit_the_pins_of_the_dropped_one() -> None:
    node = directory(dram=2)
    put(node, A)
    (old,) = node.pin("reader", [A])
    node.drop(A, Tier.DRAM)
    put(node, A)
    new = node.copy(A, Tier.DRAM)
    assert new is not None
    assert new.pages != old.pages
    put(node, B)
    assert readable(node) == [B]
    node.unpin("reader")
    assert node.stats(Tier.DRAM).free_pages == 1


def test_pages_that_were_freed_late_belong_to_nobody() -> None:
    """A page that held a dropped, pinned copy carries nothing over to the copy that gets it next."""
    node = directory(dram=1)
    put(node, A)
    node.pin("reader", [A])
    node.drop(A, Tier.DRAM)
    node.unpin("reader")
    put(node, B)
    node.pin("reader", [B])
    node.unpin("reader")
    assert readable(node) == [B]
    assert node.stats(Tier.DRAM).free_pages == 0


def test_clear_leaves_leased_objects_and_hides_pinned_ones() -> None:
    node = directory()
    put(node, A, B, C)
    put(node, A, tier=Tier.SSD)
    node.reserve("op", D, Tier.DRAM, PAGE)
    node.pin("reader", [B])
    node.lease("router", [C], deadline=10.0)
    assert node.clear(Tier.DRAM) == 2
    assert readable(node) == [A, C]
    assert node.stats(Tier.DRAM).free_pages == 1
    node.unpin("reader")
    assert node.stats(Tier.DRAM).free_pages == 2
    node.commit("op", D, Tier.DRAM, b"")
    assert readable(node) == [A, C, D]


def test_bad_bytes_are_dropped_in_spite_of_a_lease() -> None:
    """L1 before L8: a lease promises that an object is not evicted, not that bad bytes are served."""
    node = directory(dram=1)
    put(node, A)
    node.lease("router", [A], deadline=10.0)
    assert node.drop(A, Tier.DRAM)
    put(node, A)
    assert node.reserve("op", B, Tier.DRAM, PAGE) is None


def test_a_lease_covers_copies_that_are_written_later() -> None:
    node = directory(ssd=1)
    put(node, A)
    node.lease("router", [A], deadline=10.0)
    put(node, A, tier=Tier.SSD)
    assert node.reserve("op", B, Tier.SSD, PAGE) is None
    node.release("router")
    node.release("router")
    assert node.reserve("op", B, Tier.SSD, PAGE) is not None


def test_a_lease_is_all_or_nothing() -> None:
    node = directory(dram=1)
    put(node, A)
    with pytest.raises(UnknownOwner, match="router cannot lease it"):
        node.lease("router", [A, B], deadline=10.0)
    assert node.reserve("op", C, Tier.DRAM, PAGE) is not None
