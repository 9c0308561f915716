"""What callers said and the client's thread did not take yet: nobody who says something waits."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from umbp_core.ports import Clock


@dataclass(eq=False, slots=True)
class Barrier:
    """Is reached when everything that was said before it is known to the master.

    Its maker abandons it when nobody waits any more.
    """

    reached: threading.Event = field(default_factory=threading.Event)
    abandoned: bool = False


class Call(NamedTuple):
    """``call(*args)`` is to be made."""

    call: Callable[..., None]
    args: tuple[Any, ...]


@dataclass(frozen=True, slots=True)
class Taken:
    """Calls to make, in order; then, if there is one, a barrier to reach before more is taken."""

    calls: list[Call]
    barrier: Barrier | None
    overflowed: bool
    """Something that was put before ``calls`` is missing."""


class Intake:
    """A queue of calls, which the one thread that takes them makes; ``max_weight`` bounds what they carry in total.

    When the bound is passed, everything up to the next take is dropped, barriers excepted, and the taker is told so.
    ``wait`` returns ``flush_interval`` seconds after the first call was put, or when as much as ``flush_weight`` waits.

    All that happens under the lock takes constant time: who says something never waits for who takes it.
    """

    def __init__(self, clock: Clock, max_weight: int, flush_weight: int, flush_interval: float) -> None:
        self._clock = clock
        self._max_weight = max_weight
        self._flush_weight = flush_weight
        self._flush_interval = flush_interval
        self._changed = threading.Condition()
        self._calls: list[Call] = []
        self._sealed: deque[tuple[list[Call], int, Barrier]] = deque()
        self._weight = 0
        self._sealed_weight = 0
        self._first_at: float | None = None
        self._held = False
        self._overflowed = False
        self._kicked = False

    @property
    def weight(self) -> int:
        """What waits."""
        return self._weight + self._sealed_weight

    def put(self, weight: int, call: Callable[..., None], *args: Any) -> None:
        """``call(*args)`` is to be made, and carries ``weight``.  Any thread; never blocks."""
        with self._changed:
            if self._overflowed:
                return
            before = self._weight
            if before + self._sealed_weight + weight > self._max_weight:
                self._overflowed = True
            else:
                self._weight += weight
                self._calls.append(Call(call, args))
            if self._first_at is None:
                self._first_at = self._clock()
                self._changed.notify()
            elif self._weight >= self._flush_weight > before:
                self._changed.notify()

    def put_barrier(self, barrier: Barrier) -> None:
        """``barrier`` is reached after all that was put before.  Any thread."""
        with self._changed:
            self._sealed.append((self._calls, self._weight, barrier))
            self._sealed_weight += self._weight
            self._calls, self._weight = [], 0
            self._kick()

    def kick(self) -> None:
        """End the wait of the taker.  Any thread."""
        with self._changed:
            self._kick()

    def take(self) -> Taken:
        """Everything up to the first barrier, that included.  Never blocks.

        After a barrier, what waits ends no wait before the next take.
        """
        with self._changed:
            overflowed, self._overflowed = self._overflowed, False
            dropped = self._drop() if overflowed else []
            if self._sealed:
                calls, weight, barrier = self._sealed.popleft()
                self._sealed_weight -= weight
                taken = Taken(calls, barrier, overflowed)
            else:
                taken = Taken(self._calls, None, overflowed)
                self._calls, self._weight = [], 0
            self._held = taken.barrier is not None
            if not (self._calls or self._sealed):
                self._first_at = None
        dropped.clear()  # here, where nobody waits for it
        return taken

    def _drop(self) -> list[list[Call]]:
        """Keep nothing but the barriers; returns what is dropped."""
        dropped = [self._calls, *(calls for calls, _, _ in self._sealed)]
        self._sealed = deque(([], 0, barrier) for _, _, barrier in self._sealed)
        self._calls = []
        self._weight = self._sealed_weight = 0
        return dropped

    def wait(self, until: float) -> None:
        """Wait until there is something to do, or ``until``.  The taker's thread."""
        with self._changed:
            while not self._kicked and (seconds := self._rest(until)) > 0:
                self._changed.wait(seconds)
            self._kicked = False

    def _rest(self, until: float) -> float:
        """How long the taker may go on waiting."""
        if self._first_at is not None and not self._held:
            until = min(until, self._first_at + self._flush_interval)
            if self._weight >= self._flush_weight:
                return 0.0
        return until - self._clock()

    def _kick(self) -> None:
        self._kicked = True
        self._changed.notify()
