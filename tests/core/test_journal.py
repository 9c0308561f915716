"""The sender's half of law L11."""

from __future__ import annotations

import pytest

from umbp_core.errors import StateError
from umbp_core.journal import Bundle, Delta, Journal

A, B, C, D = b"a", b"b", b"c", b"d"
DRAM, SSD = 2, 3
LIFE = 7


def add(key: bytes, tier: int = DRAM, size: int = 10) -> Delta:
    return Delta(key, tier, size)


def remove(key: bytes, tier: int = DRAM) -> Delta:
    return Delta(key, tier, None)


def synced(max_deltas: int = 100, bundle_deltas: int = 2) -> Journal:
    """A journal whose first full sync, number 1, is acknowledged."""
    journal = Journal(LIFE, max_deltas, bundle_deltas)
    journal.receive(LIFE, journal.begin_full_sync(), request_full_sync=False)
    return journal


@pytest.mark.parametrize("bounds", [(0, 1), (1, 0)])
def test_a_journal_that_can_hold_nothing_is_refused(bounds: tuple[int, int]) -> None:
    with pytest.raises(StateError, match="at least 1"):
        Journal(LIFE, *bounds)


def test_a_new_journal_owes_a_full_sync_and_keeps_nothing() -> None:
    journal = Journal(LIFE)
    journal.record([add(A)])
    assert (journal.incarnation, journal.full_sync_due, len(journal), journal.bundles()) == (LIFE, True, 0, [])
    assert journal.begin_full_sync() == 1
    assert (journal.full_sync_due, journal.full_sync_pending) == (False, True)


def test_what_is_recorded_during_a_full_sync_is_told_after_it() -> None:
    journal = Journal(LIFE)
    seq = journal.begin_full_sync()
    journal.record([add(A)])
    assert journal.bundles() == []
    journal.receive(LIFE, seq, request_full_sync=False)
    assert journal.bundles() == [Bundle(2, (add(A),))]


@pytest.mark.statement("connector", 91)
def test_bundles_are_bounded_numbered_and_kept_until_acknowledged() -> None:
    journal = synced()
    journal.record([add(A), add(B), add(C), add(D), add(A, SSD)])
    first = journal.bundles(limit=2)
    assert first == [Bundle(2, (add(A), add(B))), Bundle(3, (add(C), add(D)))]
    assert journal.bundles(limit=1) == first[:1]
    assert len(journal) == 5
    journal.receive(LIFE, 2, request_full_sync=False)
    assert len(journal) == 3
    assert journal.bundles() == [first[1], Bundle(4, (add(A, SSD),))]
    journal.receive(LIFE, 4, request_full_sync=False)
    assert (journal.bundles(), len(journal), journal.acked_seq, journal.last_seq) == ([], 0, 4, 4)


def test_only_the_last_change_of_a_block_in_a_tier_is_told() -> None:
    journal = synced(bundle_deltas=10)
    journal.record([add(A), add(B), remove(A), add(B, size=5), add(A, SSD), remove(C), add(C)])
    assert journal.bundles()[0].deltas == (remove(A), add(B, size=5), add(A, SSD), add(C))


def test_what_is_cut_is_not_coalesced_any_more() -> None:
    journal = synced()
    journal.record([add(A)])
    journal.bundles()
    journal.record([remove(A)])
    assert [bundle.deltas for bundle in journal.bundles()] == [(add(A),), (remove(A),)]


def test_overflow_drops_everything_and_asks_for_a_full_sync() -> None:
    journal = synced(max_deltas=3)
    journal.record([add(A), add(B)])
    journal.bundles()
    journal.record([add(C)])
    assert (len(journal), journal.full_sync_due) == (3, False)
    journal.record([add(D)])
    assert (len(journal), journal.full_sync_due, journal.bundles()) == (0, True, [])
    assert journal.begin_full_sync() == 3


def test_changes_of_one_block_do_not_overflow() -> None:
    journal = synced(max_deltas=1)
    journal.record([add(A), remove(A)] * 10)
    assert not journal.full_sync_due


def test_a_request_for_a_full_sync_voids_what_was_pending() -> None:
    journal = synced()
    journal.record([add(A)])
    journal.bundles()
    journal.receive(LIFE, 1, request_full_sync=True)
    assert (len(journal), journal.full_sync_due, journal.full_sync_pending) == (0, True, False)


def test_every_try_of_a_full_sync_has_its_own_number() -> None:
    journal = Journal(LIFE)
    assert (journal.begin_full_sync(), journal.begin_full_sync()) == (1, 2)
    journal.receive(LIFE, 1, request_full_sync=False)
    assert journal.full_sync_pending
    journal.receive(LIFE, 2, request_full_sync=False)
    assert not journal.full_sync_pending


def test_late_answers_are_harmless() -> None:
    journal = synced(bundle_deltas=1)
    journal.record([add(A), add(B)])
    journal.bundles()
    journal.receive(LIFE, 3, request_full_sync=False)
    journal.receive(LIFE, 2, request_full_sync=False)
    journal.receive(LIFE - 1, 99, request_full_sync=True)
    assert (journal.acked_seq, journal.full_sync_due, len(journal)) == (3, False, 0)


def test_a_receiver_that_knows_more_than_we_told_gets_larger_numbers() -> None:
    journal = synced()
    journal.receive(LIFE, 40, request_full_sync=False)
    assert journal.full_sync_due
    assert journal.begin_full_sync() == 41


def test_a_receiver_that_knows_a_later_life_gets_a_still_later_one() -> None:
    journal = synced()
    journal.receive(LIFE + 5, 3, request_full_sync=False)
    assert (journal.incarnation, journal.full_sync_due, journal.last_seq, journal.acked_seq) == (LIFE + 6, True, 0, 0)
    assert journal.begin_full_sync() == 1


def test_large_journals_are_cut_bundle_by_bundle() -> None:
    journal = synced(max_deltas=5000, bundle_deltas=1000)
    journal.record([add(b"%d" % number) for number in range(4500)])
    assert [len(bundle.deltas) for bundle in journal.bundles()] == [1000] * 4 + [500]


def test_the_rest_of_a_snapshot_is_told_after_its_message_and_before_anything_recorded() -> None:
    journal = Journal(LIFE, bundle_deltas=2)
    rest = iter([add(A), add(B), add(C)])
    seq = journal.begin_full_sync(rest)
    journal.record([remove(A)])
    assert (journal.bundles(), journal.settled) == ([], False)
    journal.receive(LIFE, seq, request_full_sync=False)
    assert journal.bundles() == [Bundle(2, (add(A), add(B))), Bundle(3, (add(C),)), Bundle(4, (remove(A),))]
    assert not journal.settled
    journal.receive(LIFE, 4, request_full_sync=False)
    assert (journal.bundles(), journal.settled) == ([], True)


def test_another_full_sync_forgets_the_rest_of_the_last() -> None:
    journal = Journal(LIFE)
    journal.begin_full_sync(iter([add(A)]))
    journal.receive(LIFE, journal.begin_full_sync(), request_full_sync=False)
    assert (journal.bundles(), journal.settled) == ([], True)


def test_a_new_life_has_its_own_numbers() -> None:
    journal = synced()
    journal.record([add(A)])
    journal.renew(LIFE + 1)
    assert (journal.incarnation, journal.last_seq, len(journal), journal.full_sync_due) == (LIFE + 1, 0, 0, True)
