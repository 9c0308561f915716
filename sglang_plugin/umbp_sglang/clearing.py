"""SGLang's word that every page be forgotten, which is kept until it is done."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

from umbp_core.breaker import Breaker
from umbp_core.ports import Clock

logger = logging.getLogger(__name__)


class Clearing:
    """Clears with ``clear()``, now or as soon as that is possible.  Any thread.

    SGLang tells its user that the storage is empty, whatever came of it, and pages of other weights may follow: until
    it is empty, nothing may be found, read or stored.  ``degraded`` is told of every attempt that failed and of every
    call that was turned away.
    """

    def __init__(
        self, clear: Callable[[], None], breaker: Breaker, clock: Clock, degraded: Callable[[str], None]
    ) -> None:
        self._clear = clear
        self._breaker = breaker
        self._clock = clock
        self._degraded = degraded
        self._trying = threading.Lock()
        self._due = threading.Event()

    def ask(self) -> None:
        """Clear; what cannot be cleared now is due when this returns."""
        with self._trying:
            self._try()

    def done(self) -> bool:
        """Whether nothing is due; what is due is tried first, unless that failed just now or another thread does."""
        if not self._due.is_set():
            return True
        if self._trying.acquire(blocking=False):
            try:
                if not self._due.is_set() or self._try():
                    return True
            finally:
                self._trying.release()
        self._degraded("clear_due")
        return False

    def _try(self) -> bool:
        permit = self._breaker.attempt(self._clock())
        if permit is None:  # it is due, and was tried a moment ago
            return False
        try:
            self._clear()
        except Exception as error:  # noqa: BLE001 - engine boundary: what is not cleared stays due
            self._breaker.failed(permit, self._clock())
            self._degraded("clear_error")
            if not self._due.is_set():
                logger.warning("umbp: the storage cannot be cleared yet, and is not used until it is: %s", error)
            self._due.set()
            return False
        self._breaker.succeeded(permit)
        if self._due.is_set():
            logger.info("umbp: the storage is cleared now, and used again")
        self._due.clear()
        return True
