"""The thread that makes a node's changes known: it reads the feeds, keeps the mirror, and tells the master's client.

It never waits for a network: the client has a thread for that.  So the mirror is always current, and a master that is
away costs nothing but a full sync when it is back.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from umbp_connectors.client.counters import ClientStats
from umbp_connectors.client.master_client import MasterClient
from umbp_connectors.reporting.feed import MAX_WAITING, Feed
from umbp_connectors.reporting.mirror import Changes, Mirror
from umbp_connectors.reporting.words import Word
from umbp_core.errors import StateError
from umbp_core.master.model import TierCapacity
from umbp_core.ports import Clock

logger = logging.getLogger(__name__)

T = TypeVar("T")

INTERVAL = 0.01
CLOSE_TIMEOUT = 3.0
_CAPACITY_INTERVAL = 1.0
_PAUSE_AFTER_A_BUG = 1.0


@dataclass(frozen=True, slots=True)
class ReporterStats:
    """One look at a reporter.  Numbers count from its start."""

    held: Mapping[int, int]
    """Hashes that the node holds, per tier, by what it told."""
    waiting: int
    """Hashes that the engine told and the reporter did not read yet."""
    told: int
    """Items that the engine told."""
    reported: int
    """Hashes that came to a tier."""
    revoked: int
    """Hashes that left a tier, those of cleared tiers left out."""
    overflows: int
    """How often more waited than may, so that the whole truth of a source was told instead."""
    resyncs: int
    """How often the whole truth of a source was told."""
    failures: int
    """Items that could not be understood, lists that could not be had, and capacities likewise."""
    client: ClientStats
    """How it goes with the master."""


class Reporter:
    """Tells ``client`` what the producers of its feeds say.

    ``mirror`` is new, and its ``snapshot`` is the client's.  ``interval`` seconds after the first thing was told, all
    that was told until then is read; at most ``max_waiting`` hashes per feed wait for that.

    The constructor does nothing; :meth:`start` starts a thread, and the client.  All methods may be called by any
    thread.
    """

    def __init__(
        self,
        client: MasterClient,
        mirror: Mirror,
        interval: float = INTERVAL,
        max_waiting: int = MAX_WAITING,
        clock: Clock = time.monotonic,
    ) -> None:
        self._client = client
        self._mirror = mirror
        self._interval = interval
        self._max_waiting = max_waiting
        self._clock = clock
        self._changes = Changes(client)
        self._feeds: dict[str, Feed[Any]] = {}
        self._retries: dict[str, float] = {}
        self._capacities: Callable[[], Sequence[TierCapacity]] | None = None
        self._capacities_due = 0.0
        self._last_capacities: tuple[TierCapacity, ...] = ()
        self._failures = 0
        self._lock = threading.Lock()
        self._bell = threading.Event()
        self._hurry = threading.Event()
        self._barriers: list[threading.Event] = []
        self._closing = False
        self._thread: threading.Thread | None = None

    @property
    def client(self) -> MasterClient:
        """The line to the master, for questions."""
        return self._client

    def feed(self, source: str, decode: Callable[[T], Iterable[Word]], resync: Callable[[], T]) -> Feed[T]:
        """A way for ``source`` to tell, see :class:`Feed`.  Before or after :meth:`start`.

        Raises ``StateError`` when there is one already.
        """
        with self._lock:
            if source in self._feeds:
                raise StateError(f"source {source!r} has a feed already; use that one, or another name")
            feed = Feed(source, decode, resync, self._bell, self._max_waiting)
            if self._closing:
                feed.close()
            self._feeds[source] = feed
        return feed

    def watch_capacities(self, capacities: Callable[[], Sequence[TierCapacity]]) -> None:
        """Ask ``capacities`` once a second, in the reporter's thread, for the bytes per tier that heartbeats tell.

        A master that is not ours is not told: it would send others' blocks to a node that serves nobody.
        """
        with self._lock:
            self._capacities = capacities
        self._bell.set()

    def start(self) -> None:
        """Start the thread and the client.  Never waits.  Idempotent."""
        with self._lock:
            if self._thread is None and not self._closing:
                self._thread = threading.Thread(target=self._run, name="umbp-reporter", daemon=True)
                self._thread.start()
                self._client.start()

    def flush(self, timeout: float) -> bool:
        """Wait until the master knows everything that was told before; false when it does not within ``timeout``."""
        deadline = self._clock() + timeout
        barrier = threading.Event()
        with self._lock:
            if self._thread is None or self._closing:
                return False
            self._barriers.append(barrier)
        self._hurry.set()
        self._bell.set()
        return barrier.wait(timeout) and self._client.flush(max(0.0, deadline - self._clock()))

    def stats(self) -> ReporterStats:
        """How it goes.  The numbers are taken one after the other, while things go on."""
        with self._lock:
            feeds = list(self._feeds.values())
        counters = [feed.counters for feed in feeds]
        return ReporterStats(
            held=self._mirror.counts(),
            waiting=sum([feed.waiting for feed in feeds]),
            told=sum([each.told for each in counters]),
            reported=self._changes.came,
            revoked=self._changes.went,
            overflows=sum([each.overflows for each in counters]),
            resyncs=sum([each.resyncs for each in counters]),
            failures=self._failures + sum([each.failures for each in counters]),
            client=self._client.stats(),
        )

    def close(self, timeout: float = CLOSE_TIMEOUT) -> bool:
        """Unregister the node, if the master answers, and end the threads; false when they did not end in time.

        Takes ``timeout`` seconds at most.  What is told afterwards is dropped.  Idempotent.
        """
        deadline = self._clock() + timeout
        with self._lock:
            self._closing = True
            feeds, thread = list(self._feeds.values()), self._thread
        for feed in feeds:
            feed.close()
        self._hurry.set()
        self._bell.set()
        if thread is not None:
            thread.join(timeout)
        ended = self._client.close(max(0.0, deadline - self._clock()))
        return ended and (thread is None or not thread.is_alive())

    def _run(self) -> None:
        while not self._closing:
            self._bell.wait(self._rest())
            if self._bell.is_set():
                self._hurry.wait(self._interval)
            self._hurry.clear()
            self._bell.clear()
            with self._lock:
                barriers, self._barriers = self._barriers, []
                feeds = list(self._feeds.values())
            for feed in feeds:
                self._read(feed)
            self._changes.pass_on()
            for barrier in barriers:
                barrier.set()
            self._retry()
            self._tell_capacities()

    def _rest(self) -> float | None:
        """How long there is nothing to do unless the bell rings."""
        dues = [*self._retries.values()]
        if self._capacities is not None:
            dues.append(self._capacities_due)
        return max(0.0, min(dues) - self._clock()) if dues else None

    def _read(self, feed: Feed[Any]) -> None:
        """Everything that waits in ``feed``."""
        taken = feed.take()
        if taken.lost:
            self._lose(feed)
        for item in taken.items:
            try:
                for word in feed.decode(item):
                    self._mirror.apply(feed.source, word, self._changes)
            except Exception:  # producer boundary: what one source says wrongly must not end the telling of the others
                if not self._failures:
                    logger.exception("umbp: what %s told is not understood; it counts as empty for now", feed.source)
                self._failures += 1
                feed.mute()
                self._lose(feed)
                break

    def _lose(self, feed: Feed[Any]) -> None:
        """Rather too little than too much is known of a source that cannot say what it holds, until it can."""
        self._mirror.forget(feed.source, self._changes)
        self._retries[feed.source] = self._clock() + _PAUSE_AFTER_A_BUG

    def _retry(self) -> None:
        for source in [source for source, due in self._retries.items() if due <= self._clock()]:
            del self._retries[source]
            self._feeds[source].demand()

    def _tell_capacities(self) -> None:
        if self._capacities is None or self._clock() < self._capacities_due:
            return
        self._capacities_due = self._clock() + _CAPACITY_INTERVAL
        if not self._client.stats().native:
            return
        try:
            capacities = tuple(self._capacities())
        except Exception:  # producer boundary, as above
            if not self._failures:
                logger.exception("umbp: the capacities of this node cannot be had; the master keeps the last ones")
            self._failures += 1
            return
        if capacities != self._last_capacities:
            self._last_capacities = capacities
            self._client.set_capacities(capacities)
