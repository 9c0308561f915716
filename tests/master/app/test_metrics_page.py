"""``/metrics`` of a real master after real calls: every name of the original is there, with its labels."""

import re
from pathlib import Path

import grpc
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.master.app.master_process import CALL, MasterProcess
from umbp_connectors.master.metrics_families import FAMILIES, PREFIX, REDIS_ONLY, REJECTED_SAMPLES
from umbp_connectors.wire_grpc import messages as pb
from umbp_core.journal import Bundle, Delta
from umbp_core.master.model import Heartbeat, Registration, TierCapacity
from umbp_core.master.samples import CounterDelta, GaugeValue, HistogramDelta, MetricSample
from umbp_core.tiers import Tier

ROOT = Path(__file__).resolve().parents[3]

EMITTED = {
    "external_kv_report_total": {"node", "tier", "result"},
    "external_kv_report_blocks_total": {"node", "tier"},
    "external_kv_revoke_total": {"node", "tier", "result"},
    "external_kv_revoke_blocks_total": {"node", "tier"},
    "external_kv_match_total": set(),
    "external_kv_match_queried_blocks_total": set(),
    "external_kv_match_matched_blocks_total": set(),
    "external_kv_live_count": {"node", "tier", "sgl_role"},
    "client_count": set(),
    "client_capacity_total_bytes": {"node", "tier"},
    "client_capacity_available_bytes": {"node", "tier"},
    "client_capacity_used_bytes": {"node", "tier"},
    "client_capacity_utilization_ratio": {"node", "tier"},
    "client_kv_live_count": {"node", "tier", "sgl_role"},
    "client_kv_live_count_total": {"node", "sgl_role"},
    "client_route_put_total": {"node"},
    "client_route_get_total": {"node"},
    "client_batch_route_put_total": {"node"},
    "client_batch_route_get_total": {"node"},
    "client_lookup_total": {"node"},
    "heartbeat_events_applied_total": {"node"},
    "heartbeat_seq_gap_total": {"node"},
    "store_op_latency_seconds": {"op", "backend"},
}
"""What the original's master emits, or defines and never emits, with its labels."""

_COUNTERS = """
    client_outbound_put_bytes_total client_outbound_get_bytes_total client_inbound_put_bytes_total
    client_inbound_get_bytes_total master_client_rpc_errors_total master_client_metrics_dropped_total
    ssd_copy_enqueued_total ssd_copy_succeeded_total ssd_copy_failed_total ssd_copy_dropped_total ssd_copy_bytes_total
    ssd_read_total ssd_read_bytes_total ssd_eviction_rounds_total ssd_eviction_victims_total
    ssd_eviction_bytes_freed_total ssd_eviction_backend_failed_total ssd_staging_expired_reclaims_total
    ssd_staging_slot_full_rejects_total ssd_read_client_transient_total
"""
REPORTED_COUNTERS = _COUNTERS.split()
REPORTED_HISTOGRAMS = [
    "client_batch_put_bandwidth_gibps",
    "client_batch_get_bandwidth_gibps",
    "master_client_rpc_latency_seconds",
]


def samples() -> list[MetricSample]:
    """What nodes of the original report."""
    return [
        *(MetricSample(name, CounterDelta(2.0), labels=(("traffic", "local"),)) for name in REPORTED_COUNTERS),
        *(
            MetricSample(name, HistogramDelta((1.0, 5.0), (1, 2), 3, 9.0), labels=(("traffic", "local"),))
            for name in REPORTED_HISTOGRAMS
        ),
        MetricSample("ssd_staging_slots_in_use", GaugeValue(4.0)),
        MetricSample("no name", GaugeValue(4.0)),
    ]


def call_everything(master: MasterProcess) -> None:
    client = master.grpc()
    capacities = (TierCapacity(Tier.DRAM, 1000, 400), TierCapacity(Tier.HBM, 1000, 1000))
    client.register(Registration("n1", "h", "h:1", b"", capacities, ("sgl_role=decode",)), CALL)
    client.report("n1", [b"a", b"b"], Tier.HBM, CALL)
    client.report("ghost", [b"a"], Tier.HBM, CALL)
    client.revoke("n1", [b"b"], Tier.HBM, CALL)
    client.clear_tier("n1", Tier.DRAM, CALL)
    client.match([b"a", b"x"], True, CALL)
    added = Bundle(1, (Delta(b"k", Tier.DRAM, 100),))
    client.heartbeat(Heartbeat("n1", [added], counts={Tier.DRAM: 1}), CALL)
    client.heartbeat(Heartbeat("n1", [Bundle(9, added.deltas)]), CALL)
    client.route_get("n1", [b"k", b"x"], (), CALL)
    client.route_put("n1", [b"p", b"q"], [10, 10], (), CALL)
    client.report_metrics("n1", samples(), CALL)
    call_as_others_do(master)
    client.close()


def call_as_others_do(master: MasterProcess) -> None:
    """The calls that our own clients do not make, or without saying who asks."""
    with grpc.insecure_channel(master.doors["grpc"]) as channel:
        for call, request in (
            ("RouteGet", pb.RouteGetRequest(key=b"k", node_id="n1")),
            ("RoutePut", pb.RoutePutRequest(key=b"new", node_id="n1", block_size=10)),
            ("BatchLookup", pb.BatchLookupRequest(keys=[b"k", b"x"], node_id="n1")),
        ):
            channel.unary_unary(f"/umbp.UMBPMaster/{call}")(request.SerializeToString(), timeout=CALL)


@pytest.fixture(scope="module")
def labels(tmp_path_factory: pytest.TempPathFactory) -> dict[str, set[str]]:
    """Family to the names of its labels, as on the page."""
    with MasterProcess(tmp_path_factory.mktemp("master"), "--state-dir", "state") as master:
        call_everything(master)
        client = master.native()
        client.clear_node("n2", CALL)
        client.close()
        page = master.get("/metrics")[1]
        assert master.end() == 0
    found: dict[str, set[str]] = {}
    for family in text_string_to_metric_families(page):
        assert family.documentation
        for sample in family.samples:
            if sample.name.startswith(PREFIX):
                name = re.sub(r"_(bucket|sum|count)$", "", sample.name) if family.type == "histogram" else sample.name
                found.setdefault(name.removeprefix(PREFIX), set()).update(set(sample.labels) - {"le"})
    return found


@pytest.mark.parametrize("name", EMITTED)
def test_metric_of_the_original_is_there_with_its_labels(labels: dict[str, set[str]], name: str) -> None:
    assert labels[name] == EMITTED[name]


@pytest.mark.parametrize("name", [*REPORTED_COUNTERS, *REPORTED_HISTOGRAMS])
def test_metric_that_nodes_report_is_there_with_node_and_tags(labels: dict[str, set[str]], name: str) -> None:
    assert labels[name] == {"node", "sgl_role", "traffic"}


def test_the_rest_of_our_own_is_there(labels: dict[str, set[str]]) -> None:
    for family in FAMILIES:
        if family not in REDIS_ONLY:
            assert set(family.labels) <= labels[family.name], family.name
    assert labels[REJECTED_SAMPLES.name] == {"reason"}


def test_both_protocols_have_latencies(labels: dict[str, set[str]]) -> None:
    assert labels["master_call_latency_seconds"] == {"protocol", "call", "code"}


def test_values_of_real_calls(tmp_path: Path) -> None:
    with MasterProcess(tmp_path) as master:
        call_everything(master)
        page = master.get("/metrics")[1]
        assert master.end() == 0
    for line in (
        'external_kv_report_total{node="n1",result="ok",tier="HBM"} 1.0',
        'external_kv_report_total{node="ghost",result="rejected_not_alive",tier="HBM"} 1.0',
        'external_kv_report_blocks_total{node="n1",tier="HBM"} 2.0',
        'external_kv_revoke_blocks_total{node="n1",tier="HBM"} 1.0',
        'external_kv_live_count{node="n1",sgl_role="decode",tier="HBM"} 1.0',
        'client_capacity_used_bytes{node="n1",tier="DRAM"} 600.0',
        'client_kv_live_count{node="n1",sgl_role="decode",tier="DRAM"} 1.0',
        'client_batch_route_get_total{node="n1"} 1.0',
        'client_batch_route_put_total{node="n1"} 2.0',
        'client_route_get_total{node="n1"} 1.0',
        'client_route_put_total{node="n1"} 1.0',
        'client_lookup_total{node="n1"} 2.0',
        'heartbeat_events_applied_total{node="n1"} 2.0',
        'heartbeat_seq_gap_total{node="n1"} 1.0',
        "external_kv_match_queried_blocks_total 2.0",
        "external_kv_match_matched_blocks_total 1.0",
        'ssd_copy_bytes_total{node="n1",sgl_role="decode",traffic="local"} 2.0',
        'master_metrics_rejected_total{reason="invalid"} 1.0',
        "client_count 1.0",
    ):
        assert f"\nmori_umbp_{line}\n" in "\n" + re.sub(r"\{([^}]*)\}", _sorted_labels, page), line
    assert 'call="MatchExternalKv"' in page


def _sorted_labels(match: "re.Match[str]") -> str:
    return "{" + ",".join(sorted(match[1].split(","))) + "}"


def test_series_of_a_node_that_unregisters_go(tmp_path: Path) -> None:
    with MasterProcess(tmp_path) as master:
        call_everything(master)
        client = master.native()
        client.unregister("n1", CALL)
        client.close()
        page = master.get("/metrics")[1]
        assert 'node="n1"' not in page
        assert "mori_umbp_client_count 0.0" in page
        assert master.end() == 0
