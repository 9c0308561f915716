"""From an engine's thread to the reporter's: what was told and is not read yet, in order and bounded.

The engine pays for one append under a lock that nobody holds for longer than that.  When more waits than may, the
engine itself puts its whole truth in the place of all that waits: only it can do so while nothing changes.
"""

from __future__ import annotations

import enum
import logging
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from umbp_connectors.reporting.words import Word

logger = logging.getLogger(__name__)

T = TypeVar("T")

MAX_WAITING = 1 << 18


class _State(enum.Enum):
    OPEN = "open"
    OWED = "owed"
    """The next thing told is the whole truth."""
    MUTED = "muted"
    """Nothing is taken until the whole truth is demanded."""
    CLOSED = "closed"


_OPEN = _State.OPEN


@dataclass(frozen=True, slots=True)
class Taken:
    """What the reporter reads at one go."""

    items: list[Any]
    lost: bool
    """The source could not list what it holds: nothing is known of it any more, and it is muted."""


@dataclass(slots=True)
class FeedCounters:
    """Counted under the feed's lock; others may read."""

    told: int = 0
    """Items that were told."""
    overflows: int = 0
    """How often more waited than may."""
    resyncs: int = 0
    """How often the whole truth was told in place of what happened."""
    failures: int = 0
    """How often the whole truth could not be had."""


class Feed(Generic[T]):
    """What ``source`` tells.  One producer at a time: one thread, or whoever holds the producer's own lock.

    The producer changes its own structures first and tells then.  ``decode`` makes words of an item, in the reporter's
    thread.  ``resync`` gives an item that says everything that the source holds, with one ``REPLACE`` for each tier
    that it speaks for; it runs inside :meth:`tell`, in the producer's thread.  ``bell`` wakes the reporter.
    """

    def __init__(
        self,
        source: str,
        decode: Callable[[T], Iterable[Word]],
        resync: Callable[[], T],
        bell: threading.Event,
        max_waiting: int = MAX_WAITING,
    ) -> None:
        self.source = source
        self.decode = decode
        self.counters = FeedCounters()
        self._resync = resync
        self._bell = bell
        self._max_waiting = max_waiting
        self._lock = threading.Lock()
        self._items: list[T] = []
        self._waiting = 0
        self._lost = False
        self._state = _State.OPEN

    @property
    def waiting(self) -> int:
        """The weight of what was told and is not read yet."""
        return self._waiting

    def tell(self, weight: int, item: T) -> None:
        """``item`` happened, and carries ``weight`` hashes.  Never blocks, and raises nothing.

        ``item`` must not be changed afterwards.  It is dropped when the whole truth, which contains it, is told in its
        place.
        """
        with self._lock:
            self.counters.told += 1
            waiting = self._waiting + weight
            if self._state is _OPEN and waiting <= self._max_waiting:
                self._waiting = waiting
                self._items.append(item)
                whole = False
            else:
                whole = self._state in (_State.OPEN, _State.OWED)
                self.counters.overflows += self._state is _OPEN
        if whole:
            self.tell_all()
        elif not self._bell.is_set():
            self._bell.set()

    def tell_all(self) -> None:
        """Tell the whole truth in the place of all that waits.  The producer's thread; raises nothing."""
        try:
            item = self._resync()
        except Exception:  # producer boundary: what is wrong with its truth must not reach the engine
            if not self.counters.failures:
                logger.exception("umbp: what %s holds cannot be listed; it counts as empty for now", self.source)
            with self._lock:
                self.counters.failures += 1
                self._lost = True
            self.mute()
        else:
            with self._lock:
                if self._state is _State.CLOSED:
                    return
                dropped, self._items = self._items, [item]
                self._waiting = 0
                self._state = _OPEN
                self.counters.resyncs += 1
            dropped.clear()
        self._bell.set()

    def mute(self) -> None:
        """Drop what waits, and what is told until :meth:`demand`.  Any thread."""
        with self._lock:
            self._drop(_State.MUTED)

    def demand(self) -> None:
        """The next time anything is told, the whole truth is.  Any thread."""
        with self._lock:
            if self._state is not _State.CLOSED:
                self._state = _State.OWED

    def close(self) -> None:
        """Drop what is told from now on.  Any thread; idempotent."""
        with self._lock:
            self._drop(_State.CLOSED)

    def take(self) -> Taken:
        """Everything that waits.  The reporter's thread; never blocks."""
        with self._lock:
            taken = Taken(self._items, self._lost)
            self._items = []
            self._waiting = 0
            self._lost = False
        return taken

    def _drop(self, state: _State) -> None:
        if self._state is not _State.CLOSED:
            self._state = state
        self._items = []
        self._waiting = 0
