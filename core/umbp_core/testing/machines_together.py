"""A hypothesis machine of slots and transfer schedulers together: one leader, two ranks, and messages that wander.

What each of the two does alone is driven by :mod:`~umbp_core.testing.machines_slots` and
:mod:`~umbp_core.testing.machines_transfer`.  Here they meet: ops begin in a slot, run on every rank, and end the slot's
transaction when all ranks have said how.  Messages come in any order, twice, or (one half of an op) not at all.
Subclass the machine with another ``make_slots`` or ``make_scheduler`` to check implementations of your own.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

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
from umbp_core.slots import Life, SlotTable
from umbp_core.testing.models_transfer import SlotModel

RANKS = (0, 1)
TIMEOUT_S = 10.0
LIMITS = Limits(loads=1, stores=1, demotions=1, orphan_timeout_s=5.0)

Message = LeaderTransferRequest | WorkerTransferRequest | str
"""A half of an op, or the id of one that is cancelled."""

names = st.sampled_from(["r0", "r1"])
ranks = st.sampled_from(RANKS)
picks = st.integers(0, 1 << 16)


@dataclass
class OpFacts:
    """An op, told in facts: whose it is, and what the leader has heard from each rank."""

    life: str
    direction: Direction
    heard: dict[int, OpStatus] = field(default_factory=dict)

    @property
    def worst(self) -> OpStatus:
        """How it ended on all ranks together: done only if all say so."""
        return next((status for _, status in sorted(self.heard.items()) if status is not OpStatus.DONE), OpStatus.DONE)


class Rank:
    """One worker: its scheduler, what is on the way to it, what it executes, and what is on the way back."""

    def __init__(self, scheduler: TransferScheduler) -> None:
        self.scheduler = scheduler
        self.inbox: list[Message] = []
        self.step = 0
        self.executing: set[str] = set()
        self.committed: set[str] = set()
        self.outbox: list[OpResult] = []
        self.ended: dict[str, OpStatus] = {}
        """The one result of each op."""
        self.halved: set[str] = set()
        """Ops that lost a half on the way."""


class TogetherMachine(RuleBasedStateMachine):
    """Laws L3, L4 and L6 over both machines: a slot ends after its last op, and every op ends once, come what may."""

    def __init__(self) -> None:
        super().__init__()
        self.slots = self.make_slots()
        self.ranks = {rank: Rank(self.make_scheduler(LIMITS)) for rank in RANKS}
        self.models: dict[str, SlotModel] = {}
        self.ops: dict[str, OpFacts] = {}
        self.current: dict[str, str] = {}
        self.step = 0
        self.now = 100.0
        for name in ("r0", "r1"):
            self._create(name)

    def make_slots(self) -> SlotTable:
        """The slots under test."""
        return SlotTable()

    def make_scheduler(self, limits: Limits) -> TransferScheduler:
        """A rank's scheduler under test."""
        return TransferScheduler(limits)

    # ---- what the engine does, as far as the model allows it ---------------------------------------------

    def _create(self, name: str) -> None:
        life = f"{name}#{len(self.models)}"
        self.current[name] = life
        self.models[life] = SlotModel()
        self.slots.create(life)

    @rule(name=names, n_ops=st.integers(1, 2))
    def match_and_load(self, name: str, n_ops: int) -> None:
        """A match is staged, allocated, and loaded by one or two ops."""
        life = self.current[name]
        model, slot = self.models[life], self.slots.get(life)
        assert slot is not None
        if not model.may_match:
            return
        slot.stage(16)
        model.stage(16)
        for _ in range(n_ops):
            op_id = self._op(life, Direction.LOAD)
            slot.begin_onboard(op_id)
            model.loads.add(op_id)

    @rule(name=names, decoding=st.booleans(), store=st.booleans())
    def schedule(self, name: str, decoding: bool, store: bool) -> None:
        """In the step; it may fill a block, which is stored when the step has ended."""
        life = self.current[name]
        model, slot = self.models[life], self.slots.get(life)
        assert slot is not None
        if not model.may_be_scheduled:
            return
        self.step += 1
        slot.scheduled(decoding)
        model.schedule(decoding)
        if store and model.may_store:
            op_id = self._op(life, Direction.STORE)
            slot.begin_store(op_id)
            model.stores.add(op_id)

    @rule(name=names)
    def preempt(self, name: str) -> None:
        """Out of HBM, with stores in flight or without."""
        life = self.current[name]
        model, slot = self.models[life], self.slots.get(life)
        assert slot is not None
        if model.may_be_preempted:
            slot.preempted()
            model.preempt()

    @rule(name=names)
    def abort(self, name: str) -> None:
        """In whatever state: loads are cancelled, stores go on, and the id may come again at once."""
        life = self.current[name]
        model, slot = self.models[life], self.slots.get(life)
        assert slot is not None
        slot.finish()
        model.finish()
        for op_id in model.loads:
            for rank in self.ranks.values():
                rank.inbox.append(op_id)
        self._retire(life)
        self._create(name)

    @rule(name=names, committed=st.booleans())
    def abort_what_runs(self, name: str, committed: bool) -> None:
        """Too rare by chance, too: the abort of a load gets to every rank while it runs, before or after its commit."""
        self.match_and_load(name, 1)
        for rank in RANKS:
            self.usual_course(rank, commits=committed, behind=0)
        self.abort(name)
        for rank in RANKS:
            self.usual_course(rank, commits=True, behind=0)
            self.collect(rank, arrives=True)

    @rule(name=names, rank=ranks)
    def store_early(self, name: str, rank: int) -> None:
        """A store gets to a rank that has not ended its step."""
        self.schedule(name, decoding=True, store=True)
        self.usual_course(rank, commits=True, behind=1)

    def _op(self, life: str, direction: Direction) -> str:
        """A new op, whose halves are on the way to every rank."""
        op_id = f"op{len(self.ops)}"
        self.ops[op_id] = OpFacts(life, direction)
        needs = Requirement(RequirementKind.ITERATION_COMPLETE, self.step) if direction is Direction.STORE else None
        blocks = (BlockCopy(op_id.encode(), 0, 1, 1),)
        half = LeaderTransferRequest(op_id, life, direction, blocks, needs or Requirement(), timeout_s=TIMEOUT_S)
        for rank in self.ranks.values():
            rank.inbox += [half, WorkerTransferRequest(op_id, life, direction)]
        return op_id

    def _retire(self, life: str) -> None:
        slot = self.slots.get(life)
        if slot is not None and slot.is_finished:
            self.slots.remove(life)

    # ---- what ranks do ------------------------------------------------------------------------------------

    @rule(rank=ranks, pick=picks, fate=st.sampled_from(["once", "once", "twice", "never"]))
    def deliver(self, rank: int, pick: int, fate: str) -> None:
        """A message arrives, in any order; again; or, for one half of an op at most, not at all."""
        self._deliver(self.ranks[rank], pick, fate)

    def _deliver(self, rank: Rank, pick: int, fate: str) -> None:
        if not rank.inbox:
            return
        message = rank.inbox.pop(pick % len(rank.inbox))
        if isinstance(message, str):
            rank.scheduler.cancel(message)
            return
        if fate == "never" and message.op_id not in rank.halved:
            rank.halved.add(message.op_id)
            return
        rank.halved.add(message.op_id)
        for _ in range(2 if fate == "twice" else 1):
            if isinstance(message, LeaderTransferRequest):
                rank.scheduler.submit(message, self.now)
            else:
                rank.scheduler.enqueue(message, self.now)

    @rule(rank=ranks)
    def end_step(self, rank: int) -> None:
        """The rank has computed a step."""
        worker = self.ranks[rank]
        worker.step = min(worker.step + 1, self.step)
        worker.scheduler.end_iteration(worker.step)

    @rule(rank=ranks)
    def start(self, rank: int) -> None:
        """Start what may start."""
        worker = self.ranks[rank]
        for op in worker.scheduler.poll(self.now):
            assert op.op_id not in worker.executing, "started twice"
            assert op.op_id not in worker.ended, "started after its end"
            if op.direction is Direction.STORE:
                assert worker.step >= op.requirement.iteration, "the step that computes the block has not ended"
            worker.executing.add(op.op_id)

    @rule(rank=ranks, commits=st.booleans(), behind=st.integers(0, 1))
    def usual_course(self, rank: int, commits: bool, behind: int) -> None:
        """What chance alone does too rarely: all that is on the way to a rank arrives, runs, and is committed.

        The rank has ended the newest step, or is one ``behind``.
        """
        worker = self.ranks[rank]
        while worker.inbox:
            self._deliver(worker, 0, "once")
        worker.step = max(worker.step, self.step - behind)
        worker.scheduler.end_iteration(worker.step)
        self.start(rank)
        if commits:
            for pick in range(len(worker.executing)):
                self.commit(rank, pick)

    @rule(rank=ranks, pick=picks)
    def commit(self, rank: int, pick: int) -> None:
        """The point of no return: from here on HBM is touched, so the slot must know of it until the end."""
        worker = self.ranks[rank]
        if worker.executing:
            op_id = sorted(worker.executing)[pick % len(worker.executing)]
            if worker.scheduler.commit(op_id):
                assert not worker.scheduler.has_ended(op_id), "committed after its end"
                worker.committed.add(op_id)

    @rule(rank=ranks, pick=picks, status=st.sampled_from([OpStatus.DONE, OpStatus.DONE, OpStatus.FAILED]))
    def execute(self, rank: int, pick: int, status: OpStatus) -> None:
        """An executor has touched its memory for the last time."""
        worker = self.ranks[rank]
        if worker.executing:
            self._execute(worker, sorted(worker.executing)[pick % len(worker.executing)], status)

    def _execute(self, worker: Rank, op_id: str, status: OpStatus) -> None:
        if op_id not in worker.committed:
            status = OpStatus.FAILED
        worker.executing.discard(op_id)
        worker.committed.discard(op_id)
        facts = self.ops[op_id]
        worker.scheduler.finished(OpResult(op_id, facts.life, facts.direction, status), self.now)

    @rule(seconds=st.sampled_from([0.5, 3.0, 6.0]))
    def wait(self, seconds: float) -> None:
        """Time passes, and deadlines with it."""
        self.now += seconds
        for worker in self.ranks.values():
            worker.scheduler.expire(self.now)

    @rule(rank=ranks, arrives=st.booleans())
    def collect(self, rank: int, arrives: bool) -> None:
        """Results go on their way, and arrive at once or later."""
        worker = self.ranks[rank]
        self._collect(worker)
        if arrives:
            arrived, worker.outbox = worker.outbox, []
            for result in arrived:
                self._hear(rank, result)

    def _collect(self, worker: Rank) -> None:
        for result in worker.scheduler.take_results():
            assert result.op_id not in worker.ended, "an op ended twice on a rank"
            worker.ended[result.op_id] = result.status
            worker.outbox.append(result)

    # ---- what the leader hears ------------------------------------------------------------------------------

    @precondition(lambda self: any(worker.outbox for worker in self.ranks.values()))
    @rule(pick=picks, twice=st.booleans())
    def hear(self, pick: int, twice: bool) -> None:
        """A result arrives, in any order, perhaps twice."""
        waiting = [(number, result) for number, worker in self.ranks.items() for result in worker.outbox]
        number, result = waiting[pick % len(waiting)]
        if not twice:
            self.ranks[number].outbox.remove(result)
        self._hear(number, result)

    def _hear(self, rank: int, result: OpResult) -> None:
        facts = self.ops[result.op_id]
        if rank in facts.heard:
            return
        facts.heard[rank] = result.status
        if len(facts.heard) < len(RANKS):
            return
        slot, model = self.slots.get(facts.life), self.models[facts.life]
        assert slot is not None, "the slot was gone before its last op had ended everywhere"
        assert slot.op_ended(result.op_id, facts.worst)
        assert not slot.op_ended(result.op_id, facts.worst), "the same end again changes nothing"
        assert model.end(result.op_id, facts.worst)
        self._retire(facts.life)

    # ---- what always holds ------------------------------------------------------------------------------------

    @invariant()
    def slots_are_what_their_models_say(self) -> None:
        """And what is over, with nothing in flight, is gone."""
        alive = {life for life, model in self.models.items() if model.life is not Life.FINISHED}
        assert {slot.request_id for slot in self.slots} == alive
        for slot in self.slots:
            model = self.models[slot.request_id]
            assert (slot.life, slot.transaction) == (model.life, model.transaction)
            assert set(slot.ops) == model.loads | model.stores

    @invariant()
    def whoever_touches_hbm_is_known_to_the_slot(self) -> None:
        """L3: no block may be given away that a committed op reads or writes, on any rank."""
        for worker in self.ranks.values():
            for op_id in worker.committed:
                slot = self.slots.get(self.ops[op_id].life)
                assert slot is not None, f"{op_id} touches the blocks of a request that is gone"
                assert op_id in slot.ops

    def teardown(self) -> None:
        """L4: when everything that is on its way has arrived or missed its deadline, nothing is left."""
        for name in ("r0", "r1"):
            self.abort(name)
        for worker in self.ranks.values():
            while worker.inbox:
                self._deliver(worker, 0, "once")
            for op_id in sorted(worker.executing):
                self._execute(worker, op_id, OpStatus.DONE)
            worker.scheduler.end_iteration(self.step)
        self.wait(6.0)
        self.wait(6.0)
        for number, worker in self.ranks.items():
            self._collect(worker)
            for result in worker.outbox:
                self._hear(number, result)
            assert set(worker.ended) == set(self.ops)
            assert worker.scheduler.pending() == 0
            assert not worker.scheduler.quarantined()
        assert {slot.request_id for slot in self.slots} == set(self.current.values())
        super().teardown()
