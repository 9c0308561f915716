"""A line to a master for those that only ask: routers and tools, which are no nodes."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

from umbp_connectors.client.addresses import MasterAddress, parse_addresses
from umbp_connectors.client.dial import Dialer
from umbp_connectors.client.dialects import Dialect
from umbp_connectors.client.link import Dial
from umbp_connectors.client.queries import Queries
from umbp_connectors.client.settings import ClientSettings
from umbp_core.breaker import Breaker
from umbp_core.index_match import PrefixMatch
from umbp_core.master.model import NodeInfo
from umbp_core.master.transport import is_native
from umbp_core.ports import Clock

T = TypeVar("T")


class MasterReader:
    """Asks the master at ``addresses`` (see ``parse_addresses``), and is never seen among its nodes.

    Of several addresses the first that answers is asked.  One that does not answer is left alone for a while, up to
    two seconds.  A question takes its deadline at most, by default ``ClientSettings.query_timeout``, and raises
    nothing; ``None`` means that there was no answer, which is not the same as an empty one.

    The constructor connects to nothing; any thread may ask.
    """

    def __init__(
        self,
        addresses: str | Sequence[MasterAddress],
        *,
        settings: ClientSettings | None = None,
        dial: Dial | None = None,
        clock: Clock = time.monotonic,
        chance: Callable[[], float] = random.random,
    ) -> None:
        self._settings = settings or ClientSettings()
        self._clock = clock
        dial = dial or Dialer(role="reader")
        doors = parse_addresses(addresses) if isinstance(addresses, str) else tuple(addresses)
        self._lines = [_line(door, dial, Breaker(chance, self._settings.backoff, failures=1), clock) for door in doors]

    def match_prefix(
        self,
        hashes: Sequence[bytes],
        weights: Mapping[int, float] | None = None,
        timeout: float | None = None,
        limit: int = 0,
    ) -> list[PrefixMatch] | None:
        """The longest usable prefix of ``hashes`` per node, longest first; see ``ExternalKvIndex.match_prefix``.

        At most ``limit`` nodes; 0: all.
        """
        return self._ask(lambda dialect, left: dialect.match_prefix(hashes, weights, left, limit), timeout)

    def nodes(self, timeout: float | None = None) -> list[NodeInfo] | None:
        """All nodes that the master knows; ``None`` also from a master that cannot say (UMBP's gRPC)."""

        def question(dialect: Dialect, left: float) -> list[NodeInfo] | None:
            return dialect.transport.list_nodes(left) if is_native(dialect.transport) else None

        return self._ask(question, timeout)

    def close(self) -> None:
        """Answer with ``None`` from now on; questions that wait end soon.  Idempotent, any thread."""
        for line in self._lines:
            line.close()

    def _ask(self, question: Callable[[Dialect, float], T | None], timeout: float | None) -> T | None:
        deadline = self._clock() + (self._settings.query_timeout if timeout is None else timeout)
        for line in self._lines:
            left = deadline - self._clock()
            answer = line.ask(question, None, left) if left > 0 else None
            if answer is not None:
                return answer
        return None


def _line(door: MasterAddress, dial: Dial, breaker: Breaker, clock: Clock) -> Queries:
    return Queries(lambda: door, dial, breaker, clock)
