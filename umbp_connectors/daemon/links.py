"""The connections of one client: made when they are needed, given up together when the daemon is gone."""

from __future__ import annotations

import contextlib
import logging
import random
import threading
import time
from collections.abc import Callable, Iterator
from enum import Enum

from umbp_connectors.daemon.link import Link
from umbp_core.breaker import Backoff, Breaker
from umbp_core.errors import UmbpError

logger = logging.getLogger(__name__)

FAILURES = 3
"""Calls in a row that the daemon does not answer before it is left alone for a while."""


class Way(Enum):
    """What a connection is for.  A call has one for itself, so that lookups do not wait for copies."""

    ASK = 1
    PUT = 2
    GET = 3


_AT_ONCE = {Way.ASK: 2, Way.PUT: 1, Way.GET: 4}


class Busy(Exception):
    """Other calls had the connections for the whole time of this one."""


class Links:
    """Connections made by ``connect(deadline)``.  Any thread.

    After ``FAILURES`` calls in a row that were not answered, only one now and then is tried.  ``absent`` is called
    whenever a call finds that nobody listens at the daemon's socket.
    """

    def __init__(self, connect: Callable[[float], Link], absent: Callable[[], None]) -> None:
        self._connect = connect
        self._absent = absent
        self._breaker = Breaker(random.random, Backoff(), FAILURES)
        self._changed = threading.Condition()
        self._free: dict[Way, list[tuple[int, Link]]] = {way: [] for way in Way}
        self._out = dict.fromkeys(Way, 0)
        self._life = 0
        """Counts how often a connection broke: those that were made before are probably broken too."""
        self._closed = False
        self._warned = ""
        self.failed = 0

    def call(self, way: Way, deadline: float, work: Callable[[Link], object]) -> bool:
        """``work`` with a connection, if there is one to be had in time; whether it was done to its end.

        It may be called twice, the second time with another connection.
        """
        if time.monotonic() >= deadline:
            return False
        with self._changed:
            permit = self._breaker.attempt(time.monotonic())
        if permit is None:
            return False
        try:
            self._attempt(way, deadline, work)
        except Busy:
            return False
        except (OSError, UmbpError) as error:
            self._note(permit, error)
            return False
        with self._changed:
            self._breaker.succeeded(permit)
            if self._warned:
                self._warned = ""
                logger.info("umbp: the daemon answers again")
        return True

    def close(self) -> None:
        """Close what nobody uses; what is in use is closed when it is given back.  Idempotent."""
        with self._changed:
            self._closed = True
            free = [link for links in self._free.values() for _, link in links]
            self._free = {way: [] for way in Way}
        for link in free:
            link.close()

    def _attempt(self, way: Way, deadline: float, work: Callable[[Link], object]) -> None:
        """``work``; once more, with a new connection, when the one that lay idle turns out to be dead."""
        with self._changed:
            idle = bool(self._free[way])
        try:
            with self._using(way, deadline) as link:
                work(link)
        except (BrokenPipeError, ConnectionResetError):
            if not idle or time.monotonic() >= deadline:
                raise
            with self._using(way, deadline) as link:
                work(link)

    @contextlib.contextmanager
    def _using(self, way: Way, deadline: float) -> Iterator[Link]:
        link, life = self._take(way, deadline)
        with contextlib.ExitStack() as broken:
            broken.callback(self._give_back, way, link, life, broken=True)
            if link is None:
                link = self._connect(deadline)
                broken.callback(link.close)
            yield link
            broken.pop_all()
        self._give_back(way, link, life, broken=False)

    def _take(self, way: Way, deadline: float) -> tuple[Link | None, int]:
        """A free connection, or the right to make one."""
        old: list[Link] = []
        try:
            with self._changed:
                left = max(0.0, deadline - time.monotonic())
                if not self._changed.wait_for(lambda: self._out[way] < _AT_ONCE[way], left):
                    raise Busy
                self._out[way] += 1
                while self._free[way]:
                    life, link = self._free[way].pop()
                    if life == self._life:
                        return link, life
                    old.append(link)
                return None, self._life
        finally:
            for each in old:
                each.close()

    def _give_back(self, way: Way, link: Link | None, life: int, broken: bool) -> None:
        with self._changed:
            self._out[way] -= 1
            self._life += broken and life == self._life
            keep = not broken and not self._closed and life == self._life
            if keep and link is not None:
                self._free[way].append((life, link))
            self._changed.notify()
        if link is not None and not keep:
            link.close()

    def _note(self, permit: int, error: Exception) -> None:
        text = str(error)
        with self._changed:
            self.failed += 1
            self._breaker.failed(permit, time.monotonic())
            first, self._warned = text != self._warned, text
        if first:
            logger.warning("umbp: the daemon does not answer, which costs hits: %s", text)
        if isinstance(error, (FileNotFoundError, ConnectionRefusedError)):
            self._absent()
