"""What a store counts: Prometheus metrics, and the page counts that SGLang's scheduler collects."""

from __future__ import annotations

import threading
from collections import deque
from dataclasses import dataclass
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram

from umbp_sglang import compat

_SECONDS = (0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
_KEPT_CALLS = 1024
"""Calls that are remembered for SGLang's collector, should it not ask for a while."""


@dataclass(frozen=True, slots=True)
class MetricDoc:
    """Name as on the page (counters with their ``_total``), type, labels and meaning of one metric."""

    name: str
    kind: str
    labels: tuple[str, ...]
    help: str


METRICS = (
    MetricDoc("umbp_sglang_lookups_total", "counter", (), "Chains of pages that SGLang asked for."),
    MetricDoc("umbp_sglang_lookup_pages_total", "counter", (), "Pages in these chains."),
    MetricDoc("umbp_sglang_hit_pages_total", "counter", (), "Leading pages of these chains that could be restored."),
    MetricDoc("umbp_sglang_pages_total", "counter", ("direction", "pool", "result"), "Pages of gets and puts."),
    MetricDoc("umbp_sglang_bytes_total", "counter", ("direction", "pool"), "Bytes of the pages that were ok."),
    MetricDoc("umbp_sglang_call_seconds", "histogram", ("direction", "pool"), "Time that one get or put took."),
    MetricDoc("umbp_sglang_degraded_total", "counter", ("reason",), "Calls that gave up a part of their service."),
)
"""Every metric of a store; ``docs/metrics.md`` has this table."""


class StoreStats:
    """Counts of one store, in a registry of its own.  Any thread.

    In SGLang's multi-process mode, which its servers use, the values reach the server's ``/metrics`` by themselves.
    """

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._metrics = {doc.name: _make(doc, self.registry) for doc in METRICS}
        self._series: dict[tuple[str, str], _Series] = {}
        self._lock = threading.Lock()
        self._calls: dict[str, deque[tuple[int, float]]] = {
            direction: deque(maxlen=_KEPT_CALLS) for direction in ("get", "put")
        }

    def looked_up(self, asked: int, found: int) -> None:
        """A chain of ``asked`` pages, of which the first ``found`` can be restored."""
        self._metrics["umbp_sglang_lookups_total"].inc()
        self._metrics["umbp_sglang_lookup_pages_total"].inc(asked)
        self._metrics["umbp_sglang_hit_pages_total"].inc(found)

    def moved(self, direction: str, pool: str, pages: int, ok: int, nbytes: int, seconds: float) -> None:
        """A call that was to move ``pages`` pages of ``nbytes`` bytes each, ``ok`` of which it did."""
        series = self._series_of(direction, pool)
        series.ok.inc(ok)
        if ok < pages:
            series.failed.inc(pages - ok)
        series.nbytes.inc(ok * nbytes)
        series.seconds.observe(seconds)
        if ok and seconds > 0:
            with self._lock:
                self._calls[direction].append((ok, ok * nbytes / seconds / 1e9))

    def degraded(self, reason: str) -> None:
        """A call gave up a part of its service."""
        self._metrics["umbp_sglang_degraded_total"].labels(reason).inc()

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

    def _series_of(self, direction: str, pool: str) -> _Series:
        found = self._series.get((direction, pool))
        if found is None:
            pages = self._metrics["umbp_sglang_pages_total"]
            found = _Series(
                ok=pages.labels(direction, pool, "ok"),
                failed=pages.labels(direction, pool, "missing" if direction == "get" else "not_stored"),
                nbytes=self._metrics["umbp_sglang_bytes_total"].labels(direction, pool),
                seconds=self._metrics["umbp_sglang_call_seconds"].labels(direction, pool),
            )
            self._series[direction, pool] = found
        return found


@dataclass(frozen=True, slots=True)
class _Series:
    """The metrics of one pool in one direction, looked up once."""

    ok: Any
    failed: Any
    nbytes: Any
    seconds: Any


def _make(doc: MetricDoc, registry: CollectorRegistry) -> Any:
    if doc.kind == "histogram":
        return Histogram(doc.name, doc.help, doc.labels, buckets=_SECONDS, registry=registry)
    return Counter(doc.name, doc.help, doc.labels, registry=registry)
