"""Whether a stream of numbered batches is whole: losses, replays and restarts of the engine, without a socket.

An engine numbers its batches 0, 1, 2 ... in each of its lives, publishes each once, and keeps the latest ones for those
who ask for a replay.  A subscriber sees them in order, but may miss any: it came late, it was slow, the connection was
down.  Nothing in a number says which life it is from.  So the number is not believed alone: a replay begins with the
last batch that was applied, and only an engine that repeats that batch byte for byte (a batch holds a clock) is the
same as before and goes on from there.

What follows from a batch that is missed for good is that anything may be gone: everything is cleared then, and what
comes afterwards is true again, though not all (law L11: rather too little than too much).
"""

from __future__ import annotations

import enum
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from types import MappingProxyType
from typing import NamedTuple

import xxhash

MAX_PENDING = 1 << 14
MAX_PENDING_BYTES = 1 << 28
MAX_REMEMBERED = 1 << 17


class State(enum.Enum):
    """What is made of the next batch."""

    AWAY = "away"
    """There is no connection, or none that was greeted."""
    STEADY = "steady"
    """Batches are applied as they come."""
    CATCHING_UP = "catching up"
    """A replay is under way; what comes meanwhile waits."""


class Event(enum.Enum):
    """What the sockets tell."""

    CONNECTED = "connected"
    DISCONNECTED = "disconnected"
    GONE = "gone"
    """The engine has been away for so long that its memory is not to be counted on."""
    IDLE = "idle"
    """Nothing has come for a while: either nothing happened, or we were not told."""
    LIVE = "live"
    """A batch of the stream."""
    REPLAYED = "replayed"
    """A batch of the replay that was asked for last."""
    ENDED = "ended"
    """The engine says that this was all of the replay."""
    FAILED = "failed"
    """Nothing more comes of the replay, and nobody said that it was all."""


class Why(enum.Enum):
    """Why nothing of what was told before counts any more."""

    GAP = "gap"
    """Batches are missing that nobody can give us."""
    RESTART = "restart"
    """It is another life of the engine."""
    UNPROVEN = "unproven"
    """The connection was lost, and without a replay nobody can say what happened meanwhile."""
    GONE = "gone"
    """The engine is away."""


class Apply(NamedTuple):
    """The next batch."""

    payload: bytes


class Clear(NamedTuple):
    """Forget everything."""

    why: Why


class Replay(NamedTuple):
    """Ask for every batch from number ``start`` on; a replay that is under way is given up."""

    start: int


Effect = Apply | Clear | Replay


@dataclass(slots=True)
class SequenceCounters:
    """Counted from the beginning."""

    applied: int = 0
    repeated: int = 0
    """Batches that came once more, and were left out."""
    replays: int = 0
    """Replays that were asked for."""
    missed: int = 0
    """Batches that are known to exist, or to have existed, and that were never seen."""
    gaps: int = 0
    """How often batches were missed for good."""
    restarts: int = 0
    """Lives of the engine after the first one that was seen."""
    dropped: int = 0
    """Batches that came while there was no connection, or while too many waited for a replay."""


class BatchSequence:
    """The batches of one engine's stream, as events in and effects out.  Not thread-safe.

    ``replays`` says whether the engine can be asked for a replay.  Effects are to be carried out in their order.
    """

    def __init__(
        self, replays: bool, max_pending: int = MAX_PENDING, max_pending_bytes: int = MAX_PENDING_BYTES
    ) -> None:
        self.counters = SequenceCounters()
        self._replays = replays
        self._max_pending = max_pending
        self._max_pending_bytes = max_pending_bytes
        self._state = State.AWAY
        self._next: int | None = None
        """The number to come; with ``None`` any will do."""
        self._anchor: bytes | None = None
        """The last batch that was applied: by it an engine is known again."""
        self._replayed: dict[int, int] = {}
        """Digests of replayed batches, each of which may be on its way as a live one too.

        So may be those before the first one, which the engine kept no longer."""
        self._pending: deque[tuple[int, bytes]] = deque()
        self._pending_bytes = 0
        self._overflowed = False
        self._round = _Round()
        self._effects: list[Effect] = []

    @property
    def state(self) -> State:
        """What is made of the next batch."""
        return self._state

    @property
    def expected(self) -> int | None:
        """The number that comes next, as far as that is known."""
        return self._next

    def feed(self, event: Event, number: int = -1, payload: bytes = b"") -> list[Effect]:
        """What follows from ``event``; the last two are those of a batch."""
        handler = _TABLE.get((self._state, event))
        if handler is None:
            return []
        handler(self, number, payload)
        effects, self._effects = self._effects, []
        return effects

    def _connect(self, _number: int, _payload: bytes) -> None:
        """Also when there is a connection already: the engine came anew before its old connection was given up."""
        self._drop_pending()
        if self._replays:
            self._ask()
        else:
            self._forget(Why.UNPROVEN)
            self._state = State.STEADY

    def _disconnect(self, _number: int, _payload: bytes) -> None:
        self._drop_pending()
        self._state = State.AWAY
        if not self._replays:
            self._forget(Why.UNPROVEN)

    def _give_up(self, _number: int, _payload: bytes) -> None:
        self._forget(Why.GONE)

    def _probe(self, _number: int, _payload: bytes) -> None:
        """The end of a burst may have been lost without anything after it that would show it."""
        if self._replays:
            self._ask(probe=True)

    def _drop(self, _number: int, _payload: bytes) -> None:
        """It is from before the connection was lost: the engine repeats it, or nothing of it counts."""
        self.counters.dropped += 1

    def _live(self, number: int, payload: bytes) -> None:
        if self._next is None or number == self._next:
            self._adopt(number, payload)
            self._replayed.clear()  # batches are in order: those that come twice are past
        elif number < self._next and self._is_past(number, payload):
            self.counters.repeated += 1
        elif not self._replays:
            self._lose(number)
            self._adopt(number, payload)
        elif number < self._next:
            self._wait(number, payload)
            self._restart()
        else:
            self._wait(number, payload)
            self._ask(goal=number)

    def _wait(self, number: int, payload: bytes) -> None:
        """Those that there is no room for are asked for later."""
        room = self._max_pending_bytes - self._pending_bytes
        if self._pending and (self._overflowed or len(self._pending) >= self._max_pending or len(payload) > room):
            self._overflowed = True
            self.counters.dropped += 1
        else:
            self._pending.append((number, payload))
            self._pending_bytes += len(payload)

    def _replay(self, number: int, payload: bytes) -> None:
        first, self._round.first = self._round.first, False
        if first and self._anchor is None:
            self.counters.missed += max(0, number - (self._next or 0))
            self._next = number
        elif first and self._next is not None and number == self._next - 1:
            if payload != self._anchor:
                self._restart()
            return
        elif first:
            self._lose(number)
        if self._next is not None and number > self._next:
            if self._round.progress or self._round.goal != number:
                self._ask(goal=number)  # a replay loses batches as well when there is no room for them
                return
            self._lose(number)
        if number == self._next:
            self._adopt(number, payload)
            self._round.progress = True
            self._replayed[number] = _digest(payload)
            if len(self._replayed) > MAX_REMEMBERED:
                del self._replayed[next(iter(self._replayed))]
            if self._pending and self._pending[0][0] <= number + 1:
                self._settle()  # the rest has come already

    def _end(self, _number: int, _payload: bytes) -> None:
        if self._round.first and self._anchor is not None:
            self._restart()  # an engine that never published our last batch
            return
        if self._next is None:
            self._next = 0
        self._settle()

    def _fail(self, _number: int, _payload: bytes) -> None:
        """Without an answer nothing is proven, and what waits begins anew; only after a mere question all stays.

        When a part came, what is missing may be no more than the word that it was all.
        """
        if self._round.first and not self._round.probe:
            self._forget(Why.GAP)
        self._settle()

    def _settle(self) -> None:
        """Apply what waits; ask again where something is missing, as long as that brings anything."""
        while self._pending:
            number, payload = self._pending[0]
            if self._next is not None and number > self._next:
                if self._round.progress or self._round.goal != number:
                    self._ask(goal=number)
                    return
                self._lose(number)
            elif self._next is not None and number < self._next and not self._is_past(number, payload):
                self._restart()
                return
            self._pending.popleft()
            self._pending_bytes -= len(payload)
            if self._next is None or number == self._next:
                self._adopt(number, payload)
            else:
                self.counters.repeated += 1
        self._state = State.STEADY
        if self._overflowed:
            self._overflowed = False
            self._ask()

    def _is_past(self, number: int, payload: bytes) -> bool:
        """Whether a replay has already told what this batch tells, or what came after it."""
        if not self._replayed:
            return False
        return number < next(iter(self._replayed)) or self._replayed.get(number) == _digest(payload)

    def _adopt(self, number: int, payload: bytes) -> None:
        self._next = number + 1
        self._anchor = payload
        self.counters.applied += 1
        self._effects.append(Apply(payload))

    def _ask(self, goal: int | None = None, probe: bool = False) -> None:
        """Ask for a replay: from the last batch on that was applied, by which the engine is known again."""
        anchored = self._next is not None and self._anchor is not None
        start = self._next or 0
        self._state = State.CATCHING_UP
        self._round = _Round(goal, probe)
        self.counters.replays += 1
        self._effects.append(Replay(start - anchored))

    def _restart(self) -> None:
        self.counters.restarts += 1
        self._forget(Why.RESTART)
        self._ask()

    def _lose(self, number: int) -> None:
        """Batch ``number`` is what we have next, and it does not follow on what we had."""
        if self._next is not None and number < self._next:
            self.counters.restarts += 1
            self._forget(Why.RESTART)
        else:
            self.counters.gaps += 1
            self.counters.missed += number - (self._next or 0)
            self._forget(Why.GAP)
        self._next = number

    def _forget(self, why: Why) -> None:
        if self._anchor is not None:
            self._effects.append(Clear(why))
        self._next = self._anchor = None
        self._replayed.clear()

    def _drop_pending(self) -> None:
        self.counters.dropped += len(self._pending)
        self._pending.clear()
        self._pending_bytes = 0
        self._overflowed = False


@dataclass(slots=True)
class _Round:
    """A replay that is under way."""

    goal: int | None = None
    """The batch before which something is missing."""
    probe: bool = False
    """Nothing is known to be missing."""
    first: bool = True
    """Nothing has come yet."""
    progress: bool = False
    """It brought a batch that we did not have."""


def _digest(payload: bytes) -> int:
    return xxhash.xxh3_64_intdigest(payload)


_Handler = Callable[[BatchSequence, int, bytes], None]

_TABLE: MappingProxyType[tuple[State, Event], _Handler] = MappingProxyType(
    {
        (State.AWAY, Event.CONNECTED): BatchSequence._connect,
        (State.AWAY, Event.GONE): BatchSequence._give_up,
        (State.AWAY, Event.LIVE): BatchSequence._drop,
        (State.STEADY, Event.CONNECTED): BatchSequence._connect,
        (State.STEADY, Event.DISCONNECTED): BatchSequence._disconnect,
        (State.STEADY, Event.IDLE): BatchSequence._probe,
        (State.STEADY, Event.LIVE): BatchSequence._live,
        (State.CATCHING_UP, Event.CONNECTED): BatchSequence._connect,
        (State.CATCHING_UP, Event.DISCONNECTED): BatchSequence._disconnect,
        (State.CATCHING_UP, Event.LIVE): BatchSequence._wait,
        (State.CATCHING_UP, Event.REPLAYED): BatchSequence._replay,
        (State.CATCHING_UP, Event.ENDED): BatchSequence._end,
        (State.CATCHING_UP, Event.FAILED): BatchSequence._fail,
    }
)
"""All there is; anything else is a word that came too late, and says nothing."""
