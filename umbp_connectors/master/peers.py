"""Asks nodes to evict blocks: ``EvictKey`` of UMBP's peer service, as the original master does.

Fire and forget: what a node really evicted comes with its next heartbeat.  Needs the extra ``grpc``.
"""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import Any

from umbp_connectors.wire_grpc import channel as wire
from umbp_connectors.wire_grpc import grpc
from umbp_connectors.wire_grpc import messages as pb
from umbp_connectors.wire_grpc.codec import parse
from umbp_core.errors import ProtocolError
from umbp_core.master.model import EvictionOrder

logger = logging.getLogger(__name__)

EVICT_KEY = f"/{pb.PEER_SERVICE}/EvictKey"
DEADLINE = 1.0
"""Seconds that a node has to answer [UMBP_EVICTKEY_DEADLINE_MS]."""
MAX_CALLS = 16
"""Calls under way at once."""
MAX_CHANNELS = 256
"""Connections that are kept; the one that was used least recently is closed for a new one."""
MAX_KEY_BYTES = 1 << 20
"""Bytes of keys in one call: a peer accepts gRPC's default of 4 MiB, and its answer repeats the keys."""


class PeerEvictions:
    """An ``EvictionSender``.  Lives on one loop; ``close`` it there.

    A node that is not reached in ``deadline`` seconds is logged and otherwise left alone: as long as its blocks are
    in the index, the next round of evictions names them again.
    """

    def __init__(self, *, deadline: float = DEADLINE, max_calls: int = MAX_CALLS) -> None:
        self._deadline = deadline
        self._turns = asyncio.Semaphore(max_calls)
        self._channels: OrderedDict[str, Any] = OrderedDict()

    async def send(self, order: EvictionOrder) -> None:
        """Ask for the blocks of ``order``; returns when the node answered or will not.  Raises nothing."""
        if not order.peer_address:
            logger.debug("node %s has no peer address: %d blocks stay", order.node_id, len(order.keys))
            return
        async with self._turns:
            freed = 0
            try:
                for keys in _parts(order.keys):
                    freed += await self._evict(order.peer_address, keys)
            except grpc.aio.AioRpcError as error:
                logger.warning(
                    "node %s at %s did not evict: %s %s",
                    order.node_id,
                    order.peer_address,
                    error.code().name,
                    error.details(),
                )
            except ProtocolError as error:
                logger.warning("node %s at %s: %s", order.node_id, order.peer_address, error)
            else:
                logger.debug("node %s: %d of %d bytes evicted", order.node_id, freed, order.nbytes)

    async def close(self) -> None:
        """Close the connections; calls that are under way end."""
        while self._channels:
            _, channel = self._channels.popitem()
            await channel.close()

    async def _evict(self, address: str, keys: Sequence[bytes]) -> int:
        """Bytes that the node says it freed."""
        call = (await self._channel(address)).unary_unary(EVICT_KEY)
        answer = await call(pb.EvictKeyRequest(keys=keys).SerializeToString(), timeout=self._deadline)
        return sum(entry.bytes_freed for entry in parse(pb.EvictKeyResponse, answer).evicted)

    async def _channel(self, address: str) -> Any:
        channel = self._channels.get(address)
        if channel is None:
            channel = grpc.aio.insecure_channel(wire.target_of(address), wire.options(wire.CHANNEL_OPTIONS))
            self._channels[address] = channel
            if len(self._channels) > MAX_CHANNELS:
                _, oldest = self._channels.popitem(last=False)
                await oldest.close(grace=self._deadline)
        self._channels.move_to_end(address)
        return channel


def _parts(keys: Sequence[bytes]) -> Iterator[list[bytes]]:
    """``keys`` in parts that fit a call."""
    part: list[bytes] = []
    size = 0
    for key in keys:
        if part and size + len(key) > MAX_KEY_BYTES:
            yield part
            part, size = [], 0
        part.append(key)
        size += len(key)
    if part:
        yield part
