"""A hypothesis machine that drives a transfer scheduler beside a plain model.

Subclass it with another ``make`` to check an implementation of your own; run it as
``SchedulerMachine.TestCase`` under pytest or unittest.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from umbp_core.errors import StateError
from umbp_core.ops import (
    BlockCopy,
    Direction,
    ImmediateTransferResult,
    LeaderTransferRequest,
    OpResult,
    OpStatus,
    Requirement,
    RequirementKind,
    WorkerTransferRequest,
)
from umbp_core.scheduler import Limits, TransferScheduler
from umbp_core.testing.models_transfer import SchedulerModel

requests = st.sampled_from(["r0", "r1", "r2"])
numbers = st.integers(0, 7)
iterations = st.integers(0, 4)
requirements = st.builds(
    Requirement,
    st.sampled_from(RequirementKind),
    iterations,
    st.sampled_from(["layer.0", "layer.1"]),
    st.integers(0, 1),
)
#: Three blocks at most, so that "all of them" differs from op to op.
block_lists = st.integers(0, 3).map(lambda n: tuple(BlockCopy(b"k%d" % i, 0, i, i) for i in range(n)))


class SchedulerMachine(RuleBasedStateMachine):
    """Law L4 and the rendezvous: halves, progress, cancellations, deadlines and results in any order."""

    limits = Limits(loads=2, stores=1, demotions=1, orphan_timeout_s=5.0, blocks=4)

    def __init__(self) -> None:
        super().__init__()
        self.scheduler = self.make(self.limits)
        self.model = SchedulerModel(self.limits)
        self.now = 100.0
        self.reported: dict[str, OpStatus] = {}
        self.generation = [0] * 8

    def make(self, limits: Limits) -> TransferScheduler:
        """The scheduler under test."""
        return TransferScheduler(limits)

    @rule(
        number=numbers,
        request=requests,
        direction=st.sampled_from(Direction),
        blocks=block_lists,
        requirement=requirements,
        immediate=st.booleans(),
        timeout=st.sampled_from([0.0, 1.0, 3.0, 30.0]),
        worker_too=st.booleans(),
    )
    def submit(
        self,
        number: int,
        request: str,
        direction: Direction,
        blocks: tuple[BlockCopy, ...],
        requirement: Requirement,
        immediate: bool,
        timeout: float,
        worker_too: bool,
    ) -> None:
        """A leader's half: new, a repetition, a contradiction, or of an op that is over."""
        op_id = self._id(number)
        leader = LeaderTransferRequest(op_id, request, direction, blocks, requirement, immediate, timeout)
        self._half(self.model.submit(leader, self.now), lambda: self.scheduler.submit(leader, self.now))
        if worker_too:
            self.enqueue(number, request, direction)

    @rule(number=numbers, request=requests, direction=st.sampled_from(Direction))
    def enqueue(self, number: int, request: str, direction: Direction) -> None:
        """A worker's half."""
        worker = WorkerTransferRequest(self._id(number), request, direction)
        self._half(self.model.enqueue(worker, self.now), lambda: self.scheduler.enqueue(worker, self.now))

    @rule(
        number=numbers,
        request=requests,
        direction=st.sampled_from(Direction),
        status=st.sampled_from(OpStatus),
        failed=st.sampled_from([(), (0,)]),
    )
    def carried_out_elsewhere(
        self, number: int, request: str, direction: Direction, status: OpStatus, failed: tuple[int, ...]
    ) -> None:
        """The result of an immediate op, before, after or without its halves."""
        immediate = ImmediateTransferResult(self._id(number), request, direction, status, failed, "elsewhere")
        self._half(self.model.immediate_done(immediate), lambda: self.scheduler.take(immediate, self.now))

    @rule(number=numbers, request=requests, direction=st.sampled_from(Direction), blocks=block_lists)
    def ask(self, number: int, request: str, direction: Direction, blocks: tuple[BlockCopy, ...]) -> None:
        """The leader asks about an op, which may never have come here."""
        leader = LeaderTransferRequest(self._id(number), request, direction, blocks)
        assert self.scheduler.account_for(leader, self.now) is self.model.account_for(leader, self.now)

    @rule(number=numbers)
    def repeat(self, number: int) -> None:
        """Both halves of a pending op once more."""
        op = self.model.ops.get(self._id(number))
        if op is not None:
            self.enqueue(number, op.request_id, op.direction)
            if op.leader is not None:
                self.scheduler.submit(op.leader, self.now + 1000.0)

    @rule(n=iterations)
    def begin_iteration(self, n: int) -> None:
        """Also backwards and with gaps."""
        self.scheduler.begin_iteration(n)
        self.model.begin_iteration(n)
        self.model.settle()

    @rule(n=iterations)
    def end_iteration(self, n: int) -> None:
        """Also repeatedly."""
        self.scheduler.end_iteration(n)
        self.model.end_iteration(n)
        self.model.settle()

    @rule(index=st.integers(0, 1))
    def layer_done(self, index: int) -> None:
        """A layer, by both of its names."""
        self.scheduler.layer_done(f"layer.{index}", index)
        self.model.layers.add((f"layer.{index}", index))
        self.model.settle()

    @rule()
    def poll(self) -> None:
        """Start what may start."""
        self.model.check_poll(self.scheduler.poll(self.now), self.now)

    @rule(number=numbers)
    def commit(self, number: int) -> None:
        """The commitment point, for any op."""
        op_id = self._id(number)
        assert self.scheduler.commit(op_id) == self.model.commit(op_id)

    @rule(number=numbers, status=st.sampled_from(OpStatus), failed=st.sampled_from([(), (0,), (0, 2)]))
    def finished(self, number: int, status: OpStatus, failed: tuple[int, ...]) -> None:
        """An executor reports, rightly or not."""
        op_id = self._id(number)
        result = OpResult(op_id, "", Direction.LOAD, status, failed, reason="executor")
        op = self.model.ops.get(op_id)
        if op is not None and op.state == "started" and status is OpStatus.DONE:
            with suppress(StateError):
                self.scheduler.finished(result, self.now)
                raise AssertionError("done without commitment was accepted")
            return
        assert self.scheduler.finished(result, self.now) == self.model.finished(op_id, status, failed, "executor")

    @rule(number=numbers, request=requests, direction=st.sampled_from(Direction), blocks=block_lists)
    def start(self, number: int, request: str, direction: Direction, blocks: tuple[BlockCopy, ...]) -> None:
        """A new op that waits for nothing but a token."""
        if self._id(number) in self.model.ended | self.model.ops.keys():
            return
        self.submit(number, request, direction, blocks, Requirement(), True, 30.0, False)
        self.poll()

    @precondition(lambda self: self._in("started"))
    @rule(data=st.data(), then=st.sampled_from([None, *OpStatus]))
    def execute(self, data: st.DataObject, then: OpStatus | None) -> None:
        """A started op commits and, perhaps at once, ends."""
        number = data.draw(st.sampled_from(self._in("started")))
        self.commit(number)
        if then is not None:
            self.finished(number, then, (1,))

    @precondition(lambda self: self._in("committed"))
    @rule(data=st.data(), status=st.sampled_from(OpStatus), twice=st.booleans())
    def complete(self, data: st.DataObject, status: OpStatus, twice: bool) -> None:
        """A committed op ends; its result may come twice."""
        number = data.draw(st.sampled_from(self._in("committed")))
        self.finished(number, status, ())
        if twice:
            self.finished(number, OpStatus.FAILED, (0,))

    @precondition(lambda self: self.model.quarantine)
    @rule(data=st.data())
    def let_go(self, data: st.DataObject) -> None:
        """The executor of a dropped op is through with its memory."""
        op_id = data.draw(st.sampled_from(sorted(self.model.quarantine)))
        assert not self.scheduler.finished(OpResult(op_id, "", Direction.LOAD, OpStatus.CANCELLED), self.now)
        assert not self.model.finished(op_id, OpStatus.CANCELLED, (), "")

    @rule(number=numbers)
    def cancel(self, number: int) -> None:
        """One op, known or not."""
        op_id = self._id(number)
        assert self.scheduler.cancel(op_id) == self.model.cancel(op_id)

    @rule(request=requests)
    def cancel_request(self, request: str) -> None:
        """All ops of a request."""
        mine = [op.op_id for op in self.model.ops.values() if op.request_id == request]
        assert self.scheduler.cancel_request(request) == sum([self.model.cancel(op_id) for op_id in mine])

    @rule(seconds=st.sampled_from([0.5, 1.0, 4.0]), expire=st.booleans())
    def time_passes(self, seconds: float, expire: bool) -> None:
        """With or without anyone noticing."""
        self.now += seconds
        if expire:
            self.scheduler.expire(self.now)
            self.model.expire(self.now)

    @precondition(lambda self: len(self.model.ops) > 2)
    @rule(committed=st.booleans())
    def end_all(self, committed: bool) -> None:
        """Shutdown, in its two steps."""
        if committed:
            self.scheduler.abort()
        else:
            self.scheduler.cancel_all("closed")
        for op_id in tuple(self.model.ops):
            self.model.cancel(op_id, "closed", committed)

    @rule(number=numbers)
    def renew(self, number: int) -> None:
        """An id that is used up makes room for a new one."""
        if self._id(number) in self.model.ended:
            self.generation[number] += 1

    @rule()
    def take(self) -> None:
        """Every op has exactly one result, in the order of their ends."""
        results = self.scheduler.take_results()
        expected, self.model.results = self.model.results, []
        found = [(r.op_id, r.status, r.failed, r.reason, r.quarantined) for r in results]
        assert found == [(e.op_id, e.status, e.failed, e.reason, e.quarantined) for e in expected]
        for result in results:
            assert result.op_id not in self.reported, "a second result"
            assert result.seconds >= 0.0
            self.reported[result.op_id] = result.status
        assert self.scheduler.take_released() == self.model.released
        self.model.released = []

    @invariant()
    def same(self) -> None:
        """What is pending, how far, until when."""
        dump = self.scheduler.dump()
        found = {
            (line["op_id"], line["request_id"], line["direction"], line["phase"], line["worker_half"]) for line in dump
        }
        expected = {(op.op_id, op.request_id, op.direction.name, op.phase, op.worker) for op in self.model.ops.values()}
        assert found == expected
        assert len(dump) == self.scheduler.pending() == len(self.model.ops)
        assert self.scheduler.next_deadline() == self.model.next_deadline()
        assert self.scheduler.quarantined() == frozenset(self.model.quarantine)
        for op_id in map(self._id, range(8)):
            op = self.model.ops.get(op_id)
            assert self.scheduler.has_ended(op_id) == (op is None)
            assert self.scheduler.is_running(op_id) == (op is not None and op.state != "open")

    def teardown(self) -> None:
        """Whatever happened, an abort leaves nothing pending and every op with one result."""
        self.scheduler.abort()
        for op_id in tuple(self.model.ops):
            self.model.cancel(op_id, "closed", committed=True)
        self.take()
        assert self.scheduler.pending() == 0
        assert self.scheduler.next_deadline() is None
        assert self.reported.keys() == self.model.ended

    def _id(self, number: int) -> str:
        return f"op{number}.{self.generation[number]}"

    def _in(self, state: str) -> list[int]:
        """The numbers of the ops in a state of the model."""
        ops = self.model.ops
        return [n for n in range(8) if self._id(n) in ops and ops[self._id(n)].state == state]

    def _half(self, accepted: bool, real: Callable[[], None]) -> None:
        before = (self.scheduler.dump(), self.scheduler.next_deadline())
        if accepted:
            real()
            self.model.settle()
            return
        try:
            real()
        except StateError:
            assert (self.scheduler.dump(), self.scheduler.next_deadline()) == before
        else:
            raise AssertionError("a contradicting half was accepted")
