"""What a master counts about itself and its nodes, for ``/metrics``.

The master's loop counts; a scrape copies on the loop and renders in another thread.  Nothing here is global to the
process: every scrape has a registry of its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from umbp_connectors.master import metrics_families as families
from umbp_connectors.master.metrics_families import Family, Histogram
from umbp_connectors.master.metrics_nodes import ReportedMetrics, ReportedSnapshot
from umbp_core.master.model import NodeInfo, NodeStatus
from umbp_core.master.samples import MetricSample
from umbp_core.tiers import Tier

MAX_STRANGERS = 256
"""Nodes that never registered and are counted nevertheless; the oldest of them is forgotten first."""

_ROUTED: Mapping[str, Family] = {
    "route_put": families.ROUTE_PUT,
    "route_get": families.ROUTE_GET,
    "batch_route_put": families.BATCH_ROUTE_PUT,
    "batch_route_get": families.BATCH_ROUTE_GET,
    "lookup": families.LOOKUPS,
}
_TIERS = {int(tier): tier.name for tier in Tier}

Labels = tuple[str, ...]


@dataclass(frozen=True, slots=True)
class StoreStats:
    """What the store of nodes has done: a histogram per kind of op, and failures."""

    backend: str
    ops: Mapping[str, Histogram]
    errors: int


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Everything at one moment; may be read by any thread."""

    nodes: Sequence[NodeInfo]
    counters: Sequence[tuple[str, Mapping[tuple[str, Labels], float]]]
    """By node; each series has the name of its family and its other labels."""
    totals: Mapping[str, Mapping[Labels, float]]
    """Counters without a node, by the name of the family."""
    calls: Mapping[Labels, Histogram]
    reported: ReportedSnapshot
    store: StoreStats | None


def tier_label(tier: int) -> str:
    """The label of a tier.  The wire's enumeration is open and labels are not: what has no name is ``OTHER``."""
    return _TIERS.get(tier, "OTHER")


class MasterMetrics:
    """A ``MasterObserver`` that counts.  All methods are for the thread of the master's loop.

    Series of a node go when it does.
    """

    def __init__(self) -> None:
        self._nodes: dict[str, dict[tuple[str, Labels], float]] = {}
        self._alive: set[str] = set()
        self._strangers: dict[str, None] = {}
        self._calls: dict[Labels, Histogram] = {}
        self._reported = ReportedMetrics()
        self._matches = self._queried = self._matched = 0

    def reported(self, node: str, tier: int, blocks: int, accepted: bool) -> None:
        """A report of ``blocks`` hashes came; it was not accepted when the node is not alive."""
        label = tier_label(tier)
        series = self._series_of(node)
        self._count(series, families.REPORTS, (label, "ok" if accepted else "rejected_not_alive"))
        if accepted:
            self._count(series, families.REPORTED_BLOCKS, (label,), blocks)

    def revoked(self, node: str, tier: int | None, blocks: int | None) -> None:
        """A revoke of ``blocks`` hashes came, or a bulk one (``blocks`` is ``None``), of all tiers without ``tier``."""
        label = "ALL" if tier is None else tier_label(tier)
        series = self._series_of(node)
        self._count(series, families.REVOKES, (label, "ok"))
        if tier is not None and blocks is not None:
            self._count(series, families.REVOKED_BLOCKS, (label,), blocks)

    def matched(self, queried: int, matched: int) -> None:
        """A match of ``queried`` hashes found ``matched`` of them, summed over nodes."""
        self._matches += 1
        self._queried += queried
        self._matched += matched

    def node_changed(self, info: NodeInfo) -> None:
        """A node registered or came back; one that is not alive loses its series."""
        if info.status is not NodeStatus.ALIVE:
            self.node_gone(info.node_id)
            return
        self._alive.add(info.node_id)
        self._strangers.pop(info.node_id, None)

    def node_gone(self, node_id: str) -> None:
        """A node expired or unregistered: its series go."""
        self._alive.discard(node_id)
        self._strangers.pop(node_id, None)
        self._forget(node_id)

    def heartbeat(self, node: str, events: int, gap: bool) -> None:
        """A heartbeat with ``events`` came; ``gap``: something before it is missing."""
        series = self._series_of(node)
        self._count(series, families.HEARTBEAT_EVENTS, (), events)
        if gap:
            self._count(series, families.HEARTBEAT_GAPS, ())

    def routed(self, call: str, node: str, entries: int = 1) -> None:
        """``entries`` of a call of ``node`` were routed."""
        self._count(self._series_of(node), _ROUTED[call], (), entries)

    def metrics_reported(self, node: str, tags: Sequence[str], samples: Sequence[MetricSample]) -> None:
        """A node handed over metrics of its own."""
        self._series_of(node)
        self._reported.add(node, tags, samples)

    def call_finished(self, protocol: str, call: str, code: str, seconds: float) -> None:
        """A call was answered.  Names are those of the code, never of the network."""
        key = (protocol, call, code)
        histogram = self._calls.get(key)
        if histogram is None:
            histogram = self._calls[key] = Histogram()
        histogram.observe(seconds)

    def snapshot(self, nodes: Sequence[NodeInfo], store: StoreStats | None) -> Snapshot:
        """A copy of everything; ``nodes`` are those that the master knows now."""
        counters = [(node, dict(series)) for node, series in self._nodes.items()]
        totals: dict[str, dict[Labels, float]] = {
            families.MATCHES.name: {(): self._matches},
            families.MATCH_QUERIED.name: {(): self._queried},
            families.MATCH_MATCHED.name: {(): self._matched},
            families.REJECTED_SAMPLES.name: {(why,): n for why, n in self._reported.rejected.items()},
        }
        calls = {key: histogram.copy() for key, histogram in self._calls.items()}
        return Snapshot(nodes, counters, totals, calls, self._reported.snapshot(), store)

    def _series_of(self, node: str) -> dict[tuple[str, Labels], float]:
        series = self._nodes.get(node)
        if series is None:
            series = self._nodes[node] = {}
            if node not in self._alive:
                self._strangers[node] = None
                if len(self._strangers) > MAX_STRANGERS:
                    oldest = next(iter(self._strangers))
                    del self._strangers[oldest]
                    self._forget(oldest)
        return series

    def _forget(self, node: str) -> None:
        self._nodes.pop(node, None)
        self._reported.forget(node)

    @staticmethod
    def _count(series: dict[tuple[str, Labels], float], family: Family, labels: Labels, by: float = 1) -> None:
        key = (family.name, labels)
        series[key] = series.get(key, 0) + by
