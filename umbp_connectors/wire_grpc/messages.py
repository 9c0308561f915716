"""The messages of UMBP's wire, as classes of whatever protobuf runtime is there.

Hashes and keys are strings in the ``.proto`` and ``bytes`` here: on the wire the two are the same, and inside this
project they are bytes.  That saves a decoding and an encoding per hash, which is more than half of what a message costs
(2048 hashes: 151 us as strings, 70 as bytes).  Whoever reads a message checks the encoding once, with
:func:`~umbp_connectors.wire_grpc.codec.require_utf8`.
"""

from __future__ import annotations

from typing import Any, TypeAlias

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

from umbp_connectors.wire_grpc.descriptors import FILE_DESCRIPTOR_SET

Message: TypeAlias = Any
"""A message.  Its fields are those of the ``.proto``, which no type checker sees."""
MessageClass: TypeAlias = Any

PACKAGE = "umbp"
MASTER_SERVICE = "umbp.UMBPMaster"
PEER_SERVICE = "umbp.UMBPPeer"
BYTE_FIELDS = frozenset({"hash", "hashes", "key", "keys", "hashes_by_tier"})
"""Fields that are bytes in the classes of this module: hashes, keys, and the buckets of a match, whose messages
(``TierHashes``) are read one by one, because many of them are the same."""


def files() -> list[Any]:
    """The ``FileDescriptorProto`` of each file, as the ``.proto`` says, hashes and keys being strings."""
    return list(descriptor_pb2.FileDescriptorSet.FromString(FILE_DESCRIPTOR_SET).file)


def description_of(file: Any) -> Any:
    """The ``FileDescriptorProto`` of a file that a generated module brings along (its ``DESCRIPTOR``)."""
    description = descriptor_pb2.FileDescriptorProto()
    file.CopyToProto(description)
    return description


def pool_of(descriptors: list[Any]) -> Any:
    """A descriptor pool of its own with ``descriptors``, which come after what they import."""
    pool = descriptor_pool.DescriptorPool()
    for descriptor in descriptors:
        pool.AddSerializedFile(descriptor.SerializeToString())
    return pool


def _with_bytes(descriptors: list[Any]) -> list[Any]:
    for descriptor in descriptors:
        for message in descriptor.message_type:
            for field in message.field:
                if field.name in BYTE_FIELDS:
                    field.type = field.TYPE_BYTES
                    field.ClearField("type_name")
    return descriptors


_POOL = pool_of(_with_bytes(files()))


def _message(name: str) -> MessageClass:
    return message_factory.GetMessageClass(_POOL.FindMessageTypeByName(f"{PACKAGE}.{name}"))


BatchLookupRequest = _message("BatchLookupRequest")
BatchLookupResponse = _message("BatchLookupResponse")
BatchRouteGetRequest = _message("BatchRouteGetRequest")
BatchRouteGetResponse = _message("BatchRouteGetResponse")
BatchRoutePutEntry = _message("BatchRoutePutEntry")
BatchRoutePutRequest = _message("BatchRoutePutRequest")
BatchRoutePutResponse = _message("BatchRoutePutResponse")
EventBundle = _message("EventBundle")
EvictKeyRequest = _message("EvictKeyRequest")
EvictKeyResponse = _message("EvictKeyResponse")
GetExternalKvHitCountsRequest = _message("GetExternalKvHitCountsRequest")
GetExternalKvHitCountsResponse = _message("GetExternalKvHitCountsResponse")
HeartbeatRequest = _message("HeartbeatRequest")
HeartbeatResponse = _message("HeartbeatResponse")
HistogramAggregate = _message("HistogramAggregate")
HitCountEntry = _message("HitCountEntry")
KvEvent = _message("KvEvent")
MatchExternalKvRequest = _message("MatchExternalKvRequest")
MatchExternalKvResponse = _message("MatchExternalKvResponse")
MetricLabel = _message("MetricLabel")
MetricSample = _message("MetricSample")
NodeInfo = _message("NodeInfo")
RegisterClientRequest = _message("RegisterClientRequest")
RegisterClientResponse = _message("RegisterClientResponse")
ReportExternalKvBlocksRequest = _message("ReportExternalKvBlocksRequest")
ReportMetricsRequest = _message("ReportMetricsRequest")
RevokeAllExternalKvBlocksAtTierRequest = _message("RevokeAllExternalKvBlocksAtTierRequest")
RevokeAllExternalKvBlocksForNodeRequest = _message("RevokeAllExternalKvBlocksForNodeRequest")
RevokeExternalKvBlocksRequest = _message("RevokeExternalKvBlocksRequest")
RouteGetRequest = _message("RouteGetRequest")
RouteGetResponse = _message("RouteGetResponse")
RoutePutRequest = _message("RoutePutRequest")
RoutePutResponse = _message("RoutePutResponse")
TierCapacity = _message("TierCapacity")
TierHashes = _message("TierHashes")
TierKvCount = _message("TierKvCount")
UnregisterClientRequest = _message("UnregisterClientRequest")
