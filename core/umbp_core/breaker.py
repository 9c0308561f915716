"""When to try again: a back-off that grows and is spread by chance, and a circuit breaker on top of it.

No threads, no clock: ``now`` is whatever monotonic seconds the caller passes.  One thread at a time.
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import dataclass, replace
from types import MappingProxyType

from umbp_core.errors import StateError

_MAX_EXPONENT = 64
"""A delay has reached any ceiling by then, and a float does not overflow."""


@dataclass(frozen=True, slots=True)
class Backoff:
    """Delays of ``first`` seconds, then ``factor`` times as long each, up to ``ceiling``.

    Up to the part ``jitter`` of a delay is taken off by chance, so that nodes that lost the same master do not come
    back at the same moment.
    """

    first: float = 0.1
    ceiling: float = 2.0
    factor: float = 2.0
    jitter: float = 0.5

    def __post_init__(self) -> None:
        if not (0 < self.first <= self.ceiling and self.factor >= 1 and 0 <= self.jitter < 1):
            raise StateError(
                f"{self}: a back-off grows from a positive first delay to its ceiling, and a jitter is less than 1"
            )

    def delay(self, failures: int, random: float) -> float:
        """Seconds to wait after ``failures`` in a row, at least 1; ``random`` is between 0 and 1."""
        grown = self.first * self.factor ** min(failures - 1, _MAX_EXPONENT)
        return min(self.ceiling, grown) * (1 - self.jitter * random)

    def below(self, ceiling: float) -> Backoff:
        """The same, with a ceiling that is at most ``ceiling``."""
        lower = min(self.ceiling, ceiling)
        return replace(self, first=min(self.first, lower), ceiling=lower)


class BreakerState(enum.Enum):
    """Whether calls are made."""

    CLOSED = "closed"
    """They are."""
    OPEN = "open"
    """They are not: the other side does not answer."""
    HALF_OPEN = "half_open"
    """One is, to see."""


class BreakerEvent(enum.Enum):
    """What a breaker is told, or finds out."""

    SUCCEEDED = "succeeded"
    FAILED = "failed"
    TRIPPED = "tripped"
    """A failure, and there were as many in a row as are borne."""
    DUE = "due"
    """Somebody wants to call, and the delay is over."""


TRANSITIONS = MappingProxyType(
    {
        (BreakerState.CLOSED, BreakerEvent.SUCCEEDED): BreakerState.CLOSED,
        (BreakerState.CLOSED, BreakerEvent.FAILED): BreakerState.CLOSED,
        (BreakerState.CLOSED, BreakerEvent.TRIPPED): BreakerState.OPEN,
        (BreakerState.OPEN, BreakerEvent.DUE): BreakerState.HALF_OPEN,
        (BreakerState.HALF_OPEN, BreakerEvent.DUE): BreakerState.HALF_OPEN,
        (BreakerState.HALF_OPEN, BreakerEvent.SUCCEEDED): BreakerState.CLOSED,
        (BreakerState.HALF_OPEN, BreakerEvent.TRIPPED): BreakerState.OPEN,
    }
)
"""All there is.  A trial that nobody tells the end of is followed by another (``HALF_OPEN``, ``DUE``)."""


class Breaker:
    """Decides whether a call may be made.

    ``failures`` in a row open it.  After a delay one call is let through; its success closes the breaker, its failure
    keeps it open for longer.  A call needs a permit, and its result is told with it: results of calls that were made
    before the breaker last opened or closed say nothing about now, and are ignored.
    """

    def __init__(self, random: Callable[[], float], backoff: Backoff | None = None, failures: int = 3) -> None:
        if failures < 1:
            raise StateError(f"a breaker that opens after {failures} failures is never closed; give at least 1")
        self._random = random
        self.backoff = backoff or Backoff()
        """May be replaced at any time; counts from the next failure on."""
        self._bearable = failures
        self._state = BreakerState.CLOSED
        self._permit = 1
        self._failures = 0
        self._due = 0.0
        self.opened = 0
        """How often it opened, or stayed open after a trial."""

    @property
    def state(self) -> BreakerState:
        """Whether calls are made."""
        return self._state

    @property
    def due(self) -> float:
        """When a call may be made; in the past, or 0, when that is now."""
        return self._due

    def attempt(self, now: float) -> int | None:
        """A permit for one call, or ``None`` when none may be made now."""
        if self._state is BreakerState.CLOSED:
            return self._permit
        if now < self._due:
            return None
        self._move(BreakerEvent.DUE)
        self._permit += 1
        self._due = now + self.backoff.ceiling
        return self._permit

    def succeeded(self, permit: int) -> None:
        """The call with ``permit`` was answered."""
        if permit != self._permit or self._state is BreakerState.OPEN:
            return
        if self._state is BreakerState.HALF_OPEN:
            self._permit += 1
        self._move(BreakerEvent.SUCCEEDED)
        self._failures = 0
        self._due = 0.0

    def failed(self, permit: int, now: float) -> None:
        """The call with ``permit`` was not answered."""
        if permit != self._permit or self._state is BreakerState.OPEN:
            return
        self._failures += 1
        if self._state is BreakerState.CLOSED and self._failures < self._bearable:
            self._move(BreakerEvent.FAILED)
            return
        self._move(BreakerEvent.TRIPPED)
        self.opened += 1
        self._due = now + self.backoff.delay(self._failures - self._bearable + 1, self._random())

    def _move(self, event: BreakerEvent) -> None:
        self._state = TRANSITIONS[self._state, event]
