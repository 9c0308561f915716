"""What nodes report about themselves, added up until the next scrape and after it.

Names, labels and values come from the network: what Prometheus could not read is refused, and so is what would make
the memory grow without end.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

from umbp_connectors.master.metrics_families import FAMILIES, PREFIX, Kind
from umbp_core.master.samples import CounterDelta, GaugeValue, HistogramDelta, MetricSample

_NAME = re.compile(r"[a-zA-Z_][a-zA-Z0-9_]*")
_RESERVED = frozenset({"node", "le", "quantile"})
_KINDS: dict[type, Kind] = {CounterDelta: "counter", GaugeValue: "gauge", HistogramDelta: "histogram"}

MAX_SERIES_PER_NODE = 2000
MAX_SERIES = 200_000
MAX_BOUNDS = 64
MAX_LABELS = 32
"""Labels of a sample, and tags of a node that become labels."""
MAX_TEXT = 256
"""Characters of a name, a label's name or a label's value."""

Labels = tuple[tuple[str, str], ...]


class Buckets(NamedTuple):
    """The sum of histogram deltas that have the same bounds."""

    bounds: tuple[float, ...]
    cumulative: tuple[int, ...]
    observed: int
    total: float


Value = float | Buckets
Series = dict[tuple[str, Labels], Value]
"""Name and labels of each series of a node to its value, which never changes: a copy of the dictionary is enough."""


@dataclass(slots=True)
class _Name:
    """One metric of nodes, while there are series of it."""

    kind: Kind
    help: str
    series: int = 0


class ReportedFamily(NamedTuple):
    """One metric of nodes with its series: labels, ``node`` among them, and value."""

    name: str
    kind: Kind
    help: str
    series: list[tuple[Labels, Value]]


class ReportedSnapshot(NamedTuple):
    """The samples of all nodes at one moment.  Any thread."""

    nodes: list[tuple[str, Series]]
    kinds: dict[str, tuple[Kind, str]]

    def families(self) -> list[ReportedFamily]:
        """The same by name."""
        families = {name: ReportedFamily(name, *kind, []) for name, kind in sorted(self.kinds.items())}
        for node, series in self.nodes:
            for (name, labels), value in series.items():
                families[name].series.append(((("node", node), *labels), value))
        return list(families.values())


class ReportedMetrics:
    """The samples of all nodes: counters and histograms are summed, of a gauge the last value counts.

    One thread at a time.
    """

    def __init__(self, max_series: int = MAX_SERIES, max_series_per_node: int = MAX_SERIES_PER_NODE) -> None:
        self._max_series = max_series
        self._max_series_per_node = max_series_per_node
        self._nodes: dict[str, Series] = {}
        self._names: dict[str, _Name] = {}
        self._exposed: dict[str, str] = {}
        self._series = 0
        self.rejected: Counter[str] = Counter()
        """Samples that were not taken over, by reason: ``invalid``, ``conflict``, ``bound``."""
        for family in FAMILIES:
            self._exposed.update(dict.fromkeys(_exposed(PREFIX + family.name, family.kind), ""))

    def add(self, node: str, tags: Iterable[str], samples: Sequence[MetricSample]) -> None:
        """Take over ``samples`` of ``node``, whose ``tags`` of the form ``name=value`` become labels."""
        common = tag_labels(tags)
        looked_at = samples[: self._max_series_per_node]
        if len(looked_at) < len(samples):
            self.rejected["bound"] += len(samples) - len(looked_at)
        for sample in looked_at:
            reason = self._add(node, common, sample)
            if reason:
                self.rejected[reason] += 1

    def forget(self, node: str) -> None:
        """Drop the series of ``node``."""
        series = self._nodes.pop(node, {})
        self._series -= len(series)
        for name, _ in series:
            known = self._names[name]
            known.series -= 1
            if not known.series:
                del self._names[name]
                for exposed in _exposed(name, known.kind):
                    del self._exposed[exposed]

    def snapshot(self) -> ReportedSnapshot:
        """A copy of everything."""
        nodes = [(node, dict(series)) for node, series in self._nodes.items()]
        return ReportedSnapshot(nodes, {name: (known.kind, known.help) for name, known in self._names.items()})

    def _add(self, node: str, common: Labels, sample: MetricSample) -> str:
        """Take over one sample; returns why not, or nothing."""
        kind = _KINDS[type(sample.value)]
        labels = _merged(sample.labels, common)
        if labels is None or not _is_name(sample.name) or not _is_sound(sample.value):
            return "invalid"
        name = sample.name if sample.name.startswith(PREFIX) else PREFIX + sample.name
        if kind == "counter" and not name.endswith("_total"):
            name += "_total"
        series = self._nodes.get(node, {})
        key = (name, labels)
        before = series.get(key)
        if before is None:
            if self._series >= self._max_series or len(series) >= self._max_series_per_node:
                return "bound"
            if not self._claim(name, kind, sample.help):
                return "conflict"
            self._nodes[node] = series
            self._series += 1
        elif self._names[name].kind != kind:
            return "conflict"
        after = _combined(before, sample.value)
        if after is None:
            return "conflict"
        series[key] = after
        return ""

    def _claim(self, name: str, kind: Kind, text: str) -> bool:
        """Count one more series of ``name``; false when the name means something else already."""
        known = self._names.get(name)
        if known is None:
            exposed = _exposed(name, kind)
            if any(taken in self._exposed for taken in exposed):
                return False
            known = self._names[name] = _Name(kind, text[:MAX_TEXT])
            self._exposed.update(dict.fromkeys(exposed, name))
        if known.kind != kind:
            return False
        known.series += 1
        return True


def tag_labels(tags: Iterable[str]) -> Labels:
    """The labels that a node's tags make; tags without ``=`` and what Prometheus could not read are left out."""
    labels: dict[str, str] = {}
    for tag in tags:
        name, separator, value = tag.partition("=")
        if separator and _is_label(name, value) and name != "tier" and len(labels) < MAX_LABELS:
            labels[name] = value
    return tuple(sorted(labels.items()))


def _merged(labels: Labels, common: Labels) -> Labels | None:
    """The labels of one series, sorted; ``None`` when they cannot be used.  Those of the sample win over tags."""
    if len(labels) > MAX_LABELS or not all(_is_label(name, value) for name, value in labels):
        return None
    merged = dict(common) | dict(labels)
    return tuple(sorted(merged.items())) if len(dict(labels)) == len(labels) else None


def _is_label(name: str, value: str) -> bool:
    return _is_name(name) and not name.startswith("__") and name not in _RESERVED and len(value) <= MAX_TEXT


def _is_name(text: str) -> bool:
    return len(text) <= MAX_TEXT and _NAME.fullmatch(text) is not None


def _is_sound(value: CounterDelta | GaugeValue | HistogramDelta) -> bool:
    if isinstance(value, CounterDelta):
        return math.isfinite(value.delta) and value.delta >= 0
    if isinstance(value, GaugeValue):
        return True
    bounds, counts = value.bounds, value.cumulative
    rising = all(a < b for a, b in pairwise(bounds)) and all(map(math.isfinite, bounds))
    piling = all(a <= b for a, b in pairwise((0, *counts, value.observed)))
    return len(bounds) == len(counts) <= MAX_BOUNDS and rising and piling and math.isfinite(value.total)


def _combined(before: Value | None, value: CounterDelta | GaugeValue | HistogramDelta) -> Value | None:
    """``before`` and what was reported; ``None`` when they do not fit together."""
    if isinstance(value, GaugeValue):
        return value.value
    if isinstance(value, CounterDelta):
        return value.delta if before is None or isinstance(before, Buckets) else before + value.delta
    if not isinstance(before, Buckets):
        return Buckets(*value)
    if before.bounds != value.bounds:
        return None
    cumulative = tuple(a + b for a, b in zip(before.cumulative, value.cumulative, strict=True))
    return Buckets(before.bounds, cumulative, before.observed + value.observed, before.total + value.total)


def _exposed(name: str, kind: Kind) -> tuple[str, ...]:
    """The names that series of a metric have on the page."""
    return (name, f"{name}_bucket", f"{name}_sum", f"{name}_count") if kind == "histogram" else (name,)
