"""Requests of the native protocol to calls of the master's service."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Sequence
from typing import Any, NamedTuple

from umbp_connectors.master.service import MasterService, breathe
from umbp_core.index import PositionMatch
from umbp_core.journal import Bundle, Delta
from umbp_core.wire import bounds, messages, replies, values_index, values_nodes
from umbp_core.wire.columns import pack_bitmap
from umbp_core.wire.hashes import count_hashes, unpack_hashes, unpack_in_parts, view_hashes
from umbp_core.wire.messages import Message

_BREATH = 8192
"""Hashes that are unpacked without letting others in; about a millisecond."""
Answer = Message | Coroutine[Any, Any, Message]
_DONE = replies.Done()


class Call(NamedTuple):
    """One call: its name, that of UMBP's wire where it has one, and what answers it."""

    name: str
    run: Callable[[Any], Answer]


class NativeCalls:
    """The table of calls on ``service``.

    A call returns its answer, or a coroutine that does where it may take more than a moment.  It raises kinds of
    ``MasterError``.  The master's loop only.
    """

    def __init__(self, service: MasterService, max_hashes: int) -> None:
        self._service = service
        self._max_hashes = max_hashes
        self._few = service.state.slices.keys
        self._at_once = service.state.slices.query
        self._prepared = service.state.prepare(self._matches_message)
        self.table: dict[type[Message], Call] = {
            messages.Register: Call("RegisterClient", self._register),
            messages.Unregister: Call("UnregisterClient", self._unregister),
            messages.ReportHeartbeat: Call("Heartbeat", self._heartbeat),
            messages.RoutePut: Call("BatchRoutePut", self._route_put),
            messages.RouteGet: Call("BatchRouteGet", self._route_get),
            messages.Lookup: Call("BatchLookup", self._lookup),
            messages.Report: Call("ReportExternalKvBlocks", self._report),
            messages.Revoke: Call("RevokeExternalKvBlocks", self._revoke),
            messages.ClearTier: Call("RevokeAllExternalKvBlocksAtTier", self._clear_tier),
            messages.ClearNode: Call("RevokeAllExternalKvBlocksForNode", self._clear_node),
            messages.Match: Call("MatchExternalKv", self._match),
            messages.HitCounts: Call("GetExternalKvHitCounts", self._hit_counts),
            messages.ReportMetrics: Call("ReportMetrics", self._report_metrics),
            messages.ApplyBatch: Call("ApplyExternalKvBatch", self._apply_batch),
            messages.Probe: Call("Probe", self._probe),
            messages.MatchPrefix: Call("MatchPrefix", self._match_prefix),
            messages.ListNodes: Call("ListNodes", self._list_nodes),
            messages.ListBlocks: Call("ListBlocks", self._list_blocks),
            messages.Explain: Call("Explain", self._explain),
        }

    def _match(self, request: messages.Match) -> Answer:
        if len(request.hashes) > self._at_once and count_hashes(request.hashes) > self._at_once:
            return self._match_in_steps(request)
        hashes = view_hashes(request.hashes)
        return self._service.match_prepared(hashes, request.count_as_hit, self._prepared)

    async def _match_in_steps(self, request: messages.Match) -> Message:
        hashes = await self._unpack(request.hashes)
        return self._matches_message(await self._service.match_positions(hashes, request.count_as_hit))

    def _matches_message(self, matches: Sequence[PositionMatch]) -> Message:
        return values_index.matches_message(matches, self._service.peer_address)

    async def _match_prefix(self, request: messages.MatchPrefix) -> Message:
        values_index.check_weights(request.weights)
        hashes = await self._unpack(request.hashes)
        matches = await self._service.match_prefix(hashes, request.weights)
        return values_index.prefixes_message(matches[: request.limit or None])

    def _register(self, request: messages.Register) -> Answer:
        ack = self._service.register(values_nodes.registration_of(request))
        return replies.Registered(ack.heartbeat_interval_ms, ack.ack_seq)

    def _unregister(self, request: messages.Unregister) -> Answer:
        self._service.unregister(request.node_id)
        return _DONE

    async def _heartbeat(self, request: messages.ReportHeartbeat) -> Message:
        bundles, pace = [], _Pace()
        for row in request.bundles:
            deltas: list[Delta] = []
            for part in values_nodes.deltas_in_parts(row):
                await pace.worked(len(part))
                deltas += part
            bundles.append(Bundle(row.seq, tuple(deltas)))
        reply = await self._service.heartbeat(values_nodes.heartbeat_of(request, bundles))
        return values_nodes.heartbeat_answer(reply)

    def _route_put(self, request: messages.RoutePut) -> Answer:
        keys, sizes = self._keys(request.keys), values_nodes.sizes_of(request)
        if len(keys) > self._few:
            return self._route_put_in_steps(request, keys, sizes)
        routes = self._service.route_put(request.node_id, keys, sizes, request.exclude, batch=len(keys) != 1)
        return values_nodes.put_routes_message(routes)

    async def _route_put_in_steps(self, request: messages.RoutePut, keys: list[bytes], sizes: list[int]) -> Message:
        routes = await self._service.batch_route_put(request.node_id, keys, sizes, request.exclude)
        return values_nodes.put_routes_message(routes)

    def _route_get(self, request: messages.RouteGet) -> Answer:
        keys = self._keys(request.keys)
        if len(keys) > self._few:
            return self._route_get_in_steps(request, keys)
        routes = self._service.route_get(request.node_id, keys, request.exclude, batch=len(keys) != 1)
        return values_nodes.get_routes_message(routes)

    async def _route_get_in_steps(self, request: messages.RouteGet, keys: list[bytes]) -> Message:
        routes = await self._service.batch_route_get(request.node_id, keys, request.exclude)
        return values_nodes.get_routes_message(routes)

    def _lookup(self, request: messages.Lookup) -> Answer:
        return replies.Found(pack_bitmap(self._service.lookup(self._keys(request.keys))))

    async def _report(self, request: messages.Report) -> Message:
        hashes = await self._unpack(request.hashes)
        return replies.Accepted(await self._service.report(request.node_id, hashes, request.tier))

    async def _revoke(self, request: messages.Revoke) -> Message:
        hashes = await self._unpack(request.hashes)
        await self._service.revoke(request.node_id, hashes, request.tier)
        return _DONE

    def _clear_tier(self, request: messages.ClearTier) -> Answer:
        self._service.clear_tier(request.node_id, request.tier)
        return _DONE

    def _clear_node(self, request: messages.ClearNode) -> Answer:
        self._service.clear_node(request.node_id)
        return _DONE

    def _hit_counts(self, request: messages.HitCounts) -> Answer:
        return values_index.hit_counts_message(self._service.hit_counts(self._keys(request.hashes)))

    def _report_metrics(self, request: messages.ReportMetrics) -> Answer:
        self._service.report_metrics(request.node_id, values_nodes.samples_of(request))
        return _DONE

    async def _apply_batch(self, request: messages.ApplyBatch) -> Message:
        pace = _Pace()
        actions = [values_index.action_of(row, await self._unpack(row.hashes, pace)) for row in request.actions]
        answer = await self._service.apply_batch(request.node_id, values_index.batch_of(request, actions))
        return values_index.acknowledgement_message(answer)

    def _probe(self, request: messages.Probe) -> Answer:
        answer = self._service.probe(request.node_id, request.incarnation, request.acked)
        return values_index.acknowledgement_message(answer)

    def _list_nodes(self, _: messages.ListNodes) -> Answer:
        return values_nodes.nodes_message(self._service.list_nodes())

    def _list_blocks(self, request: messages.ListBlocks) -> Answer:
        page = self._service.list_blocks(request.node_id, request.tier, request.cursor, request.limit)
        return values_index.blocks_message(page)

    def _explain(self, request: messages.Explain) -> Answer:
        return values_index.explanation_message(self._service.explain(request.node_id, request.hash))

    def _keys(self, packed: bytes) -> list[bytes]:
        """Those of a call that works at one go."""
        return unpack_hashes(packed, min(bounds.KEYS, self._max_hashes))

    async def _unpack(self, packed: bytes, pace: _Pace | None = None) -> list[bytes]:
        """Those of a call that lets others in."""
        pace = pace or _Pace()
        hashes: list[bytes] = []
        for part in unpack_in_parts(packed, self._max_hashes):
            await pace.worked(len(part))
            hashes += part
        return hashes


class _Pace:
    """Lets others in after every ``_BREATH`` items."""

    def __init__(self) -> None:
        self._items = 0

    async def worked(self, items: int) -> None:
        """``items`` more, and one for the trouble, were worked on."""
        self._items += items + 1
        if self._items > _BREATH:
            self._items = 0
            await breathe()
