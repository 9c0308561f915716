"""Keeps calls away from a disk that does not answer, and writes from one that takes nothing."""

from __future__ import annotations

import random
import threading

from umbp_core.breaker import Backoff, Breaker, BreakerState
from umbp_core.ports import Clock


class ReadFence:
    """A breaker for the calls that read from one disk.  Any thread.

    A call *fails* when its time is over and the disk gave it nothing at all, though there was enough of it.  After
    ``failures`` of these in a row the disk is left alone for ``retry_s`` seconds, then one call may try; every failed
    trial makes the pause longer, up to a minute.
    """

    def __init__(self, clock: Clock, failures: int, retry_s: float) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._breaker = Breaker(random.random, Backoff(retry_s, max(retry_s, 60.0)), failures)
        self._kept_away = 0

    @property
    def passable(self) -> bool:
        """Whether a call that begins now may read."""
        breaker = self._breaker
        return breaker.state is BreakerState.CLOSED or self._clock() >= breaker.due

    @property
    def raised(self) -> int:
        """How often the disk was left alone, or again after a trial."""
        return self._breaker.opened

    @property
    def kept_away(self) -> int:
        """Objects that were not read because of it."""
        return self._kept_away

    def enter(self) -> int | None:
        """A permit to read for one call, or ``None``."""
        with self._lock:
            return self._breaker.attempt(self._clock())

    def refuse(self, objects: int) -> None:
        """Count ``objects`` that were not read for want of a permit."""
        with self._lock:
            self._kept_away += objects

    def leave(self, permit: int, answered: bool, fair: bool) -> None:
        """The call with ``permit`` got something from the disk, or nothing at all in its time.

        A time that was not ``fair`` says nothing about the disk, unless the call was the one that should try it.
        """
        with self._lock:
            if answered:
                self._breaker.succeeded(permit)
            elif fair or self._breaker.state is BreakerState.HALF_OPEN:
                self._breaker.failed(permit, self._clock())


class WriteFence:
    """A breaker for the writes to one tier.  Any thread.

    A tier that says that it takes nothing more is left alone at once, one whose writes fail after ``failures`` in a
    row: for ``retry_s`` seconds, then one write may try; every failed trial makes the pause longer, up to a minute.
    """

    def __init__(self, clock: Clock, retry_s: float, failures: int = 3) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._failures = failures
        self._breaker = Breaker(random.random, Backoff(retry_s, max(retry_s, 60.0)), failures)

    @property
    def passable(self) -> bool:
        """Whether something that is queued now may come to be written."""
        breaker = self._breaker
        return breaker.state is not BreakerState.OPEN or self._clock() >= breaker.due

    @property
    def doubtful(self) -> bool:
        """Whether a write that begins now would be a trial, or none may begin."""
        return self._breaker.state is not BreakerState.CLOSED

    @property
    def trying(self) -> bool:
        """Whether a write tries just now: what becomes of the next ones is known when it ends."""
        breaker = self._breaker
        return breaker.state is BreakerState.HALF_OPEN and self._clock() < breaker.due

    def enter(self) -> int | None:
        """A permit to write one object, or ``None``."""
        with self._lock:
            return self._breaker.attempt(self._clock())

    def written(self, permit: int) -> None:
        """The write with ``permit`` succeeded."""
        with self._lock:
            self._breaker.succeeded(permit)

    def failed(self, permit: int, takes_nothing: bool) -> bool:
        """The write with ``permit`` failed; true when the tier is left alone from now on and was not before."""
        with self._lock:
            before = self._breaker.state
            for _ in range(self._failures if takes_nothing else 1):
                self._breaker.failed(permit, self._clock())
            return before is BreakerState.CLOSED and self._breaker.state is BreakerState.OPEN
