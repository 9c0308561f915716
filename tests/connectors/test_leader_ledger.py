"""The ledger's verdict over all ranks, through its public door."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from umbp_connectors.leader.ledger import OpLedger, Verdict
from umbp_core.errors import StateError
from umbp_core.ops import BlockCopy, Direction, LeaderTransferRequest, OpResult, OpStatus


def store(op_id: str, blocks: int = 2) -> LeaderTransferRequest:
    return LeaderTransferRequest(
        op_id, "request", Direction.STORE, tuple(BlockCopy(b"key%d" % i, 0, i + 1, i) for i in range(blocks))
    )


def done(op: LeaderTransferRequest, fill: int = 0) -> OpResult:
    return OpResult(
        op.op_id,
        op.request_id,
        op.direction,
        OpStatus.DONE,
        checksums=bytes([fill]) * 16 * len(op.blocks),
        moved_bytes=8,
    )


def ended(op: LeaderTransferRequest, status: OpStatus, *, failed: tuple[int, ...] = (), held: bool = False) -> OpResult:
    return OpResult(op.op_id, op.request_id, op.direction, status, failed, reason="io", quarantined=held)


def only(verdict: Verdict | None) -> Verdict:
    assert verdict is not None
    return verdict


def test_the_verdict_comes_with_the_last_rank_and_joins_checksums_in_rank_order() -> None:
    ledger = OpLedger([0, 1])
    op = store("a")
    ledger.open(op)
    assert ledger.add(1, done(op, 1)) is None
    assert ledger.blocks_in_flight(Direction.STORE) == 2
    verdict = only(ledger.add(0, done(op, 7)))
    assert verdict.status is OpStatus.DONE
    assert verdict.checksums()[1] == bytes([7]) * 16 + bytes([1]) * 16
    assert (verdict.moved_bytes, len(ledger), ledger.blocks_in_flight(Direction.STORE)) == (16, 0, 0)


@pytest.mark.statement("connector", 38)
@pytest.mark.bug("B6")
def test_a_rank_that_reports_twice_does_not_stand_for_another() -> None:
    ledger = OpLedger([0, 1])
    op = store("a")
    ledger.open(op)
    assert ledger.add(0, done(op)) is None
    assert ledger.add(0, done(op)) is None
    assert "a" in ledger


@pytest.mark.bug("B1")
def test_a_block_that_is_bad_on_one_rank_is_bad() -> None:
    ledger = OpLedger([0, 1, 2])
    op = store("a", 4)
    ledger.open(op)
    ledger.add(0, ended(op, OpStatus.FAILED, failed=(1,)))
    ledger.add(1, done(op))
    verdict = only(ledger.add(2, ended(op, OpStatus.FAILED, failed=(3,))))
    assert (verdict.status, verdict.failed, verdict.reasons) == (OpStatus.FAILED, {1, 3}, ("io",))


@pytest.mark.parametrize("status", [OpStatus.FAILED, OpStatus.CANCELLED, OpStatus.EXPIRED])
def test_an_end_without_indexes_means_all_blocks(status: OpStatus) -> None:
    ledger = OpLedger([0])
    op = store("a", 3)
    ledger.open(op)
    assert only(ledger.add(0, ended(op, status))).failed == {0, 1, 2}


def test_replicated_ranks_take_the_writers_checksums() -> None:
    ledger = OpLedger([0, 0])
    op = store("a", 1)
    ledger.open(op)
    ledger.add(1, OpResult(op.op_id, op.request_id, op.direction, OpStatus.DONE))
    assert only(ledger.add(0, done(op, 5))).checksums()[0] == bytes([5]) * 32


def test_unknown_ops_and_ranks_change_nothing() -> None:
    ledger = OpLedger([0])
    op = store("a")
    assert ledger.add(0, done(op)) is None
    assert not ledger.release(0, "a")
    ledger.open(op)
    assert ledger.add(3, done(op)) is None
    assert len(ledger) == 1


def test_an_op_id_in_flight_cannot_be_opened_again() -> None:
    ledger = OpLedger([0])
    ledger.open(store("a"))
    with pytest.raises(StateError, match="a of request request"):
        ledger.open(store("a"))


@pytest.mark.statement("connector", 46)
def test_memory_is_released_when_the_last_quarantined_rank_lets_go() -> None:
    ledger = OpLedger([0, 1])
    op = store("a")
    ledger.open(op)
    ledger.add(0, ended(op, OpStatus.EXPIRED, held=True))
    assert only(ledger.add(1, ended(op, OpStatus.EXPIRED, held=True))).quarantined
    assert not ledger.release(0, "a")
    assert not ledger.release(0, "a")
    assert ledger.quarantined == 1
    assert ledger.release(1, "a")
    assert ledger.quarantined == 0


@pytest.mark.statement("connector", 46)
def test_an_op_ends_with_its_memory_unless_a_rank_was_left_at_work() -> None:
    ledger = OpLedger([0, 1])
    first, second = store("a"), store("b")
    assert not ledger.will_end("a")
    for op in (first, second):
        ledger.open(op)
    ledger.add(0, ended(first, OpStatus.EXPIRED, held=True))
    ledger.add(0, done(second))
    assert [ledger.will_end(op_id) for op_id in "ab"] == [False, True]
    assert not ledger.release(0, "a")
    assert ledger.will_end("a"), "it let go while the other one is still to answer"
    for op in (first, second):
        ledger.add(1, ended(op, OpStatus.EXPIRED, held=True))
    assert [ledger.will_end(op_id) for op_id in "ab"] == [False, False]


def test_a_release_before_the_verdict_leaves_nothing_to_wait_for() -> None:
    ledger = OpLedger([0, 1])
    op = store("a")
    ledger.open(op)
    ledger.add(0, ended(op, OpStatus.EXPIRED, held=True))
    assert not ledger.release(0, "a")
    assert not only(ledger.add(1, done(op))).quarantined


@given(st.data())
def test_any_order_of_reports_gives_the_same_single_verdict(data: st.DataObject) -> None:
    ranks = data.draw(st.integers(1, 4))
    statuses = [data.draw(st.sampled_from([OpStatus.DONE, OpStatus.FAILED])) for _ in range(ranks)]
    op = store("a", 3)
    ledger = OpLedger(list(range(ranks)))
    ledger.open(op)
    results = [done(op) if s is OpStatus.DONE else ended(op, s, failed=(r % 3,)) for r, s in enumerate(statuses)]
    order = data.draw(st.permutations(list(range(ranks)) * 2))
    verdicts = [verdict for rank in order if (verdict := ledger.add(rank, results[rank])) is not None]
    expected = {rank % 3 for rank, status in enumerate(statuses) if status is not OpStatus.DONE}
    assert [set(verdict.failed) for verdict in verdicts] == [expected]


@pytest.mark.statement("connector", 94)
def test_a_dump_says_how_old_an_op_is_and_whom_it_waits_for() -> None:
    now = 100.0
    ledger = OpLedger([0, 1], clock=lambda: now)
    a, b = store("a"), store("b", 1)
    ledger.open(a)
    now = 103.5
    ledger.open(b)
    ledger.add(1, done(a))
    rows = {row["op"]: row for row in ledger.dump(104.0)}
    assert (rows["a"]["age_s"], rows["b"]["age_s"]) == (4.0, 0.5)
    assert (rows["a"]["waits_for"], rows["b"]["waits_for"]) == ([0], [0, 1])
    assert (rows["a"]["request"], rows["a"]["direction"], rows["a"]["blocks"]) == ("request", "store", 2)
    ledger.add(0, ended(a, OpStatus.EXPIRED, held=True))
    assert [row for row in ledger.dump(104.0) if row["op"] == "a"] == [{"op": "a", "quarantined": [0]}]
    assert ledger.release(0, "a")
    assert [row["op"] for row in ledger.dump(104.0)] == ["b"]
