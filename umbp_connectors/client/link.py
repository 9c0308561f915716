"""The connection to a master: which of its addresses is used, and when another one is tried."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence

from umbp_connectors.client.addresses import MasterAddress
from umbp_connectors.client.dialects import Dialect, dialect_of
from umbp_connectors.client.settings import ClientSettings
from umbp_core.errors import MasterError, MasterUnavailable
from umbp_core.master.transport import MasterTransport
from umbp_core.ports import Clock

logger = logging.getLogger(__name__)

Dial = Callable[[MasterAddress, float], MasterTransport]
"""Connects to an address and completes the handshake, within a number of seconds.  Raises a ``MasterError``."""


class Link:
    """A connection to the best of ``addresses`` that answers.  One thread; :meth:`abort` and ``address`` are for all.

    While it is not the very best, that is tried every ``upgrade_interval`` seconds, and taken as soon as it answers.
    """

    def __init__(self, addresses: Sequence[MasterAddress], dial: Dial, clock: Clock, settings: ClientSettings) -> None:
        self._addresses = addresses
        self._dial = dial
        self._clock = clock
        self._settings = settings
        self._dialect: Dialect | None = None
        self._rank = 0
        self._upgrade_at = 0.0
        self._deadline = math.inf
        self.address: MasterAddress | None = None
        """What is connected to; ``None`` when nothing is."""

    @property
    def dialect(self) -> Dialect | None:
        """How to talk over the connection; ``None`` when there is none."""
        return self._dialect

    def connect(self) -> Dialect:
        """Connect to the first address that answers.  Raises what the last one raised when none does."""
        return self._connect(range(len(self._addresses)))

    def upgrade(self) -> bool:
        """Try the better addresses if it is time to; whether one of them is used now."""
        if self._rank == 0 or self._clock() < self._upgrade_at:
            return False
        self._upgrade_at = self._clock() + self._settings.upgrade_interval
        before = self._dialect
        try:
            self._connect(range(self._rank))
        except MasterError as error:
            logger.debug("no better address of the master answers: %s", error)
            return False
        if before is not None:
            before.transport.close()
        return True

    def limit(self, deadline: float) -> None:
        """No attempt to connect that begins later may take longer than until ``deadline``.  Any thread."""
        self._deadline = deadline

    def drop(self) -> None:
        """End the connection; idempotent."""
        dialect, self._dialect, self.address = self._dialect, None, None
        if dialect is not None:
            dialect.transport.close()

    def abort(self) -> None:
        """End what is under way in the owner's thread.  Any thread."""
        dialect = self._dialect
        if dialect is not None:
            dialect.transport.close()

    def _connect(self, ranks: range) -> Dialect:
        failure: MasterError = MasterUnavailable("there was no time to connect to a master")
        for rank in ranks:
            address = self._addresses[rank]
            timeout = min(self._settings.connect_timeout, self._deadline - self._clock())
            if timeout <= 0:
                break
            try:
                transport = self._dial(address, timeout)
            except MasterError as error:
                failure = error
                continue
            self._dialect = dialect_of(transport)
            self._rank = rank
            self._upgrade_at = self._clock() + self._settings.upgrade_interval
            self.address = address
            return self._dialect
        raise failure
