"""The border to SGLang's threads: what goes wrong behind it costs pages, never an exception and never a hang."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import TypeVar

from umbp_core.breaker import Breaker, BreakerState
from umbp_core.ports import Clock
from umbp_sglang.pools import Moved

logger = logging.getLogger(__name__)

Answer = TypeVar("Answer")


class Door:
    """Calls of one kind.  Any thread.

    After some calls in a row whose time was over, or that failed, calls are answered at once as misses, until a trial
    succeeds.  An exception is logged once for each type.  ``degraded`` is told why a call gave nothing.  While
    ``ready()`` is false, every move is a miss.
    """

    def __init__(
        self,
        name: str,
        breaker: Breaker,
        clock: Clock,
        degraded: Callable[[str], None],
        ready: Callable[[], bool] = lambda: True,
    ) -> None:
        self.name = name
        self._breaker = breaker
        self._clock = clock
        self._degraded = degraded
        self._ready = ready
        self._lock = threading.Lock()
        self._logged: set[type[BaseException]] = set()

    @property
    def shut(self) -> bool:
        """Whether a call would be answered at once."""
        with self._lock:
            return self._breaker.state is not BreakerState.CLOSED and self._clock() < self._breaker.due

    def move(self, work: Callable[[], Moved], pages: int) -> list[bool]:
        """What ``work`` says of its ``pages`` pages; all of them false when it fails or may not be done now."""
        if not self._ready():
            return [False] * pages
        with self._lock:
            permit = self._breaker.attempt(self._clock())
        if permit is None:
            self._degraded(f"{self.name}_shut")
            return [False] * pages
        moved = self.answer(work, None)
        with self._lock:
            if moved is not None and not moved.late:
                self._breaker.succeeded(permit)
            else:
                self._breaker.failed(permit, self._clock())
        if moved is None:
            return [False] * pages
        if moved.late:
            self._degraded(f"{self.name}_timeout")
        return moved.ok

    def answer(self, work: Callable[[], Answer], miss: Answer) -> Answer:
        """What ``work`` returns, or ``miss`` when it fails."""
        try:
            return work()
        except Exception as error:  # noqa: BLE001 - engine boundary: a storage call is a miss
            self._degraded(f"{self.name}_error")
            self._log(error)
            return miss

    def _log(self, error: BaseException) -> None:
        with self._lock:
            known = type(error) in self._logged
            self._logged.add(type(error))
        if not known:
            logger.error("umbp: %s failed, which costs hits; further ones are only counted", self.name, exc_info=error)
