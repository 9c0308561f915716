"""Questions to the master, in the caller's thread: an answer in time, or none."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import TypeVar

from umbp_connectors.client.addresses import MasterAddress
from umbp_connectors.client.dialects import Dialect, dialect_of
from umbp_connectors.client.link import Dial
from umbp_core.breaker import Breaker
from umbp_core.errors import InvalidRequest, MasterError, MasterUnavailable
from umbp_core.ports import Clock

logger = logging.getLogger(__name__)

T = TypeVar("T")

_LEAST = 0.001
"""Seconds that a call gets even if the deadline is over: it then fails by itself."""


class Queries:
    """A connection for questions only, so that no answer waits behind a large report.  Any thread.

    ``where`` is the address at which the client's own thread has a master.  While it has none, a question is answered
    with nothing at once; so it is while questions have been failing, but for a trial now and then.
    """

    def __init__(self, where: Callable[[], MasterAddress | None], dial: Dial, breaker: Breaker, clock: Clock) -> None:
        self._where = where
        self._dial = dial
        self._breaker = breaker
        self._clock = clock
        self._lock = threading.Lock()
        self._dialing = threading.Lock()
        self._dialect: Dialect | None = None
        self._address: MasterAddress | None = None
        self._closed = False
        self.questions = 0
        self.degraded = 0

    def ask(self, question: Callable[[Dialect, float], T], nothing: T, timeout: float) -> T:
        """The answer, or ``nothing`` when there is none within ``timeout`` seconds.  Raises nothing."""
        deadline = self._clock() + timeout
        address = self._where()
        with self._lock:
            self.questions += 1
            permit = None if self._closed or address is None else self._breaker.attempt(self._clock())
        if permit is None or address is None:
            return self._degrade(nothing)
        dialect = None
        try:
            dialect = self._connected(address, deadline)
            answer = question(dialect, max(_LEAST, deadline - self._clock()))
        except InvalidRequest as error:
            logger.warning("the master does not take a question: %s", error)
            with self._lock:
                self._breaker.succeeded(permit)
            return self._degrade(nothing)
        except MasterError as error:
            logger.debug("a question to the master at %s has no answer: %s", address, error)
            self._drop(dialect)
            with self._lock:
                self._breaker.failed(permit, self._clock())
            return self._degrade(nothing)
        with self._lock:
            self._breaker.succeeded(permit)
        return answer

    def close(self) -> None:
        """Answer with nothing from now on.  Any thread; questions that wait end soon."""
        with self._lock:
            self._closed = True
            dialect, self._dialect = self._dialect, None
        if dialect is not None:
            dialect.transport.close()

    def _connected(self, address: MasterAddress, deadline: float) -> Dialect:
        """The connection to ``address``; one caller makes it, the others wait as long as they have time."""
        dialect = self._current(address)
        if dialect is not None:
            return dialect
        if not self._dialing.acquire(timeout=max(0.0, deadline - self._clock())):
            raise MasterUnavailable("another question is still connecting to the master; there is no time to wait")
        try:
            dialect = self._current(address)
            if dialect is None:
                dialect = dialect_of(self._dial(address, max(_LEAST, deadline - self._clock())))
                self._keep(dialect, address)
            return dialect
        finally:
            self._dialing.release()

    def _current(self, address: MasterAddress) -> Dialect | None:
        with self._lock:
            return self._dialect if self._address == address else None

    def _keep(self, dialect: Dialect, address: MasterAddress) -> None:
        with self._lock:
            before, self._dialect, self._address = self._dialect, dialect, address
            closed = self._closed
        if before is not None:
            before.transport.close()
        if closed:
            self.close()

    def _drop(self, dialect: Dialect | None) -> None:
        """Use ``dialect`` no more, unless it was replaced already."""
        with self._lock:
            if dialect is None or dialect is not self._dialect:
                return
            self._dialect = None
        dialect.transport.close()

    def _degrade(self, nothing: T) -> T:
        with self._lock:
            self.degraded += 1
        return nothing
