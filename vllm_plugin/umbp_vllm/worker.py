"""The worker half of the connector: one per rank, in the rank's process.

It decides nothing.  It hands the leader's ops to the transfer engine, tells vLLM which loads ended (each
exactly once, and only loads it was given), and carries the results back to the leader.  The calls come on
the forward thread and never wait for memory, disk or device, with two exceptions: an idle step, in which there is
nothing to compute and a load is on its way (see :meth:`Worker.poll`), and layer-wise loads
(:mod:`umbp_vllm.layer_gate`), which never wait for a disk.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterable

import msgspec

from umbp_connectors.transfer.failures import LOST
from umbp_core.errors import UmbpError
from umbp_core.intake import Intake
from umbp_core.ops import Direction, LeaderTransferRequest, NewWorkerSlot, OpResult, OpStatus, RequirementKind
from umbp_core.scheduler import Fate
from umbp_core.worker_slots import WorkerSlots
from umbp_vllm.dump import worker_state
from umbp_vllm.host_rank import RankHost
from umbp_vllm.load_outcome import LoadOutcome
from umbp_vllm.metadata import RankHello, StepMetadata, WorkerReport
from umbp_vllm.rank_kit import RankKit

logger = logging.getLogger("vllm.umbp.worker")

IDLE_WAIT_S = 0.005
"""How long a step without any token waits for a load: it would otherwise only be repeated.

As long as a load of some thousand tokens takes, so that most loads end within one wait, and no longer than what a new
request that arrives meanwhile would not notice beside its own prefill.
"""


FENCE_S = 30.0
"""How long a forward pass waits for copies that read blocks which it may write: they take milliseconds."""

REPORTED = 4096
"""Loads that are remembered when vLLM has heard of their end: a question about one may still be on its way."""


class Worker:
    """Runs the leader's ops on one rank.

    ``kit`` is this object's, which closes it.  ``writes`` is False on a rank that shares another one's arena and slab:
    there, stores and demotions are the other rank's work and count as done.  ``by_layer`` is False where the forward
    pass does not ask for every layer that it reads.  ``host`` maps the arenas of the host's daemon, where that has the
    pool; ``kit`` is then of ``hello.arena``, and changes with the arena.
    """

    def __init__(
        self,
        hello: RankHello,
        kit: RankKit,
        *,
        writes: bool,
        by_layer: bool = True,
        host: RankHost | None = None,
        clears_early: bool = False,
    ) -> None:
        self.hello = hello
        self._use(kit)
        self._host = host
        self._writes = writes
        self._by_layer = by_layer
        self._clears_early = clears_early
        self.stores_by_layer = False
        """Whether the step under way has stores that want to hear of its layers."""
        self._layers_done = 0
        self._hello_sent = False
        self._intake: Intake[StepMetadata] = Intake(lambda metadata: metadata.iteration)
        self._slots = WorkerSlots()
        self._loads: dict[str, LeaderTransferRequest] = {}
        self._reported: deque[str] = deque(maxlen=REPORTED)
        self._ended: list[OpResult] = []
        self._results: list[OpResult] = []
        self._running: list[str] = []
        self._missed: list[tuple[int, int]] = []
        self._torn: set[str] = set()
        self._refused: list[tuple[str, tuple[int, ...]]] = []
        self._released: list[str] = []

    def _use(self, kit: RankKit) -> None:
        self._kit = kit
        self.engine, self.gate, self._copier = kit.engine, kit.gate, kit.copier

    def load_ahead(self, metadata: StepMetadata, *, by_layer: bool) -> None:
        """Start the layer-wise loads of the step, whose forward pass is about to be launched.

        Waits for them where the pass will not ask layer by layer.
        """
        if metadata.layerwise:
            self.gate.expect(metadata.layerwise)
            self.gate.start(metadata.iteration, self._copier.fence())
            if not (by_layer and self._by_layer):
                self.gate.wait_for_all()

    def _end_layerwise(self, metadata: StepMetadata) -> None:
        """The forward pass is launched: its layer-wise loads end here, well or not."""
        missed = [op for op in metadata.layerwise if op.op_id not in self.gate]
        self._results += [_failed(op, "not_started") for op in missed]
        self.gate.lack([block.hbm_block for op in missed for block in op.blocks])
        self.gate.lack(metadata.void_blocks)
        self.gate.finish()
        ended = self._ended + self.engine.poll()
        self._ended = [result for result in ended if result.op_id not in self.gate]
        self._results += self.gate.settle(ended)

    def store_ahead(self, metadata: StepMetadata) -> None:
        """Take over the step's stores by layer: its forward pass is about to be launched."""
        self._layers_done = 0
        if not self._is_this_step(metadata):
            return
        by_layer = [op for op in metadata.ops if op.requirement.kind is RequirementKind.LAYER_COMPLETE]
        by_layer = self._admitted(metadata, by_layer)
        self.stores_by_layer = bool(by_layer) and self._writes
        if self.stores_by_layer:
            self.engine.begin_iteration(metadata.iteration)
            self.engine.submit(by_layer)

    def layer_done(self, layer: str) -> None:
        """The step's forward pass has launched ``layer``, all of it."""
        self.engine.layer_done(layer, self._layers_done, self._copier.fence())
        self._layers_done += 1

    def step(self, metadata: StepMetadata) -> None:
        """The step's forward pass is launched: what it computes may be stored, what waits may be loaded.

        Loads start behind the same fence, so that nothing that the step reads or clears is overwritten early.
        """
        self._is_this_step(metadata)
        self.stores_by_layer = False
        for due in self._intake.due():
            self._carry_out(due)

    def _is_this_step(self, metadata: StepMetadata) -> bool:
        """Take the step's message, whichever hook brings it first; False for one that is not the newest."""
        self._intake.take(metadata)
        for late in self._intake.late():  # its last hook never ran, and this step may write over what it is to store
            self._carry_out(late)
        missed = self._intake.missed()
        if missed:
            self._missed += missed
            self._distrust_stores()
            logger.error("umbp: the instructions of steps %s never came; what they said is not done", missed)
        return self._intake.is_newest(metadata)

    def _distrust_stores(self) -> None:
        """A step may have written blocks that stores were reading, and nobody told to wait for these."""
        ended = self.engine.poll()
        self._ended += ended
        self._torn |= {str(op["op_id"]) for op in self.engine.dump() if op["direction"] == Direction.STORE.name}
        self._torn |= {result.op_id for result in ended if result.direction is Direction.STORE}

    def _carry_out(self, metadata: StepMetadata) -> None:
        host = self._host
        if host is not None and host.has_new(metadata) and not (self.engine.pending() or self.engine.quarantined()):
            self._follow(host)
        if metadata.layerwise or metadata.void_blocks:
            self._end_layerwise(metadata)
        self.engine.begin_iteration(metadata.iteration)
        self.engine.end_iteration(metadata.iteration, self._copier.fence())
        self._submit(metadata)
        if metadata.overdue:
            self._answer(metadata.overdue)
        if metadata.who:
            self._hello_sent = False

    def _admitted(self, metadata: StepMetadata, ops: list[LeaderTransferRequest]) -> list[LeaderTransferRequest]:
        """Those of the step's ``ops`` whose pages are what the leader means."""
        refused = self._not_to_start(metadata, ops)
        return [op for op in ops if op.op_id not in refused]

    def _not_to_start(self, metadata: StepMetadata, ops: list[LeaderTransferRequest]) -> dict[str, str]:
        """The others, by id, and why.  To be asked once where both count: the clock goes on in between."""
        return self._host.refused(metadata, ops) if self._host is not None else {}

    def _follow(self, host: RankHost) -> None:
        """Change to the daemon's new arena: nothing is being copied in the old one."""
        self._released += self.engine.take_released()
        self._ended += self.engine.poll()
        self._use(host.change(self._kit))

    def _answer(self, overdue: Iterable[LeaderTransferRequest]) -> None:
        """The leader has not heard how these ops ended: say what is known, and refuse those of which nothing is."""
        mine = [op for op in overdue if self._writes or op.direction is Direction.LOAD]
        fates = {op.op_id: self.engine.account_for(op) for op in mine}
        self._ended += self.engine.poll()
        untold = {result.op_id for result in self._ended + self._results}
        for op in overdue:
            fate = fates.get(op.op_id)
            if fate is None:
                self._results.append(_not_mine(op))
            else:
                self._tell(op, fate, untold=op.op_id in untold)

    def _tell(self, op: LeaderTransferRequest, fate: Fate, *, untold: bool) -> None:
        """Tell the leader what became of ``op``; with ``untold``, how it ended goes with this very report anyway."""
        if fate in (Fate.PENDING, Fate.QUARANTINED):
            self._running.append(op.op_id)
        if fate is Fate.REFUSED:
            self._nobody_said(op)
        elif fate in (Fate.ENDED, Fate.QUARANTINED) and not untold:
            self._results.append(msgspec.structs.replace(_failed(op, LOST), quarantined=fate is Fate.QUARANTINED))
            if fate is Fate.ENDED:
                self._released.append(op.op_id)

    def _nobody_said(self, op: LeaderTransferRequest) -> None:
        """The engine never got ``op``.  Where vLLM waits for it on this rank, too, have its end reported, once."""
        waits = op.direction is Direction.LOAD and not op.layerwise
        if waits and op.op_id not in self._loads and op.op_id not in self._reported:
            self._loads[op.op_id] = op
            self._slots.open(NewWorkerSlot(op.request_id, (op.op_id,)))
            self._slots.finished([op.request_id])  # which vLLM may have said before: keep nothing of it afterwards

    def fence(self, metadata: StepMetadata) -> None:
        """End the stores in ``metadata.fences`` before the forward pass writes HBM again (law L3).

        Those that come with this very step read what earlier steps wrote, so they start first.  One that does not end
        within :data:`FENCE_S` counts as failed, whatever it brings: its blocks may have changed while it read them.
        So do all where the step has cleared its blocks already.
        """
        fences = set(metadata.fences)
        self._torn |= fences
        if not self._is_this_step(metadata):
            return
        early = [op for op in metadata.ops if op.op_id in fences]
        admitted = self._admitted(metadata, early)
        late = {op.op_id for op in early if op not in admitted}
        if self._writes and admitted:
            try:
                self.engine.submit(admitted)
            except UmbpError:  # they come again with the step's others, when their blocks hold something else
                late = {op.op_id for op in early}
        if self._clears_early:
            late |= self._untold(fences)
        if self.engine.wait(fences, FENCE_S):
            self._torn -= fences - late
        else:
            self._torn -= fences - late - {str(op["op_id"]) for op in self.engine.dump()}
            logger.error(
                "umbp: stores did not end within %.0f s before their blocks were reused; they are void", FENCE_S
            )

    def _untold(self, stores: set[str]) -> set[str]:
        """Those of ``stores`` that run, or of which nobody has heard that they ended before this step began."""
        self._ended += self.engine.poll()
        ended = {result.op_id for result in self._ended}
        return stores & (ended | {str(op["op_id"]) for op in self.engine.dump()})

    def let_go_of_hbm(self) -> None:
        """End what reads or writes HBM, whose memory is taken away and comes back with other content (law L3).

        A store that does not end within :data:`FENCE_S` counts as failed, whatever it brings.
        """
        if self.engine.wait([str(op["op_id"]) for op in self.engine.dump()], FENCE_S):
            return
        late = [op for op in self.engine.dump() if op["direction"] == Direction.STORE.name]
        self._torn |= {str(op["op_id"]) for op in late}
        logger.error(
            "umbp: %d stores did not end within %.0f s before HBM went away; they are void", len(late), FENCE_S
        )

    def _submit(self, metadata: StepMetadata) -> None:
        self._refused += metadata.refused_loads
        self._loads.update({op.op_id: op for op in metadata.ops if op.direction is Direction.LOAD})
        for slot in metadata.new_slots:
            self._slots.open(slot)
        mine = [op for op in metadata.ops if self._writes or op.direction is Direction.LOAD]
        self._results += [
            _not_mine(op) for op in metadata.ops if not self._writes and op.direction is not Direction.LOAD
        ]
        refused = self._not_to_start(metadata, mine)
        self._results += [_failed(op, refused[op.op_id]) for op in mine if op.op_id in refused]
        mine = [op for op in mine if op.op_id not in refused]
        try:
            self.engine.submit(mine)
        except UmbpError:
            logger.exception("umbp: ops of step %d could not all be started", metadata.iteration)
            for op in mine:  # those that were end by themselves; of the others the engine will never hear again
                self.engine.account_for(op)
        self.engine.cancel(metadata.cancels)

    def poll(self, *, idle: bool, finished: Iterable[str] = ()) -> LoadOutcome:
        """What ended since the last call.  ``finished`` are requests that vLLM is done with.

        In an idle step (no tokens scheduled) with loads in flight this waits up to :data:`IDLE_WAIT_S` for the
        first of them, on an event: vLLM would only repeat the step, and with the scheduler in the same process
        that repetition would take the interpreter away from the threads that move the bytes.
        """
        outcome = LoadOutcome()
        if idle and self._loads and not self._results and not self._refused:
            self.engine.wait(self._loads, IDLE_WAIT_S, first=True)
        self._released += self.engine.take_released()  # first: what is released was reported before, or is just now
        results = self._ended + self.engine.poll()
        self._ended = []
        if self.gate.has_late:
            late = self.gate.released(results)
            results = [result for result in results if result.op_id not in late]
            self._released += late
        self._results += [self._whole(result) for result in results]
        for result in self._results:
            if result.op_id in self._loads:
                self._slots.ended(result)
        for slot in self._slots.take_complete():
            for result in slot.results:
                outcome.add(self._loads.pop(result.op_id), result)
                self._reported.append(result.op_id)
        self._slots.finished(finished)
        for request_id, blocks in self._refused:
            outcome.never_came(request_id, blocks)
        self._refused = []
        return outcome

    def take_void_blocks(self) -> set[int]:
        """The blocks that the step's forward pass counted on and that are not known to have been there."""
        return self.gate.take_bad_blocks()

    def _whole(self, result: OpResult) -> OpResult:
        """The result, or a failure where blocks or pages of the op were taken away while it read them."""
        if self._host is not None:
            result = self._host.judged(result)
        if result.op_id not in self._torn:
            return result
        self._torn.discard(result.op_id)
        return msgspec.structs.replace(result, status=OpStatus.FAILED, failed=(), checksums=b"", reason="fence")

    def take_report(self) -> WorkerReport | None:
        """Results, releases and (once) the hello for the leader; ``None`` when there is nothing to say."""
        rank = self.hello.world_rank
        report = WorkerReport()
        if self._results:
            report.results[rank], self._results = self._results, []
        if self._released:
            report.released[rank], self._released = self._released, []
        if not self._hello_sent:
            self._hello_sent = True
            report.hellos[rank] = self.hello
        if self._running:
            report.running[rank], self._running = self._running, []
        if self._missed:
            report.missed[rank], self._missed = self._missed, []
        arena = self._host.news() if self._host is not None else None
        if arena is not None:
            report.arenas[rank] = arena
        return report if report.ranks else None

    def dump_state(self) -> dict[str, object]:
        """What this rank is doing, as plain data; only reads."""
        return worker_state(
            self.engine.dump(),
            self.engine.quarantined(),
            rank=self.hello.world_rank,
            loads_not_reported=len(self._loads),
            results_not_told=len(self._results),
        )

    def close(self, timeout_s: float) -> None:
        """End everything within ``timeout_s``; idempotent."""
        if not self._kit.close(timeout_s):
            logger.warning("umbp: a copy or a disk hangs; its memory stays mapped until the process ends")
            return
        if self._host is not None:
            self._host.close()


def _failed(op: LeaderTransferRequest, reason: str) -> OpResult:
    return OpResult(
        op.op_id, op.request_id, op.direction, OpStatus.FAILED, failed=tuple(range(len(op.blocks))), reason=reason
    )


def _not_mine(op: LeaderTransferRequest) -> OpResult:
    return OpResult(op.op_id, op.request_id, op.direction, OpStatus.DONE)
