"""Which requests wait for which ops: completion is a set, early results count for every later slot."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from umbp_core.ops import Direction, NewWorkerSlot, OpResult, OpStatus
from umbp_core.worker_slots import WorkerSlots


def result(op_id: str, request_id: str = "r", status: OpStatus = OpStatus.DONE) -> OpResult:
    return OpResult(op_id, request_id, Direction.LOAD, status)


def completed(slots: WorkerSlots) -> list[tuple[str, tuple[str, ...]]]:
    return [(slot.request_id, tuple(r.op_id for r in slot.results)) for slot in slots.take_complete()]


@pytest.mark.statement("connector", 36)
def test_a_result_that_comes_before_its_slot_counts_once() -> None:
    slots = WorkerSlots()
    slots.ended(result("a"))
    assert completed(slots) == []
    slots.open(NewWorkerSlot("r", ("a", "b")))
    slots.ended(result("a"))
    assert (completed(slots), slots.is_waiting("r")) == ([], True)
    slots.ended(result("b"))
    assert (completed(slots), slots.is_waiting("r")) == ([("r", ("a", "b"))], False)


@pytest.mark.statement("connector", 37)
def test_early_results_count_for_every_later_slot_until_the_request_has_finished() -> None:
    slots = WorkerSlots()
    slots.ended(result("a"))
    for _ in range(2):
        slots.open(NewWorkerSlot("r", ("a",)))
        assert completed(slots) == [("r", ("a",))]
    slots.finished(["r"])
    slots.open(NewWorkerSlot("r", ("a",)))
    assert (completed(slots), len(slots)) == ([], 1)


@pytest.mark.statement("connector", 38)
@pytest.mark.bug("B6")
def test_repeated_and_unknown_results_complete_nothing_and_never_overshoot() -> None:
    """A counter would be complete after two results, and past complete after the third."""
    slots = WorkerSlots()
    slots.open(NewWorkerSlot("r", ("a", "b")))
    for _ in range(3):
        slots.ended(result("a"))
        slots.ended(result("nobody's"))
        slots.ended(result("b", request_id="another request"))
    assert completed(slots) == []
    slots.ended(result("b", status=OpStatus.FAILED))
    slots.ended(result("b"))
    (slot,) = slots.take_complete()
    assert [r.status for r in slot.results] == [OpStatus.DONE, OpStatus.FAILED], "the first word counts"
    assert completed(slots) == []


def test_a_request_that_finishes_while_it_waits_is_complete_later_and_leaves_nothing() -> None:
    slots = WorkerSlots()
    slots.open(NewWorkerSlot("r", ("a", "b")))
    slots.ended(result("a"))
    slots.finished(["r", "unknown"])
    slots.ended(result("b"))
    assert completed(slots) == [("r", ("a", "b"))]
    assert (slots.remembered, len(slots)) == (0, 0)


def test_what_is_kept_for_nobody_is_bounded() -> None:
    slots = WorkerSlots(remember=3)
    for number in range(10):
        slots.ended(result("a", request_id=f"r{number}"))
    assert slots.remembered == 3
    slots.open(NewWorkerSlot("r9", ("a",)))
    slots.open(NewWorkerSlot("r0", ("a",)))
    assert completed(slots) == [("r9", ("a",))]


class SlotsMachine(RuleBasedStateMachine):
    """Beside a model that looks at every slot after every event."""

    ops = st.lists(st.sampled_from(["a", "b", "c"]), unique=True, max_size=3)
    requests = st.sampled_from(["x", "y"])

    def __init__(self) -> None:
        super().__init__()
        self.slots = WorkerSlots()
        self.known: dict[str, set[str]] = {"x": set(), "y": set()}
        self.open: list[tuple[str, tuple[str, ...], set[str]]] = []
        self.over: set[str] = set()
        self.complete: list[tuple[str, tuple[str, ...]]] = []

    @rule(request=requests, op_ids=ops)
    def open_slot(self, request: str, op_ids: Iterable[str]) -> None:
        named = tuple(op_ids)
        self.slots.open(NewWorkerSlot(request, named))
        if set(named) - self.known[request]:
            self.over.discard(request)
        self.open.append((request, named, set(named) - self.known[request]))
        self._settle()

    @rule(request=requests, op_id=st.sampled_from(["a", "b", "c"]))
    def end(self, request: str, op_id: str) -> None:
        op_id = f"{op_id}"
        self.slots.ended(result(op_id, request))
        if op_id not in self.known[request]:
            self.known[request].add(op_id)
            for owner, _, missing in self.open:
                if owner == request:
                    missing.discard(op_id)
        self._settle()

    @rule(request=requests)
    def finish(self, request: str) -> None:
        self.slots.finished([request])
        if any(owner == request for owner, _, _ in self.open):
            self.over.add(request)
        else:
            self.known[request] = set()

    def _settle(self) -> None:
        done = [slot for slot in self.open if not slot[2]]
        self.open = [slot for slot in self.open if slot[2]]
        self.complete += [(owner, named) for owner, named, _ in done]
        for request in tuple(self.over):
            if not any(owner == request for owner, _, _ in self.open):
                self.over.discard(request)
                self.known[request] = set()

    @rule()
    def take(self) -> None:
        assert sorted(completed(self.slots)) == sorted(self.complete)
        self.complete = []

    @invariant()
    def same(self) -> None:
        assert len(self.slots) == len(self.open)
        for request in ("x", "y"):
            assert self.slots.is_waiting(request) == any(owner == request for owner, _, _ in self.open)
        assert self.slots.remembered <= 2


TestWorkerSlots = SlotsMachine.TestCase
