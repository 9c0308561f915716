"""A snapshot of a master's metrics as Prometheus reads it; the library does the names, types and escaping."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping

from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.core import Metric
from prometheus_client.registry import Collector

from umbp_connectors._version import __version__
from umbp_connectors.master import metrics_families as families
from umbp_connectors.master.metrics import Labels, Snapshot, tier_label
from umbp_connectors.master.metrics_families import PREFIX, Family, Histogram
from umbp_connectors.master.metrics_nodes import Buckets, ReportedFamily, tag_labels
from umbp_core.master.model import NodeInfo, NodeStatus

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


def render(snapshot: Snapshot) -> bytes:
    """The page of ``snapshot``, the process's own figures at its end.  May take a while; any thread."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Frozen(snapshot))
    ProcessCollector(registry=registry)
    return generate_latest(registry)


class _Frozen(Collector):
    def __init__(self, snapshot: Snapshot) -> None:
        self._snapshot = snapshot

    def describe(self) -> Iterable[Metric]:
        """Nothing: the registry has no other collector of these names."""
        return ()

    def collect(self) -> Iterator[Metric]:
        """The master's own metrics, then those of its nodes."""
        snapshot = self._snapshot
        yield from _own(snapshot)
        yield from _nodes(snapshot.nodes)
        yield from _store(snapshot)
        yield from map(_reported, snapshot.reported.families())


def _own(snapshot: Snapshot) -> Iterator[Metric]:
    counters: dict[str, dict[Labels, float]] = defaultdict(dict, {k: dict(v) for k, v in snapshot.totals.items()})
    for node, series in snapshot.counters:
        for (name, labels), value in series.items():
            key = (node, *labels)
            counters[name][key] = value
    for family in families.FAMILIES:
        if counters.get(family.name):
            yield _plain(family, counters[family.name])
    yield _histograms(families.CALLS, snapshot.calls)
    yield _plain(families.INFO, {(__version__,): 1})


_CAPACITIES = (
    families.CAPACITY_TOTAL,
    families.CAPACITY_AVAILABLE,
    families.CAPACITY_USED,
    families.CAPACITY_RATIO,
)


def _nodes(infos: Iterable[NodeInfo]) -> Iterator[Metric]:
    """The gauges of the nodes that are alive: they are read off the state, so that nothing of a dead node is left."""
    alive = [info for info in infos if info.status is NodeStatus.ALIVE]
    yield _plain(families.CLIENTS, {(): len(alive)})
    capacities = {family.name: _metric(family) for family in _CAPACITIES}
    live, total, external = map(_metric, (families.KV_LIVE, families.KV_LIVE_TOTAL, families.EXTERNAL_LIVE))
    for info in alive:
        node = {"node": info.node_id}
        for tier, (size, available) in _capacities(info).items():
            values = (size, available, size - available, (size - available) / size if size else 0.0)
            for family, value in zip(_CAPACITIES, values, strict=True):
                capacities[family.name].add_sample(PREFIX + family.name, node | {"tier": tier}, value)
        tagged = dict(tag_labels(info.tags)) | node
        for tier, count in _by_label(info.block_counts).items():
            live.add_sample(live.name, tagged | {"tier": tier}, count)
        total.add_sample(total.name, tagged, sum(info.block_counts.values()))
        for tier, count in _by_label(info.external_counts).items():
            external.add_sample(external.name, tagged | {"tier": tier}, count)
    yield from (*capacities.values(), live, total, external)


def _capacities(info: NodeInfo) -> dict[str, tuple[int, int]]:
    """Size and free bytes by the label of the tier; tiers without a name of their own are added up."""
    sums: dict[str, tuple[int, int]] = {}
    for tier, total, available in info.capacities:
        before = sums.get(tier_label(tier), (0, 0))
        sums[tier_label(tier)] = (before[0] + total, before[1] + min(available, total))
    return sums


def _by_label(counts: Mapping[int, int]) -> dict[str, int]:
    sums: dict[str, int] = defaultdict(int)
    for tier, count in counts.items():
        sums[tier_label(tier)] += count
    return sums


def _store(snapshot: Snapshot) -> Iterator[Metric]:
    stats = snapshot.store
    if stats is None:
        return
    yield _histograms(families.STORE_LATENCY, {(op, stats.backend): value for op, value in stats.ops.items()})
    yield _plain(families.STORE_ERRORS, {(stats.backend,): stats.errors})
    if stats.backend == "redis":
        for family in families.REDIS_ONLY:
            if family.kind == "histogram":
                yield _histograms(family, {(): Histogram()})
            else:
                yield _plain(family, {(): stats.errors if family is families.REDIS_ERRORS else 0})


def _reported(reported: ReportedFamily) -> Metric:
    metric = Metric(
        reported.name.removesuffix("_total") if reported.kind == "counter" else reported.name,
        reported.help or "Reported by nodes.",
        reported.kind,
    )
    for labels, value in reported.series:
        if isinstance(value, Buckets):
            _add_buckets(metric, dict(labels), value.bounds, [*value.cumulative, value.observed], value.total)
        else:
            metric.add_sample(reported.name, dict(labels), value)
    return metric


def _metric(family: Family) -> Metric:
    name = family.name.removesuffix("_total") if family.kind == "counter" else family.name
    return Metric(PREFIX + name, family.help, family.kind)


def _plain(family: Family, series: Mapping[Labels, float]) -> Metric:
    metric = _metric(family)
    for labels, value in series.items():
        metric.add_sample(PREFIX + family.name, dict(zip(family.labels, labels, strict=True)), value)
    return metric


def _histograms(family: Family, series: Mapping[Labels, Histogram]) -> Metric:
    metric = _metric(family)
    for labels, value in series.items():
        named = dict(zip(family.labels, labels, strict=True))
        _add_buckets(metric, named, value.bounds, value.cumulative(), value.total)
    return metric


def _add_buckets(
    metric: Metric, labels: dict[str, str], bounds: tuple[float, ...], cumulative: list[int], total: float
) -> None:
    """Add one histogram; the last of ``cumulative`` counts all observations."""
    for bound, count in zip((*(repr(float(bound)) for bound in bounds), "+Inf"), cumulative, strict=True):
        metric.add_sample(f"{metric.name}_bucket", labels | {"le": bound}, count)
    metric.add_sample(f"{metric.name}_count", labels, cumulative[-1])
    metric.add_sample(f"{metric.name}_sum", labels, total)
