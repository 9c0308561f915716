"""A leader's ledger and real workers in virtual time, over engines whose transfers are played.

The transfers go on between any two calls of a worker, as threads do; which of them and how far, a random number says.
"""

from __future__ import annotations

import contextlib
import random
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from umbp_connectors.leader.ledger import OpLedger, Verdict
from umbp_core.errors import StateError
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
from umbp_vllm.layer_gate import LayerGate
from umbp_vllm.metadata import PROTOCOL_VERSION, RankHello, StepMetadata, WorkerReport
from umbp_vllm.rank_kit import RankKit
from umbp_vllm.worker import Worker

TICK_S = 0.05
SKIPPED = 0.05
"""Of the steps, those whose last hook does not run."""
MOST_STEPS = 1000
"""More than anything that hangs takes."""


class PlayedEngine:
    """What a worker calls of a transfer engine, without threads."""

    def __init__(self, clock: FakeClock, rng: random.Random, hanging: float, broken: float, limits: Limits) -> None:
        self.scheduler = TransferScheduler(limits)
        self.clock = clock
        self.truth: dict[str, OpResult] = {}
        """How each op ended here."""
        self.torn: set[str] = set()
        """Stores that were reading when the blocks under them were written."""
        self._rng = rng
        self._hanging = hanging
        self._broken = broken
        self._running: dict[str, list[Any]] = {}
        self._written: set[str] = set()

    def written(self, stores: Iterable[str]) -> None:
        """From here on the blocks of ``stores`` hold something else."""
        self._written.update(stores)
        self.torn |= self._written & self.at_work

    @property
    def at_work(self) -> set[str]:
        """The ops whose memory is being touched."""
        return set(self._running)

    def tick(self) -> None:
        """A little time passes; some of what runs goes on."""
        self.clock.advance(TICK_S * self._rng.random())
        for op_id, entry in list(self._running.items()):
            entry[0] -= self._rng.randint(0, 2)
            if entry[0] <= entry[1] and not entry[2]:
                entry[2] = self.scheduler.commit(op_id)
                if not entry[2] and not self.scheduler.is_running(op_id):
                    entry[0] = min(entry[0], self._rng.randint(0, 4))  # dropped: it lets go soon
            if entry[0] <= 0:
                del self._running[op_id]
                self.scheduler.finished(self._result(entry[3], committed=entry[2]), self.clock())
                self._dispatch()

    def _result(self, op: LeaderTransferRequest, *, committed: bool) -> OpResult:
        if not committed:
            return OpResult(op.op_id, op.request_id, op.direction, OpStatus.CANCELLED)
        if self._rng.random() < 0.05:
            return OpResult(op.op_id, op.request_id, op.direction, OpStatus.FAILED, (0,), reason="io")
        return OpResult(op.op_id, op.request_id, op.direction, OpStatus.DONE, checksums=bytes(16 * len(op.blocks)))

    def _meanwhile(self) -> None:
        while self._rng.random() < 0.5:
            self.tick()
        self._dispatch()

    def _dispatch(self) -> None:
        for op in self.scheduler.poll(self.clock()):
            if op.op_id in self._written:
                self.torn.add(op.op_id)
            takes = self._rng.randint(60, 900) if self._rng.random() < self._hanging else self._rng.randint(0, 12)
            self._running[op.op_id] = [takes, self._rng.randint(0, takes), False, op]

    # What a worker calls -------------------------------------------------------------------------------

    def submit(self, ops: Iterable[LeaderTransferRequest]) -> None:
        self._meanwhile()
        for op in ops:
            if self._rng.random() < self._broken:
                raise self._rng.choice((StateError("no fence"), RuntimeError("no device")))
            self.scheduler.take(TransferScheduleRequest(op), self.clock())
            if not op.immediate:
                self.scheduler.take(WorkerTransferRequest(op.op_id, op.request_id, op.direction), self.clock())
        self._dispatch()

    def submit_ahead(self, n: int, ops: Iterable[LeaderTransferRequest], fence: object) -> None:
        self.begin_iteration(n)
        self.submit(ops)

    def begin_iteration(self, n: int) -> None:
        self.scheduler.begin_iteration(n)

    def layer_done(self, name: str, index: int, fence: object) -> None:
        self._meanwhile()
        self.scheduler.layer_done(name, index)

    def end_iteration(self, n: int, fence: object) -> None:
        self.scheduler.end_iteration(n)
        self._meanwhile()

    def cancel(self, op_ids: Iterable[str]) -> None:
        self._meanwhile()
        for op_id in op_ids:
            self.scheduler.cancel(op_id)

    def poll(self) -> list[OpResult]:
        self._meanwhile()
        results = self.scheduler.take_results()
        for result in results:
            self.truth.setdefault(result.op_id, result)
        return results

    def _pass(self, over: Callable[[], bool], timeout: float) -> bool:
        end = self.clock() + timeout
        self._dispatch()
        while not over():
            if self.clock() >= end:
                return False
            self.tick()
            self._dispatch()
        return True

    def wait(self, op_ids: Iterable[str], timeout: float, first: bool = False) -> bool:
        ops = list(op_ids)
        enough = any if first else all
        return not ops or self._pass(lambda: enough(map(self.scheduler.has_ended, ops)), timeout)

    def wait_layers(self, op_ids: Iterable[str], bands: int, timeout: float) -> bool:
        ops = list(op_ids)
        return self._pass(lambda: all(map(self.scheduler.has_ended, ops)), timeout)

    def give_up(self, op_ids: Iterable[str]) -> None:
        self._meanwhile()
        for op_id in op_ids:
            self.scheduler.cancel(op_id)

    def pending(self) -> int:
        return self.scheduler.pending()

    def account_for(self, op: LeaderTransferRequest) -> Fate:
        self._meanwhile()
        return self.scheduler.account_for(op, self.clock())

    def quarantined(self) -> frozenset[str]:
        return self.scheduler.quarantined()

    def take_released(self) -> list[str]:
        self._meanwhile()
        return self.scheduler.take_released()

    def dump(self) -> list[dict[str, object]]:
        return self.scheduler.dump()


class NoDevice:
    """A device without an order of its own."""

    def fence(self) -> object:
        return None


class PlayedRank:
    """One worker, and what its engine heard from it."""

    def __init__(self, number: int, rng: random.Random, engine: PlayedEngine) -> None:
        self.engine = engine
        gate = LayerGate(engine, {}, engine.clock)  # type: ignore[arg-type]
        hello = RankHello(PROTOCOL_VERSION, number, number, b"", b"", 1, 1, 1, 1, (1,))
        self.worker = Worker(hello, RankKit(b"", engine, NoDevice(), gate), writes=True)  # type: ignore[arg-type]
        self.reported: Counter[str] = Counter()
        """How often each request was reported as loaded, well or not."""
        self.failed: set[str] = set()
        self.void: set[int] = set()
        self._rng = rng

    def run(self, metadata: StepMetadata, finished: set[str]) -> WorkerReport | None:
        """One step, in the order of vLLM's calls; what they raise ends at the boundary."""
        worker = self.worker
        if metadata.fences:
            with contextlib.suppress(StateError, RuntimeError):
                worker.fence(metadata)
            self.engine.written(metadata.fences)
        with contextlib.suppress(StateError, RuntimeError):
            worker.store_ahead(metadata)
        if metadata.layerwise:
            try:
                worker.load_ahead(metadata, by_layer=self._rng.random() < 0.5)
            except (StateError, RuntimeError):
                worker.gate.distrust()
        if worker.stores_by_layer:
            worker.layer_done("first")
        if metadata.layerwise or self._rng.random() >= SKIPPED:  # else the hook does not run in this step
            with contextlib.suppress(StateError, RuntimeError):
                worker.step(metadata)
        outcome = worker.poll(idle=self._rng.random() < 0.5, finished=finished)
        self.reported.update(outcome.ended)
        self.failed |= outcome.failed
        self.void |= worker.take_void_blocks()
        self.engine.tick()
        return worker.take_report()


@dataclass
class Story:
    """A leader that sends random ops, as vLLM's does, and hears of their ends.

    Messages take up to ``lag`` steps each way, in their order; of the instructions of steps ``loss`` never arrive, of
    the ops ``hanging`` take long, and ``broken`` cannot be submitted.  Engines ``remember`` so many ends.
    """

    seed: int
    ranks: int = 2
    lag: int = 0
    loss: float = 0.0
    hanging: float = 0.02
    broken: float = 0.0
    remember: int = 65536
    sent: dict[str, LeaderTransferRequest] = field(default_factory=dict)
    verdicts: dict[str, Verdict] = field(default_factory=dict)
    statuses: dict[str, dict[int, OpStatus]] = field(default_factory=lambda: defaultdict(dict))

    def __post_init__(self) -> None:
        self.rng = random.Random(self.seed)
        self.clock = FakeClock()
        self.ledger = OpLedger(range(self.ranks), self.clock)
        self.workers = []
        for rank in range(self.ranks):
            rng = random.Random(self.seed * 10 + rank)
            engine = PlayedEngine(self.clock, rng, self.hanging, self.broken, Limits(remember=self.remember))
            self.workers.append(PlayedRank(rank, rng, engine))
        self.iteration = 0
        self.free: set[str] = set()
        """Ops whose memory the leader believes to be nobody's."""
        self._let_go: set[str] = set()
        self._steps: list[list[tuple[StepMetadata, set[str]]]] = [[] for _ in range(self.ranks)]
        self._reports: list[list[WorkerReport | None]] = [[] for _ in range(self.ranks)]

    def _random_op(self) -> LeaderTransferRequest:
        number = len(self.sent)
        direction = self.rng.choice(
            [Direction.LOAD, Direction.LOAD, Direction.STORE, Direction.STORE, Direction.DEMOTE]
        )
        requirement = Requirement()
        if direction is Direction.STORE:
            kind = self.rng.choice([RequirementKind.ITERATION_COMPLETE, RequirementKind.LAYER_COMPLETE])
            requirement = Requirement(kind, self.iteration, layer_index=0)
            if self.rng.random() < 0.3:  # of a request that finished between two steps
                requirement = Requirement(RequirementKind.ITERATION_COMPLETE, self.iteration - 1)
        blocks = tuple(BlockCopy(b"%d" % block, 0, block, block) for block in range(10 * number, 10 * number + 3))
        return LeaderTransferRequest(
            f"op{number}",
            f"r{number}",
            direction,
            blocks,
            requirement,
            immediate=direction is Direction.DEMOTE,
            timeout_s=self.rng.choice((0.2, 1.0, 1.0, 5.0)),
            layerwise=direction is Direction.LOAD and self.rng.random() < 0.4,
        )

    def _plan(self, quiet: bool) -> StepMetadata:
        metadata = StepMetadata(self.iteration)
        for _ in range(0 if quiet else self.rng.choice((0, 1, 1, 2))):
            op = self._random_op()
            self.ledger.open(op)
            self.sent[op.op_id] = op
            (metadata.layerwise if op.layerwise else metadata.ops).append(op)
            if op.direction is Direction.LOAD and not op.layerwise:
                metadata.new_slots.append(NewWorkerSlot(op.request_id, (op.op_id,)))
        flying = [op for op_id, op in self.sent.items() if op_id in self.ledger]
        if flying and self.rng.random() < 0.1:
            metadata.cancels.append(self.rng.choice(flying).op_id)
        if self.rng.random() < 0.1:
            stores = [op for op in flying if op.direction is Direction.STORE and op.op_id not in self._let_go]
            metadata.fences += [op.op_id for op in stores if op.requirement.iteration < self.iteration]
            self._let_go.update(metadata.fences)
        if self.ledger.step():
            metadata.overdue += self.ledger.overdue()
        return metadata

    def step(self, quiet: bool = False) -> None:
        """One step everywhere."""
        self.iteration += 1
        metadata = self._plan(quiet)
        finished = {op.request_id for op_id, op in self.sent.items() if op_id in self.verdicts}
        for rank, worker in enumerate(self.workers):
            # Layer-wise loads are the business of their very step; vLLM has no way to lose it and go on.
            if metadata.layerwise or self.rng.random() >= self.loss:
                self._steps[rank].append((metadata, finished))
            while len(self._steps[rank]) > (0 if quiet else self.rng.randint(0, self.lag)):
                self._reports[rank].append(worker.run(*self._steps[rank].pop(0)))
            while len(self._reports[rank]) > (0 if quiet else self.rng.randint(0, self.lag)):
                report = self._reports[rank].pop(0)
                if report is not None:
                    self._take(report)

    def _take(self, report: WorkerReport) -> None:
        """As :meth:`umbp_vllm.pool.LeaderPool.take`."""
        self.ledger.heard(report.ranks)
        if report.missed:
            self.ledger.ask_all()
        for rank, results in report.results.items():
            for result in results:
                if result.op_id in self.ledger:
                    self.statuses[result.op_id].setdefault(rank, result.status)
                verdict = self.ledger.add(rank, result)
                if verdict is not None:
                    self.verdicts[result.op_id] = verdict
                    if not verdict.quarantined:
                        self._is_free(result.op_id)
        for rank, op_ids in report.released.items():
            for op_id in op_ids:
                if self.ledger.release(rank, op_id):
                    self._is_free(op_id)

    def _is_free(self, op_id: str) -> None:
        self.free.add(op_id)
        for worker in self.workers:
            assert op_id not in worker.engine.at_work, f"{op_id} is given back and still being touched"

    def settle(self, most: int = MOST_STEPS) -> None:
        """Step until everything is over everywhere; ``AssertionError`` when that takes too long."""
        for _ in range(most):
            if not len(self.ledger) and not self.ledger.quarantined and not any(map(self._is_busy, self.workers)):
                break
            self.step(quiet=True)
        self.step(quiet=True)
        self.step(quiet=True)
        assert self.ledger.dump(self.clock()) == []

    @staticmethod
    def _is_busy(rank: PlayedRank) -> bool:
        return bool(rank.engine.pending() or rank.engine.at_work)
