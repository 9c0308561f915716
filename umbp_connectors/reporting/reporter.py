"""The thread that makes a node's changes known: it reads the feeds, keeps the mirror, and tells the master's client.

It never waits for a network: the client has a thread for that.  So the mirror is always current, and a master that is
away costs nothing but a full sync when it is back.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

from umbp_connectors.client.master_client import MasterClient
from umbp_connectors.reporting.feed import MAX_WAITING, Feed
from umbp_connectors.reporting.mirror import Mirror
from umbp_connectors.reporting.reader import Reader
from umbp_connectors.reporting.stats import ReporterStats
from umbp_connectors.reporting.words import Word
from umbp_core.master.model import TierCapacity
from umbp_core.ports import Clock

__all__ = ["Reporter", "ReporterStats"]

logger = logging.getLogger(__name__)

T = TypeVar("T")

INTERVAL = 0.02
JOIN = 0.001
"""Seconds that the first change after a pause waits for others: an engine's step tells several things."""
CLOSE_TIMEOUT = 3.0
CAPACITY_INTERVAL = 1.0


class Reporter:
    """Tells ``client`` what the producers of its feeds say.

    ``mirror`` is new, and its ``snapshot`` is the client's.  What was told is read every ``interval`` seconds at most,
    and about at once after a pause; at most ``max_waiting`` hashes per feed wait for that.

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
        self._clock = clock
        self._bell = threading.Event()
        self._hurry = threading.Event()
        self._reader = Reader(client, mirror, clock, self._bell, max_waiting)
        self._capacities: Callable[[], Sequence[TierCapacity]] | None = None
        self._capacities_due = 0.0
        self._last_capacities: tuple[TierCapacity, ...] = ()
        self._failures = 0
        self._lock = threading.Lock()
        self._barriers: list[threading.Event] = []
        self._closing = False
        self._thread: threading.Thread | None = None

    @property
    def client(self) -> MasterClient:
        """The line to the master, for questions."""
        return self._client

    def feed(self, source: str, decode: Callable[[T], Iterable[Word]], resync: Callable[[], T]) -> Feed[T]:
        """A way for ``source`` to tell, see :class:`Feed`; before or after :meth:`start`.

        Raises ``StateError`` when there is one already.
        """
        return self._reader.feed(source, decode, resync)

    def watch_capacities(self, capacities: Callable[[], Sequence[TierCapacity]]) -> None:
        """Ask ``capacities`` once a second, in the reporter's thread, for the bytes per tier that heartbeats tell.

        A master that is not ours is not told, though they are asked for: it would send others' blocks to a node that
        serves nobody.
        """
        self._capacities = capacities
        self._hurry.set()
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
        """How it goes; never waits.  The numbers are taken one after the other, while things go on."""
        feeds = self._reader.feeds
        counters = [feed.counters for feed in feeds]
        changes = self._reader.changes
        return ReporterStats(
            held=self._mirror.counts(),
            waiting=sum([feed.waiting for feed in feeds]),
            told=sum([each.told for each in counters]),
            came=dict(changes.came),
            left=dict(changes.left),
            overflows=sum([each.overflows for each in counters]),
            resyncs=sum([each.resyncs for each in counters]),
            failures=self._failures + self._reader.failures + sum([each.failures for each in counters]),
            client=self._client.stats(),
        )

    def close(self, timeout: float = CLOSE_TIMEOUT) -> bool:
        """Unregister the node, if the master answers, and end the threads; false when they did not end in time.

        Takes ``timeout`` seconds at most.  What is told afterwards is dropped.  Idempotent.
        """
        deadline = self._clock() + timeout
        with self._lock:
            self._closing = True
            thread = self._thread
        self._reader.close()
        self._hurry.set()
        self._bell.set()
        if thread is not None:
            thread.join(timeout)
        ended = self._client.close(max(0.0, deadline - self._clock()))
        return ended and (thread is None or not thread.is_alive())

    def _run(self) -> None:
        due = None
        join = min(JOIN, self._interval)
        free = self._clock()
        while not self._closing:
            self._bell.wait(self._rest(due))
            if self._bell.is_set():
                self._hurry.wait(max(join, free - self._clock()))
                free = self._clock() + self._interval
            self._hurry.clear()
            self._bell.clear()
            with self._lock:
                barriers, self._barriers = self._barriers, []
            due = self._reader.read()
            for barrier in barriers:
                barrier.set()
            self._tell_capacities()

    def _rest(self, due: float | None) -> float | None:
        """Seconds to wait for the bell; ``None``: until it rings."""
        if self._capacities is not None:
            due = self._capacities_due if due is None else min(due, self._capacities_due)
        return None if due is None else max(0.0, due - self._clock())

    def _tell_capacities(self) -> None:
        if self._capacities is None or self._clock() < self._capacities_due:
            return
        self._capacities_due = self._clock() + CAPACITY_INTERVAL
        try:
            capacities = tuple(self._capacities())
        except Exception:  # producer boundary: what is wrong with its numbers must not end the telling
            if not self._failures:
                logger.exception("umbp: the capacities of this node cannot be had; the master keeps the last ones")
            self._failures += 1
            return
        client = self._client.stats()
        if not client.native:
            capacities = ()
        if client.address and capacities != self._last_capacities:
            self._last_capacities = capacities
            self._client.set_capacities(capacities)
