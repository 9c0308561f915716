"""The transfer scheduler: decides, on one worker, when an op may start, and says once how it ended.

Theory of operation
-------------------
An op comes in two halves: the leader's (:class:`~umbp_core.ops.LeaderTransferRequest`: what to move, when,
by when) and the worker's (:class:`~umbp_core.ops.WorkerTransferRequest`: this rank expects it).  They may
come over different channels, in either order and repeatedly.  An op passes through these phases::

    HALF ─ both halves, or immediate ─► WAITING ─ requirement holds ─► READY ─ token ─► STARTED ─ commit ─► COMMITTED
      └──────────── cancellation or deadline: dropped and reported at once ─────────────────┘       runs to its end

* **Tokens.**  Each direction has its own, so that a load never waits for a store's token; an op that waits
  for its partner or its requirement holds none, so a stuck one delays nobody else.  Starts are handed out
  loads first, then stores, then demotions, each in the order in which they became ready.  Small ops that start
  together share a token, up to ``Limits.blocks`` blocks.  A layer-wise load takes
  no token and starts before all others: a whole forward pass waits for it, and it never waits for a disk itself.
* **Commitment** is one call, :meth:`TransferScheduler.commit`, right before the first byte goes to its final
  destination.  Before it an op can be dropped.  After it the op runs to its end and its status tells what
  happened; a cancellation or deadline changes nothing any more.
* **Ending** is membership in a set of op ids, never a count: unknown, repeated and late results, halves and
  cancellations change nothing.
* An op that is dropped while STARTED gives its part of a token back at once, but its executor may still be at work on
  the op's DRAM pages.  It is **quarantined** until the executor calls :meth:`TransferScheduler.finished`.

Nothing here blocks, reads a clock or knows a thread: the caller serialises the calls and passes the time.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

import msgspec

from umbp_core.deadlines import Deadlines
from umbp_core.errors import StateError
from umbp_core.op_state import Fate, Half, Limits, OpState, Phase, Transfer
from umbp_core.ops import (
    Direction,
    ImmediateTransferResult,
    LeaderTransferRequest,
    OpResult,
    OpStatus,
    TransferScheduleRequest,
    WorkerTransferRequest,
)
from umbp_core.progress import Progress

__all__ = ["Fate", "Limits", "Message", "Phase", "TransferScheduler"]

Message = TransferScheduleRequest | WorkerTransferRequest | ImmediateTransferResult
"""What :meth:`TransferScheduler.take` understands."""


class TransferScheduler:
    """Rendezvous, requirements, tokens, deadlines and results of one worker's ops.  One thread at a time.

    Every call costs time in proportion to the ops that it changes, whatever else is pending.
    """

    def __init__(self, limits: Limits | None = None) -> None:
        self._limits = limits if limits is not None else Limits()
        self._tokens = self._limits.tokens()
        self._ops: dict[str, OpState] = {}
        self._by_request: dict[str, dict[str, None]] = {}
        self._ready: dict[Direction, deque[OpState]] = {direction: deque() for direction in Direction}
        self._awaited: deque[OpState] = deque()
        self._progress = Progress()
        self._deadlines = Deadlines()
        self._results: list[OpResult] = []
        self._ended: set[str] = set()
        self._ended_order: deque[str] = deque()
        self._quarantine: dict[str, None] = {}
        self._released: list[str] = []

    def take(self, message: Message, now: float) -> None:
        """Any message about an op, from whichever side; each kind as its own method says."""
        _DOORS[type(message)](self, message, now)

    def submit(self, leader: LeaderTransferRequest, now: float) -> None:
        """The leader's half arrived.

        A repetition, or the half of an op that has ended, changes nothing.  Raises ``StateError``, with
        nothing changed, when the half contradicts what is known under its op id.
        """
        known = self._ops.get(leader.op_id)
        if known is not None and known.leader is not None:
            if known.leader != leader:
                raise _contradiction(leader.op_id)
            return
        op = self._op_of(leader)
        if op is None:
            return
        op.leader = leader
        self._deadlines.set(op.op_id, now + (leader.timeout_s if leader.timeout_s > 0 else 0.0))
        if op.paired or leader.immediate:
            self._pair(op, leader)

    def enqueue(self, worker: WorkerTransferRequest, now: float) -> None:
        """The worker's half arrived; otherwise as :meth:`submit`.

        Without a partner it is given up after ``Limits.orphan_timeout_s``.
        """
        op = self._op_of(worker)
        if op is None or op.paired:
            return
        op.paired = True
        if op.leader is None:
            self._deadlines.set(op.op_id, now + self._limits.orphan_timeout_s)
        elif op.phase is Phase.HALF:
            self._pair(op, op.leader)

    def immediate_done(self, immediate: ImmediateTransferResult) -> None:
        """An immediate op ended that was carried out elsewhere; it counts once, whatever of it is known here.

        One that this scheduler started ends by its own executor's word.  Raises ``StateError`` as :meth:`submit`.
        """
        op = self._op_of(immediate)
        if op is not None and op.phase < Phase.STARTED:
            status, failed = immediate.status, immediate.failed
            self._end(op, OpResult(op.op_id, op.request_id, op.direction, status, failed, reason=immediate.reason))

    def begin_iteration(self, iteration: int) -> None:
        """The worker starts the leader's step ``iteration``; numbers that do not grow are ignored."""
        self._progress.begin_iteration(iteration)

    def layer_done(self, name: str, index: int) -> None:
        """A layer of the current iteration was computed."""
        self._make_ready(self._progress.layer_done(name, index))

    def end_iteration(self, iteration: int) -> None:
        """The worker ended step ``iteration`` and, with it, every earlier one; repetitions are ignored."""
        self._make_ready(self._progress.end_iteration(iteration))

    def poll(self, now: float) -> list[LeaderTransferRequest]:
        """Start ops: the caller must execute each returned one.

        Layer-wise loads come first and take no token.  Ops whose deadline has passed are expired first and never
        started.
        """
        self.expire(now)
        started: list[LeaderTransferRequest] = []
        while self._awaited:
            self._start(self._awaited.popleft(), now, started)
        for direction, ready in self._ready.items():
            transfer: Transfer | None = None
            while ready:
                op = ready[0]
                if op.phase is Phase.READY:
                    if transfer is None or op.blocks > transfer.room:
                        if not self._tokens[direction]:
                            break
                        self._tokens[direction] -= 1
                        transfer = Transfer(self._limits.blocks)
                    op.transfer = transfer
                    transfer.add(op.blocks)
                self._start(ready.popleft(), now, started)
        return started

    @staticmethod
    def _start(op: OpState, now: float, started: list[LeaderTransferRequest]) -> None:
        if op.phase is Phase.READY and op.leader is not None:
            op.phase = Phase.STARTED
            op.started_at = now
            started.append(op.leader)

    def commit(self, op_id: str) -> bool:
        """The commitment point: the executor is about to write the first byte to its final destination.

        True exactly once per op.  False means that the op was dropped meanwhile (or was never started):
        its destination must not be touched.
        """
        op = self._ops.get(op_id)
        if op is None or op.phase is not Phase.STARTED:
            return False
        op.phase = Phase.COMMITTED
        self._deadlines.discard(op_id)
        return True

    def is_running(self, op_id: str) -> bool:
        """Whether the op was started and has not ended; an executor may stop working on others."""
        op = self._ops.get(op_id)
        return op is not None and op.phase >= Phase.STARTED

    def finished(self, result: OpResult, now: float) -> bool:
        """The executor is through with an op, and no longer touches any of its memory.

        Returns whether this ended the op.  Otherwise the op had been dropped before, which releases it from
        quarantine, or it is unknown, repeated or not started, which changes nothing.  Raises ``StateError``
        for an op that says ``DONE`` and was never committed.
        """
        if result.op_id in self._quarantine:
            del self._quarantine[result.op_id]
            self._released.append(result.op_id)
            return False
        op = self._ops.get(result.op_id)
        if op is None or op.phase < Phase.STARTED:
            return False
        if result.status is OpStatus.DONE and op.phase is not Phase.COMMITTED:
            raise StateError(f"op {op.op_id} is reported as done but was not committed; commit before the first byte")
        seconds = max(0.0, now - op.started_at)
        self._end(
            op,
            msgspec.structs.replace(result, request_id=op.request_id, direction=op.direction, seconds=seconds),
        )
        return True

    def cancel(self, op_id: str) -> bool:
        """Drop an op unless it is committed; returns whether this ended it."""
        op = self._ops.get(op_id)
        if op is None or op.phase is Phase.COMMITTED:
            return False
        self._drop(op, OpStatus.CANCELLED, "cancelled")
        return True

    def cancel_request(self, request_id: str) -> int:
        """Drop the request's ops that are not committed; returns how many that ended."""
        return sum(self.cancel(op_id) for op_id in tuple(self._by_request.get(request_id, ())))

    def cancel_all(self, reason: str) -> None:
        """Drop every op that is not committed."""
        for op in tuple(self._ops.values()):
            if op.phase is not Phase.COMMITTED:
                self._drop(op, OpStatus.CANCELLED, reason)

    def expire(self, now: float) -> None:
        """Drop the ops whose deadline is at or before ``now`` and that are not committed."""
        for op_id in self._deadlines.pop_expired(now):
            op = self._ops[op_id]
            self._drop(op, OpStatus.EXPIRED, f"deadline_{op.phase.name.lower()}")

    def abort(self) -> None:
        """End every op as ``CANCELLED``, committed ones too: for a shutdown that waits no longer."""
        for op in tuple(self._ops.values()):
            self._drop(op, OpStatus.CANCELLED, "closed")

    def take_results(self) -> list[OpResult]:
        """The results since the last call, in the order in which the ops ended; each op has exactly one."""
        results, self._results = self._results, []
        return results

    def take_released(self) -> list[str]:
        """The op ids that left the quarantine since the last call."""
        released, self._released = self._released, []
        return released

    def quarantined(self) -> frozenset[str]:
        """Ops that were reported while their executor was still at work on their DRAM pages."""
        return frozenset(self._quarantine)

    def next_deadline(self) -> float | None:
        """When :meth:`expire` will have something to do; ``None`` for never."""
        return self._deadlines.next()

    def has_ended(self, op_id: str) -> bool:
        """Whether the op is not pending: it ended, or was never seen."""
        return op_id not in self._ops

    def account_for(self, leader: LeaderTransferRequest, now: float) -> Fate:
        """What became of an op whose end the leader has not heard of.  One that was never seen is never carried out.

        An op that ended longer ago than ``Limits.remember`` others counts as never seen.
        """
        if leader.op_id in self._quarantine:
            return Fate.QUARANTINED
        if leader.op_id in self._ended:
            return Fate.ENDED
        if leader.op_id in self._ops:
            return Fate.PENDING
        self.submit(leader, now)
        self._drop(self._ops[leader.op_id], OpStatus.CANCELLED, "lost")
        return Fate.REFUSED

    def pending(self) -> int:
        """Ops that were seen and have not ended."""
        return len(self._ops)

    def dump(self) -> list[dict[str, object]]:
        """One line per pending op, for logs and debugging."""
        return [
            {
                "op_id": op.op_id,
                "request_id": op.request_id,
                "direction": op.direction.name,
                "phase": op.phase.name,
                "leader_half": op.leader is not None,
                "worker_half": op.paired,
                "blocks": op.blocks,
            }
            for op in self._ops.values()
        ]

    def _op_of(self, half: Half) -> OpState | None:
        """The op that the half belongs to, created when it is the first one; None when it has ended."""
        if half.op_id in self._ended:
            return None
        op = self._ops.get(half.op_id)
        if op is None:
            op = self._ops[half.op_id] = OpState(half)
            self._by_request.setdefault(op.request_id, {})[op.op_id] = None
        elif (op.request_id, op.direction) != (half.request_id, half.direction):
            raise _contradiction(half.op_id)
        return op

    def _pair(self, op: OpState, leader: LeaderTransferRequest) -> None:
        op.phase = Phase.WAITING
        if self._progress.wait(op.op_id, leader.requirement):
            self._make_ready([op.op_id])

    def _make_ready(self, op_ids: list[str]) -> None:
        for op_id in op_ids:
            op = self._ops[op_id]
            op.phase = Phase.READY
            (self._awaited if op.is_layerwise else self._ready[op.direction]).append(op)

    def _drop(self, op: OpState, status: OpStatus, reason: str) -> None:
        quarantined = op.phase >= Phase.STARTED
        if quarantined:
            self._quarantine[op.op_id] = None
        failed = tuple(range(op.blocks))
        self._end(
            op,
            OpResult(op.op_id, op.request_id, op.direction, status, failed, reason=reason, quarantined=quarantined),
        )

    def _end(self, op: OpState, result: OpResult) -> None:
        """The only way out: books the op off everywhere and keeps its one result."""
        transfer = op.transfer
        if transfer is not None:
            transfer.ops -= 1
            if not transfer.ops:
                self._tokens[op.direction] += 1
        op.phase = Phase.ENDED
        del self._ops[op.op_id]
        of_request = self._by_request[op.request_id]
        del of_request[op.op_id]
        if not of_request:
            del self._by_request[op.request_id]
        self._progress.discard(op.op_id)
        self._deadlines.discard(op.op_id)
        self._ended.add(op.op_id)
        self._ended_order.append(op.op_id)
        if len(self._ended_order) > self._limits.remember:
            self._ended.discard(self._ended_order.popleft())
        self._results.append(result)


_DOORS: dict[type[Message], Callable[[TransferScheduler, Any, float], None]] = {
    TransferScheduleRequest: lambda scheduler, message, now: scheduler.submit(message.leader_request, now),
    WorkerTransferRequest: lambda scheduler, message, now: scheduler.enqueue(message, now),
    ImmediateTransferResult: lambda scheduler, message, now: scheduler.immediate_done(message),
}


def _contradiction(op_id: str) -> StateError:
    return StateError(f"op {op_id} came again with different contents; the first is kept, give every op its own id")
