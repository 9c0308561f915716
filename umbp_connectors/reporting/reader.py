"""What is done with what the feeds were told, pass by pass: the part of a reporter that needs no thread."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from umbp_connectors.reporting.feed import MAX_WAITING, Feed
from umbp_connectors.reporting.mirror import Changes, Mirror, Told
from umbp_connectors.reporting.words import Word
from umbp_core.errors import StateError
from umbp_core.ports import Clock

logger = logging.getLogger(__name__)

T = TypeVar("T")

PAUSE_AFTER_A_BUG = 1.0
"""Seconds until a source that could not say what it holds is asked for everything."""


class Reader:
    """Reads feeds, keeps ``mirror``, and tells ``told``.

    One thread calls :meth:`read`; ``bell`` is set when there is something to read.  A source that says what nobody
    understands counts as empty until it was able to list everything: too little is known of it rather than too much.
    """

    def __init__(
        self, told: Told, mirror: Mirror, clock: Clock, bell: threading.Event, max_waiting: int = MAX_WAITING
    ) -> None:
        self._mirror = mirror
        self._clock = clock
        self._bell = bell
        self._max_waiting = max_waiting
        self._lock = threading.Lock()
        self._feeds: dict[str, Feed[Any]] = {}
        self._closed = False
        self._demands: dict[str, float] = {}
        self.changes = Changes(told)
        self.failures = 0
        """Items that were not understood."""

    @property
    def feeds(self) -> list[Feed[Any]]:
        """All of them.  Any thread."""
        with self._lock:
            return list(self._feeds.values())

    def feed(self, source: str, decode: Callable[[T], Iterable[Word]], resync: Callable[[], T]) -> Feed[T]:
        """A way for ``source`` to tell, see :class:`Feed`.  Any thread.

        Raises ``StateError`` when there is one already.
        """
        with self._lock:
            if source in self._feeds:
                raise StateError(f"source {source!r} has a feed already; use that one, or another name")
            feed = Feed(source, decode, resync, self._bell, self._max_waiting)
            if self._closed:
                feed.close()
            self._feeds[source] = feed
        return feed

    def close(self) -> None:
        """Drop what is told from now on.  Any thread."""
        with self._lock:
            self._closed = True
            feeds = list(self._feeds.values())
        for feed in feeds:
            feed.close()

    def read(self) -> float | None:
        """Pass on all that was told before.  Returns when to be called again though nothing is told."""
        for feed in self.feeds:
            self._read(feed)
        self.changes.pass_on()
        for source in [source for source, due in self._demands.items() if due <= self._clock()]:
            del self._demands[source]
            self._feeds[source].demand()
        return min(self._demands.values(), default=None)

    def _read(self, feed: Feed[Any]) -> None:
        taken = feed.take()
        if taken.lost:
            self._lose(feed)
        for item in taken.items:
            try:
                for word in feed.decode(item):
                    self._mirror.apply(feed.source, word, self.changes)
            except Exception:  # producer boundary: what one source says wrongly must not end the telling of the others
                if not self.failures:
                    logger.exception("umbp: what %s told is not understood; it counts as empty for now", feed.source)
                self.failures += 1
                feed.mute()
                self._lose(feed)
                break

    def _lose(self, feed: Feed[Any]) -> None:
        self._mirror.forget(feed.source, self.changes)
        self._demands[feed.source] = self._clock() + PAUSE_AFTER_A_BUG
