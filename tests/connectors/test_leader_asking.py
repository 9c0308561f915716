"""What the ledger asks the ranks about, and when it gives a rank up (statements 46, 47, 49; bug B9)."""

from __future__ import annotations

import pytest

from umbp_connectors.leader.ledger import HEARTBEAT_S, QUESTIONS, RANK_LOST, STEPS, OpLedger
from umbp_core.ops import BlockCopy, Direction, LeaderTransferRequest, OpResult, OpStatus
from umbp_core.testing.fakes import FakeClock


def op(op_id: str, direction: Direction = Direction.STORE) -> LeaderTransferRequest:
    return LeaderTransferRequest(op_id, "request", direction, (BlockCopy(b"k", 0, 1, 2),))


def done(op_id: str) -> OpResult:
    return OpResult(op_id, "request", Direction.STORE, OpStatus.DONE, checksums=b"s" * 16)


def given_up(op_id: str) -> OpResult:
    return OpResult(op_id, "request", Direction.STORE, OpStatus.EXPIRED, (0,), quarantined=True)


def asked(ledger: OpLedger) -> list[str]:
    return [late.op_id for late in ledger.overdue()] if ledger.step() else []


def test_nobody_is_asked_about_young_ops() -> None:
    clock = FakeClock()
    ledger = OpLedger([0, 1], clock)
    assert not ledger.step(), "there is nothing to ask about"
    ledger.open(op("a"))
    assert asked(ledger) == []
    assert not ledger.step()
    clock.advance(HEARTBEAT_S)
    ledger.open(op("young"))
    assert asked(ledger) == ["a"]
    assert asked(ledger) == [], "once in a while, not in every step"
    clock.advance(HEARTBEAT_S)
    assert asked(ledger) == ["a", "young"]
    for rank in (0, 1):
        for op_id in ("a", "young"):
            ledger.add(rank, done(op_id))
    clock.advance(HEARTBEAT_S)
    assert not ledger.step()


def test_a_lost_message_is_asked_about_at_once() -> None:
    clock = FakeClock()
    ledger = OpLedger([0], clock)
    ledger.open(op("a"))
    assert asked(ledger) == []
    ledger.ask_all()
    assert asked(ledger) == ["a"]


@pytest.mark.statement("connector", 46)
def test_who_keeps_memory_is_asked_until_it_lets_go() -> None:
    """The verdict is out and its release was lost: the memory is not lost with it."""
    clock = FakeClock()
    ledger = OpLedger([0, 1], clock)
    ledger.open(op("a"))
    ledger.add(0, given_up("a"))
    verdict = ledger.add(1, done("a"))
    assert verdict is not None
    assert verdict.quarantined
    clock.advance(HEARTBEAT_S)
    assert asked(ledger) == ["a"]
    assert ledger.release(0, "a")
    clock.advance(HEARTBEAT_S)
    assert asked(ledger) == []


def silence(ledger: OpLedger, clock: FakeClock, questions: int, answers: tuple[int, ...] = ()) -> list[int]:
    """So many unanswered questions, with steps in between; who is lost by then."""
    lost: list[int] = []
    for _ in range(questions):
        clock.advance(HEARTBEAT_S)
        ledger.overdue()
        lost += ledger.give_up_silent()[0]
        for _ in range(STEPS):
            ledger.step()
        ledger.heard(answers)
    return lost


@pytest.mark.statement("connector", 49)
@pytest.mark.bug("B9")
def test_a_rank_that_answers_no_more_is_lost_and_its_part_of_everything_fails() -> None:
    clock = FakeClock()
    ledger = OpLedger([0, 1], clock)
    for op_id in ("a", "b"):
        ledger.open(op(op_id))
    ledger.add(0, done("a"))
    assert silence(ledger, clock, QUESTIONS, answers=(0,)) == []
    clock.advance(HEARTBEAT_S)
    ledger.overdue()
    lost, verdicts = ledger.give_up_silent()
    assert (lost, ledger.lost) == ([1], {1})
    (verdict,) = verdicts
    assert (verdict.op.op_id, verdict.status, verdict.reasons) == ("a", OpStatus.EXPIRED, (RANK_LOST,))
    assert verdict.quarantined, "what it may still touch is never used again"
    second = ledger.add(0, done("b"))
    assert second is not None
    assert (second.status, second.failed) == (OpStatus.EXPIRED, {0})
    assert (len(ledger), ledger.quarantined) == (0, 0), "nothing keeps the engine awake for it"
    assert ledger.add(1, done("a")) is None, "a late word changes nothing"


@pytest.mark.statement("connector", 49)
@pytest.mark.parametrize("answered", [False, True])
def test_an_op_that_is_opened_when_a_rank_is_lost_ends_without_it(answered: bool) -> None:
    """In the step that gives the rank up, what it asks for may have been decided before."""
    clock = FakeClock()
    ledger = OpLedger([0, 1], clock)
    ledger.open(op("a"))
    assert silence(ledger, clock, QUESTIONS + 1, answers=(0,)) == [1]
    ledger.open(op("late"))
    if answered:
        assert ledger.add(0, done("late")) is None
    clock.advance(HEARTBEAT_S)
    assert ledger.step()
    ledger.overdue()
    lost, verdicts = ledger.give_up_silent()
    assert lost == []
    if not answered:
        verdicts = [verdict for verdict in (ledger.add(0, done("late")),) if verdict is not None]
    assert [(verdict.op.op_id, verdict.reasons, verdict.quarantined) for verdict in verdicts] == [
        ("late", (RANK_LOST,), True)
    ]
    ledger.add(0, done("a"))
    assert (len(ledger), ledger.quarantined) == (0, 0)


@pytest.mark.statement("connector", 49)
@pytest.mark.parametrize("answers", [(0, 1), (1,)])
def test_a_rank_that_answers_is_not_lost_however_long_its_op_takes(answers: tuple[int, ...]) -> None:
    clock = FakeClock()
    ledger = OpLedger([0, 1], clock)
    ledger.open(op("a"))
    lost = silence(ledger, clock, 50, answers)
    assert 1 not in lost
    assert lost == ([] if 0 in answers else [0])


def test_long_steps_are_no_silence() -> None:
    """Hardly a step was planned since the first question: the engine computes, or compiles."""
    clock = FakeClock()
    ledger = OpLedger([0], clock)
    ledger.open(op("a"))
    for _ in range(50):
        clock.advance(HEARTBEAT_S)
        ledger.overdue()
        assert ledger.give_up_silent() == ([], [])
    ledger.step()
    assert ledger.lost == frozenset()


@pytest.mark.statement("connector", 48)
def test_a_hundred_thousand_ops_leave_nothing_behind() -> None:
    clock = FakeClock()
    ledger = OpLedger([0, 1], clock)
    for number in range(100_000):
        op_id = str(number)
        ledger.open(op(op_id))
        first = given_up(op_id) if number % 7 == 0 else done(op_id)
        assert ledger.add(0, first) is None
        assert ledger.add(1, done(op_id)) is not None
        if number % 7 == 0:
            assert ledger.release(0, op_id)
    clock.advance(HEARTBEAT_S)
    assert (len(ledger), ledger.quarantined, asked(ledger), ledger.dump(0.0)) == (0, 0, [], [])
    assert [ledger.blocks_in_flight(direction) for direction in Direction] == [0, 0, 0]
