"""The blocking client of the native protocol: any thread may ask, and everybody has a deadline."""

from __future__ import annotations

import ssl
import threading
from collections.abc import Collection, Mapping, Sequence
from time import monotonic
from typing import TypeVar

from umbp_connectors.client import native_asks
from umbp_connectors.client.native_asks import Ask
from umbp_connectors.client.native_link import NativeLink, Refused, connect
from umbp_connectors.client.native_session import Identity, NativeAddress, describe
from umbp_core.errors import MasterUnavailable
from umbp_core.index_gate import Acknowledgement, Batch
from umbp_core.index_match import PrefixMatch
from umbp_core.master.model import (
    BlockPage,
    ExternalMatch,
    GetRoute,
    HashExplanation,
    Heartbeat,
    HeartbeatReply,
    NodeInfo,
    PutRoute,
    Registration,
    RegistrationAck,
)
from umbp_core.master.samples import MetricSample

T = TypeVar("T")

_FRESH = 1.0
"""Seconds for which an idle connection is used without asking whether it still is one."""
_ANONYMOUS = Identity()


class NativeBlockingClient:
    """A ``NativeTransport`` to the master at ``address``: the path of a Unix socket, or host and port.

    Calls of different threads run beside each other, on up to ``connections`` connections; calls of one thread take
    effect in its order.  A call whose deadline passes, or whose connection fails, raises ``MasterUnavailable``, and its
    connection is closed: an answer that comes late finds nobody.  The next call connects again by itself, within its
    own deadline; nothing is ever sent twice.  :meth:`open` connects at once, to see whether the master is one of ours.
    """

    def __init__(
        self,
        address: NativeAddress,
        identity: Identity = _ANONYMOUS,
        *,
        tls: ssl.SSLContext | None = None,
        connections: int = 4,
    ) -> None:
        self.address = address
        self._identity = identity
        self._tls = tls
        self._limit = connections
        self._lock = threading.Lock()
        self._change = threading.Condition(self._lock)
        self._idle: list[NativeLink] = []
        self._busy: set[NativeLink] = set()
        self._connecting = 0
        self._waiting = 0
        self._closed = False

    @property
    def native(self) -> bool:
        """True: this is a ``NativeTransport``."""
        return True

    def open(self, timeout: float) -> None:
        """Connect and greet now.

        Raises ``ProtocolError`` when the other side does not speak our protocol, ``AccessDenied`` when it does not
        accept the token, ``MasterUnavailable`` when it is not there.
        """
        self._give_back(self._take(monotonic() + timeout))

    def close(self) -> None:
        """End all connections.  Idempotent; calls under way in other threads get ``MasterUnavailable``."""
        with self._lock:
            self._closed = True
            idle, self._idle = self._idle, []
            for link in self._busy:
                link.interrupt()
            self._change.notify_all()
        for link in idle:
            link.close()

    def register(self, registration: Registration, timeout: float) -> RegistrationAck:
        """See ``MasterTransport``."""
        return self._ask(native_asks.register(registration), timeout)

    def unregister(self, node_id: str, timeout: float) -> None:
        """See ``MasterTransport``."""
        self._ask(native_asks.unregister(node_id), timeout)

    def heartbeat(self, heartbeat: Heartbeat, timeout: float) -> HeartbeatReply:
        """See ``MasterTransport``."""
        return self._ask(native_asks.heartbeat(heartbeat), timeout)

    def route_put(
        self, node_id: str, keys: Sequence[bytes], sizes: Sequence[int], exclude: Collection[str], timeout: float
    ) -> list[PutRoute]:
        """See ``MasterTransport``."""
        return self._ask(native_asks.route_put(node_id, keys, sizes, exclude), timeout)

    def route_get(
        self, node_id: str, keys: Sequence[bytes], exclude: Collection[str], timeout: float
    ) -> list[GetRoute | None]:
        """See ``MasterTransport``."""
        return self._ask(native_asks.route_get(node_id, keys, exclude), timeout)

    def lookup(self, keys: Sequence[bytes], timeout: float) -> list[bool]:
        """See ``MasterTransport``."""
        return self._ask(native_asks.lookup(keys), timeout)

    def report(self, node_id: str, hashes: Sequence[bytes], tier: int, timeout: float) -> bool:
        """See ``MasterTransport``."""
        return self._ask(native_asks.report(node_id, hashes, tier), timeout)

    def revoke(self, node_id: str, hashes: Sequence[bytes], tier: int, timeout: float) -> None:
        """See ``MasterTransport``."""
        self._ask(native_asks.revoke(node_id, hashes, tier), timeout)

    def clear_tier(self, node_id: str, tier: int, timeout: float) -> None:
        """See ``MasterTransport``."""
        self._ask(native_asks.clear_tier(node_id, tier), timeout)

    def clear_node(self, node_id: str, timeout: float) -> None:
        """See ``MasterTransport``."""
        self._ask(native_asks.clear_node(node_id), timeout)

    def match(self, hashes: Sequence[bytes], count_as_hit: bool, timeout: float) -> list[ExternalMatch]:
        """See ``MasterTransport``.  Lists with the same content may be one object; nobody may change them."""
        return self._ask(native_asks.match(hashes, count_as_hit), timeout)

    def hit_counts(self, hashes: Sequence[bytes], timeout: float) -> list[tuple[bytes, int]]:
        """See ``MasterTransport``."""
        return self._ask(native_asks.hit_counts(hashes), timeout)

    def report_metrics(self, node_id: str, samples: Sequence[MetricSample], timeout: float) -> None:
        """See ``MasterTransport``."""
        self._ask(native_asks.report_metrics(node_id, samples), timeout)

    def apply_batch(self, node_id: str, batch: Batch, timeout: float) -> Acknowledgement:
        """See ``NativeTransport``."""
        return self._ask(native_asks.apply_batch(node_id, batch), timeout)

    def probe(self, node_id: str, incarnation: int, acked: int, timeout: float) -> Acknowledgement:
        """See ``NativeTransport``."""
        return self._ask(native_asks.probe(node_id, incarnation, acked), timeout)

    def match_prefix(
        self, hashes: Sequence[bytes], weights: Mapping[int, float] | None, timeout: float, limit: int = 0
    ) -> list[PrefixMatch]:
        """See ``NativeTransport``."""
        return self._ask(native_asks.match_prefix(hashes, weights, limit), timeout)

    def list_nodes(self, timeout: float) -> list[NodeInfo]:
        """See ``NativeTransport``."""
        return self._ask(native_asks.list_nodes(), timeout)

    def list_blocks(self, node_id: str, tier: int, cursor: int, limit: int, timeout: float) -> BlockPage:
        """See ``NativeTransport``."""
        return self._ask(native_asks.list_blocks(node_id, tier, cursor, limit), timeout)

    def explain(self, node_id: str, key: bytes, timeout: float) -> HashExplanation:
        """See ``NativeTransport``."""
        return self._ask(native_asks.explain(node_id, key), timeout)

    def _ask(self, ask: Ask[T], timeout: float) -> T:
        deadline = monotonic() + timeout
        link = self._take(deadline)
        usable = False
        try:
            reply = link.ask(ask.request, ask.reply, deadline)
            usable = True
        except Refused as refusal:
            usable = True
            raise refusal.error from None
        finally:
            if usable:
                self._give_back(link)
            else:
                self._discard(link)
        return ask.read(reply)

    def _take(self, deadline: float) -> NativeLink:
        """A connection for the caller alone: an idle one, or a new one."""
        stale = []
        with self._lock:
            while not self._closed:
                if self._idle:
                    link = self._idle.pop()
                    if link.is_fresh(_FRESH):
                        self._busy.add(link)
                        return link
                    stale.append(link)
                elif len(self._busy) + self._connecting < self._limit:
                    self._connecting += 1
                    break
                elif not self._wait(deadline):
                    raise MasterUnavailable(
                        f"all {self._limit} connections to the master at {describe(self.address)} were busy; "
                        "give the call more time, or the client more connections"
                    )
            else:
                raise self._is_closed()
        for link in stale:
            link.close()
        return self._connect(deadline)

    def _wait(self, deadline: float) -> bool:
        """Wait for another thread's connection; whether there was one in time."""
        self._waiting += 1
        try:
            return self._change.wait(deadline - monotonic())
        finally:
            self._waiting -= 1

    def _connect(self, deadline: float) -> NativeLink:
        """A new connection; the caller has counted it already."""
        link = None
        try:
            link = connect(self.address, self._identity, deadline, self._tls)
        finally:
            with self._lock:
                self._connecting -= 1
                closed = self._closed
                if link is not None:
                    self._busy.add(link)
                elif self._waiting:
                    self._change.notify()
        usable = False
        try:
            if closed:
                raise self._is_closed()
            link.greet(deadline)
            usable = True
        finally:
            if not usable:
                self._discard(link)
        return link

    def _give_back(self, link: NativeLink) -> None:
        with self._lock:
            self._busy.discard(link)
            if not self._closed:
                self._idle.append(link)
                if self._waiting:
                    self._change.notify()
                return
        link.close()

    def _discard(self, link: NativeLink) -> None:
        """A connection failed; idle ones to the same master are not trusted either."""
        with self._lock:
            self._busy.discard(link)
            gone, self._idle = [link, *self._idle], []
            self._change.notify()
        for one in gone:
            one.close()

    def _is_closed(self) -> MasterUnavailable:
        return MasterUnavailable(f"the client of the master at {describe(self.address)} is closed; make a new one")
