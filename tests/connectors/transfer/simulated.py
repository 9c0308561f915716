"""A leader and its ranks in virtual time: the real ledger, schedulers and slots, with played channels and executors."""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from umbp_connectors.leader.ledger import OpLedger, Verdict
from umbp_core.ops import (
    BlockCopy,
    Direction,
    LeaderTransferRequest,
    NewWorkerSlot,
    OpResult,
    OpStatus,
    Requirement,
    RequirementKind,
    TransferScheduleRequest,
    WorkerTransferRequest,
)
from umbp_core.scheduler import Fate, Limits, TransferScheduler
from umbp_core.testing.fakes import FakeClock
from umbp_core.worker_slots import WorkerSlots

STEP_S = 0.5
"""What a step takes."""

Delivery = Callable[[], None]
Judge = Callable[[str], Sequence[int]]
"""After how many steps a message arrives, once for each number; none: never."""


def at_once(_: str) -> Sequence[int]:
    """Nothing happens to a message."""
    return (0,)


@dataclass
class Channel:
    """Carries deliveries, each as ``judge`` says."""

    judge: Judge = at_once
    sent: list[str] = field(default_factory=list)
    _due: list[tuple[int, Delivery]] = field(default_factory=list)

    def send(self, kind: str, delivery: Delivery) -> None:
        """One message."""
        self.sent.append(kind)
        self._due += [(steps, delivery) for steps in self.judge(kind)]

    def deliver(self) -> None:
        """What has arrived by now, in the order of sending."""
        arrived = [delivery for steps, delivery in self._due if steps <= 0]
        self._due = [(steps - 1, delivery) for steps, delivery in self._due if steps > 0]
        for delivery in arrived:
            delivery()


class Executor:
    """Plays the side that moves bytes: every op takes a while, commits on the way, and may fail."""

    def __init__(self, scheduler: TransferScheduler, rng: random.Random, slowest: int, failing: float) -> None:
        self._scheduler = scheduler
        self._rng = rng
        self._slowest = slowest
        self._failing = failing
        self._running: list[list[Any]] = []

    def start(self, op: LeaderTransferRequest) -> None:
        """An op was started."""
        left = self._rng.randint(0, self._slowest)
        self._running.append([left, self._rng.randint(0, left), op])

    def step(self, now: float) -> None:
        """Some time passes."""
        for entry in self._running:
            left, commit_at, op = entry
            if left == commit_at:
                self._scheduler.commit(op.op_id)
            if left == 0:
                self._scheduler.finished(self._result(op), now)
            entry[0] -= 1
        self._running = [entry for entry in self._running if entry[0] >= 0]

    def _result(self, op: LeaderTransferRequest) -> OpResult:
        if not self._scheduler.is_running(op.op_id):
            return OpResult(op.op_id, op.request_id, op.direction, OpStatus.CANCELLED)
        if self._rng.random() < self._failing:
            return OpResult(op.op_id, op.request_id, op.direction, OpStatus.FAILED, (0,), reason="io")
        return OpResult(op.op_id, op.request_id, op.direction, OpStatus.DONE, checksums=b"s" * 16 * len(op.blocks))


class Rank:
    """One worker: what it hears, what it does, what it says."""

    def __init__(self, number: int, clock: FakeClock, rng: random.Random, slowest: int, failing: float) -> None:
        self.number = number
        self.clock = clock
        self.scheduler = TransferScheduler(Limits(orphan_timeout_s=5.0))
        self.slots = WorkerSlots()
        self.executor = Executor(self.scheduler, rng, slowest, failing)
        self.finished: Counter[str] = Counter()
        """How often each request was reported to its engine as loaded."""
        self.released: list[str] = []
        self.results: list[OpResult] = []
        self._slotted: set[str] = set()

    def leader_half(self, op: LeaderTransferRequest) -> None:
        """Over the channel of the bytes.  Whatever tells of a load first has the engine wait for it."""
        self._expect(op)
        self.scheduler.take(TransferScheduleRequest(op), self.clock())

    def worker_half(self, half: WorkerTransferRequest, slot: NewWorkerSlot | None) -> None:
        """Over the engine's channel."""
        if slot is not None:
            self._open(slot)
        self.scheduler.take(half, self.clock())

    def _open(self, slot: NewWorkerSlot) -> None:
        if not self._slotted.issuperset(slot.op_ids):
            self._slotted.update(slot.op_ids)
            self.slots.open(slot)

    def _expect(self, op: LeaderTransferRequest) -> None:
        if op.direction is Direction.LOAD:
            self._open(NewWorkerSlot(op.request_id, (op.op_id,)))

    def asked(self, op: LeaderTransferRequest) -> None:
        """The leader does not know how the op ended."""
        self._expect(op)
        fate = self.scheduler.account_for(op, self.clock())
        if fate in (Fate.ENDED, Fate.QUARANTINED):
            kept = fate is Fate.QUARANTINED
            self.results.append(
                OpResult(op.op_id, op.request_id, op.direction, OpStatus.FAILED, (0,), reason="lost", quarantined=kept)
            )
        if fate is Fate.ENDED:
            self.released.append(op.op_id)

    def step(self, iteration: int) -> None:
        """One step of the engine."""
        now = self.clock()
        self.scheduler.begin_iteration(iteration)
        self.scheduler.end_iteration(iteration)
        for op in self.scheduler.poll(now):
            self.executor.start(op)
        self.executor.step(now)
        for result in self.scheduler.take_results():
            self.results.append(result)
            if result.op_id in self._slotted:
                self.slots.ended(result)
        self.released += self.scheduler.take_released()
        for slot in self.slots.take_complete():
            self.finished[slot.request_id] += 1


class Cluster:
    """A leader and its ranks; ``judge`` decides about every message between them."""

    def __init__(self, ranks: int, seed: int, judge: Judge = at_once, slowest: int = 6, failing: float = 0.0) -> None:
        self.clock = FakeClock()
        self.ledger = OpLedger(range(ranks), self.clock)
        self.channel = Channel(judge)
        self.ranks = [
            Rank(number, self.clock, random.Random(seed * 100 + number), slowest, failing) for number in range(ranks)
        ]
        self.verdicts: dict[str, Verdict] = {}
        self.per_rank: dict[str, dict[int, OpStatus]] = defaultdict(dict)
        self.iteration = 0
        self.sent: list[LeaderTransferRequest] = []

    def send(self, op: LeaderTransferRequest) -> None:
        """An op to all ranks: its halves over two channels, with a slot where the engine waits for it."""
        self.ledger.open(op)
        self.sent.append(op)
        half = WorkerTransferRequest(op.op_id, op.request_id, op.direction)
        slot = NewWorkerSlot(op.request_id, (op.op_id,)) if op.direction is Direction.LOAD else None
        for rank in self.ranks:
            self.channel.send("leader half", lambda r=rank: r.leader_half(op))
            self.channel.send("worker half", lambda r=rank: r.worker_half(half, slot))

    def cancel(self, op_id: str) -> None:
        """The request of an op is gone."""
        for rank in self.ranks:
            self.channel.send("cancel", lambda r=rank: r.scheduler.cancel(op_id))

    def step(self) -> None:
        """One step everywhere."""
        self.iteration += 1
        self.clock.advance(STEP_S)
        if self.ledger.step():
            for op in self.ledger.overdue():
                for rank in self.ranks:
                    self.channel.send("question", lambda r=rank, o=op: r.asked(o))
        self.channel.deliver()
        for rank in self.ranks:
            rank.step(self.iteration)
            for result in rank.results:
                self.channel.send("result", lambda r=rank.number, s=result: self._take(r, s))
            for op_id in rank.released:
                self.channel.send("release", lambda r=rank.number, o=op_id: self.ledger.release(r, o) and None)
            rank.results, rank.released = [], []

    def _take(self, rank: int, result: OpResult) -> None:
        if result.op_id in self.ledger:
            self.per_rank[result.op_id].setdefault(rank, result.status)
        verdict = self.ledger.add(rank, result)
        if verdict is not None:
            assert result.op_id not in self.verdicts, "a second verdict"
            self.verdicts[result.op_id] = verdict

    def settle(self, most: int) -> int:
        """Step until nothing is under way, ``most`` steps at most; how many that took."""
        for number in range(most):
            if not len(self.ledger) and not self.ledger.quarantined:
                return number
            self.step()
        return most

    def left(self) -> dict[str, object]:
        """What is under way anywhere; empty when all is over."""
        left = {
            "ledger": self.ledger.dump(self.clock()),
            "pending": [rank.scheduler.dump() for rank in self.ranks if rank.scheduler.pending()],
            "slots": [rank.number for rank in self.ranks if len(rank.slots)],
            "quarantine": [rank.number for rank in self.ranks if rank.scheduler.quarantined()],
        }
        return {name: value for name, value in left.items() if value}


def random_op(rng: random.Random, number: int, iteration: int, timeout_s: float = 20.0) -> LeaderTransferRequest:
    """An op of any direction and size; stores wait for a step."""
    direction = rng.choice([Direction.LOAD, Direction.LOAD, Direction.STORE, Direction.DEMOTE])
    requirement = Requirement()
    if direction is Direction.STORE:
        requirement = Requirement(RequirementKind.ITERATION_COMPLETE, iteration + rng.randint(0, 2))
    blocks = tuple(BlockCopy(b"%d" % n, 0, n, n) for n in range(rng.choice((1, 2, 7, 20))))
    return LeaderTransferRequest(f"op{number}", f"r{number}", direction, blocks, requirement, timeout_s=timeout_s)
