"""Metrics that a node hands to the master, which serves them with the node's name and tags as labels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple


class CounterDelta(NamedTuple):
    """How much a counter has grown since the last report."""

    delta: float


class GaugeValue(NamedTuple):
    """What a gauge shows now."""

    value: float


class HistogramDelta(NamedTuple):
    """Observations since the last report.

    ``cumulative`` says how many were at most the bound at the same place in ``bounds``; ``observed`` is all of them.
    """

    bounds: tuple[float, ...]
    cumulative: tuple[int, ...]
    observed: int
    total: float


@dataclass(frozen=True, slots=True)
class MetricSample:
    """One series."""

    name: str
    value: CounterDelta | GaugeValue | HistogramDelta
    help: str = ""
    labels: tuple[tuple[str, str], ...] = ()
