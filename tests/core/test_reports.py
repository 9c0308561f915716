"""The coalescer of reports: the sender's half of law L11 for external KV."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import settings

from umbp_core.errors import StateError
from umbp_core.index_gate import Action, ActionKind, Batch
from umbp_core.reports import ReportJournal
from umbp_core.testing.machines_telling import ReportsMachine

A, B, C, D = b"a", b"b", b"c", b"d"
HBM, DRAM, SSD = 1, 2, 3
LIFE = 7

ReportsMachine.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
TestReports = ReportsMachine.TestCase


def report(*hashes: bytes, tier: int = HBM) -> Action:
    return Action(ActionKind.REPORT, tier, list(hashes))


def revoke(*hashes: bytes, tier: int = HBM) -> Action:
    return Action(ActionKind.REVOKE, tier, list(hashes))


def acknowledge(journal: ReportJournal) -> Batch:
    """Send the batch that is due over a channel that works."""
    batch = journal.batch()
    assert batch is not None
    journal.receive(batch.incarnation, batch.seq, request_full_sync=False)
    return batch


def synced(max_hashes: int = 100, batch_hashes: int = 3) -> ReportJournal:
    """A journal whose first full sync, number 1, is acknowledged."""
    journal = ReportJournal(LIFE, max_hashes, batch_hashes)
    journal.begin_full_sync([])
    acknowledge(journal)
    return journal


@pytest.mark.parametrize("bounds", [(0, 1), (1, 0)])
def test_a_journal_that_can_hold_nothing_is_refused(bounds: tuple[int, int]) -> None:
    with pytest.raises(StateError, match="at least 1"):
        ReportJournal(LIFE, *bounds)


def test_a_new_journal_owes_a_full_sync_and_keeps_nothing() -> None:
    journal = ReportJournal(LIFE)
    journal.report([A], HBM)
    journal.revoke([A], HBM)
    journal.clear(HBM)
    assert (journal.full_sync_due, len(journal), journal.batch(), journal.settled) == (True, 0, None, False)


def test_an_empty_full_sync_is_a_message_too() -> None:
    journal = ReportJournal(LIFE)
    journal.begin_full_sync([])
    assert journal.batch() == Batch(LIFE, 1, [], full_sync=True)
    acknowledge(journal)
    assert (journal.settled, journal.batch(), journal.acked_seq) == (True, None, 1)


def test_a_large_full_sync_goes_on_in_ordinary_batches() -> None:
    journal = ReportJournal(LIFE, batch_hashes=3)
    journal.begin_full_sync([(HBM, [A, B]), (DRAM, []), (DRAM, [A, B, C, D])])
    journal.revoke([A], HBM)
    assert acknowledge(journal) == Batch(LIFE, 1, [report(A, B), report(A, tier=DRAM)], full_sync=True)
    assert acknowledge(journal) == Batch(LIFE, 2, [report(B, C, D, tier=DRAM)])
    assert acknowledge(journal) == Batch(LIFE, 3, [revoke(A)])
    assert journal.settled


def test_a_snapshot_is_read_as_it_is_told() -> None:
    read = []

    def snapshot() -> Iterator[tuple[int, list[bytes]]]:
        for key in (A, B, C):
            read.append(key)
            yield HBM, [key]

    journal = ReportJournal(LIFE, batch_hashes=1)
    journal.begin_full_sync(snapshot())
    assert read == []
    acknowledge(journal)
    assert read == [A]


def test_the_last_word_on_a_hash_in_a_tier_is_told() -> None:
    journal = synced()
    journal.report([A, B], HBM)
    journal.revoke([A], HBM)
    journal.report([A], DRAM)
    assert acknowledge(journal).actions == [report(B), revoke(A), report(A, tier=DRAM)]


def test_a_clear_makes_earlier_words_on_its_tier_void_and_comes_before_later_ones() -> None:
    journal = synced()
    journal.report([A], HBM)
    journal.report([A], DRAM)
    journal.clear(HBM)
    journal.report([B], HBM)
    assert len(journal) == 2
    assert acknowledge(journal).actions == [Action(ActionKind.CLEAR, HBM), report(B), report(A, tier=DRAM)]
    assert journal.settled


def test_batches_are_bounded_numbered_and_given_out_until_acknowledged() -> None:
    journal = synced()
    journal.report([A, B, C, D], HBM)
    first = journal.batch()
    assert first == Batch(LIFE, 2, [report(A, B, C)])
    journal.revoke([A], HBM)
    assert journal.batch() is first
    journal.receive(LIFE, 1, request_full_sync=False)
    assert journal.batch() is first
    acknowledge(journal)
    assert [acknowledge(journal), acknowledge(journal)] == [Batch(LIFE, 3, [report(D)]), Batch(LIFE, 4, [revoke(A)])]


def test_a_busy_tier_does_not_keep_the_others_from_being_told() -> None:
    journal = synced()
    journal.report([A, B, C], HBM)
    journal.report([A, B, C], DRAM)
    told = []
    for _ in range(4):
        told += [action.tier for action in acknowledge(journal).actions]
        journal.report([A, B, C], HBM)
    assert sorted(told) == [HBM, HBM, HBM, DRAM]


def test_a_part_that_does_not_fit_waits_for_the_next_batch() -> None:
    journal = synced()
    journal.report([A, B], HBM)
    journal.report([A, B, C, D], DRAM)
    journal.revoke([D], SSD)
    batches = [acknowledge(journal).actions for _ in range(3)]
    assert batches == [[report(A, B), revoke(D, tier=SSD)], [report(A, B, C, tier=DRAM)], [report(D, tier=DRAM)]]
    assert journal.settled


def test_overflow_drops_everything_and_a_full_sync_is_due() -> None:
    journal = synced(max_hashes=3)
    journal.report([A, B, C], HBM)
    journal.report([A, B, C], HBM)
    assert (len(journal), journal.full_sync_due) == (3, False)
    journal.report([A], DRAM)
    assert (len(journal), journal.full_sync_due, journal.batch()) == (0, True, None)


def test_what_the_receiver_asks_for_or_cannot_know_brings_a_full_sync() -> None:
    journal = synced()
    journal.receive(LIFE, 1, request_full_sync=True)
    assert journal.full_sync_due
    journal = synced()
    journal.receive(LIFE, 40, request_full_sync=False)
    journal.begin_full_sync([])
    assert acknowledge(journal).seq == 41
    journal.receive(LIFE + 5, 3, request_full_sync=False)
    assert (journal.incarnation, journal.full_sync_due, journal.acked_seq) == (LIFE + 6, True, 0)
    journal.receive(LIFE, 99, request_full_sync=True)
    assert journal.incarnation == LIFE + 6


def test_a_refused_batch_keeps_its_number() -> None:
    journal = synced()
    journal.report([A, B], HBM)
    journal.batch()
    assert journal.empty_batch() == 2
    assert acknowledge(journal) == Batch(LIFE, 2, ())
    assert (journal.empty_batch(), journal.settled) == (0, True)


def test_a_new_life_begins_with_a_full_sync() -> None:
    journal = synced()
    journal.report([A], HBM)
    journal.renew(LIFE + 1)
    assert (journal.incarnation, len(journal), journal.full_sync_due) == (LIFE + 1, 0, True)
