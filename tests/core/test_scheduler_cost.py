"""What an op costs the scheduler beside ops that do not change, in lines: a clock says what a machine does besides.

The clock's side is ``benchmarks/scheduler.py``.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest

from umbp_core.ops import (
    BlockCopy,
    Direction,
    LeaderTransferRequest,
    OpResult,
    OpStatus,
    Requirement,
    RequirementKind,
    WorkerTransferRequest,
)
from umbp_core.scheduler import Limits, TransferScheduler

OPS = 20
"""Few enough that nothing is tidied up meanwhile."""
NEVER = 1 << 40


def pair(scheduler: TransferScheduler, op_id: str, iteration: int, direction: Direction, now: float) -> None:
    requirement = Requirement(RequirementKind.ITERATION_COMPLETE, iteration)
    op = LeaderTransferRequest(op_id, op_id, direction, (BlockCopy(b"k", 0, 1, 1),), requirement)
    scheduler.submit(op, now)
    if iteration != NEVER or direction is not Direction.DEMOTE:
        scheduler.enqueue(WorkerTransferRequest(op_id, op_id, direction), now)


def beside(pending: int) -> TransferScheduler:
    """Ops that wait for a half, for a step and for a token."""
    scheduler = TransferScheduler(Limits(loads=1, blocks=1))
    for number in range(pending):
        direction = (Direction.LOAD, Direction.STORE, Direction.DEMOTE)[number % 3]
        pair(scheduler, f"waits{number}", 0 if direction is Direction.LOAD else NEVER, direction, now=0.0)
    scheduler.end_iteration(0)
    scheduler.poll(0.0)
    return scheduler


def live(scheduler: TransferScheduler, number: int) -> None:
    """An op from its halves to its result."""
    now = number / 100
    pair(scheduler, f"op{number}", number, Direction.STORE, now)
    scheduler.end_iteration(number)
    for started in scheduler.poll(now):
        assert scheduler.commit(started.op_id)
        scheduler.finished(OpResult(started.op_id, "", Direction.STORE, OpStatus.DONE), now)
    assert [result.status for result in scheduler.take_results()] == [OpStatus.DONE]


def cancel(scheduler: TransferScheduler, number: int) -> None:
    """An op that waits, and the end of its request."""
    pair(scheduler, f"op{number}", NEVER, Direction.STORE, number / 100)
    assert scheduler.cancel_request(f"op{number}") == 1
    assert len(scheduler.take_results()) == 1


def quiet(scheduler: TransferScheduler, number: int) -> None:
    """A step in which nothing becomes ready."""
    scheduler.begin_iteration(number)
    scheduler.end_iteration(number)
    assert scheduler.poll(number / 100) == []


def lines(work: Callable[[TransferScheduler, int], None], scheduler: TransferScheduler) -> int:
    """How many lines of the core run while ``work`` is done :data:`OPS` times."""
    count = 0

    def trace(frame: Any, event: str, argument: Any) -> Any:
        nonlocal count
        if not frame.f_globals.get("__name__", "").startswith("umbp_core."):
            return None  # what the garbage collector ends may run anywhere
        count += event == "line"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        for number in range(1, OPS + 1):
            work(scheduler, number)
    finally:
        sys.settrace(before)
    return count


@pytest.mark.statement("connector", 95)
@pytest.mark.parametrize("work", [live, cancel, quiet])
def test_what_does_not_change_costs_nothing(work: Callable[[TransferScheduler, int], None]) -> None:
    few, many = (lines(work, beside(pending)) for pending in (30, 3000))
    assert few == many > OPS
