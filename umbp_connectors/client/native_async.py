"""The asyncio client of the native protocol: many requests on one connection, and watches on their own.

What is asked for in one turn of the loop is written at once, and answers find their callers by number, so that a router
can have a thousand matches under way.  The server answers the requests of a connection in their order.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import AsyncGenerator, Collection, Mapping, Sequence
from typing import TypeVar

from umbp_connectors.client import native_asks
from umbp_connectors.client.native_asks import Ask
from umbp_connectors.client.native_pipe import NativePipe
from umbp_connectors.client.native_session import Identity, NativeAddress, describe, unreachable
from umbp_connectors.client.native_stream import watch_events
from umbp_core.errors import MasterUnavailable
from umbp_core.index_feed import FeedPage
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
from umbp_core.wire.codec import decode_as

T = TypeVar("T")

_ANONYMOUS = Identity()
_SILENCE = 20.0
"""Seconds without a word on a watch after which the master is gone: it says something every few."""


class NativeAsyncClient:
    """A client of the master at ``address``: the path of a Unix socket, or host and port.

    Calls and errors are those of ``NativeTransport``; every call has a ``timeout`` in seconds.  It connects with the
    first call, and again with the first one after the connection failed; nothing is ever sent twice.  A call whose time
    is up is given up alone: its answer, should it come, is dropped.  With ``pending`` requests under way, or while the
    master does not read, the next ones wait.  One loop's thread.
    """

    def __init__(
        self,
        address: NativeAddress,
        identity: Identity = _ANONYMOUS,
        *,
        tls: ssl.SSLContext | None = None,
        pending: int = 1024,
    ) -> None:
        self.address = address
        self._identity = identity
        self._tls = tls
        self._pending = pending
        self._pipe: NativePipe | None = None
        self._connecting: asyncio.Task[NativePipe] | None = None
        self._closed = False

    async def open(self, timeout: float) -> None:
        """Connect and greet now; see ``NativeBlockingClient.open`` for what is raised."""
        await self._connected(timeout)

    def close(self) -> None:
        """End the connection; calls under way raise ``MasterUnavailable``.  Idempotent."""
        self._closed = True
        if self._connecting is not None:
            self._connecting.cancel()
        if self._pipe is not None:
            self._pipe.close()

    def watch(
        self, incarnation: int = 0, cursor: int = 0, *, timeout: float, silence: float = _SILENCE
    ) -> AsyncGenerator[FeedPage, None]:
        """Follow the master's index from ``cursor`` of ``incarnation`` on, on a connection of its own.

        Yields pages of changes, each as soon as there are some.  To go on later, give the ``incarnation`` and
        ``cursor`` of the last page.  A page that says ``lost`` comes first when that is not possible, or not any more:
        list nodes and blocks then, and apply the pages that follow to it; to apply a change twice does no harm.  A
        large change may come in several pages, as changes of the same number with a part of its hashes each.  A reader
        that is slow is waited for.  Connecting may take ``timeout`` seconds; ends with ``MasterUnavailable`` when
        nothing comes for ``silence`` seconds, or the connection fails.
        """
        return watch_events(self.address, self._identity, self._tls, (incarnation, cursor), timeout, silence)

    async def register(self, registration: Registration, timeout: float) -> RegistrationAck:
        """See ``MasterTransport``."""
        return await self._ask(native_asks.register(registration), timeout)

    async def unregister(self, node_id: str, timeout: float) -> None:
        """See ``MasterTransport``."""
        await self._ask(native_asks.unregister(node_id), timeout)

    async def heartbeat(self, heartbeat: Heartbeat, timeout: float) -> HeartbeatReply:
        """See ``MasterTransport``."""
        return await self._ask(native_asks.heartbeat(heartbeat), timeout)

    async def route_put(
        self, node_id: str, keys: Sequence[bytes], sizes: Sequence[int], exclude: Collection[str], timeout: float
    ) -> list[PutRoute]:
        """See ``MasterTransport``."""
        return await self._ask(native_asks.route_put(node_id, keys, sizes, exclude), timeout)

    async def route_get(
        self, node_id: str, keys: Sequence[bytes], exclude: Collection[str], timeout: float
    ) -> list[GetRoute | None]:
        """See ``MasterTransport``."""
        return await self._ask(native_asks.route_get(node_id, keys, exclude), timeout)

    async def lookup(self, keys: Sequence[bytes], timeout: float) -> list[bool]:
        """See ``MasterTransport``."""
        return await self._ask(native_asks.lookup(keys), timeout)

    async def report(self, node_id: str, hashes: Sequence[bytes], tier: int, timeout: float) -> bool:
        """See ``MasterTransport``."""
        return await self._ask(native_asks.report(node_id, hashes, tier), timeout)

    async def revoke(self, node_id: str, hashes: Sequence[bytes], tier: int, timeout: float) -> None:
        """See ``MasterTransport``."""
        await self._ask(native_asks.revoke(node_id, hashes, tier), timeout)

    async def clear_tier(self, node_id: str, tier: int, timeout: float) -> None:
        """See ``MasterTransport``."""
        await self._ask(native_asks.clear_tier(node_id, tier), timeout)

    async def clear_node(self, node_id: str, timeout: float) -> None:
        """See ``MasterTransport``."""
        await self._ask(native_asks.clear_node(node_id), timeout)

    async def match(self, hashes: Sequence[bytes], count_as_hit: bool, timeout: float) -> list[ExternalMatch]:
        """See ``MasterTransport``.  Lists with the same content may be one object; nobody may change them."""
        return await self._ask(native_asks.match(hashes, count_as_hit), timeout)

    async def hit_counts(self, hashes: Sequence[bytes], timeout: float) -> list[tuple[bytes, int]]:
        """See ``MasterTransport``."""
        return await self._ask(native_asks.hit_counts(hashes), timeout)

    async def report_metrics(self, node_id: str, samples: Sequence[MetricSample], timeout: float) -> None:
        """See ``MasterTransport``."""
        await self._ask(native_asks.report_metrics(node_id, samples), timeout)

    async def apply_batch(self, node_id: str, batch: Batch, timeout: float) -> Acknowledgement:
        """See ``NativeTransport``."""
        return await self._ask(native_asks.apply_batch(node_id, batch), timeout)

    async def probe(self, node_id: str, incarnation: int, acked: int, timeout: float) -> Acknowledgement:
        """See ``NativeTransport``."""
        return await self._ask(native_asks.probe(node_id, incarnation, acked), timeout)

    async def match_prefix(
        self, hashes: Sequence[bytes], weights: Mapping[int, float] | None, timeout: float, limit: int = 0
    ) -> list[PrefixMatch]:
        """See ``NativeTransport``."""
        return await self._ask(native_asks.match_prefix(hashes, weights, limit), timeout)

    async def list_nodes(self, timeout: float) -> list[NodeInfo]:
        """See ``NativeTransport``."""
        return await self._ask(native_asks.list_nodes(), timeout)

    async def list_blocks(self, node_id: str, tier: int, cursor: int, limit: int, timeout: float) -> BlockPage:
        """See ``NativeTransport``."""
        return await self._ask(native_asks.list_blocks(node_id, tier, cursor, limit), timeout)

    async def explain(self, node_id: str, key: bytes, timeout: float) -> HashExplanation:
        """See ``NativeTransport``."""
        return await self._ask(native_asks.explain(node_id, key), timeout)

    async def _ask(self, ask: Ask[T], timeout: float) -> T:
        pipe = self._pipe
        deadline = asyncio.get_running_loop().time() + timeout
        if pipe is None or pipe.broken:
            pipe = await self._connected(timeout)
        if pipe.full:
            await pipe.room(deadline)
        return ask.read(decode_as(ask.reply, await pipe.ask(ask.request, deadline)))

    async def _connected(self, timeout: float) -> NativePipe:
        """The connection; those who want one at the same time share the attempt."""
        if self._closed:
            raise MasterUnavailable(f"the client of the master at {describe(self.address)} is closed; make a new one")
        if self._pipe is not None and not self._pipe.broken:
            return self._pipe
        if self._connecting is None or self._connecting.done():
            self._connecting = asyncio.get_running_loop().create_task(self._connect(timeout))
            self._connecting.add_done_callback(_look_at)
        try:
            self._pipe = await asyncio.wait_for(asyncio.shield(self._connecting), timeout)
        except (OSError, asyncio.TimeoutError) as error:
            raise unreachable(self.address, error) from error
        except asyncio.CancelledError:
            if self._closed and self._connecting.cancelled():
                raise MasterUnavailable(f"the client of the master at {describe(self.address)} was closed") from None
            raise
        return self._pipe

    async def _connect(self, timeout: float) -> NativePipe:
        loop = asyncio.get_running_loop()
        pipe = NativePipe(self.address, self._identity, self._pending, loop)
        if isinstance(self.address, str):
            await asyncio.wait_for(loop.create_unix_connection(lambda: pipe, self.address), timeout)
        else:
            host, port = self.address
            transport, _ = await asyncio.wait_for(
                loop.create_connection(lambda: pipe, host, port, ssl=self._tls), timeout
            )
            sock = transport.get_extra_info("socket")
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        try:
            await asyncio.wait_for(pipe.greeting, timeout)
        finally:
            if not pipe.ready:
                pipe.close()
        return pipe


def _look_at(task: asyncio.Task[NativePipe]) -> None:
    """Those who waited for the connection may be gone; then nobody else looks at what went wrong."""
    if not task.cancelled():
        task.exception()
