"""A hypothesis machine that drives a slot table beside a plain model.

Subclass it with another ``make`` to check an implementation of your own; run it as ``SlotMachine.TestCase``
under pytest or unittest.
"""

from __future__ import annotations

from collections.abc import Callable

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from umbp_core.errors import IllegalTransition, StateError
from umbp_core.ops import Direction, OpStatus
from umbp_core.slots import Slot, SlotTable
from umbp_core.testing.models_transfer import SlotModel

requests = st.sampled_from(["r0", "r1"])


class SlotMachine(RuleBasedStateMachine):
    """Law L6 and the two tables: any sequence of events, legal or not, on two requests."""

    def __init__(self) -> None:
        super().__init__()
        self.table = self.make()
        self.models: dict[str, SlotModel] = {}
        self.op_count = 0
        for request in ("r0", "r1"):
            self.create(request)

    def make(self) -> SlotTable:
        """The table under test."""
        return SlotTable()

    @rule(request=requests)
    def replace(self, request: str) -> None:
        """What is over makes room for a new request of the same id."""
        model = self.models.get(request)
        if model is None or (model.over and not model.loads and not model.stores):
            self.remove(request)
            self.create(request)

    @rule(request=requests)
    def create(self, request: str) -> None:
        """A second slot for a living request is refused."""
        if request in self.models:
            try:
                self.table.create(request)
            except StateError:
                return
            raise AssertionError("a second slot was created")
        self.table.create(request)
        self.models[request] = SlotModel()

    @rule(request=requests)
    def remove(self, request: str) -> None:
        """Only what is over is forgotten."""
        model = self.models.get(request)
        if model is not None and not (model.over and not model.loads and not model.stores):
            try:
                self.table.remove(request)
            except StateError:
                return
            raise AssertionError("a living slot was removed")
        self.table.remove(request)
        self.models.pop(request, None)

    @rule(request=requests, n_tokens=st.integers(1, 100))
    def stage(self, request: str, n_tokens: int) -> None:
        """Match."""
        self._event(request, lambda m: m.may_match, lambda s: s.stage(n_tokens), lambda m: m.stage(n_tokens))

    @rule(request=requests)
    def unstage(self, request: str) -> None:
        """Give the match up."""
        self._event(request, lambda m: m.holds_match, lambda s: s.unstage(), lambda m: m.stage(0))

    @rule(request=requests)
    def begin_onboard(self, request: str) -> None:
        """Load."""
        op_id = self._new_op()
        self._event(request, lambda m: m.may_onboard, lambda s: s.begin_onboard(op_id), lambda m: m.loads.add(op_id))

    @rule(request=requests)
    def begin_store(self, request: str) -> None:
        """Store."""
        op_id = self._new_op()
        self._event(request, lambda m: m.may_store, lambda s: s.begin_store(op_id), lambda m: m.stores.add(op_id))

    @rule(request=requests, match=st.booleans())
    def usual_course(self, request: str, match: bool) -> None:
        """What chance alone does too rarely: a load from where one is possible, else a step and a store."""
        if match:
            self.preempted(request)
            self.stage(request, 16)
            self.begin_onboard(request)
        else:
            self.scheduled(request, decoding=False)
            self.begin_store(request)

    @rule(request=requests, decoding=st.booleans())
    def scheduled(self, request: str, decoding: bool) -> None:
        """In the step."""
        self._event(
            request, lambda m: m.may_be_scheduled, lambda s: s.scheduled(decoding), lambda m: m.schedule(decoding)
        )

    @rule(request=requests)
    def skipped(self, request: str) -> None:
        """Not in the step."""

        def skip(model: SlotModel) -> None:
            model.skipped = True

        self._event(request, lambda m: m.may_be_preempted, lambda s: s.skipped(), skip)

    @rule(request=requests)
    def preempted(self, request: str) -> None:
        """Out of HBM."""
        self._event(request, lambda m: m.may_be_preempted, lambda s: s.preempted(), lambda m: m.preempt())

    @rule(request=requests)
    def finish(self, request: str) -> None:
        """In whatever state."""
        self._event(request, lambda _: True, lambda s: s.finish(), lambda m: m.finish())

    @rule(request=requests, data=st.data(), status=st.sampled_from(OpStatus))
    def end_one(self, request: str, data: st.DataObject, status: OpStatus) -> None:
        """An op in flight ends, and its result comes twice."""
        model, slot = self.models.get(request), self.table.get(request)
        if model is None or slot is None or not (model.loads or model.stores):
            return
        op_id = data.draw(st.sampled_from(sorted(model.loads | model.stores)))
        assert slot.op_ended(op_id, status)
        assert model.end(op_id, status)
        assert not slot.op_ended(op_id, status), "the second result changes nothing"

    @rule(request=requests, status=st.sampled_from(OpStatus))
    def end_unknown(self, request: str, status: OpStatus) -> None:
        """A result for an op of nobody."""
        slot = self.table.get(request)
        assert slot is None or not slot.op_ended("nobody's", status)

    @invariant()
    def same(self) -> None:
        """Every slot is what its model says."""
        assert {slot.request_id for slot in self.table} == self.models.keys()
        assert len(self.table) == len(self.models)
        for request, model in self.models.items():
            slot = self.table.get(request)
            assert slot is not None
            assert request in self.table
            found = (slot.life, slot.transaction, dict(slot.ops), slot.staged_tokens, slot.may_match, slot.may_store)
            ops = dict.fromkeys(model.loads, Direction.LOAD) | dict.fromkeys(model.stores, Direction.STORE)
            assert found == (model.life, model.transaction, ops, model.staged, model.may_match, model.may_store)
            assert slot.is_finished == (model.over and not ops)

    def _new_op(self) -> str:
        self.op_count += 1
        return f"op{self.op_count}"

    def _event(
        self,
        request: str,
        legal: Callable[[SlotModel], bool],
        real: Callable[[Slot], None],
        apply: Callable[[SlotModel], object],
    ) -> None:
        model, slot = self.models.get(request), self.table.get(request)
        if model is None or slot is None:
            return
        if legal(model):
            real(slot)
            apply(model)
            return
        try:
            real(slot)
        except IllegalTransition:
            return
        raise AssertionError(f"{slot} accepted an event that its model forbids")
