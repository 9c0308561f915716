"""UMBP's wire as a :class:`~umbp_core.master.transport.MasterTransport`: for any master that speaks nothing else.

Imported only when a gRPC address is configured; needs the extra ``grpc``.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

from umbp_connectors.wire_grpc import channel as wire
from umbp_connectors.wire_grpc import convert, grpc
from umbp_connectors.wire_grpc import messages as pb
from umbp_connectors.wire_grpc.codec import parse, read_matches, require_utf8
from umbp_connectors.wire_grpc.messages import Message, MessageClass
from umbp_core.errors import InvalidRequest, MasterUnavailable, ProtocolError
from umbp_core.master.model import (
    ExternalMatch,
    GetRoute,
    Heartbeat,
    HeartbeatReply,
    NodeStatus,
    PutOutcome,
    PutRoute,
    Registration,
    RegistrationAck,
)
from umbp_core.master.samples import MetricSample

_NO_ANSWER = (grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.UNAVAILABLE)
"""How a call ends that reached nobody."""


class GrpcTransport:
    """Calls to the master at ``address`` (``host:port``).  Any thread; what is promised stands in ``MasterTransport``.

    Without ``credentials`` the connection is neither encrypted nor authenticated, as UMBP's own are; ``token`` is what
    the master wants to see, if it wants one.
    """

    native = False

    def __init__(self, address: str, *, token: str = "", credentials: grpc.ChannelCredentials | None = None) -> None:
        self._address = address
        self._metadata = wire.bearer(token)
        target, options = wire.target_of(address), wire.options(wire.CHANNEL_OPTIONS)
        if credentials is None:
            self._channel = grpc.insecure_channel(target, options)
        else:
            self._channel = grpc.secure_channel(target, credentials, options)
        self._calls: dict[str, Any] = {}

    @classmethod
    def connect(
        cls, address: str, timeout: float, *, token: str = "", credentials: grpc.ChannelCredentials | None = None
    ) -> GrpcTransport:
        """A transport whose connection stands.  Raises ``MasterUnavailable`` when it does not within ``timeout``.

        UMBP's wire has no handshake: whether it is a master that answers, and whether it wants a token, shows the first
        call.  What is asked for here is gRPC's own health, and any answer will do, also that nobody knows of that call.
        """
        transport = cls(address, token=token, credentials=credentials)
        # gRPC's own future watches in a thread, which falls over a channel that is closed soon after.
        ask = transport._channel.unary_unary(f"/{wire.HEALTH}/Check")
        try:
            ask(b"", timeout=timeout, metadata=transport._metadata, wait_for_ready=True)
        except grpc.RpcError as error:
            if error.code() in _NO_ANSWER:
                transport.close()
                raise MasterUnavailable(
                    f"no gRPC connection to the master at {address} within {timeout:g} s; is it running, and is TLS on "
                    "at both ends or at neither?"
                ) from None
        return transport

    def close(self) -> None:
        """End the connection; calls that are under way end with ``MasterUnavailable``."""
        self._channel.close()

    def register(self, registration: Registration, timeout: float) -> RegistrationAck:
        """See ``MasterTransport``.  The incarnation is not sent: this wire has none."""
        answer = self._call("RegisterClient", timeout, convert.registration_message, registration=registration)
        reply = parse(pb.RegisterClientResponse, answer)
        return RegistrationAck(reply.heartbeat_interval_ms, reply.ack_seq)

    def unregister(self, node_id: str, timeout: float) -> None:
        """See ``MasterTransport``."""
        self._call("UnregisterClient", timeout, pb.UnregisterClientRequest, node_id=node_id)

    def heartbeat(self, heartbeat: Heartbeat, timeout: float) -> HeartbeatReply:
        """See ``MasterTransport``."""
        require_keys([delta.key for bundle in heartbeat.bundles for delta in bundle.deltas])
        answer = self._call("Heartbeat", timeout, convert.heartbeat_message, heartbeat=heartbeat)
        reply = parse(pb.HeartbeatResponse, answer)
        return HeartbeatReply(_status(reply.status), reply.acked_seq, reply.request_full_sync)

    def route_put(
        self, node_id: str, keys: Sequence[bytes], sizes: Sequence[int], exclude: Collection[str], timeout: float
    ) -> list[PutRoute]:
        """See ``MasterTransport``."""
        require_keys(keys)
        fields = {"node_id": node_id, "keys": keys, "block_sizes": sizes, "exclude_nodes": exclude}
        answer = self._call("BatchRoutePut", timeout, pb.BatchRoutePutRequest, **fields)
        reply = parse(pb.BatchRoutePutResponse, answer)
        _same_length("BatchRoutePut", len(keys), len(reply.entries))
        return [
            PutRoute(_outcome(entry.outcome), entry.node_id, entry.tier, entry.peer_address) for entry in reply.entries
        ]

    def route_get(
        self, node_id: str, keys: Sequence[bytes], exclude: Collection[str], timeout: float
    ) -> list[GetRoute | None]:
        """See ``MasterTransport``."""
        require_keys(keys)
        fields = {"node_id": node_id, "keys": keys, "exclude_nodes": exclude}
        answer = self._call("BatchRouteGet", timeout, pb.BatchRouteGetRequest, **fields)
        reply = parse(pb.BatchRouteGetResponse, answer)
        for column in (reply.node_ref, reply.tier, reply.size):
            _same_length("BatchRouteGet", len(keys), len(column))
        nodes = [(node.node_id, node.peer_address) for node in reply.nodes]
        if any(ref > len(nodes) for ref in reply.node_ref):
            raise ProtocolError(f"BatchRouteGet at {self._address} refers to nodes that it does not name")
        return [
            GetRoute(nodes[ref - 1][0], tier, size, nodes[ref - 1][1]) if ref else None
            for ref, tier, size in zip(reply.node_ref, reply.tier, reply.size, strict=True)
        ]

    def lookup(self, keys: Sequence[bytes], timeout: float) -> list[bool]:
        """See ``MasterTransport``."""
        require_keys(keys)
        reply = parse(pb.BatchLookupResponse, self._call("BatchLookup", timeout, pb.BatchLookupRequest, keys=keys))
        _same_length("BatchLookup", len(keys), len(reply.found))
        return list(reply.found)

    def report(self, node_id: str, hashes: Sequence[bytes], tier: int, timeout: float) -> bool:
        """See ``MasterTransport``.  Always true; no hashes are no call."""
        return self._tell("ReportExternalKvBlocks", pb.ReportExternalKvBlocksRequest, node_id, hashes, tier, timeout)

    def revoke(self, node_id: str, hashes: Sequence[bytes], tier: int, timeout: float) -> None:
        """See ``MasterTransport``.  No hashes are no call."""
        self._tell("RevokeExternalKvBlocks", pb.RevokeExternalKvBlocksRequest, node_id, hashes, tier, timeout)

    def clear_tier(self, node_id: str, tier: int, timeout: float) -> None:
        """See ``MasterTransport``."""
        request = pb.RevokeAllExternalKvBlocksAtTierRequest
        self._call("RevokeAllExternalKvBlocksAtTier", timeout, request, node_id=node_id, tier=tier)

    def clear_node(self, node_id: str, timeout: float) -> None:
        """See ``MasterTransport``."""
        request = pb.RevokeAllExternalKvBlocksForNodeRequest
        self._call("RevokeAllExternalKvBlocksForNode", timeout, request, node_id=node_id)

    def match(self, hashes: Sequence[bytes], count_as_hit: bool, timeout: float) -> list[ExternalMatch]:
        """See ``MasterTransport``."""
        require_keys(hashes)
        fields = {"hashes": hashes, "count_as_hit": count_as_hit}
        return read_matches(self._call("MatchExternalKv", timeout, pb.MatchExternalKvRequest, **fields))

    def hit_counts(self, hashes: Sequence[bytes], timeout: float) -> list[tuple[bytes, int]]:
        """See ``MasterTransport``."""
        require_keys(hashes)
        answer = self._call("GetExternalKvHitCounts", timeout, pb.GetExternalKvHitCountsRequest, hashes=hashes)
        reply = parse(pb.GetExternalKvHitCountsResponse, answer)
        return [(entry.hash, entry.hit_count_total) for entry in reply.entries]

    def report_metrics(self, node_id: str, samples: Sequence[MetricSample], timeout: float) -> None:
        """See ``MasterTransport``."""
        self._call("ReportMetrics", timeout, convert.metrics_message, node_id=node_id, samples=samples)

    def _tell(
        self, name: str, message_class: MessageClass, node_id: str, hashes: Sequence[bytes], tier: int, timeout: float
    ) -> bool:
        if hashes:
            require_keys(hashes)
            self._call(name, timeout, message_class, node_id=node_id, hashes=hashes, tier=tier)
        return True

    def _call(self, name: str, timeout: float, build: Callable[..., Message], **fields: Any) -> bytes:
        """Send the request that ``build`` makes of ``fields``, and return the answer's bytes."""
        try:
            payload = build(**fields).SerializeToString()
        except ValueError as error:  # numbers that a field has no room for, and strings that are no Unicode
            raise InvalidRequest(f"{name} cannot be said on UMBP's wire: {error}") from None
        call = self._calls.get(name)
        try:
            if call is None:
                call = self._calls[name] = self._channel.unary_unary(f"/{pb.MASTER_SERVICE}/{name}")
            answer: bytes = call(payload, timeout=timeout, metadata=self._metadata)
        except grpc.RpcError as error:
            raise wire.error_of(error.code(), error.details() or "", name, self._address) from None
        except ValueError as error:  # grpc's word for a channel that was closed
            raise MasterUnavailable(f"{name} at {self._address}: {error}; connect again") from None
        return answer


def require_keys(keys: Sequence[bytes]) -> None:
    """Raises ``InvalidRequest`` for hashes or keys that this wire cannot carry."""
    try:
        require_utf8(keys)
    except ProtocolError as error:
        raise InvalidRequest(str(error)) from None


def _same_length(call: str, asked: int, answered: int) -> None:
    if asked != answered:
        raise ProtocolError(f"{call} of {asked} keys was answered for {answered}; the master speaks another version")


def _status(number: int) -> NodeStatus:
    """An open enumeration: whatever is not known asks for a registration, as UMBP's client reads it."""
    return NodeStatus(number) if number in NodeStatus._value2member_map_ else NodeStatus.UNKNOWN


def _outcome(number: int) -> PutOutcome:
    return PutOutcome(number) if number in PutOutcome._value2member_map_ else PutOutcome.UNAVAILABLE
