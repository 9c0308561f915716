"""The transfer engine of one worker (rank)."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from typing import Final

from umbp_connectors.transfer.failures import FailureLog, lost_result
from umbp_connectors.transfer.fences import Fences
from umbp_connectors.transfer.jobs import DemoteJob, Job, StoreJob, Tools
from umbp_connectors.transfer.lanes import Lanes
from umbp_connectors.transfer.layer_stores import BehindLayers, LayerWaits, LayerwiseStoreJob
from umbp_connectors.transfer.layerwise import Delivered, LayerwiseLoadJob
from umbp_connectors.transfer.loads import LoadJob
from umbp_connectors.transfer.memory import PageMemory, SlotStore
from umbp_core.errors import StateError
from umbp_core.ids import Identity
from umbp_core.ops import (
    Direction,
    LeaderTransferRequest,
    OpResult,
    RequirementKind,
    TransferScheduleRequest,
    WorkerTransferRequest,
)
from umbp_core.ports import Clock, DeviceCopier, LayerCopier, PoolObserver, SlotRuns
from umbp_core.scheduler import Fate, Limits, Message, TransferScheduler

logger = logging.getLogger(__name__)

_JOBS: Final[Mapping[Direction, type[Job]]] = {
    Direction.LOAD: LoadJob,
    Direction.STORE: StoreJob,
    Direction.DEMOTE: DemoteJob,
}

_LAYER_KINDS: Final = frozenset({RequirementKind.LAYER_NAME_COMPLETE, RequirementKind.LAYER_COMPLETE})

_DRAIN_SHARE: Final = 0.75
"""Part of the time of :meth:`TransferEngine.close` that ops under way get before they are given up."""


class TransferEngine:
    """Executes the ops of one worker: HBM to DRAM, DRAM and SSD to HBM, DRAM to SSD.

    The :class:`~umbp_core.scheduler.TransferScheduler` decides when an op starts and says once how it ended;
    this class adds a lock, a clock, fences and threads: one for device copies (loads first), ``io_threads``
    for SSD slots, ``hash_threads`` for checksums and, where the KV cache lies in host memory, for loads.  SSD and
    checksums have threads of their own so that a disk that hangs costs the hits on it and nothing else.

    Threads.  :meth:`submit`, :meth:`begin_iteration`, :meth:`layer_done`, :meth:`end_iteration` and
    :meth:`poll` belong to the engine's forward thread and only ever take a lock that is held for microseconds
    (law L5); the other methods may be called from any thread.  Only :meth:`wait`, :meth:`wait_layers` and
    :meth:`close` block.

    Quarantine.  An op that was cancelled or expired while it was being carried out is reported at once, with
    ``OpResult.quarantined``: its HBM blocks are never touched after that, but a hanging read may still write
    into its DRAM pages.  They must not be given away before the op's id comes out of :meth:`take_released`
    (and is no longer in :meth:`quarantined`).

    The leader's ``timeout_s`` is noticed by :meth:`poll`, :meth:`submit` and :meth:`wait`; nothing runs a timer.
    """

    def __init__(
        self,
        copier: DeviceCopier,
        arena: PageMemory,
        slab: SlotStore | None,
        identity: Identity,
        world_rank: int,
        object_bytes: Mapping[int, int],
        limits: Limits | None = None,
        clock: Clock = time.monotonic,
        io_threads: int = 4,
        observer: PoolObserver | None = None,
        hash_threads: int = 2,
        scheduler: TransferScheduler | None = None,
        layers: LayerCopier | None = None,
    ) -> None:
        """``object_bytes`` maps every KV group to how many bytes of a page an object is on this rank.

        ``arena`` has pages, and ``slab`` slots, of a multiple of 4096 bytes that hold the largest object;
        ``slab`` is None on a worker without an SSD tier.  ``scheduler`` is a fresh one that brings its own limits;
        of ``limits`` the number of blocks then bounds what is copied at once.
        ``layers`` is what layer-wise loads need, where there are such.  Starts nothing.
        """
        self._copier = copier
        self._clock = clock
        self._observer = observer
        self._scheduler = scheduler if scheduler is not None else TransferScheduler(limits)
        self._tools = Tools(
            copier=copier,
            layers=layers,
            pages=arena,
            slots=slab,
            runs=slab if isinstance(slab, SlotRuns) else None,
            identity=identity.digest,
            world_rank=world_rank,
            object_bytes=dict(object_bytes),
            device=Lanes("device", 1),
            io=Lanes("io", io_threads),
            io_threads=io_threads,
            hashing=Lanes("hash", hash_threads, apart=True),
            hash_threads=hash_threads,
            failures=FailureLog(clock),
            batch_blocks=(limits if limits is not None else Limits()).blocks,
        )
        self._changed = threading.Condition()
        self._fences = Fences()
        self._delivered = Delivered()
        self._layer_waits = LayerWaits()
        self._observed: list[OpResult] = []
        self._lost: deque[LeaderTransferRequest] = deque()
        self._started = False
        self._closing = False

    def start(self) -> None:
        """Start the threads; ops that were submitted before begin now.

        Raises ``StateError`` when the engine was started or closed before.
        """
        with self._changed:
            if self._started or self._closing:
                raise StateError("a transfer engine starts once; make a new one")
            self._started = True
        for lanes in self._lanes():
            lanes.start()

    def submit(self, ops: Iterable[LeaderTransferRequest], paired: bool = True) -> None:
        """Take over ops.  Forward thread.

        With ``paired``, the channel that brought them stands for both halves; otherwise each waits for its
        worker half (:meth:`take`) unless it is immediate.  Repetitions change nothing.  An op that
        contradicts what is known under its id is logged and ignored; the first one has its result.  After
        :meth:`close` every op is reported as cancelled.
        """
        if not self._fences.has_any:
            self._fences.advance(self._copier.fence())
        with self._changed:
            now = self._clock()
            for op in ops:
                self._take(TransferScheduleRequest(op), now)
                if paired and not op.immediate:
                    self._take(WorkerTransferRequest(op.op_id, op.request_id, op.direction), now)
            self._dispatch()

    def submit_ahead(self, n: int, ops: Iterable[LeaderTransferRequest], fence: object) -> None:
        """Take over layer-wise loads that the forward pass of step ``n``, not launched yet, will wait for.

        ``fence`` lies before the pass: on the device the loads come after it.  Forward thread; otherwise as
        :meth:`submit`.
        """
        with self._changed:
            self._fences.advance(fence)
        self.begin_iteration(n)
        self.submit(ops)

    def take(self, messages: Iterable[Message]) -> None:
        """What comes over other channels: worker halves, results of ops carried out elsewhere.  Any thread.

        Otherwise as :meth:`submit`.
        """
        with self._changed:
            now = self._clock()
            for message in messages:
                self._take(message, now)
            self._dispatch()

    def begin_iteration(self, n: int) -> None:
        """The forward pass of the leader's step ``n`` starts.  Forward thread."""
        with self._changed:
            self._scheduler.begin_iteration(n)
            self._layer_waits.begin_iteration(n)

    def layer_done(self, name: str, index: int, fence: object) -> None:
        """A layer of the current step was launched; ``fence`` lies behind it.  Forward thread."""
        with self._changed:
            self._fences.advance(fence)
            self._scheduler.layer_done(name, index)
            self._layer_waits.layer_done(name, index, fence)
            self._dispatch()

    def end_iteration(self, n: int, fence: object) -> None:
        """The forward pass of step ``n`` was launched; ``fence`` lies behind it.  Forward thread; never waits.

        Ops that name step ``n`` are ordered after ``fence`` on the device, others after the newest one.  Layers that
        nobody reported (:meth:`layer_done`) count as done.
        """
        with self._changed:
            self._fences.end_iteration(n, fence)
            self._scheduler.end_iteration(n)
            self._layer_waits.end_iteration(n, fence)
            self._dispatch()

    def cancel(self, op_ids: Iterable[str]) -> None:
        """Drop ops that have not begun to write to their destination; others run to their end.  Any thread."""
        with self._changed:
            for op_id in op_ids:
                self._scheduler.cancel(op_id)
            self._dispatch()

    def cancel_request(self, request_id: str) -> None:
        """As :meth:`cancel` for all ops of a request."""
        with self._changed:
            self._scheduler.cancel_request(request_id)
            self._dispatch()

    def poll(self) -> list[OpResult]:
        """The ops that ended since the last call, each exactly once; tells the observer.  Forward thread."""
        with self._changed:
            self._dispatch()
            results = self._scheduler.take_results()
            observed, self._observed = self._observed, []
        self._observe(results)
        return observed + results

    def wait(self, op_ids: Iterable[str], timeout: float, first: bool = False) -> bool:
        """Block until all ops have ended (or, with ``first``, one of them), for at most ``timeout`` seconds.

        Returns whether they have.  An op that ended touches HBM no more; its result still comes from
        :meth:`poll`.  Unknown ids have ended.  Deadlines count meanwhile.
        """
        with self._changed:
            waiting = list(op_ids)
            enough = len(waiting) - 1 if first and waiting else 0
            end = self._clock() + timeout
            while True:
                self._dispatch()
                waiting = [op_id for op_id in waiting if not self._scheduler.has_ended(op_id)]
                if len(waiting) <= enough:
                    return True
                now = self._clock()
                if now >= end:
                    return False
                deadline = self._scheduler.next_deadline()
                self._changed.wait((end if deadline is None else min(end, deadline)) - now)

    def wait_layers(self, op_ids: Iterable[str], bands: int, timeout: float) -> bool:
        """Block until the first ``bands`` bands of every layer-wise load in ``op_ids`` are in place or it has ended.

        For at most ``timeout`` seconds; returns whether it is so.  Any thread, several at once.
        """
        waiting = list(op_ids)

        def over() -> bool:
            while waiting:
                last = waiting[-1]
                if self._delivered.bands(last) < bands and not self._scheduler.has_ended(last):
                    return False
                waiting.pop()
            return True

        with self._changed:
            return self._changed.wait_for(over, timeout)

    def give_up(self, op_ids: Iterable[str]) -> None:
        """Nobody waits for these layer-wise loads any more.  Any thread.

        Those that have not begun to write are dropped, the others end as failed after the copy that is being made.
        """
        with self._changed:
            for op_id in op_ids:
                if not (self._scheduler.cancel(op_id) or self._scheduler.has_ended(op_id)):
                    self._delivered.give_up(op_id)
            self._dispatch()

    def pending(self) -> int:
        """Ops that have not ended.  Any thread."""
        with self._changed:
            return self._scheduler.pending()

    def account_for(self, op: LeaderTransferRequest) -> Fate:
        """What became of ``op``, which was sent and never heard of again.  Any thread."""
        with self._changed:
            return self._scheduler.account_for(op, self._clock())

    def quarantined(self) -> frozenset[str]:
        """Ops that were reported while a thread was still at work on their DRAM pages.  Any thread."""
        with self._changed:
            return self._scheduler.quarantined()

    def take_released(self) -> list[str]:
        """Ops that left the quarantine since the last call: their DRAM pages are free of this rank."""
        with self._changed:
            return self._scheduler.take_released()

    def dump(self) -> list[dict[str, object]]:
        """One line per pending op, for logs."""
        with self._changed:
            return self._scheduler.dump()

    def close(self, timeout: float = 10.0) -> bool:
        """End every op and the threads within ``timeout`` seconds; idempotent.

        Ops that have not begun to write are cancelled at once, others may end; what has not by then is
        reported as cancelled too.  The results stay for a last :meth:`poll`.  Returns False when a thread
        could not be ended because it hangs in a copy or a read: its memory must stay mapped.
        """
        end = time.monotonic() + timeout
        with self._changed:
            again, self._closing = self._closing, True
            self._dispatch()
            if self._started and not again:
                self._changed.wait_for(self._is_idle, timeout * _DRAIN_SHARE)
            self._scheduler.abort()
            results = self._scheduler.take_results()
            self._observed += results
            self._changed.notify_all()
        self._observe(results)
        for lanes in self._lanes():
            lanes.stop()
        joined = [lanes.join(end - time.monotonic()) for lanes in self._lanes()]
        if not all(joined):
            logger.warning("a transfer thread did not end within %.1f s: a copy or a disk hangs", timeout)
        return all(joined)

    def commit(self, op_id: str) -> bool:
        """For jobs: the scheduler's commitment point.  Transfer threads."""
        with self._changed:
            return self._scheduler.commit(op_id)

    def is_running(self, op_id: str) -> bool:
        """For jobs: False once the op was dropped.  Transfer threads."""
        with self._changed:
            return self._scheduler.is_running(op_id)

    def delivered(self, op_id: str, bands: int) -> bool:
        """For jobs: some layers are in place; False once the op was given up.  Transfer threads."""
        with self._changed:
            self._changed.notify_all()
            return self._delivered.reached(op_id, bands)

    def after_layers(self, iteration: int, layers: Sequence[str], call: BehindLayers) -> None:
        """For jobs: ``call`` when the layers are done.  Transfer threads."""
        with self._changed:
            self._layer_waits.wait(iteration, layers, self._fences.behind(iteration), call)

    def finished(self, result: OpResult) -> None:
        """For jobs: the op's memory was touched for the last time.  Transfer threads."""
        with self._changed:
            self._delivered.forget(result.op_id)
            self._scheduler.finished(result, self._clock())
            self._dispatch()

    def lost(self, op: LeaderTransferRequest) -> None:
        """For jobs: the interpreter has dropped one that never said how its op ended.  Takes no lock."""
        self._lost.append(op)

    def _take(self, message: Message, now: float) -> None:
        try:
            self._scheduler.take(message, now)
        except StateError:
            logger.exception("half of an op refused")

    def _dispatch(self) -> None:
        """Expire, start what may start, wake who waits.  With the lock held."""
        while self._lost:
            op = self._lost.popleft()
            logger.error("%s %s was dropped by its job; it counts as failed", op.direction.label, op.op_id)
            self._delivered.forget(op.op_id)
            self._scheduler.finished(lost_result(op), self._clock())
        if self._closing:
            self._scheduler.cancel_all("closed")
        for op in self._scheduler.poll(self._clock()):
            self._job_of(op)(op, self._fences.of(op), self._tools, self).start()
        self._changed.notify_all()

    def _job_of(self, op: LeaderTransferRequest) -> type[Job]:
        if op.layerwise:
            return LayerwiseLoadJob
        required = op.requirement
        by_layer = op.direction is Direction.STORE and required.kind in _LAYER_KINDS
        if by_layer and not self._layer_waits.has_ended(required.iteration):
            return LayerwiseStoreJob
        return _JOBS[op.direction]

    def _is_idle(self) -> bool:
        return not self._scheduler.pending() and not self._scheduler.quarantined()

    def _lanes(self) -> tuple[Lanes, ...]:
        return (self._tools.device, self._tools.io, self._tools.hashing)

    def _observe(self, results: Sequence[OpResult]) -> None:
        if self._observer is not None:
            for result in results:
                self._observer.op_finished(
                    result.direction.label,
                    result.status.value,
                    result.moved_bytes,
                    result.seconds,
                    result.reason,
                )
