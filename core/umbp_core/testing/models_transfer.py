"""Plain models of the slot and of the transfer scheduler: slow, obvious, and written without their tables.

A model says what should happen; the machines in :mod:`umbp_core.testing.machines_slots` and
:mod:`umbp_core.testing.machines_transfer` do the same to the model and to the real thing and compare.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from umbp_core.ops import (
    Direction,
    ImmediateTransferResult,
    LeaderTransferRequest,
    OpStatus,
    Requirement,
    RequirementKind,
    WorkerTransferRequest,
)
from umbp_core.scheduler import Fate, Limits
from umbp_core.slots import Life, Transaction


@dataclass
class SlotModel:
    """One slot, told in facts instead of states."""

    staged: int = 0
    """Tokens of the match that is held or being loaded."""
    running: str = ""
    """``"prefill"`` or ``"decode"`` while the engine computes with the request's HBM blocks."""
    skipped: bool = False
    was_preempted: bool = False
    """Preempted, and neither matched nor scheduled since."""
    over: bool = False
    failed: bool = False
    """A load failed, and ops have been in flight ever since."""
    loads: set[str] = field(default_factory=set)
    stores: set[str] = field(default_factory=set)

    @property
    def holds_match(self) -> bool:
        """Matched, the load not begun."""
        return self.staged > 0 and not self.loads and not self.over

    @property
    def life(self) -> Life:
        """The state that these facts are called."""
        if self.over:
            return Life.FINISHING if self.loads or self.stores else Life.FINISHED
        if self.loads:
            return Life.ONBOARDING
        if self.staged:
            return Life.ONBOARD_STAGED
        names = {
            "prefill": (Life.PREFILLING, Life.SKIPPED_PREFILL),
            "decode": (Life.DECODING, Life.SKIPPED_DECODE),
            "": (Life.INITIALIZED, Life.PREEMPTED),
        }
        return names[self.running][self.skipped or self.was_preempted]

    @property
    def transaction(self) -> Transaction:
        """The state that the ops in flight are called."""
        if self.failed:
            return Transaction.FAILED
        names = {
            (False, False): Transaction.NONE,
            (True, False): Transaction.LOADING,
            (False, True): Transaction.STORING,
            (True, True): Transaction.LOADING_AND_STORING,
        }
        return names[bool(self.loads), bool(self.stores)]

    @property
    def may_match(self) -> bool:
        """Nothing runs, no load is in flight, nothing failed that has not drained."""
        return not (self.over or self.running or self.loads or self.failed)

    @property
    def may_onboard(self) -> bool:
        """A match is held or being loaded; a failed load takes no further ones."""
        return self.staged > 0 and not self.over and not self.failed

    @property
    def may_store(self) -> bool:
        """The request computes, and no failed load is draining."""
        return bool(self.running) and not self.over and not self.failed

    @property
    def may_be_scheduled(self) -> bool:
        """No match is held or being loaded."""
        return not self.over and not self.staged and not self.loads

    @property
    def may_be_preempted(self) -> bool:
        """It has HBM blocks that the engine computes with."""
        return bool(self.running) and not self.over

    def schedule(self, decoding: bool) -> None:
        """In the step."""
        self.running = "decode" if decoding else "prefill"
        self.skipped = self.was_preempted = False

    def preempt(self) -> None:
        """Out of HBM."""
        self.running = ""
        self.skipped = False
        self.was_preempted = True

    def stage(self, n_tokens: int) -> None:
        """Matched."""
        self.staged = n_tokens
        self.was_preempted = False

    def finish(self) -> None:
        """Over, whatever is in flight."""
        self.over = True
        if not self.loads:
            self.staged = 0

    def end(self, op_id: str, status: OpStatus) -> bool:
        """An op ended; False when it was not in flight."""
        if op_id not in self.loads | self.stores:
            return False
        if op_id in self.loads and status is not OpStatus.DONE:
            self.failed = True
        if self.loads == {op_id}:
            self.staged = 0
        self.loads.discard(op_id)
        self.stores.discard(op_id)
        if not self.loads and not self.stores:
            self.failed = False
        return True


@dataclass
class OpModel:
    """One op of the scheduler's model."""

    op_id: str
    request_id: str
    direction: Direction
    leader: LeaderTransferRequest | None = None
    worker: bool = False
    deadline: float = 0.0
    ready_since: int = -1
    """The number of the event that made it ready; -1 before."""
    state: str = "open"
    """``open``, then ``started``, then ``committed``."""
    started_at: float = 0.0
    token: int = 0
    """The token that it holds, perhaps with others."""

    @property
    def is_paired(self) -> bool:
        """Both halves are there, or one is enough."""
        return self.leader is not None and (self.worker or self.leader.immediate)

    @property
    def phase(self) -> str:
        """The scheduler's name for how far it is."""
        if self.state != "open":
            return self.state.upper()
        if not self.is_paired:
            return "HALF"
        return "WAITING" if self.ready_since < 0 else "READY"


@dataclass(frozen=True)
class Ended:
    """How an op should be reported."""

    op_id: str
    status: OpStatus
    failed: tuple[int, ...]
    reason: str
    quarantined: bool


class SchedulerModel:
    """What :class:`~umbp_core.scheduler.TransferScheduler` promises, by looking at everything every time."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.ops: dict[str, OpModel] = {}
        self.ended: set[str] = set()
        self.results: list[Ended] = []
        self.quarantine: set[str] = set()
        self.released: list[str] = []
        self.current = -1
        self.completed = -1
        self.layers: set[tuple[str, int]] = set()
        self.events = 0
        self.tokens = 0

    def holds(self, requirement: Requirement) -> bool:
        """Whether the requirement is met by what happened so far."""
        if requirement.kind is RequirementKind.NONE or requirement.iteration <= self.completed:
            return True
        if requirement.iteration != self.current:
            return False
        by_name = requirement.kind is RequirementKind.LAYER_NAME_COMPLETE
        by_index = requirement.kind is RequirementKind.LAYER_COMPLETE
        return any(
            (by_name and name == requirement.layer_name) or (by_index and index == requirement.layer_index)
            for name, index in self.layers
        )

    def settle(self) -> None:
        """After every event: note which ops became ready by it."""
        self.events += 1
        for op in self.ops.values():
            if op.ready_since < 0 and op.is_paired and op.leader is not None and self.holds(op.leader.requirement):
                op.ready_since = self.events

    def submit(self, leader: LeaderTransferRequest, now: float) -> bool:
        """The leader's half; False when it contradicts."""
        op = self.ops.get(leader.op_id)
        if leader.op_id in self.ended:
            return True
        if op is not None and (op.request_id, op.direction) != (leader.request_id, leader.direction):
            return False
        if op is not None and op.leader is not None:
            return op.leader == leader
        op = self.ops.setdefault(leader.op_id, OpModel(leader.op_id, leader.request_id, leader.direction))
        op.leader = leader
        op.deadline = now + leader.timeout_s
        return True

    def enqueue(self, worker: WorkerTransferRequest, now: float) -> bool:
        """The worker's half; False when it contradicts."""
        op = self.ops.get(worker.op_id)
        if worker.op_id in self.ended:
            return True
        if op is not None and (op.request_id, op.direction) != (worker.request_id, worker.direction):
            return False
        op = self.ops.setdefault(worker.op_id, OpModel(worker.op_id, worker.request_id, worker.direction))
        if op.leader is None and not op.worker:
            op.deadline = now + self.limits.orphan_timeout_s
        op.worker = True
        return True

    def immediate_done(self, immediate: ImmediateTransferResult) -> bool:
        """An op was carried out elsewhere; False when it contradicts."""
        op = self.ops.get(immediate.op_id)
        if immediate.op_id in self.ended:
            return True
        if op is not None and (op.request_id, op.direction) != (immediate.request_id, immediate.direction):
            return False
        op = self.ops.setdefault(immediate.op_id, OpModel(immediate.op_id, immediate.request_id, immediate.direction))
        if op.state == "open":
            self._end(op, Ended(op.op_id, immediate.status, immediate.failed, immediate.reason, quarantined=False))
        return True

    def account_for(self, leader: LeaderTransferRequest, now: float) -> Fate:
        """What is said about an op that was asked about."""
        if leader.op_id in self.quarantine:
            return Fate.QUARANTINED
        if leader.op_id in self.ended:
            return Fate.ENDED
        if leader.op_id in self.ops:
            return Fate.PENDING
        self.submit(leader, now)
        self.cancel(leader.op_id, "lost")
        return Fate.REFUSED

    def begin_iteration(self, iteration: int) -> None:
        """A step starts."""
        if iteration > self.current:
            self.current = iteration
            self.layers = set()

    def end_iteration(self, iteration: int) -> None:
        """A step ends, and all before."""
        if iteration > self.completed:
            self.begin_iteration(iteration)
            self.completed = iteration

    def free(self, direction: Direction) -> int:
        """Tokens of a direction that nobody holds."""
        held = {op.token for op in self.ops.values() if op.direction is direction and op.state != "open"}
        return self.limits.tokens()[direction] - len(held)

    def may_start(self, direction: Direction, places: dict[str, int]) -> list[OpModel]:
        """The ops of a direction that start next, each with the token that it shares.

        ``places`` orders those that became ready by the same event; whoever is not named comes last.
        """
        ready = [op for op in self.ops.values() if op.direction is direction and op.phase == "READY"]
        left, room = self.free(direction), 0
        starting: list[OpModel] = []
        for op in sorted(ready, key=lambda op: (op.ready_since, places.get(op.op_id, len(places)))):
            need = len(op.leader.blocks) if op.leader is not None else 0
            if not starting or need > room:
                if not left:
                    break
                left, room = left - 1, self.limits.blocks
                self.tokens += 1
            op.token = self.tokens
            room -= max(1, need)
            starting.append(op)
        return starting

    def check_poll(self, started: list[LeaderTransferRequest], now: float) -> None:
        """Expire, then check that ``started`` is what may start, in an order that is right; start them."""
        self.expire(now)
        assert [op.direction for op in started] == sorted(op.direction for op in started), "loads, stores, demotions"
        for direction in Direction:
            mine = [self.ops[op.op_id] for op in started if op.direction is direction]
            assert all(op.phase == "READY" for op in mine)
            since = [op.ready_since for op in mine]
            assert since == sorted(since), "in the order in which they became ready"
            places = {op.op_id: place for place, op in enumerate(mine)}
            assert mine == self.may_start(direction, places), "whoever fits, and nobody overtakes"
        for leader in started:
            assert self.ops[leader.op_id].leader == leader
            self.ops[leader.op_id].state = "started"
            self.ops[leader.op_id].started_at = now

    def commit(self, op_id: str) -> bool:
        """True once, for a started op."""
        op = self.ops.get(op_id)
        if op is None or op.state != "started":
            return False
        op.state = "committed"
        return True

    def finished(self, op_id: str, status: OpStatus, failed: tuple[int, ...], reason: str) -> bool:
        """The executor is through."""
        if op_id in self.quarantine:
            self.quarantine.discard(op_id)
            self.released.append(op_id)
            return False
        op = self.ops.get(op_id)
        if op is None or op.state == "open":
            return False
        self._end(op, Ended(op_id, status, failed, reason, quarantined=False))
        return True

    def cancel(self, op_id: str, reason: str = "cancelled", committed: bool = False) -> bool:
        """Drop it, unless it is committed."""
        op = self.ops.get(op_id)
        if op is None or (op.state == "committed" and not committed):
            return False
        self._drop(op, OpStatus.CANCELLED, reason)
        return True

    def expire(self, now: float) -> None:
        """Drop what is late."""
        late = [op for op in self.ops.values() if op.deadline <= now and op.state != "committed"]
        for op in sorted(late, key=lambda op: (op.deadline, op.op_id)):
            self._drop(op, OpStatus.EXPIRED, f"deadline_{op.phase.lower()}")

    def next_deadline(self) -> float | None:
        """The earliest deadline of an op that can still be dropped."""
        return min((op.deadline for op in self.ops.values() if op.state != "committed"), default=None)

    def _drop(self, op: OpModel, status: OpStatus, reason: str) -> None:
        blocks = len(op.leader.blocks) if op.leader is not None else 0
        started = op.state != "open"
        if started:
            self.quarantine.add(op.op_id)
        self._end(op, Ended(op.op_id, status, tuple(range(blocks)), reason, started))

    def _end(self, op: OpModel, result: Ended) -> None:
        del self.ops[op.op_id]
        self.ended.add(op.op_id)
        self.results.append(result)
