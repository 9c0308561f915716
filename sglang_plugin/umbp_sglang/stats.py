"""What a store counts: Prometheus metrics, and the page counts that SGLang's scheduler collects."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from umbp_connectors.reporting.stats import Reading
from umbp_core.errors import StateError
from umbp_sglang import compat
from umbp_sglang.metrics import METRICS, MetricDoc, counter_of
from umbp_sglang.pools import Moved, StorePool

_SECONDS = (0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
_KEPT_CALLS = 1024
"""Calls that are remembered for SGLang's collector, should it not ask for a while."""
_USED, _CAPACITY = "umbp_sglang_tier_used_bytes", "umbp_sglang_tier_capacity_bytes"
_REFUSED, _SSD = "umbp_sglang_refused_pages_total", "umbp_sglang_ssd_total"


class StoreStats:
    """Counts of one store, in a registry of its own.  Any thread.

    In Prometheus' multi-process mode, which SGLang's servers use, the values are on the server's ``/metrics`` by
    themselves, summed over the ranks.
    """

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._metrics = {doc.name: _make(doc, self.registry) for doc in METRICS}
        self._series: dict[tuple[str, str], _Series] = {}
        self._lock = threading.Lock()
        self._counted: dict[tuple[str, str, str], int] = {}
        self._tiers: set[tuple[str, str]] = set()
        self._calls: dict[str, deque[tuple[int, float]]] = {
            direction: deque(maxlen=_KEPT_CALLS) for direction in ("get", "put")
        }

    def looked_up(self, asked: int, found: int) -> None:
        """A chain of ``asked`` pages, of which the first ``found`` can be restored."""
        self._metrics["umbp_sglang_lookups_total"].inc()
        self._metrics["umbp_sglang_lookup_pages_total"].inc(asked)
        self._metrics["umbp_sglang_hit_pages_total"].inc(found)

    def moved(self, direction: str, pool: str, moved: Moved, page_bytes: int, seconds: float) -> None:
        """A call that moved pages of ``page_bytes`` bytes each."""
        series = self._series_of(direction, pool)
        ok = sum(moved.ok)
        series.fresh.inc(moved.fresh)
        series.rest.inc(ok - moved.fresh)
        series.failed.inc(len(moved.ok) - ok)
        pages = ok if direction == "get" else moved.fresh
        series.nbytes.inc(pages * page_bytes)
        series.seconds.observe(seconds)
        if pages and seconds > 0:
            with self._lock:
                self._calls[direction].append((pages, pages * page_bytes / seconds / 1e9))

    def degraded(self, reason: str, times: int = 1) -> None:
        """A call gave up a part of its service."""
        self._metrics["umbp_sglang_degraded_total"].labels(reason).inc(times)

    def watch(self, pools: Sequence[StorePool]) -> None:
        """Ask ``pools`` how full they are, and what happened on the way to their SSD tiers.  One thread."""
        for pool in pools:
            try:
                tiers, refused, events = pool.tiers(), pool.refused(), pool.ssd_events()
            except StateError:  # it is being closed
                continue
            for tier, (used, capacity) in tiers.items():
                self._tiers.add((pool.name, tier))
                self._metrics[_USED].labels(pool.name, tier).set(used)
                self._metrics[_CAPACITY].labels(pool.name, tier).set(capacity)
            self._follow(_REFUSED, pool.name, refused)
            self._follow(_SSD, pool.name, events)

    def ended(self) -> None:
        """The pools are closed.  A gauge would show its last value until the process ends, in multi-process mode."""
        for labels in list(self._tiers):
            for name in (_USED, _CAPACITY):
                self._metrics[name].labels(*labels).set(0)

    def reported(self, readings: Iterable[Reading], untold: int) -> None:
        """What was told to a master since the last time, and how many pages it cannot be told."""
        for metric, labels, amount in readings:
            counter = self._metrics[counter_of(metric)]
            (counter.labels(*labels) if labels else counter).inc(amount)
        self._metrics["umbp_sglang_report_untold_pages"].set(untold)

    def take_page_counts(self) -> Any:
        """SGLang's ``StorageMetrics`` of the calls since the last time: pages, and GB/s, of each."""
        with self._lock:
            calls = {direction: list(kept) for direction, kept in self._calls.items()}
            for kept in self._calls.values():
                kept.clear()
        return compat.find("sglang.srt.observability.metrics_collector:StorageMetrics")(
            prefetch_pgs=[pages for pages, _ in calls["get"]],
            backup_pgs=[pages for pages, _ in calls["put"]],
            prefetch_bandwidth=[speed for _, speed in calls["get"]],
            backup_bandwidth=[speed for _, speed in calls["put"]],
        )

    def _follow(self, metric: str, pool: str, counts: Mapping[str, int]) -> None:
        """Add what ``counts`` of ``pool`` grew by since the last time; those of a pool opened again begin at zero."""
        for label, count in counts.items():
            before = self._counted.get((metric, pool, label), 0)
            self._counted[metric, pool, label] = count
            self._metrics[metric].labels(pool, label).inc(count - before if count >= before else count)

    def _series_of(self, direction: str, pool: str) -> _Series:
        found = self._series.get((direction, pool))
        if found is None:
            pages = self._metrics["umbp_sglang_pages_total"]
            results = ("ssd", "dram", "missing") if direction == "get" else ("stored", "present", "not_stored")
            fresh, rest, failed = (pages.labels(direction, pool, result) for result in results)
            nbytes = self._metrics["umbp_sglang_bytes_total"].labels(direction, pool)
            seconds = self._metrics["umbp_sglang_call_seconds"].labels(direction, pool)
            found = self._series[direction, pool] = _Series(fresh, rest, failed, nbytes, seconds)
        return found


@dataclass(frozen=True, slots=True)
class _Series:
    """The metrics of one pool in one direction, looked up once."""

    fresh: Any
    rest: Any
    failed: Any
    nbytes: Any
    seconds: Any


def _make(doc: MetricDoc, registry: CollectorRegistry) -> Any:
    if doc.kind == "histogram":
        return Histogram(doc.name, doc.help, doc.labels, buckets=_SECONDS, registry=registry)
    if doc.kind == "gauge":
        return Gauge(doc.name, doc.help, doc.labels, registry=registry, multiprocess_mode="livesum")
    return Counter(doc.name, doc.help, doc.labels, registry=registry)
