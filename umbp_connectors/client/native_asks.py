"""The calls of the native protocol, once for all clients: what is sent, what comes back, and what that means."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, TypeVar

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
from umbp_core.wire import messages, replies, values_index, values_nodes
from umbp_core.wire.columns import unpack_bitmap
from umbp_core.wire.hashes import pack_hashes
from umbp_core.wire.messages import Message

T = TypeVar("T")


@dataclass(slots=True)
class Ask(Generic[T]):
    """One call.  No NamedTuple, which cannot be generic in Python 3.10; not frozen, which costs every call."""

    request: Message
    reply: type[Message]
    read: Callable[[Any], T]
    """The reply to its meaning; raises ``ProtocolError``."""


def register(registration: Registration) -> Ask[RegistrationAck]:
    """Introduce a node."""
    return Ask(values_nodes.registration_message(registration), replies.Registered, _registration_ack)


def unregister(node_id: str) -> Ask[None]:
    """Forget a node."""
    return Ask(messages.Unregister(node_id), replies.Done, _nothing)


def heartbeat(beat: Heartbeat) -> Ask[HeartbeatReply]:
    """A sign of life."""
    return Ask(values_nodes.heartbeat_message(beat), replies.HeartbeatAnswer, values_nodes.heartbeat_reply_of)


def route_put(
    node_id: str, keys: Sequence[bytes], sizes: Sequence[int], exclude: Collection[str]
) -> Ask[list[PutRoute]]:
    """Where to put blocks."""
    request = values_nodes.route_put_message(node_id, keys, sizes, exclude)
    return Ask(request, replies.PutRoutes, partial(_put_routes, len(keys)))


def route_get(node_id: str, keys: Sequence[bytes], exclude: Collection[str]) -> Ask[list[GetRoute | None]]:
    """Where to get blocks from."""
    request = messages.RouteGet(node_id, pack_hashes(keys), tuple(exclude))
    return Ask(request, replies.GetRoutes, partial(_get_routes, len(keys)))


def lookup(keys: Sequence[bytes]) -> Ask[list[bool]]:
    """Whether anybody holds blocks."""
    return Ask(messages.Lookup(pack_hashes(keys)), replies.Found, partial(_found, len(keys)))


def report(node_id: str, hashes: Sequence[bytes], tier: int) -> Ask[bool]:
    """Add a tier to hashes of a node."""
    return Ask(messages.Report(node_id, tier, pack_hashes(hashes)), replies.Accepted, _accepted)


def revoke(node_id: str, hashes: Sequence[bytes], tier: int) -> Ask[None]:
    """Take a tier away from hashes of a node."""
    return Ask(messages.Revoke(node_id, tier, pack_hashes(hashes)), replies.Done, _nothing)


def clear_tier(node_id: str, tier: int) -> Ask[None]:
    """Take a tier away from all hashes of a node."""
    return Ask(messages.ClearTier(node_id, tier), replies.Done, _nothing)


def clear_node(node_id: str) -> Ask[None]:
    """Forget all hashes of a node."""
    return Ask(messages.ClearNode(node_id), replies.Done, _nothing)


def match(hashes: Sequence[bytes], count_as_hit: bool) -> Ask[list[ExternalMatch]]:
    """Who holds which hashes."""
    return Ask(messages.Match(pack_hashes(hashes), count_as_hit), replies.Matches, partial(_matches, hashes))


def hit_counts(hashes: Sequence[bytes]) -> Ask[list[tuple[bytes, int]]]:
    """How often hashes were asked for."""
    return Ask(messages.HitCounts(pack_hashes(hashes)), replies.HitCountsAnswer, values_index.hit_counts_of)


def report_metrics(node_id: str, samples: Sequence[MetricSample]) -> Ask[None]:
    """Hand over metrics of a node."""
    return Ask(values_nodes.metrics_message(node_id, samples), replies.Done, _nothing)


def apply_batch(node_id: str, batch: Batch) -> Ask[Acknowledgement]:
    """Apply a numbered batch."""
    return Ask(values_index.batch_message(node_id, batch), replies.BatchAnswer, values_index.acknowledgement_of)


def probe(node_id: str, incarnation: int, acked: int) -> Ask[Acknowledgement]:
    """Whether what was acknowledged is still known."""
    return Ask(messages.Probe(node_id, incarnation, acked), replies.BatchAnswer, values_index.acknowledgement_of)


def match_prefix(hashes: Sequence[bytes], weights: Mapping[int, float] | None, limit: int) -> Ask[list[PrefixMatch]]:
    """The longest usable prefix per node."""
    values_index.check_weights(weights)
    costs = None if weights is None else dict(weights)
    return Ask(messages.MatchPrefix(pack_hashes(hashes), costs, limit), replies.Prefixes, values_index.prefixes_of)


def list_nodes() -> Ask[list[NodeInfo]]:
    """All nodes."""
    return Ask(messages.ListNodes(), replies.Nodes, values_nodes.nodes_of)


def list_blocks(node_id: str, tier: int, cursor: int, limit: int) -> Ask[BlockPage]:
    """A page of what a node holds on a tier."""
    return Ask(messages.ListBlocks(node_id, tier, cursor, limit), replies.Blocks, values_index.blocks_of)


def explain(node_id: str, key: bytes) -> Ask[HashExplanation]:
    """Why a hash can, or cannot, be used on a node."""
    return Ask(messages.Explain(node_id, key), replies.Explained, values_index.explanation_of)


def _nothing(_: replies.Done) -> None:
    return None


def _registration_ack(reply: replies.Registered) -> RegistrationAck:
    return RegistrationAck(reply.heartbeat_interval_ms, reply.ack_seq)


def _accepted(reply: replies.Accepted) -> bool:
    return reply.accepted


def _put_routes(count: int, reply: replies.PutRoutes) -> list[PutRoute]:
    return values_nodes.put_routes_of(reply, count)


def _get_routes(count: int, reply: replies.GetRoutes) -> list[GetRoute | None]:
    return values_nodes.get_routes_of(reply, count)


def _found(count: int, reply: replies.Found) -> list[bool]:
    return list(map(bool, unpack_bitmap(reply.bitmap, count)))


def _matches(hashes: Sequence[bytes], reply: replies.Matches) -> list[ExternalMatch]:
    return values_index.matches_of(reply, hashes)
