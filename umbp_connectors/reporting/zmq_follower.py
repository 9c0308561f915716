"""Follows the event stream of an engine that has no plug-in of ours, and tells a reporter what the engine holds."""

from __future__ import annotations

import logging
import math
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

from umbp_connectors.reporting.reporter import Reporter
from umbp_connectors.reporting.words import Word
from umbp_connectors.reporting.zmq_batches import BatchDecoder
from umbp_connectors.reporting.zmq_blocks import BlockTable
from umbp_connectors.reporting.zmq_sequence import Apply, BatchSequence, Clear, Effect, Event, State
from umbp_connectors.reporting.zmq_sockets import EngineStream, Happening
from umbp_core.errors import ProtocolError
from umbp_core.ports import Clock

logger = logging.getLogger(__name__)

SOURCE = "events"
_MAX_NAMES = 16
_OTHER = "other"


@dataclass(frozen=True, slots=True)
class Patience:
    """Seconds to wait for an engine."""

    grace: float = 5.0
    """An engine that is away for longer counts as empty."""
    idle: float = 5.0
    """Without a batch for so long, the engine is asked whether there was one."""
    replay: float = 5.0
    """A replay that says nothing for so long has failed."""
    greeting: float = 10.0
    """Nothing has ever answered: a word of advice."""


@dataclass(frozen=True, slots=True)
class FollowerStats:
    """One look at a follower.  Numbers count from its start."""

    state: str
    expected: int | None
    """The number of the batch that comes next; the reporter was told those before it."""
    applied: int
    repeated: int
    replays: int
    missed: int
    """Batches that were never seen."""
    gaps: int
    restarts: int
    dropped: int
    garbled: int
    """Messages and batches that were not understood."""
    elsewhere: int
    """Hashes in places that are none of the node's tiers."""
    unknown: int
    """Events that are not known here."""
    absent: int
    """Hashes that were removed, and not known to be there."""
    cleared: Mapping[str, int]
    """How often everything was forgotten, by the reason."""


class Follower:
    """Follows ``stream`` and tells ``reporter``, which the caller starts and closes.

    :meth:`run` is the work, in whatever thread calls it; all else may be called by any thread.
    """

    def __init__(
        self,
        stream: EngineStream,
        reporter: Reporter,
        patience: Patience | None = None,
        clock: Clock = time.monotonic,
    ) -> None:
        self._stream = stream
        self._patience = patience or Patience()
        self._clock = clock
        self._sequence = BatchSequence(replays=bool(stream.settings.replay))
        self._at = self._sequence.state, self._sequence.expected
        """As far as what followed from it is done."""
        self._decoder = BatchDecoder()
        self._table = BlockTable()
        self._feed = reporter.feed(SOURCE, _as_told, self._table.whole)
        self._garbled = 0
        self._elsewhere = 0
        self._unknown: Counter[str] = Counter()
        self._cleared: Counter[str] = Counter()
        self._deadlines = dict.fromkeys(("gone", "idle", "replay", "greeting"), math.inf)
        self._stopping = False

    def run(self) -> None:
        """Follow until :meth:`stop`.  Raises ``ConfigError`` when the endpoint cannot be used."""
        self._stream.open()
        self._set("greeting", self._patience.greeting)
        try:
            while not self._stopping:
                rest = min(self._deadlines.values()) - self._clock()
                for happening in self._stream.wait(min(rest, 3600.0)):
                    self._take(happening)
                self._keep_time()
        finally:
            self._stream.close()

    def stop(self) -> None:
        """Let :meth:`run` return."""
        self._stopping = True
        self._stream.wake()

    def stats(self) -> FollowerStats:
        """How it goes."""
        return FollowerStats(
            state=self._at[0].value,
            expected=self._at[1],
            garbled=self._garbled + self._stream.garbled,
            elsewhere=self._elsewhere,
            unknown=self._unknown.total(),
            absent=self._table.absent,
            cleared=dict(self._cleared),
            **asdict(self._sequence.counters),
        )

    def _take(self, happening: Happening) -> None:
        event, number, payload, of_round = happening
        if of_round and of_round != self._stream.round:
            return  # it belongs to a replay that was given up meanwhile
        if event is Event.CONNECTED:
            logger.info("umbp: connected to %s", self._stream.settings.endpoint)
            self._deadlines["gone"] = self._deadlines["greeting"] = math.inf
        elif event is Event.DISCONNECTED:
            logger.warning("umbp: %s is away", self._stream.settings.endpoint)
            self._set("gone", self._patience.grace)
        elif event is Event.REPLAYED:
            self._set("replay", self._patience.replay)
        self._set("idle", self._patience.idle)
        self._carry_out(self._sequence.feed(event, number, payload))

    def _carry_out(self, effects: Sequence[Effect]) -> None:
        for effect in effects:
            if isinstance(effect, Apply):
                self._apply(effect.payload)
            elif isinstance(effect, Clear):
                self._clear(effect.why.value)
            else:
                self._stream.ask(effect.start)
                self._set("replay", self._patience.replay)
        if self._sequence.state is not State.CATCHING_UP:
            self._stream.end_replay()
            self._deadlines["replay"] = math.inf
        self._at = self._sequence.state, self._sequence.expected

    def _apply(self, payload: bytes) -> None:
        try:
            batch = self._decoder.decode(payload)
        except ProtocolError as error:
            self._garbled += 1
            logger.warning("umbp: %s: %s", self._stream.settings.endpoint, error)
            self._clear("garbled")
            return
        self._elsewhere += batch.elsewhere
        for name in batch.unknown:
            self._note_unknown(name)
        self._tell([word for event in batch.events for word in self._table.apply(event)])

    def _note_unknown(self, name: str) -> None:
        """Log each name once; an engine that makes up ever new ones fills neither the log nor the memory."""
        if name not in self._unknown and len(self._unknown) >= _MAX_NAMES:
            name = _OTHER
        elif name not in self._unknown:
            logger.warning("umbp: the engine tells of a %r, which is not known here; it is left out", name[:100])
        self._unknown[name] += 1

    def _clear(self, why: str) -> None:
        logger.warning("umbp: %s: nothing counts of what was told before (%s)", self._stream.settings.endpoint, why)
        self._tell(self._table.clear())
        self._cleared[why] += 1

    def _tell(self, words: list[Word]) -> None:
        if words:
            self._feed.tell(sum([len(word.hashes) for word in words]), words)

    def _keep_time(self) -> None:
        now = self._clock()
        for name, event in (("gone", Event.GONE), ("replay", Event.FAILED), ("idle", Event.IDLE)):
            if self._deadlines[name] <= now:
                self._deadlines[name] = math.inf
                self._take_time(event)
        if self._deadlines["greeting"] <= now:
            self._deadlines["greeting"] = math.inf
            advice = (
                "does the engine name this machine as its endpoint?"
                if self._stream.settings.bind
                else "an engine whose endpoint names a host, not *, connects instead of listening; then give --bind"
            )
            logger.warning("umbp: no engine at %s yet; %s", self._stream.settings.endpoint, advice)

    def _take_time(self, event: Event) -> None:
        if event is Event.FAILED:
            logger.warning("umbp: %s does not answer", self._stream.settings.replay)
        self._carry_out(self._sequence.feed(event))
        if self._sequence.state is not State.AWAY:
            self._set("idle", self._patience.idle)

    def _set(self, name: str, seconds: float) -> None:
        self._deadlines[name] = self._clock() + seconds


def _as_told(words: list[Word]) -> list[Word]:
    """Words need no decoding."""
    return words
