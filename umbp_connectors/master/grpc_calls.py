"""The calls of ``umbp.UMBPMaster``: a request's bytes in, the answer's bytes out, as UMBP's master means them.

What a call does is the service's matter; here is what the wire adds: its messages, its order of columns, and the words
of its refusals, which UMBP's tests look for.  Everything raised is a ``MasterError``.  On the service's loop.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence

from umbp_connectors.master.grpc_raw import (
    OBJECTS,
    in_turns,
    read,
    read_heartbeat,
    read_items,
    read_samples,
    write_matches,
)
from umbp_connectors.master.service import MasterService
from umbp_connectors.wire_grpc import convert
from umbp_connectors.wire_grpc import messages as pb
from umbp_connectors.wire_grpc.codec import MAX_MESSAGE, parse, require_utf8, too_large
from umbp_connectors.wire_grpc.messages import Message
from umbp_core.errors import InvalidRequest
from umbp_core.master.model import PutRoute

Call = Callable[[bytes], Awaitable[bytes]]
_NOTHING = b""
"""Every answer without fields."""


class MasterCalls:
    """The fifteen calls, on ``service``."""

    def __init__(self, service: MasterService) -> None:
        self._service = service

    def table(self) -> Mapping[str, Call]:
        """The calls by their names on the wire."""
        return {
            "RegisterClient": self.register,
            "UnregisterClient": self.unregister,
            "Heartbeat": self.heartbeat,
            "RouteGet": self.route_get,
            "RoutePut": self.route_put,
            "BatchRoutePut": self.batch_route_put,
            "BatchRouteGet": self.batch_route_get,
            "BatchLookup": self.batch_lookup,
            "ReportExternalKvBlocks": self.report,
            "RevokeExternalKvBlocks": self.revoke,
            "RevokeAllExternalKvBlocksAtTier": self.revoke_tier,
            "RevokeAllExternalKvBlocksForNode": self.revoke_node,
            "MatchExternalKv": self.match,
            "GetExternalKvHitCounts": self.hit_counts,
            "ReportMetrics": self.report_metrics,
        }

    async def register(self, data: bytes) -> bytes:
        """A node introduces itself; this wire has no incarnations."""
        registration = convert.registration_of(await read(pb.RegisterClientRequest, data))
        ack = self._service.register(registration)
        return _bytes(pb.RegisterClientResponse(heartbeat_interval_ms=ack.heartbeat_interval_ms, ack_seq=ack.ack_seq))

    async def unregister(self, data: bytes) -> bytes:
        """A node takes its leave."""
        self._service.unregister(parse(pb.UnregisterClientRequest, data).node_id)
        return _NOTHING

    async def heartbeat(self, data: bytes) -> bytes:
        """A sign of life; nothing is applied before all of it is understood."""
        reply = await self._service.heartbeat(await read_heartbeat(data))
        return _bytes(
            pb.HeartbeatResponse(
                status=reply.status, acked_seq=reply.acked_seq, request_full_sync=reply.request_full_sync
            )
        )

    async def route_put(self, data: bytes) -> bytes:
        """Where to put one block."""
        request = parse(pb.RoutePutRequest, data)
        key = _key(request, data)
        (route,) = self._service.route_put(
            request.node_id, [key], [request.block_size], list(request.exclude_nodes), batch=False
        )
        return _bytes(pb.RoutePutResponse(**_put_fields(route)))

    async def route_get(self, data: bytes) -> bytes:
        """Where to get one block."""
        request = parse(pb.RouteGetRequest, data)
        key = _key(request, data)
        (route,) = self._service.route_get(request.node_id, [key], list(request.exclude_nodes), batch=False)
        if route is None:
            return _NOTHING
        return _bytes(
            pb.RouteGetResponse(
                found=True,
                node_id=route.node_id,
                tier=route.tier,
                size=route.size,
                peer_address=route.peer_address,
            )
        )

    async def batch_route_put(self, data: bytes) -> bytes:
        """Where to put blocks; empty keys are keys here."""
        request = await read(pb.BatchRoutePutRequest, data)
        keys = await read_items(request.keys, data)
        sizes, exclude = list(request.block_sizes), list(request.exclude_nodes)
        if len(keys) <= OBJECTS:
            routes = self._service.route_put(request.node_id, keys, sizes, exclude, batch=True)
        else:
            routes = await self._service.batch_route_put(request.node_id, keys, sizes, exclude)
        answer, size = [], 0
        async for start in in_turns(range(0, len(routes), OBJECTS), 1):
            # A message whose parts are put together is the message of all their entries.
            answer.append(_bytes(_put_routes(routes[start : start + OBJECTS])))
            size += len(answer[-1])
            if size > MAX_MESSAGE:
                raise too_large()
        return b"".join(answer)

    async def batch_route_get(self, data: bytes) -> bytes:
        """Where to get blocks, in columns; references to nodes count from 1."""
        request = await read(pb.BatchRouteGetRequest, data)
        keys, exclude = await read_items(request.keys, data), list(request.exclude_nodes)
        refs: dict[tuple[str, str], int] = {}
        answer = pb.BatchRouteGetResponse()
        async for part in in_turns(self._parts(keys), 1):
            columns = [
                (0, 0, 0)
                if route is None
                else (refs.setdefault((route.node_id, route.peer_address), len(refs) + 1), route.tier, route.size)
                for route in self._service.route_get(request.node_id, part, exclude, batch=True)
            ]
            answer.node_ref.extend(ref for ref, _, _ in columns)
            answer.tier.extend(tier for _, tier, _ in columns)
            answer.size.extend(size for _, _, size in columns)
        answer.nodes.extend(pb.NodeInfo(node_id=node_id, peer_address=address) for node_id, address in refs)
        return _bytes(answer)

    async def batch_lookup(self, data: bytes) -> bytes:
        """Whether blocks exist."""
        request = await read(pb.BatchLookupRequest, data)
        keys = await read_items(request.keys, data)
        answer = pb.BatchLookupResponse()
        async for part in in_turns(self._parts(keys), 1):
            answer.found.extend(self._service.lookup(part, request.node_id))
        return _bytes(answer)

    def _parts(self, keys: list[bytes]) -> list[list[bytes]]:
        """``keys`` in parts that are looked up at one go; all of them if they are too many, to be refused."""
        if len(keys) <= OBJECTS or len(keys) > self._service.state.settings.query_max:
            return [keys]
        return [keys[start : start + OBJECTS] for start in range(0, len(keys), OBJECTS)]

    async def report(self, data: bytes) -> bytes:
        """External blocks come to a tier; a node that does not live is answered the same, and nothing is kept."""
        request = await read(pb.ReportExternalKvBlocksRequest, data)
        hashes = await read_items(request.hashes, data)
        await self._service.report(request.node_id, hashes, request.tier)
        return _NOTHING

    async def revoke(self, data: bytes) -> bytes:
        """External blocks leave a tier."""
        request = await read(pb.RevokeExternalKvBlocksRequest, data)
        hashes = await read_items(request.hashes, data)
        await self._service.revoke(request.node_id, hashes, request.tier)
        return _NOTHING

    async def revoke_tier(self, data: bytes) -> bytes:
        """All external blocks of a node leave a tier."""
        request = parse(pb.RevokeAllExternalKvBlocksAtTierRequest, data)
        self._service.clear_tier(request.node_id, request.tier)
        return _NOTHING

    async def revoke_node(self, data: bytes) -> bytes:
        """All external blocks of a node are gone."""
        self._service.clear_node(parse(pb.RevokeAllExternalKvBlocksForNodeRequest, data).node_id)
        return _NOTHING

    async def match(self, data: bytes) -> bytes:
        """Who holds which hashes."""
        request = await read(pb.MatchExternalKvRequest, data)
        hashes = await read_items(request.hashes, data)
        matches = await self._service.match(hashes, request.count_as_hit)
        return await write_matches(matches, self._service.peer_address) if matches else _NOTHING

    async def hit_counts(self, data: bytes) -> bytes:
        """How often hashes were hit."""
        request = await read(pb.GetExternalKvHitCountsRequest, data)
        counts = self._service.hit_counts(await read_items(request.hashes, data))
        entries = [pb.HitCountEntry(hash=key, hit_count_total=count) for key, count in counts]
        return _bytes(pb.GetExternalKvHitCountsResponse(entries=entries))

    async def report_metrics(self, data: bytes) -> bytes:
        """Metrics of a node."""
        request = await read(pb.ReportMetricsRequest, data)
        if not request.node_id:
            raise InvalidRequest("node_id must not be empty")
        self._service.report_metrics(request.node_id, await read_samples(request.metrics))
        return _NOTHING


def _bytes(message: Message) -> bytes:
    data: bytes = message.SerializeToString()
    if len(data) > MAX_MESSAGE:
        raise too_large()
    return data


def _key(request: Message, data: bytes) -> bytes:
    key: bytes = request.key
    if not key:
        raise InvalidRequest("key cannot be empty")
    require_utf8([key], data)
    return key


def _put_routes(routes: Sequence[PutRoute]) -> Message:
    return pb.BatchRoutePutResponse(entries=[pb.BatchRoutePutEntry(**_put_fields(route)) for route in routes])


def _put_fields(route: PutRoute) -> dict[str, object]:
    return {
        "outcome": route.outcome,
        "node_id": route.node_id,
        "tier": route.tier,
        "peer_address": route.peer_address,
    }
