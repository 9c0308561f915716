"""The wire itself: names and numbers never change, and what is generated is what the .proto files say."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.master.grpc.harness import message, methods
from umbp_connectors.wire_grpc import messages as pb

ROOT = Path(__file__).resolve().parents[3]

WIRE = """
TierCapacity            tier=1 total_capacity_bytes=2:u64 available_capacity_bytes=3:u64
PageLocation            buffer_index=1:u32 page_index=2:u32
BufferMemoryDesc        buffer_index=1:u32 desc=2:bytes
RegisterClientRequest   node_id=1 node_address=2 tier_capacities=3[] peer_address=4 engine_desc=5:bytes tags=13[]
RegisterClientResponse  heartbeat_interval_ms=1:u64 ack_seq=2:u64
UnregisterClientRequest node_id=1
UnregisterClientResponse
KvEvent                 kind=1 key=2 tier=3 size=4:u64
EventBundle             seq=1:u64 events=2[]
TierKvCount             tier=1 count=2:u64
HeartbeatRequest        node_id=1 bundles=2[] is_full_sync=3 tier_capacities=4[] delta_seq_baseline=6:u64 \
                        tier_kv_counts=7[]
HeartbeatResponse       status=1 acked_seq=2:u64 request_full_sync=3
RoutePutRequest         key=1 node_id=2 block_size=3:u64 exclude_nodes=4[]
RoutePutResponse        outcome=1 node_id=2 tier=3 peer_address=4
RouteGetRequest         key=1 node_id=2 exclude_nodes=3[]
RouteGetResponse        found=1 node_id=2 tier=3 size=4:u64 peer_address=5
BatchRoutePutRequest    node_id=1 keys=2[] block_sizes=3[]:u64 exclude_nodes=4[]
BatchRoutePutEntry      outcome=1 node_id=2 tier=3 peer_address=4
BatchRoutePutResponse   entries=1[]
BatchRouteGetRequest    node_id=1 keys=2[] exclude_nodes=3[]
NodeInfo                node_id=1 peer_address=2
BatchRouteGetResponse   nodes=1[] node_ref=2[]:u32 tier=3[] size=4[]:u64
BatchLookupRequest      node_id=1 keys=2[]
BatchLookupResponse     found=1[]
MetricLabel             name=1 value=2
HistogramAggregate      bounds=1[]:double bucket_counts=2[]:u64 count=3:u64 sum=4:double
MetricSample            name=1 help=2 labels=3[] counter_delta=4:double gauge_value=5:double histogram_aggregate=6
ReportMetricsRequest    node_id=1 metrics=2[]
ReportMetricsResponse
ReportExternalKvBlocksRequest           node_id=1 hashes=2[] tier=3
RevokeExternalKvBlocksRequest           node_id=1 hashes=2[] tier=3
RevokeAllExternalKvBlocksAtTierRequest  node_id=1 tier=2
RevokeAllExternalKvBlocksForNodeRequest node_id=1
MatchExternalKvRequest  hashes=1[] count_as_hit=2
TierHashes              tier=1 hashes=2[]
ExternalKvNodeMatch     node_id=1 peer_address=2 hashes_by_tier=3[]
MatchExternalKvResponse matches=1[]
HitCountEntry           hash=1 hit_count_total=2:u64
GetExternalKvHitCountsRequest hashes=1[]
GetExternalKvHitCountsResponse entries=1[]
EvictKeyRequest         keys=1[]
EvictedKey              key=1 bytes_freed=2:u64
EvictKeyResponse        evicted=1[]
"""
"""UMBP's messages as its master had them when this was written; not to be edited to make a test pass."""

STRINGS = {
    "node_id", "node_address", "peer_address", "tags", "key", "keys", "hash", "hashes", "exclude_nodes", "name",
    "value", "help",
}  # fmt: skip
BOOLS = {"is_full_sync", "request_full_sync", "found", "count_as_hit"}
ENUMS = {"tier", "kind", "status", "outcome"}
LEFT_FREE = {
    "TierCapacity": {4}, "RegisterClientRequest": {14}, "RegisterClientResponse": {3, 4}, "KvEvent": {5},
    "HeartbeatRequest": {8}, "RoutePutResponse": {5}, "RouteGetResponse": {6}, "BatchRoutePutEntry": {5},
    "BatchRouteGetResponse": {5}, "BufferMemoryDesc": {3},
}  # fmt: skip
TYPES = {"u64": "TYPE_UINT64", "u32": "TYPE_UINT32", "bytes": "TYPE_BYTES", "double": "TYPE_DOUBLE"}


def type_of(name: str, given: str) -> str:
    if given:
        return TYPES[given]
    for names, kind in ((STRINGS, "TYPE_STRING"), (BOOLS, "TYPE_BOOL"), (ENUMS, "TYPE_ENUM")):
        if name in names:
            return kind
    return "TYPE_MESSAGE"


@pytest.mark.parametrize("line", WIRE.strip().splitlines(), ids=lambda line: line.split()[0])
def test_messages_have_the_names_numbers_and_types_of_the_wire(line: str) -> None:
    name, *parts = line.split()
    expected = {}
    for part in parts:
        field, number, repeated, kind = re.fullmatch(r"(\w+)=(\d+)(\[\])?(?::(\w+))?", part).groups()  # type: ignore[union-attr]
        expected[field] = (int(number), bool(repeated), type_of(field, kind or ""))
    (description,) = [message for file in pb.files() for message in file.message_type if message.name == name]
    found = {
        field.name: (
            field.number,
            field.label == field.LABEL_REPEATED,
            type(field).DESCRIPTOR.fields_by_name["type"].enum_type.values_by_number[field.type].name,
        )
        for field in description.field
    }
    assert found == expected
    free = {number for part in description.reserved_range for number in range(part.start, part.end)}
    assert LEFT_FREE.get(name, set()) <= free


def test_there_is_nothing_else_on_the_wire() -> None:
    """What is new is in the native protocol."""
    messages = {message.name for file in pb.files() for message in file.message_type}
    assert messages == {line.split()[0] for line in WIRE.strip().splitlines()} | {
        f"{method.name}Response" for method in methods() if method.name.startswith(("Report", "Revoke"))
    }
    assert {service.name for file in pb.files() for service in file.service} == {"UMBPMaster", "UMBPPeer"}


def test_metric_values_are_a_oneof() -> None:
    assert [field.name for field in message("MetricSample").DESCRIPTOR.oneofs_by_name["value"].fields] == [
        "counter_delta",
        "gauge_value",
        "histogram_aggregate",
    ]


def test_calls_have_the_names_and_messages_of_the_wire() -> None:
    names = {
        "RegisterClient", "UnregisterClient", "Heartbeat", "RouteGet", "RoutePut", "BatchRoutePut", "BatchRouteGet",
        "BatchLookup", "ReportExternalKvBlocks", "RevokeExternalKvBlocks", "RevokeAllExternalKvBlocksAtTier",
        "RevokeAllExternalKvBlocksForNode", "MatchExternalKv", "GetExternalKvHitCounts", "ReportMetrics",
    }  # fmt: skip
    assert {method.full_name for method in methods()} == {f"umbp.UMBPMaster.{name}" for name in names}
    for method in methods():
        assert method.input_type.name == f"{method.name}Request"
        assert method.output_type.name == f"{method.name}Response"
        assert not method.client_streaming
        assert not method.server_streaming


def test_enumerations_have_the_numbers_of_the_wire() -> None:
    enums = {enum.name: {v.name: v.number for v in enum.value} for file in pb.files() for enum in file.enum_type}
    assert enums == {
        "TierType": {"TIER_UNKNOWN": 0, "TIER_HBM": 1, "TIER_DRAM": 2, "TIER_SSD": 3},
        "ClientStatus": {"CLIENT_STATUS_UNKNOWN": 0, "CLIENT_STATUS_ALIVE": 1, "CLIENT_STATUS_EXPIRED": 2},
        "RoutePutOutcome": {
            "ROUTE_PUT_OUTCOME_UNAVAILABLE": 0,
            "ROUTE_PUT_OUTCOME_ROUTED": 1,
            "ROUTE_PUT_OUTCOME_ALREADY_EXISTS": 2,
        },
    }
    assert dict(message("KvEvent").Kind.items()) == {"ADD": 0, "REMOVE": 1}


def test_what_is_generated_is_current() -> None:
    command = [sys.executable, str(ROOT / "scripts" / "gen_proto.py"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, "current"), done.stdout + done.stderr


def test_a_class_with_bytes_reads_what_one_with_strings_writes() -> None:
    text = message("MatchExternalKvRequest")(hashes=["a", "é"], count_as_hit=True)
    raw = pb.MatchExternalKvRequest.FromString(text.SerializeToString())
    assert (list(raw.hashes), raw.count_as_hit) == ([b"a", "é".encode()], True)
    assert raw.SerializeToString() == text.SerializeToString()


def python(code: str) -> str:
    """What ``code`` prints in a new process."""
    environment = {"PYTHONPATH": f"{ROOT}:{ROOT / 'core'}"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True, cwd=ROOT, env=environment)
    return done.stdout.strip()


@pytest.mark.parametrize("module", ["grpc", "google.protobuf"])
def test_a_missing_package_is_said_with_the_extra(module: str) -> None:
    said = python(
        f"import sys; sys.modules[{module!r}] = None\n"
        "try:\n    import umbp_connectors.client.grpc_transport\n"
        "except ImportError as error:\n    print(error)"
    )
    assert "pip install 'umbp-connectors[grpc]'" in said


def test_nothing_of_grpc_is_imported_unasked() -> None:
    modules = "umbp_connectors.client.transport, umbp_connectors.client.addresses, umbp_connectors.master.service"
    said = python(
        f"import sys, {modules}\nprint([name for name in ('grpc', 'google.protobuf') if name in sys.modules])"
    )
    assert said == "[]"
