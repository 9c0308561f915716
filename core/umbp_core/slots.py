"""One request's life as the leader sees it: the bookkeeping around :mod:`umbp_core.slot_table`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import MappingProxyType

from umbp_core.errors import IllegalTransition, StateError
from umbp_core.ops import Direction, OpStatus
from umbp_core.slot_table import (
    Life,
    LifeEvent,
    State,
    Step,
    Transaction,
    TransactionEvent,
    states_that_allow,
)

__all__ = ["Life", "LifeEvent", "Slot", "SlotTable", "Transaction", "TransactionEvent"]

_STAGE = Step.of(LifeEvent.STAGE)
_UNSTAGE = Step.of(LifeEvent.UNSTAGE)
_BEGIN_ONBOARD = Step.of(LifeEvent.BEGIN_ONBOARD, TransactionEvent.LOAD_BEGUN)
_BEGIN_STORE = Step.of(LifeEvent.BEGIN_STORE, TransactionEvent.STORE_BEGUN)
_PREFILL = Step.of(LifeEvent.PREFILL)
_DECODE = Step.of(LifeEvent.DECODE)
_SKIP = Step.of(LifeEvent.SKIP)
_PREEMPT = Step.of(LifeEvent.PREEMPT)
_FINISH = Step.of(LifeEvent.FINISH)
_LOAD_BEGUN = Step.of(transfer=TransactionEvent.LOAD_BEGUN)
_LOAD_FAILED = Step.of(transfer=TransactionEvent.LOAD_FAILED)
_LOADS_ENDED = Step.of(LifeEvent.LOADED, TransactionEvent.LOADS_ENDED)
_STORES_ENDED = Step.of(transfer=TransactionEvent.STORES_ENDED)
_RELEASED = Step.of(transfer=TransactionEvent.RELEASED)

_MAY_MATCH = states_that_allow(LifeEvent.STAGE, TransactionEvent.LOAD_BEGUN)
_MAY_STORE = states_that_allow(LifeEvent.BEGIN_STORE, TransactionEvent.STORE_BEGUN)
_FIRST: State = (Life.INITIALIZED, Transaction.NONE)


class Slot:
    """The state of one request; made by :meth:`SlotTable.create`.

    Every method that changes the slot either makes one step of both machines or raises
    :class:`~umbp_core.errors.IllegalTransition` with nothing changed.  One thread.
    """

    __slots__ = ("_loads", "_ops", "_staged_tokens", "_state", "request_id")

    def __init__(self, request_id: str) -> None:
        self.request_id = request_id
        self._state = _FIRST
        self._ops: dict[str, Direction] = {}
        self._loads = 0
        self._staged_tokens = 0

    def __repr__(self) -> str:
        return f"Slot({self.request_id!r}, {self.life.name}, {self.transaction.name}, {len(self._ops)} ops)"

    @property
    def life(self) -> Life:
        """Where the engine has the request."""
        return self._state[0]

    @property
    def transaction(self) -> Transaction:
        """What is in flight for it."""
        return self._state[1]

    @property
    def ops(self) -> Mapping[str, Direction]:
        """A read-only view of the ops in flight: op id to direction."""
        return MappingProxyType(self._ops)

    @property
    def staged_tokens(self) -> int:
        """Tokens of the match that is staged or being loaded; 0 otherwise."""
        return self._staged_tokens

    @property
    def may_match(self) -> bool:
        """Whether a match may be staged now (again, when one is staged already)."""
        return self._state in _MAY_MATCH

    @property
    def may_store(self) -> bool:
        """Whether a store may begin now."""
        return self._state in _MAY_STORE

    @property
    def is_finished(self) -> bool:
        """Whether the request is over and no op of it is in flight."""
        return self._state[0] is Life.FINISHED

    def stage(self, n_tokens: int) -> None:
        """Blocks for ``n_tokens`` (at least 1) were matched and pinned.

        While a match is staged already, the new one replaces it; the caller releases the old pins.
        Raises ``IllegalTransition`` unless :attr:`may_match`, ``StateError`` for a match of nothing.
        """
        if n_tokens < 1:
            raise StateError(f"slot {self.request_id}: a match of {n_tokens} tokens cannot be staged; do not stage it")
        if self._state not in _MAY_MATCH:
            raise self._illegal(_LOAD_BEGUN if self._state in _STAGE.after else _STAGE)
        self._step(_STAGE)
        self._staged_tokens = n_tokens

    def unstage(self) -> None:
        """The staged match was given up; the request may be scheduled, or matched again."""
        self._step(_UNSTAGE)
        self._staged_tokens = 0

    def begin_onboard(self, op_id: str) -> None:
        """Load ``op_id`` was issued for the staged match, or is another one of the same match."""
        if op_id in self._ops:
            raise self._known_op(op_id)
        self._step(_BEGIN_ONBOARD)
        self._ops[op_id] = Direction.LOAD
        self._loads += 1

    def begin_store(self, op_id: str) -> None:
        """Store ``op_id`` was issued; the last one of a request before :meth:`finish`."""
        if op_id in self._ops:
            raise self._known_op(op_id)
        state = _BEGIN_STORE.after.get(self._state)  # as _step does, without its call: once per stored block
        if state is None:
            raise self._illegal(_BEGIN_STORE)
        self._state = state
        self._ops[op_id] = Direction.STORE

    def op_ended(self, op_id: str, status: OpStatus) -> bool:
        """Op ``op_id`` ended on all ranks with ``status`` (the worst of them).

        Returns False, with nothing changed, when the op is not in flight here: an unknown id or a
        repeated result completes nothing else.
        """
        direction = self._ops.pop(op_id, None)
        if direction is None:
            return False
        if direction is Direction.LOAD:
            self._load_ended(status)
        elif len(self._ops) == self._loads:
            state = _STORES_ENDED.after.get(self._state)  # as in begin_store
            if state is None:
                raise self._illegal(_STORES_ENDED)
            self._state = state
        if not self._ops and self._state[1] is not Transaction.NONE:
            self._step(_RELEASED)
        return True

    def scheduled(self, decoding: bool) -> None:
        """The engine put the request into the current step."""
        step = _DECODE if decoding else _PREFILL
        state = step.after.get(self._state)  # as in begin_store
        if state is None:
            raise self._illegal(step)
        self._state = state

    def skipped(self) -> None:
        """The request is running but absent from the current step."""
        self._step(_SKIP)

    def preempted(self) -> None:
        """The engine took the request's HBM blocks; stores in flight stay in :attr:`ops`."""
        self._step(_PREEMPT)

    def finish(self) -> None:
        """The engine is done with the request, in whatever state it is; idempotent.

        The slot is FINISHED at once when nothing is in flight, else FINISHING until the last op ended.
        """
        self._step(_FINISH)
        if not self._loads:
            self._staged_tokens = 0

    def _known_op(self, op_id: str) -> StateError:
        return StateError(f"slot {self.request_id}: op {op_id} is in flight already; every op needs its own id")

    def _load_ended(self, status: OpStatus) -> None:
        self._loads -= 1
        if status is not OpStatus.DONE:
            self._step(_LOAD_FAILED)
        if not self._loads:
            self._staged_tokens = 0
            self._step(_LOADS_ENDED)

    def _step(self, step: Step) -> None:
        """Advance both machines together; all or nothing."""
        state = step.after.get(self._state)
        if state is None:
            raise self._illegal(step)
        self._state = state

    def _illegal(self, step: Step) -> IllegalTransition:
        machine, state, event = step.refusal(self._state)
        return IllegalTransition(machine, f"request {self.request_id}", state, event)


class SlotTable:
    """All slots of one leader, by request id.  One thread."""

    def __init__(self) -> None:
        self._slots: dict[str, Slot] = {}

    def __len__(self) -> int:
        return len(self._slots)

    def __iter__(self) -> Iterator[Slot]:
        return iter(self._slots.values())

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._slots

    def create(self, request_id: str) -> Slot:
        """A new slot in INITIALIZED; raises ``StateError`` when the request has one."""
        if not request_id:
            raise StateError("a slot needs a request id; got an empty one")
        if request_id in self._slots:
            raise StateError(f"request {request_id} has a slot already; remove it before it is created again")
        slot = self._slots[request_id] = Slot(request_id)
        return slot

    def get(self, request_id: str) -> Slot | None:
        """The request's slot, or ``None`` for a request that was never created or is removed."""
        return self._slots.get(request_id)

    def remove(self, request_id: str) -> None:
        """Forget a FINISHED slot; idempotent.  Raises ``StateError`` for one that is still alive."""
        slot = self._slots.get(request_id)
        if slot is None:
            return
        if not slot.is_finished:
            raise StateError(
                f"request {request_id} is {slot.life.name} with {len(slot.ops)} ops in flight;"
                " finish it and wait for them before its slot is removed"
            )
        del self._slots[request_id]
