"""Sequences and incarnations of what nodes tell (law L11)."""

from __future__ import annotations

import pytest

from umbp_core.index import ExternalKvIndex
from umbp_core.index_feed import ChangeFeed
from umbp_core.index_gate import Acknowledgement, Action, ActionKind, Batch, BatchApplier, SequenceGate, Verdict
from umbp_core.tiers import Tier

HBM, DRAM = Tier.HBM, Tier.DRAM
A, B = b"a", b"b"
APPLY, REPLAY, GAP, STALE = Verdict.APPLY, Verdict.REPLAY, Verdict.GAP, Verdict.STALE


def report(seq: int, *hashes: bytes, incarnation: int = 5, full_sync: bool = False) -> Batch:
    return Batch(incarnation, seq, [Action(ActionKind.REPORT, HBM, hashes)], full_sync)


@pytest.fixture
def applier() -> BatchApplier:
    return BatchApplier(ExternalKvIndex())


def held(applier: BatchApplier, node: str = "n") -> list[bytes]:
    return sorted(key for part in applier.index.blocks(node, HBM) for key in part)


def test_each_message_is_applied_once_and_in_order() -> None:
    gate = SequenceGate()
    assert [gate.judge(0, seq) for seq in (1, 2, 2, 1, 4, 3, 4)] == [APPLY, APPLY, REPLAY, REPLAY, GAP, APPLY, APPLY]
    assert (gate.acked, gate.synced) == (4, True)


def test_a_full_sync_closes_a_gap() -> None:
    gate = SequenceGate()
    assert [gate.judge(0, 3), gate.judge(0, 9, full_sync=True), gate.judge(0, 10)] == [GAP, APPLY, APPLY]
    assert gate.judge(0, 9, full_sync=True) is REPLAY


def test_after_forgetting_only_a_full_sync_is_accepted() -> None:
    gate = SequenceGate()
    gate.judge(0, 1)
    gate.forget()
    assert [gate.judge(0, 1), gate.judge(0, 2), gate.judge(0, 2, full_sync=True), gate.judge(0, 3)] == [
        GAP,
        GAP,
        APPLY,
        APPLY,
    ]


def test_a_batch_does_all_of_its_actions(applier: BatchApplier) -> None:
    actions = [
        Action(ActionKind.REPORT, HBM, [A, B]),
        Action(ActionKind.REPORT, DRAM, [A]),
        Action(ActionKind.REVOKE, HBM, [A]),
        Action(ActionKind.CLEAR, DRAM),
    ]
    assert applier.apply("n", Batch(5, 1, actions)) == Acknowledgement(APPLY, 5, 1, request_full_sync=False)
    assert applier.index.counts("n") == {HBM: 1}
    assert held(applier) == [B]


def test_a_replay_is_acknowledged_and_harmless(applier: BatchApplier) -> None:
    applier.apply("n", report(1, A))
    applier.apply("n", Batch(5, 2, [Action(ActionKind.REVOKE, HBM, [A])]))
    assert applier.apply("n", report(1, A)) == Acknowledgement(REPLAY, 5, 2, request_full_sync=False)
    assert held(applier) == []


def test_a_gap_applies_nothing_and_asks_for_a_full_sync(applier: BatchApplier) -> None:
    applier.apply("n", report(1, A))
    assert applier.apply("n", report(3, B)) == Acknowledgement(GAP, 5, 1, request_full_sync=True)
    assert held(applier) == [A]
    assert applier.apply("n", report(4, B, full_sync=True)).verdict is APPLY
    assert held(applier) == [B]


def test_an_unknown_node_begins_with_its_first_batch_or_a_full_sync(applier: BatchApplier) -> None:
    assert applier.apply("n", report(7, A)) == Acknowledgement(GAP, 5, 0, request_full_sync=True)
    assert applier.apply("n", report(8, A, full_sync=True)) == Acknowledgement(APPLY, 5, 8, request_full_sync=False)
    assert applier.apply("m", report(1, B)).verdict is APPLY


def test_a_new_incarnation_voids_what_the_old_one_said() -> None:
    applier = BatchApplier(ExternalKvIndex(ChangeFeed(1)))
    applier.apply("n", report(1, A))
    answer = applier.apply("n", report(2, B, incarnation=6), now=9.0)
    assert answer == Acknowledgement(GAP, 6, 0, request_full_sync=True)
    assert held(applier) == []
    (change,) = applier.index.explain("n", A).changes
    assert (change.at, change.reason) == (9.0, "incarnation 6 began")
    assert applier.apply("n", report(1, B, incarnation=6)).verdict is APPLY
    assert held(applier) == [B]


def test_a_new_incarnation_of_an_expired_node_begins_at_once(applier: BatchApplier) -> None:
    applier.apply("n", report(1, A))
    applier.expire("n")
    assert applier.apply("n", report(1, B, incarnation=6)).verdict is APPLY
    assert held(applier) == [B]


def test_an_earlier_incarnation_is_refused(applier: BatchApplier) -> None:
    applier.apply("n", report(1, A))
    for late in (report(2, B, incarnation=4), report(1, B, incarnation=4, full_sync=True)):
        assert applier.apply("n", late) == Acknowledgement(STALE, 5, 1, request_full_sync=False)
    assert held(applier) == [A]


def test_resume_after_expiry_asks_for_a_full_sync(applier: BatchApplier) -> None:
    applier.apply("n", report(1, A))
    assert applier.expire("n") == 1
    assert held(applier) == []
    assert applier.apply("n", report(2, B)) == Acknowledgement(GAP, 5, 1, request_full_sync=True)
    assert applier.apply("n", report(3, A, B, full_sync=True)).verdict is APPLY
    assert held(applier) == [A, B]
    assert applier.expire("ghost") == 0


def test_a_forgotten_node_may_come_back_with_any_incarnation(applier: BatchApplier) -> None:
    applier.apply("n", report(1, A))
    assert applier.forget("n") == 1
    assert applier.gate("n") is None
    assert applier.apply("n", report(1, B, incarnation=2)).verdict is APPLY
    gate = applier.gate("n")
    assert gate is not None
    assert (gate.incarnation, gate.acked) == (2, 1)


def test_nodes_do_not_touch_each_other(applier: BatchApplier) -> None:
    applier.apply("n", report(1, A))
    applier.apply("m", report(1, A, full_sync=True))
    applier.apply("m", report(1, B, incarnation=6))
    assert held(applier) == [A]
    assert held(applier, "m") == [B]


def test_a_keepalive_learns_what_is_known(applier: BatchApplier) -> None:
    assert applier.probe("n", 5, 0) == Acknowledgement(GAP, 5, 0, request_full_sync=True)
    applier.apply("n", report(1, A))
    assert applier.probe("n", 5, 1) == Acknowledgement(REPLAY, 5, 1, request_full_sync=False)
    assert applier.probe("n", 5, 2) == Acknowledgement(GAP, 5, 1, request_full_sync=True)
    assert applier.probe("n", 6, 0) == Acknowledgement(GAP, 6, 0, request_full_sync=True)
    assert applier.probe("n", 4, 1) == Acknowledgement(STALE, 5, 1, request_full_sync=False)
    assert held(applier) == [A]
    applier.expire("n")
    assert applier.probe("n", 5, 1).request_full_sync
