"""The metrics of a store: their names and what they mean.  Imports nothing of an engine, for the documentation."""

from __future__ import annotations

from dataclasses import dataclass

from umbp_connectors.reporting.stats import REPORT_METRICS, ReportMetric


@dataclass(frozen=True, slots=True)
class MetricDoc:
    """Name as on the page (counters with their ``_total``), type, labels and meaning of one metric."""

    name: str
    kind: str
    labels: tuple[str, ...]
    help: str


def counter_of(metric: ReportMetric) -> str:
    """The name of one of the reporter's counters among ours."""
    return f"umbp_sglang_{metric.name}_total"


METRICS = (
    MetricDoc("umbp_sglang_lookups_total", "counter", (), "Chains of pages that SGLang asked for."),
    MetricDoc("umbp_sglang_lookup_pages_total", "counter", (), "Pages in these chains."),
    MetricDoc("umbp_sglang_hit_pages_total", "counter", (), "Leading pages of these chains that could be restored."),
    MetricDoc("umbp_sglang_pages_total", "counter", ("direction", "pool", "result"), "Pages of gets and puts."),
    MetricDoc("umbp_sglang_bytes_total", "counter", ("direction", "pool"), "Bytes of the pages that were moved."),
    MetricDoc("umbp_sglang_call_seconds", "histogram", ("direction", "pool"), "Time that one get or put took."),
    MetricDoc(
        "umbp_sglang_refused_pages_total",
        "counter",
        ("pool", "policy"),
        "Times that an offload policy kept a page out of SSD.",
    ),
    MetricDoc(
        "umbp_sglang_ssd_total",
        "counter",
        ("pool", "event"),
        "What happened on the way to and from SSD, in pools of this process.",
    ),
    MetricDoc("umbp_sglang_degraded_total", "counter", ("reason",), "Calls that gave up a part of their service."),
    MetricDoc("umbp_sglang_tier_used_bytes", "gauge", ("pool", "tier"), "Bytes of a tier that hold pages."),
    MetricDoc("umbp_sglang_tier_capacity_bytes", "gauge", ("pool", "tier"), "Bytes of a tier."),
    *(MetricDoc(counter_of(metric), "counter", metric.labels, metric.help) for metric in REPORT_METRICS),
    MetricDoc(
        "umbp_sglang_report_untold_pages",
        "gauge",
        (),
        "Pages in L3 that the master is not told, since it is not known what the event stream calls them.",
    ),
)
"""Every metric of a store; ``docs/metrics.md`` has this table."""
