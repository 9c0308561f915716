"""The feed of the index's changes, and explanations made from it (law L11)."""

from __future__ import annotations

import pytest

from umbp_core.index import ExternalKvIndex
from umbp_core.index_feed import MAX_CHANGE_HASHES, Change, ChangeFeed, ChangeKind
from umbp_core.tiers import Tier

HBM, DRAM = Tier.HBM, Tier.DRAM
A, B, C = b"a", b"b", b"c"


def feed_of(*hashes: bytes, max_changes: int = 100, max_hashes: int = 100) -> ChangeFeed:
    feed = ChangeFeed(3, max_changes, max_hashes)
    for key in hashes:
        feed.append(ChangeKind.REPORTED, "n", HBM, [key], 0.0)
    return feed


def test_changes_name_what_changed_only() -> None:
    index = ExternalKvIndex(ChangeFeed(3))
    index.report("n", [A, B], HBM, 1.0)
    index.report("n", [A, B], HBM, 2.0)
    index.report("n", [B, C], HBM, 3.0)
    index.revoke("n", [A, b"zz"], HBM, 4.0)
    index.revoke("n", [b"zz"], HBM, 5.0)
    index.clear_tier("n", DRAM, 6.0)
    index.clear_node("n", 7.0, "expired")
    assert index.feed is not None
    assert index.feed.since(3, 0).changes == [
        Change(1, ChangeKind.REPORTED, "n", HBM, (A, B), 1.0),
        Change(2, ChangeKind.REPORTED, "n", HBM, (C,), 3.0),
        Change(3, ChangeKind.REVOKED, "n", HBM, (A,), 4.0),
        Change(4, ChangeKind.CLEARED, "n", HBM, (), 7.0, "expired"),
    ]


def test_a_reader_takes_pages() -> None:
    feed = feed_of(A, B, C)
    first = feed.since(3, 0, limit=2)
    assert ([change.seq for change in first.changes], first.cursor, first.lost) == ([1, 2], 2, False)
    second = feed.since(3, first.cursor, limit=2)
    assert ([change.seq for change in second.changes], second.cursor) == ([3], 3)
    third = feed.since(3, second.cursor)
    assert (third.changes, third.cursor, third.lost) == ([], 3, False)


@pytest.mark.parametrize(("incarnation", "cursor"), [(2, 3), (4, 0), (3, 4), (3, -1)])
def test_a_cursor_of_something_else_is_lost(incarnation: int, cursor: int) -> None:
    page = feed_of(A, B, C).since(incarnation, cursor)
    assert (page.incarnation, page.changes, page.cursor, page.lost) == (3, [], 3, True)


@pytest.mark.parametrize("bounds", [{"max_changes": 2}, {"max_hashes": 2}])
def test_a_reader_that_is_too_late_is_lost(bounds: dict[str, int]) -> None:
    feed = feed_of(A, B, C, **bounds)
    assert feed.since(3, 0).lost
    assert [change.hashes for change in feed.since(3, 1).changes] == [(B,), (C,)]


def test_the_latest_change_is_kept_however_large() -> None:
    feed = feed_of(A, max_hashes=2)
    feed.append(ChangeKind.REPORTED, "n", HBM, [A, B, C], 0.0)
    assert [change.seq for change in feed.since(3, 1).changes] == [2]
    assert feed.since(3, 0).lost


def test_a_page_is_bounded_by_hashes_too() -> None:
    feed = feed_of(A, B)
    feed.append(ChangeKind.REPORTED, "n", HBM, [A, B, C], 0.0)
    assert [change.seq for change in feed.since(3, 0, max_hashes=2).changes] == [1, 2]
    assert [change.seq for change in feed.since(3, 1, max_hashes=2).changes] == [2]
    page = feed.since(3, 2, max_hashes=2)
    assert ([change.seq for change in page.changes], page.cursor) == ([3], 3)


def test_a_very_large_change_is_told_as_several() -> None:
    feed = ChangeFeed(3)
    hashes = [b"%d" % number for number in range(MAX_CHANGE_HASHES + 1)]
    feed.append(ChangeKind.REPORTED, "n", HBM, hashes, 0.0)
    first, second = feed.since(3, 0).changes
    assert (first.hashes, second.hashes) == (tuple(hashes[:-1]), tuple(hashes[-1:]))
    assert feed.cursor == 2


def test_a_new_feed_has_nothing_and_loses_nobody() -> None:
    page = ChangeFeed(1).since(1, 0)
    assert (page.changes, page.cursor, page.lost) == ([], 0, False)


def test_why_a_hash_is_not_usable() -> None:
    index = ExternalKvIndex(ChangeFeed(1))
    index.report("n", [A, B], HBM, 1.0)
    index.report("n", [A], DRAM, 2.0)
    index.report("other", [A, C], DRAM, 2.5)
    index.report("n", [C], Tier.SSD, 2.6)
    index.revoke("n", [A], HBM, 3.0)
    explanation = index.explain("n", A)
    assert explanation.tiers == [DRAM]
    assert [(change.kind, change.tier, change.at) for change in explanation.changes] == [
        (ChangeKind.REVOKED, HBM, 3.0),
        (ChangeKind.REPORTED, DRAM, 2.0),
    ]
    index.clear_node("n", 4.0, "expired")
    gone = index.explain("n", A)
    assert gone.tiers == []
    assert [(change.kind, change.tier, change.reason) for change in gone.changes] == [
        (ChangeKind.CLEARED, Tier.SSD, "expired"),
        (ChangeKind.CLEARED, DRAM, "expired"),
        (ChangeKind.CLEARED, HBM, "expired"),
    ]
    assert index.explain("nobody", C).changes == []
