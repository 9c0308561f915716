"""Which requests wait, on one worker, for which ops; complete is who has heard of each of them.

A slot is opened with the ids of the ops that its request waits for, and is complete when every one of them has ended,
well or not.  Completion is membership in a set: repeated, unknown and late results complete nothing.  Results may come
before the slot that waits for them, over another channel: they are kept, count for *every* slot of the request that is
opened later, and are forgotten when the engine says that the request has finished.
"""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

from umbp_core.ops import NewWorkerSlot, OpResult


class CompletedSlot(msgspec.Struct, frozen=True, gc=False):
    """All ops of a slot have ended; ``results`` are in the order in which the slot named them."""

    request_id: str
    results: tuple[OpResult, ...]


class _Slot:
    __slots__ = ("missing", "op_ids", "request_id", "results")

    def __init__(self, request: NewWorkerSlot, known: dict[str, OpResult]) -> None:
        self.request_id = request.request_id
        self.op_ids = request.op_ids
        self.results = {op_id: known[op_id] for op_id in request.op_ids if op_id in known}
        self.missing = set(request.op_ids) - self.results.keys()


class WorkerSlots:
    """The slots of one worker.  One thread at a time; costs are in proportion to what a call changes.

    ``remember`` bounds the requests of which results are kept while nobody waits, because a request may be over
    before its last result comes; the oldest are forgotten first.
    """

    def __init__(self, remember: int = 4096) -> None:
        self._remember = remember
        self._waiting: dict[tuple[str, str], list[_Slot]] = {}
        self._open: dict[str, int] = {}
        self._over: set[str] = set()
        self._results: dict[str, dict[str, OpResult]] = {}
        self._complete: list[CompletedSlot] = []

    def __len__(self) -> int:
        """Slots that are not complete."""
        return sum(self._open.values())

    @property
    def remembered(self) -> int:
        """Requests of which results are kept."""
        return len(self._results)

    def open(self, request: NewWorkerSlot) -> None:
        """A request waits.  Without ops, or when all have ended already, its slot is complete at once."""
        slot = _Slot(request, self._results.get(request.request_id, {}))
        if not slot.missing:
            self._end(slot)
            return
        self._over.discard(request.request_id)
        self._open[request.request_id] = self._open.get(request.request_id, 0) + 1
        for op_id in slot.missing:
            self._waiting.setdefault((request.request_id, op_id), []).append(slot)

    def ended(self, result: OpResult) -> None:
        """An op ended; the first result of each counts."""
        results = self._results.get(result.request_id)
        if results is None:
            results = self._results[result.request_id] = {}
            self._forget_oldest()
        if result.op_id in results:
            return
        results[result.op_id] = result
        for slot in self._waiting.pop((result.request_id, result.op_id), ()):
            slot.results[result.op_id] = result
            slot.missing.discard(result.op_id)
            if not slot.missing:
                self._close(slot)

    def is_waiting(self, request_id: str) -> bool:
        """Whether a slot of the request is not complete.  An unknown request waits for nothing."""
        return request_id in self._open

    def finished(self, request_ids: Iterable[str]) -> None:
        """The engine is done with these requests: forget what was kept for their later slots.

        A slot that still waits stays until it is complete.
        """
        for request_id in request_ids:
            if request_id in self._open:
                self._over.add(request_id)
            else:
                self._results.pop(request_id, None)

    def take_complete(self) -> list[CompletedSlot]:
        """The slots that became complete since the last call, in that order."""
        complete, self._complete = self._complete, []
        return complete

    def _close(self, slot: _Slot) -> None:
        request_id = slot.request_id
        self._open[request_id] -= 1
        if not self._open[request_id]:
            del self._open[request_id]
            if request_id in self._over:
                self._over.discard(request_id)
                self._results.pop(request_id, None)
        self._end(slot)

    def _end(self, slot: _Slot) -> None:
        results = tuple([slot.results[op_id] for op_id in slot.op_ids])
        self._complete.append(CompletedSlot(slot.request_id, results))

    def _forget_oldest(self) -> None:
        """Keep the bound; what a slot still waits with, it has itself."""
        if len(self._results) > self._remember:
            del self._results[next(iter(self._results))]
