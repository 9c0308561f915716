"""The two state machines of a slot, as data.

Rule: whatever decides how a slot's state changes is in this file; :mod:`umbp_core.slots` only keeps the
books (which ops are in flight) and looks things up here.  No other file knows a transition.

Theory of operation
-------------------
A slot is the life of one request as the leader sees it.  It is two small machines and not one large one,
because two things happen to a request independently: the engine moves it through prefill and decode
(*life*), and ops carry its blocks (*transaction*).  Their product would have fifty states, most of which
nobody could name.

**Life** says where the engine has the request, and therefore what may be begun:

=================  =============================================  ========  ========  =================
state              meaning                                        may load  may store  may be scheduled
=================  =============================================  ========  ========  =================
INITIALIZED        known, or back from a load; not in a step      stage     no        yes
ONBOARD_STAGED     blocks are matched and pinned, no load yet     begin     no        no
ONBOARDING         loads are in flight into its HBM blocks        begin     no        no
PREFILLING         in the current step, computing its prompt      no        yes       yes
SKIPPED_PREFILL    was prefilling, absent from the current step   no        yes       yes
DECODING           in the current step, sampling                  no        yes       yes
SKIPPED_DECODE     was decoding, absent from the current step     no        yes       yes
PREEMPTED          lost its HBM blocks, will come back            stage     no        yes
FINISHING          the engine is done with it, ops are not        no        no        no
FINISHED           nothing is left                                no        no        no
=================  =============================================  ========  ========  =================

**Transaction** says what is in flight.  FAILED is entered by the first load that does not end well and
is left only when the last op of the slot has ended: until then nothing new may begin, so that a request
whose load went wrong starts its recomputation from a quiet slot.  A store that fails is not a failure of
the slot: the blocks it read are right, there is only no copy of them.

The **joint rule** connects the two: FINISHING becomes FINISHED in the moment in which no op is left.

Every (state, event) pair that is not in a table is illegal.  Abort is legal in every state: the engine
may finish a request at any time, also while it is staged or loading.  FINISH is idempotent, because an
engine may tell us twice.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

import msgspec


class Life(enum.IntEnum):
    """Where the engine has the request."""

    INITIALIZED = 0
    ONBOARD_STAGED = 1
    ONBOARDING = 2
    PREFILLING = 3
    SKIPPED_PREFILL = 4
    DECODING = 5
    SKIPPED_DECODE = 6
    PREEMPTED = 7
    FINISHING = 8
    FINISHED = 9

    __hash__ = int.__hash__  # Enum's own is a Python function, and members are keys on hot paths


class LifeEvent(enum.IntEnum):
    """What the engine, or the last load, did."""

    STAGE = 0
    """Blocks were matched and pinned; again while staged replaces the earlier match."""
    UNSTAGE = 1
    """The match was given up; its pins are released."""
    BEGIN_ONBOARD = 2
    """A load op was issued; one match may be carried by several (one per tier)."""
    LOADED = 3
    """The last load in flight ended, well or not."""
    BEGIN_STORE = 4
    """A store op was issued."""
    PREFILL = 5
    """Scheduled in this step, computing prompt tokens."""
    DECODE = 6
    """Scheduled in this step, sampling."""
    SKIP = 7
    """Running, but absent from this step."""
    PREEMPT = 8
    """The engine took the HBM blocks away."""
    FINISH = 9
    """The engine is done with the request: completed, stopped or aborted."""

    __hash__ = int.__hash__  # Enum's own is a Python function, and members are keys on hot paths


class Transaction(enum.IntEnum):
    """What is in flight for the request."""

    NONE = 0
    LOADING = 1
    STORING = 2
    LOADING_AND_STORING = 3
    """Loads began while stores from before a preemption still drain."""
    FAILED = 4
    """A load failed; the ops that are still in flight drain, nothing new begins."""

    __hash__ = int.__hash__  # Enum's own is a Python function, and members are keys on hot paths


class TransactionEvent(enum.IntEnum):
    """What happened to the ops."""

    LOAD_BEGUN = 0
    STORE_BEGUN = 1
    LOAD_FAILED = 2
    """A load ended otherwise than done: failed, cancelled or expired."""
    LOADS_ENDED = 3
    """The last load in flight ended."""
    STORES_ENDED = 4
    """The last store in flight ended."""
    RELEASED = 5
    """No op is left."""

    __hash__ = int.__hash__  # Enum's own is a Python function, and members are keys on hot paths


LifeTable = Mapping[Life, Mapping[LifeEvent, Life]]
TransactionTable = Mapping[Transaction, Mapping[TransactionEvent, Transaction]]

LIFE: Final[LifeTable] = MappingProxyType(
    {
        Life.INITIALIZED: {
            LifeEvent.STAGE: Life.ONBOARD_STAGED,
            LifeEvent.PREFILL: Life.PREFILLING,
            LifeEvent.DECODE: Life.DECODING,
            LifeEvent.FINISH: Life.FINISHING,
        },
        Life.ONBOARD_STAGED: {
            LifeEvent.STAGE: Life.ONBOARD_STAGED,
            LifeEvent.UNSTAGE: Life.INITIALIZED,
            LifeEvent.BEGIN_ONBOARD: Life.ONBOARDING,
            LifeEvent.FINISH: Life.FINISHING,
        },
        Life.ONBOARDING: {
            LifeEvent.BEGIN_ONBOARD: Life.ONBOARDING,
            LifeEvent.LOADED: Life.INITIALIZED,
            LifeEvent.FINISH: Life.FINISHING,
        },
        Life.PREFILLING: {
            LifeEvent.BEGIN_STORE: Life.PREFILLING,
            LifeEvent.PREFILL: Life.PREFILLING,
            LifeEvent.DECODE: Life.DECODING,
            LifeEvent.SKIP: Life.SKIPPED_PREFILL,
            LifeEvent.PREEMPT: Life.PREEMPTED,
            LifeEvent.FINISH: Life.FINISHING,
        },
        Life.SKIPPED_PREFILL: {
            LifeEvent.BEGIN_STORE: Life.SKIPPED_PREFILL,
            LifeEvent.PREFILL: Life.PREFILLING,
            LifeEvent.DECODE: Life.DECODING,
            LifeEvent.SKIP: Life.SKIPPED_PREFILL,
            LifeEvent.PREEMPT: Life.PREEMPTED,
            LifeEvent.FINISH: Life.FINISHING,
        },
        Life.DECODING: {
            LifeEvent.BEGIN_STORE: Life.DECODING,
            # Back to prefill: an engine may append prompt tokens to a running request.
            LifeEvent.PREFILL: Life.PREFILLING,
            LifeEvent.DECODE: Life.DECODING,
            LifeEvent.SKIP: Life.SKIPPED_DECODE,
            LifeEvent.PREEMPT: Life.PREEMPTED,
            LifeEvent.FINISH: Life.FINISHING,
        },
        Life.SKIPPED_DECODE: {
            LifeEvent.BEGIN_STORE: Life.SKIPPED_DECODE,
            LifeEvent.PREFILL: Life.PREFILLING,
            LifeEvent.DECODE: Life.DECODING,
            LifeEvent.SKIP: Life.SKIPPED_DECODE,
            LifeEvent.PREEMPT: Life.PREEMPTED,
            LifeEvent.FINISH: Life.FINISHING,
        },
        Life.PREEMPTED: {
            LifeEvent.STAGE: Life.ONBOARD_STAGED,
            LifeEvent.PREFILL: Life.PREFILLING,
            LifeEvent.DECODE: Life.DECODING,
            LifeEvent.FINISH: Life.FINISHING,
        },
        Life.FINISHING: {
            LifeEvent.LOADED: Life.FINISHING,
            LifeEvent.FINISH: Life.FINISHING,
        },
        Life.FINISHED: {
            LifeEvent.FINISH: Life.FINISHED,
        },
    }
)
"""``LIFE[state][event]`` is the next state; a missing entry is illegal."""

TRANSACTION: Final[TransactionTable] = MappingProxyType(
    {
        Transaction.NONE: {
            TransactionEvent.LOAD_BEGUN: Transaction.LOADING,
            TransactionEvent.STORE_BEGUN: Transaction.STORING,
            TransactionEvent.RELEASED: Transaction.NONE,
        },
        Transaction.LOADING: {
            TransactionEvent.LOAD_BEGUN: Transaction.LOADING,
            TransactionEvent.LOAD_FAILED: Transaction.FAILED,
            TransactionEvent.LOADS_ENDED: Transaction.NONE,
        },
        Transaction.STORING: {
            TransactionEvent.LOAD_BEGUN: Transaction.LOADING_AND_STORING,
            TransactionEvent.STORE_BEGUN: Transaction.STORING,
            TransactionEvent.STORES_ENDED: Transaction.NONE,
        },
        Transaction.LOADING_AND_STORING: {
            TransactionEvent.LOAD_BEGUN: Transaction.LOADING_AND_STORING,
            TransactionEvent.LOAD_FAILED: Transaction.FAILED,
            TransactionEvent.LOADS_ENDED: Transaction.STORING,
            TransactionEvent.STORES_ENDED: Transaction.LOADING,
        },
        Transaction.FAILED: {
            TransactionEvent.LOAD_FAILED: Transaction.FAILED,
            TransactionEvent.LOADS_ENDED: Transaction.FAILED,
            TransactionEvent.STORES_ENDED: Transaction.FAILED,
            TransactionEvent.RELEASED: Transaction.NONE,
        },
    }
)
"""``TRANSACTION[state][event]`` is the next state; a missing entry is illegal."""

JOINT: Final[Mapping[tuple[Life, Transaction], Life]] = MappingProxyType(
    {
        (Life.FINISHING, Transaction.NONE): Life.FINISHED,
    }
)
"""Applied after every event until no rule matches: this pair of states means that life."""

State = tuple[Life, Transaction]
"""Both machines at one moment."""


class Step(msgspec.Struct, frozen=True, eq=False):
    """What one event means: for every pair of states in which it is legal, the pair that follows.

    ``event`` moves the life and ``transfer`` the transaction; ``None`` leaves the machine where it is.
    """

    event: LifeEvent | None
    transfer: TransactionEvent | None
    after: Mapping[State, State]

    @classmethod
    def of(cls, event: LifeEvent | None = None, transfer: TransactionEvent | None = None) -> Step:
        """The row of ``event`` and ``transfer`` in the product of the tables, with the joint rules applied."""
        after: dict[State, State] = {}
        for life, events in LIFE.items():
            for transaction, transfers in TRANSACTION.items():
                next_life = life if event is None else events.get(event)
                next_transaction = transaction if transfer is None else transfers.get(transfer)
                if next_life is not None and next_transaction is not None:
                    after[life, transaction] = _joined(next_life, next_transaction)
        return cls(event, transfer, after)

    def refusal(self, state: State) -> tuple[str, str, str]:
        """Why this step is not in ``after`` for ``state``: which machine, where it is, and what it does not allow."""
        life, transaction = state
        if self.event is not None and self.event not in LIFE[life]:
            return "life", life.name, self.event.name
        return "transaction", transaction.name, self.transfer.name if self.transfer is not None else "NOTHING"


def _joined(life: Life, transaction: Transaction) -> State:
    while (life, transaction) in JOINT:
        life = JOINT[life, transaction]
    return life, transaction


def states_that_allow(event: LifeEvent, transfer: TransactionEvent) -> frozenset[State]:
    """Every pair of states in which both machines allow what happens."""
    return frozenset(Step.of(event, transfer).after)
