"""A master's metrics: every name of the original, what nodes report, bounds, escaping, and nothing of dead nodes."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from umbp_connectors.master import metrics_nodes
from umbp_connectors.master.metrics import MAX_STRANGERS, MasterMetrics, StoreStats
from umbp_connectors.master.metrics_families import FAMILIES, PREFIX, REDIS_ONLY, Histogram
from umbp_connectors.master.metrics_text import render
from umbp_core.master.model import NodeInfo, NodeStatus, TierCapacity
from umbp_core.master.samples import CounterDelta, GaugeValue, HistogramDelta, MetricSample

Sample = tuple[str, tuple[tuple[str, str], ...]]


def node(node_id: str = "n1", **changes: object) -> NodeInfo:
    values: dict[str, object] = {
        "status": NodeStatus.ALIVE,
        "node_address": "10.0.0.1",
        "peer_address": "10.0.0.1:17000",
        "tags": ("sgl_role=decode", "no-value", "bad-name=x"),
        "incarnation": 0,
        "capacities": (TierCapacity(2, 100, 25), TierCapacity(3, 0, 0)),
        "last_heartbeat_age": 0.0,
        "external_counts": {1: 7, 2: 9},
        "block_counts": {2: 3, 3: 4},
    }
    return NodeInfo(node_id, **(values | changes))  # type: ignore[arg-type]


def page(metrics: MasterMetrics, *nodes: NodeInfo, store: StoreStats | None = None) -> dict[Sample, float]:
    text = render(metrics.snapshot(nodes, store)).decode()
    found: dict[Sample, float] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if sample.name.startswith(PREFIX):
                key = (sample.name.removeprefix(PREFIX), tuple(sorted(sample.labels.items())))
                assert key not in found, "a series twice"
                found[key] = sample.value
    return found


def at(name: str, **labels: str) -> Sample:
    return name, tuple(sorted(labels.items()))


def test_reports_and_revokes() -> None:
    metrics = MasterMetrics()
    metrics.reported("n1", 1, 5, True)
    metrics.reported("n1", 1, 6, True)
    metrics.reported("ghost", 2, 7, False)
    metrics.revoked("n1", 1, 3)
    metrics.revoked("n1", 2, None)
    metrics.revoked("n1", None, None)
    found = page(metrics)
    assert found[at("external_kv_report_total", node="n1", tier="HBM", result="ok")] == 2
    assert found[at("external_kv_report_blocks_total", node="n1", tier="HBM")] == 11
    assert found[at("external_kv_report_total", node="ghost", tier="DRAM", result="rejected_not_alive")] == 1
    assert at("external_kv_report_blocks_total", node="ghost", tier="DRAM") not in found
    assert found[at("external_kv_revoke_total", node="n1", tier="HBM", result="ok")] == 1
    assert found[at("external_kv_revoke_blocks_total", node="n1", tier="HBM")] == 3
    assert found[at("external_kv_revoke_total", node="n1", tier="DRAM", result="ok")] == 1
    assert found[at("external_kv_revoke_total", node="n1", tier="ALL", result="ok")] == 1
    assert at("external_kv_revoke_blocks_total", node="n1", tier="DRAM") not in found


def test_large_numbers_have_all_their_digits() -> None:
    """The original's have six."""
    metrics = MasterMetrics()
    metrics.reported("n1", 1, 123_456_789, True)
    metrics.metrics_reported("n1", (), [MetricSample("seen_total", CounterDelta(987_654_321))])
    found = page(metrics, node("n1", tags=(), capacities=(TierCapacity(2, 1_099_511_627_777, 1),)))
    assert found[at("external_kv_report_blocks_total", node="n1", tier="HBM")] == 123_456_789
    assert found[at("seen_total", node="n1")] == 987_654_321
    assert found[at("client_capacity_total_bytes", node="n1", tier="DRAM")] == 1_099_511_627_777


def test_matches_routes_and_heartbeats() -> None:
    metrics = MasterMetrics()
    metrics.matched(10, 4)
    metrics.matched(1, 0)
    for call in ("route_put", "route_get", "batch_route_put", "batch_route_get", "lookup"):
        metrics.routed(call, "n1")
    metrics.routed("batch_route_get", "n1", 4)
    metrics.heartbeat("n1", 3, False)
    metrics.heartbeat("n1", 2, True)
    found = page(metrics)
    assert found[at("external_kv_match_total")] == 2
    assert found[at("external_kv_match_queried_blocks_total")] == 11
    assert found[at("external_kv_match_matched_blocks_total")] == 4
    assert found[at("client_route_put_total", node="n1")] == 1
    assert found[at("client_route_get_total", node="n1")] == 1
    assert found[at("client_batch_route_put_total", node="n1")] == 1
    assert found[at("client_batch_route_get_total", node="n1")] == 5
    assert found[at("client_lookup_total", node="n1")] == 1
    assert found[at("heartbeat_events_applied_total", node="n1")] == 5
    assert found[at("heartbeat_seq_gap_total", node="n1")] == 1


def test_gauges_of_nodes_are_those_of_this_moment() -> None:
    metrics = MasterMetrics()
    found = page(metrics, node(), node("dead", status=NodeStatus.EXPIRED))
    assert found[at("client_count")] == 1
    assert found[at("client_capacity_total_bytes", node="n1", tier="DRAM")] == 100
    assert found[at("client_capacity_available_bytes", node="n1", tier="DRAM")] == 25
    assert found[at("client_capacity_used_bytes", node="n1", tier="DRAM")] == 75
    assert found[at("client_capacity_utilization_ratio", node="n1", tier="DRAM")] == 0.75
    assert found[at("client_capacity_utilization_ratio", node="n1", tier="SSD")] == 0
    assert found[at("client_kv_live_count", node="n1", tier="SSD", sgl_role="decode")] == 4
    assert found[at("client_kv_live_count_total", node="n1", sgl_role="decode")] == 7
    assert found[at("external_kv_live_count", node="n1", tier="HBM", sgl_role="decode")] == 7
    assert not [key for key in found if ("node", "dead") in key[1]]
    assert page(metrics)[at("client_count")] == 0


def test_tiers_without_a_name_share_a_label() -> None:
    metrics = MasterMetrics()
    for tier in range(4, 100):
        metrics.reported("n1", tier, 1, True)
    strange = node(capacities=(TierCapacity(7, 10, 1), TierCapacity(8, 10, 2)), external_counts={7: 1, 8: 2})
    found = page(metrics, strange)
    assert found[at("external_kv_report_blocks_total", node="n1", tier="OTHER")] == 96
    assert found[at("client_capacity_used_bytes", node="n1", tier="OTHER")] == 17
    assert found[at("external_kv_live_count", node="n1", tier="OTHER", sgl_role="decode")] == 3


def test_calls_have_a_latency_histogram_per_protocol() -> None:
    metrics = MasterMetrics()
    for seconds in (0.00001, 0.00003, 0.3, 60.0):
        metrics.call_finished("native", "match", "OK", seconds)
    metrics.call_finished("grpc", "MatchExternalKv", "INVALID_ARGUMENT", 0.001)
    found = page(metrics)
    native = {"protocol": "native", "call": "match", "code": "OK"}
    assert found[at("master_call_latency_seconds_bucket", le="1e-05", **native)] == 1
    assert found[at("master_call_latency_seconds_bucket", le="5e-05", **native)] == 2
    assert found[at("master_call_latency_seconds_bucket", le="0.5", **native)] == 3
    assert found[at("master_call_latency_seconds_bucket", le="+Inf", **native)] == 4
    assert found[at("master_call_latency_seconds_count", **native)] == 4
    assert found[at("master_call_latency_seconds_sum", **native)] == pytest.approx(60.30004)
    grpc = {"protocol": "grpc", "call": "MatchExternalKv", "code": "INVALID_ARGUMENT"}
    assert found[at("master_call_latency_seconds_count", **grpc)] == 1


@pytest.mark.parametrize("expires", [True, False])
def test_series_of_a_dead_node_are_removed(expires: bool) -> None:
    metrics = MasterMetrics()
    metrics.node_changed(node())
    metrics.reported("n1", 1, 5, True)
    metrics.heartbeat("n1", 1, False)
    metrics.metrics_reported("n1", ("a=b",), [MetricSample("x_total", CounterDelta(1))])
    assert [key for key in page(metrics) if ("node", "n1") in key[1]]
    if expires:
        metrics.node_changed(node(status=NodeStatus.EXPIRED))
    else:
        metrics.node_gone("n1")
    found = page(metrics)
    assert not [key for key in found if ("node", "n1") in key[1]]
    assert "x_total" not in {name for name, _ in found}


def test_nodes_that_never_registered_are_bounded() -> None:
    metrics = MasterMetrics()
    metrics.node_changed(node("real"))
    metrics.reported("real", 1, 1, True)
    for number in range(MAX_STRANGERS + 50):
        metrics.reported(f"ghost-{number}", 1, 1, False)
    nodes = {dict(labels)["node"] for name, labels in page(metrics) if name == "external_kv_report_total"}
    assert len(nodes) == MAX_STRANGERS + 1
    assert {"real", f"ghost-{MAX_STRANGERS + 49}"} <= nodes
    assert "ghost-0" not in nodes


def test_samples_of_nodes_are_merged() -> None:
    metrics = MasterMetrics()
    traffic = (("traffic", "local"),)
    samples = [
        MetricSample("client_outbound_put_bytes_total", CounterDelta(10.0), "Bytes.", traffic),
        MetricSample("ssd_staging_slots_in_use", GaugeValue(3.0)),
        MetricSample("bandwidth", HistogramDelta((1.0, 5.0, 10.0), (0, 1, 1), 2, 30.5), "", traffic),
    ]
    metrics.metrics_reported("n1", ("sgl_role=decode", "plain"), samples)
    metrics.metrics_reported("n1", ("sgl_role=decode", "plain"), samples)
    metrics.metrics_reported("n2", (), samples[:1])
    found = page(metrics)
    mine = {"node": "n1", "sgl_role": "decode"}
    assert found[at("client_outbound_put_bytes_total", traffic="local", **mine)] == 20
    assert found[at("client_outbound_put_bytes_total", traffic="local", node="n2")] == 10
    assert found[at("ssd_staging_slots_in_use", **mine)] == 3
    assert [found[at("bandwidth_bucket", le=le, traffic="local", **mine)] for le in ("1.0", "5.0", "10.0", "+Inf")] == [
        0,
        2,
        2,
        4,
    ]
    assert found[at("bandwidth_count", traffic="local", **mine)] == 4
    assert found[at("bandwidth_sum", traffic="local", **mine)] == 61


def test_a_name_with_the_prefix_gets_no_second_one() -> None:
    metrics = MasterMetrics()
    metrics.metrics_reported(
        "n1", (), [MetricSample("mori_umbp_x_total", CounterDelta(1)), MetricSample("y", GaugeValue(2))]
    )
    found = page(metrics)
    assert found[at("x_total", node="n1")] == 1
    assert found[at("y", node="n1")] == 2


HOSTILE = [
    ("invalid", MetricSample("a b", CounterDelta(1))),
    ("invalid", MetricSample("", CounterDelta(1))),
    ("invalid", MetricSample("x_total", CounterDelta(-1))),
    ("invalid", MetricSample("x_total", CounterDelta(math.nan))),
    ("invalid", MetricSample("x_total", CounterDelta(math.inf))),
    ("invalid", MetricSample("x", GaugeValue(1), labels=(("node", "other"),))),
    ("invalid", MetricSample("x", GaugeValue(1), labels=(("__x", ""),))),
    ("invalid", MetricSample("x", GaugeValue(1), labels=(("a-b", ""),))),
    ("invalid", MetricSample("x", GaugeValue(1), labels=(("a", "1"), ("a", "2")))),
    ("invalid", MetricSample("x", GaugeValue(1), labels=(("a", "v" * 1000),))),
    ("invalid", MetricSample("x", GaugeValue(1), labels=tuple((f"l{i}", "") for i in range(33)))),
    ("invalid", MetricSample("h", HistogramDelta((1.0,), (1, 2), 2, 0.0))),
    ("invalid", MetricSample("h", HistogramDelta((2.0, 1.0), (1, 2), 2, 0.0))),
    ("invalid", MetricSample("h", HistogramDelta((1.0, 2.0), (2, 1), 2, 0.0))),
    ("invalid", MetricSample("h", HistogramDelta((1.0,), (3,), 2, 0.0))),
    ("invalid", MetricSample("h", HistogramDelta((1.0,), (-1,), 2, 0.0))),
    ("invalid", MetricSample("h", HistogramDelta(tuple(map(float, range(65))), (0,) * 65, 0, 0.0))),
    ("conflict", MetricSample("client_count", GaugeValue(7))),
    ("conflict", MetricSample("external_kv_report_total", CounterDelta(1))),
    ("conflict", MetricSample("master_call_latency_seconds_sum", GaugeValue(1))),
    ("conflict", MetricSample("taken_total", GaugeValue(1))),
    ("conflict", MetricSample("buckets", HistogramDelta((2.0,), (1,), 1, 1.0))),
    ("conflict", MetricSample("buckets_count", GaugeValue(1))),
]


@pytest.mark.parametrize(("reason", "sample"), HOSTILE)
def test_what_cannot_be_served_is_refused_and_counted(reason: str, sample: MetricSample) -> None:
    metrics = MasterMetrics()
    good = [
        MetricSample("taken_total", CounterDelta(1)),
        MetricSample("buckets", HistogramDelta((1.0,), (1,), 1, 1.0)),
    ]
    metrics.metrics_reported("n1", (), [*good, sample])
    metrics.metrics_reported("n2", (), [sample] if reason == "invalid" else [])
    found = page(metrics)
    assert found[at("master_metrics_rejected_total", reason=reason)] == (2 if reason == "invalid" else 1)
    assert found[at("taken_total", node="n1")] == 1
    assert found[at("client_count")] == 0


def test_series_are_bounded_per_node_and_in_all() -> None:
    reported = metrics_nodes.ReportedMetrics(max_series=15, max_series_per_node=10)
    samples = [MetricSample("x_total", CounterDelta(1), labels=(("i", str(i)),)) for i in range(12)]
    reported.add("n1", (), samples)
    reported.add("n2", (), samples)
    assert reported.rejected == {"bound": 2 + 7}
    assert len(reported.snapshot().families()[0].series) == 15
    reported.forget("n1")
    reported.add("n3", (), samples)
    assert len(reported.snapshot().families()[0].series) == 15
    for name in ("n2", "n3"):
        reported.forget(name)
    assert reported.snapshot().families() == []
    reported.add("n4", (), [MetricSample("x_total_", GaugeValue(1)), MetricSample("x_total", GaugeValue(1))])
    assert [family.kind for family in reported.snapshot().families()] == ["gauge", "gauge"], (
        "a name is free when its series are"
    )


@given(st.text(max_size=40), st.text(max_size=40))
def test_any_text_survives_as_a_label(node_id: str, value: str) -> None:
    metrics = MasterMetrics()
    metrics.reported(node_id, 1, 1, True)
    metrics.metrics_reported(node_id, (), [MetricSample("x", GaugeValue(1), labels=(("v", value),))])
    text = render(metrics.snapshot((), None)).decode()
    found = [sample.labels for f in text_string_to_metric_families(text) for sample in f.samples]
    # The parser strips nothing, but reads a line end in what is no line end to Prometheus.
    if not {"\r", "\x0b", "\x0c", "\x1c", "\x1d", "\x1e", "\x85", "\u2028", "\u2029"} & set(node_id + value):
        assert {"node": node_id, "v": value} in found
    else:
        assert found


def test_a_snapshot_does_not_change_any_more() -> None:
    metrics = MasterMetrics()
    samples = [MetricSample("h", HistogramDelta((1.0,), (1,), 1, 1.0)), MetricSample("x_total", CounterDelta(1))]

    def count() -> None:
        metrics.metrics_reported("n1", (), samples)
        metrics.call_finished("grpc", "Heartbeat", "OK", 0.1)
        metrics.reported("n1", 1, 1, True)
        metrics.matched(1, 1)

    count()
    snapshot = metrics.snapshot((), None)
    before = [line for line in render(snapshot).splitlines() if line.startswith(b"mori_umbp_")]
    count()
    metrics.node_gone("n1")
    assert [line for line in render(snapshot).splitlines() if line.startswith(b"mori_umbp_")] == before


def test_store_and_redis() -> None:
    writes = Histogram()
    writes.observe(0.004)
    metrics = MasterMetrics()
    found = page(metrics, store=StoreStats("sqlite", {"write": writes}, 3))
    assert found[at("store_op_latency_seconds_count", op="write", backend="sqlite")] == 1
    assert found[at("store_errors_total", backend="sqlite")] == 3
    assert not [name for name, _ in found if name.startswith("redis_")]
    found = page(metrics, store=StoreStats("redis", {"write": writes}, 3))
    assert found[at("redis_transport_errors_total")] == 3
    names = {name for name, _ in found}
    for family in REDIS_ONLY:
        assert (family.name if family.kind != "histogram" else f"{family.name}_count") in names


def test_every_family_occurs_once_and_is_explained() -> None:
    assert len({family.name for family in FAMILIES}) == len(FAMILIES)
    for family in FAMILIES:
        assert family.help.endswith(".") or family.help.endswith(")")
        assert (family.kind == "counter") <= family.name.endswith("_total")


def test_page_says_type_and_help_and_the_process() -> None:
    metrics = MasterMetrics()
    metrics.reported('we"ird\\\n', 1, 1, True)
    text = render(metrics.snapshot((), None)).decode()
    assert "# TYPE mori_umbp_external_kv_report_total counter" in text
    assert "# TYPE mori_umbp_client_count gauge" in text
    assert r'node="we\"ird\\\n"' in text
    assert "process_resident_memory_bytes" in text
