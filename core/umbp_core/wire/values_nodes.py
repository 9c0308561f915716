"""Messages about nodes and their own blocks to the values of ``umbp_core`` and back."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

import numpy as np

from umbp_core.errors import ProtocolError
from umbp_core.journal import Bundle, Delta
from umbp_core.master.model import (
    GetRoute,
    Heartbeat,
    HeartbeatReply,
    NodeInfo,
    NodeStatus,
    PutOutcome,
    PutRoute,
    Registration,
    TierCapacity,
)
from umbp_core.master.samples import CounterDelta, GaugeValue, HistogramDelta, MetricSample
from umbp_core.wire import messages, replies
from umbp_core.wire.columns import check_column, pack_column, unpack_column, unpack_floats
from umbp_core.wire.hashes import count_hashes, pack_hashes, unpack_in_parts
from umbp_core.wire.names import NodeTable, check_refs, read_table

_ADD, _REMOVE = 0, 1


def registration_message(registration: Registration) -> messages.Register:
    """The request to register."""
    return messages.Register(
        registration.node_id,
        registration.node_address,
        registration.peer_address,
        registration.engine_desc,
        tuple(registration.capacities),
        registration.tags,
        registration.incarnation,
    )


def registration_of(message: messages.Register) -> Registration:
    """What the request says."""
    return Registration(
        message.node_id,
        message.node_address,
        message.peer_address,
        message.engine_desc,
        _capacities_of(message.capacities),
        message.tags,
        message.incarnation,
    )


def _capacities_of(rows: Sequence[tuple[int, int, int]]) -> tuple[TierCapacity, ...]:
    return tuple([TierCapacity(*row) for row in rows])


def heartbeat_message(heartbeat: Heartbeat) -> messages.ReportHeartbeat:
    """The request that a heartbeat is."""
    return messages.ReportHeartbeat(
        heartbeat.node_id,
        tuple([_bundle_row(bundle) for bundle in heartbeat.bundles]),
        heartbeat.full_sync,
        heartbeat.baseline,
        None if heartbeat.capacities is None else tuple(heartbeat.capacities),
        None if heartbeat.counts is None else dict(heartbeat.counts),
        heartbeat.incarnation,
    )


def _bundle_row(bundle: Bundle) -> messages.BundleRow:
    deltas = bundle.deltas
    return messages.BundleRow(
        bundle.seq,
        bytes([_REMOVE if delta.size is None else _ADD for delta in deltas]),
        pack_column("i", [delta.tier for delta in deltas]),
        pack_column("Q", [delta.size or 0 for delta in deltas]),
        pack_hashes([delta.key for delta in deltas]),
    )


def heartbeat_of(message: messages.ReportHeartbeat, bundles: Sequence[Bundle]) -> Heartbeat:
    """The heartbeat in a request, whose bundles were read."""
    return Heartbeat(
        message.node_id,
        bundles,
        message.full_sync,
        message.baseline,
        None if message.capacities is None else _capacities_of(message.capacities),
        message.counts,
        message.incarnation,
    )


def deltas_in_parts(row: messages.BundleRow) -> Iterator[list[Delta]]:
    """The deltas of a bundle, some thousand at a time.

    Raises ``ProtocolError`` when columns differ in length, or a kind is not known.
    """
    count, kinds = count_hashes(row.keys), row.kinds
    if len(kinds) != count:
        raise ProtocolError(f"bundle {row.seq} has {count} keys and {len(kinds)} kinds")
    largest = int(np.frombuffer(kinds, np.uint8).max(initial=_ADD))
    if largest > _REMOVE:
        raise ProtocolError(f"bundle {row.seq} has an event of kind {largest}; 0 is ADD, 1 is REMOVE")
    check_column("i", row.tiers, count)
    check_column("Q", row.sizes, count)
    begin = 0
    for keys in unpack_in_parts(row.keys):
        end = begin + len(keys)
        tiers = unpack_column("i", row.tiers[4 * begin : 4 * end], len(keys))
        sizes = unpack_column("Q", row.sizes[8 * begin : 8 * end], len(keys))
        rows = zip(keys, kinds[begin:end], tiers, sizes, strict=True)
        yield [Delta(key, tier, None if kind else size) for key, kind, tier, size in rows]
        begin = end


def heartbeat_answer(reply: HeartbeatReply) -> replies.HeartbeatAnswer:
    """The answer to a heartbeat."""
    return replies.HeartbeatAnswer(reply.status, reply.acked_seq, reply.request_full_sync)


def heartbeat_reply_of(message: replies.HeartbeatAnswer) -> HeartbeatReply:
    """What the answer says.  Raises ``ProtocolError``."""
    return HeartbeatReply(_status_of(message.status), message.acked_seq, message.request_full_sync)


def _status_of(number: int) -> NodeStatus:
    if number not in NodeStatus.__members__.values():
        raise ProtocolError(f"status {number} of a node is not known")
    return NodeStatus(number)


def route_put_message(
    node_id: str, keys: Sequence[bytes], sizes: Sequence[int], exclude: Collection[str]
) -> messages.RoutePut:
    """The request for places to put blocks to."""
    return messages.RoutePut(node_id, pack_hashes(keys), pack_column("Q", sizes), tuple(exclude))


def sizes_of(message: messages.RoutePut) -> list[int]:
    """The sizes in a request.  Raises ``ProtocolError`` when they are not as many as the keys."""
    return unpack_column("Q", message.sizes, count_hashes(message.keys)).tolist()


def put_routes_message(routes: Sequence[PutRoute]) -> replies.PutRoutes:
    """The answer to ``RoutePut``."""
    table = NodeTable()
    refs = [table.ref(route.node_id, route.peer_address) if route.node_id else 0 for route in routes]
    return replies.PutRoutes(
        table.nodes,
        table.addresses,
        bytes([route.outcome for route in routes]),
        pack_column("I", refs),
        pack_column("i", [route.tier for route in routes]),
    )


def put_routes_of(message: replies.PutRoutes, count: int) -> list[PutRoute]:
    """What the answer to a question with ``count`` keys says.  Raises ``ProtocolError``."""
    table = [("", ""), *read_table(message.nodes, message.addresses)]
    refs = unpack_column("I", message.refs, count)
    check_refs(refs, table[1:])
    if len(message.outcomes) != count or max(message.outcomes, default=0) > max(PutOutcome):
        raise ProtocolError(f"an answer has {len(message.outcomes)} outcomes, or unknown ones, for {count} keys")
    tiers = unpack_column("i", message.tiers, count)
    return [
        PutRoute(PutOutcome(outcome), table[ref][0], tier, table[ref][1])
        for outcome, ref, tier in zip(message.outcomes, refs, tiers, strict=True)
    ]


def get_routes_message(routes: Sequence[GetRoute | None]) -> replies.GetRoutes:
    """The answer to ``RouteGet``."""
    table = NodeTable()
    refs = [0 if route is None else table.ref(route.node_id, route.peer_address) for route in routes]
    return replies.GetRoutes(
        table.nodes,
        table.addresses,
        pack_column("I", refs),
        pack_column("i", [0 if route is None else route.tier for route in routes]),
        pack_column("Q", [0 if route is None else route.size for route in routes]),
    )


def get_routes_of(message: replies.GetRoutes, count: int) -> list[GetRoute | None]:
    """What the answer to a question with ``count`` keys says.  Raises ``ProtocolError``."""
    table = read_table(message.nodes, message.addresses)
    refs = unpack_column("I", message.refs, count)
    check_refs(refs, table)
    tiers = unpack_column("i", message.tiers, count)
    sizes = unpack_column("Q", message.sizes, count)
    return [
        GetRoute(table[ref - 1][0], tier, size, table[ref - 1][1]) if ref else None
        for ref, tier, size in zip(refs, tiers, sizes, strict=True)
    ]


def metrics_message(node_id: str, samples: Sequence[MetricSample]) -> messages.ReportMetrics:
    """The request that hands metrics over."""
    rows = [messages.SampleRow(one.name, _value_row(one.value), one.help, one.labels) for one in samples]
    return messages.ReportMetrics(node_id, tuple(rows))


def _value_row(
    value: CounterDelta | GaugeValue | HistogramDelta,
) -> messages.CounterRow | messages.GaugeRow | messages.HistogramRow:
    if isinstance(value, CounterDelta):
        return messages.CounterRow(value.delta)
    if isinstance(value, GaugeValue):
        return messages.GaugeRow(value.value)
    bounds, cumulative = pack_column("d", value.bounds), pack_column("Q", value.cumulative)
    return messages.HistogramRow(bounds, cumulative, value.observed, value.total)


def samples_of(message: messages.ReportMetrics) -> list[MetricSample]:
    """The metrics in a request.  Raises ``ProtocolError`` when columns differ in length."""
    return [MetricSample(row.name, _value_of(row.value), row.help, row.labels) for row in message.samples]


def _value_of(
    row: messages.CounterRow | messages.GaugeRow | messages.HistogramRow,
) -> CounterDelta | GaugeValue | HistogramDelta:
    if isinstance(row, messages.CounterRow):
        return CounterDelta(row.delta)
    if isinstance(row, messages.GaugeRow):
        return GaugeValue(row.value)
    count = len(row.bounds) // 8
    limits, cumulative = unpack_floats(row.bounds, count), unpack_column("Q", row.cumulative, count)
    return HistogramDelta(tuple(limits), tuple(cumulative), row.observed, row.total)


def nodes_message(nodes: Sequence[NodeInfo]) -> replies.Nodes:
    """The answer to ``ListNodes``."""
    return replies.Nodes(tuple([_node_row(node) for node in nodes]))


def _node_row(node: NodeInfo) -> replies.NodeRow:
    return replies.NodeRow(
        node.node_id,
        node.status,
        node.node_address,
        node.peer_address,
        node.tags,
        node.incarnation,
        node.capacities,
        node.last_heartbeat_age,
        node.external_counts,
        node.block_counts,
    )


def nodes_of(message: replies.Nodes) -> list[NodeInfo]:
    """What the answer says.  Raises ``ProtocolError``."""
    return [
        NodeInfo(
            row.node_id,
            _status_of(row.status),
            row.node_address,
            row.peer_address,
            row.tags,
            row.incarnation,
            _capacities_of(row.capacities),
            row.last_heartbeat_age,
            row.external_counts,
            row.block_counts,
        )
        for row in message.nodes
    ]
