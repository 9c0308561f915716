"""What a reporter counts, and how an engine's adapter publishes it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from umbp_connectors.client.counters import ClientStats
from umbp_core.tiers import Tier

_TIER_NAMES = {tier.value: tier.name.lower() for tier in Tier}


@dataclass(frozen=True, slots=True)
class ReporterStats:
    """One look at a reporter.  Numbers count from its start."""

    held: Mapping[int, int]
    """Hashes that the node holds, per tier, by what it told."""
    waiting: int
    """Hashes that the engine told and the reporter did not read yet."""
    told: int
    """Items that the engine told."""
    came: Mapping[int, int]
    """Hashes that came to a tier."""
    left: Mapping[int, int]
    """Hashes that left one."""
    overflows: int
    """How often more waited than may, so that the whole truth of a source was told instead."""
    resyncs: int
    """How often the whole truth of a source was told."""
    failures: int
    """Items that were not understood, and lists and capacities that could not be had."""
    client: ClientStats
    """How it goes with the master."""


class ReportMetric(NamedTuple):
    """A counter; adapters put their prefix before ``name``."""

    name: str
    labels: tuple[str, ...]
    help: str


HASHES = ReportMetric("report_hashes", ("tier", "change"), "Hashes that came to a tier or left it.")
ACKNOWLEDGED = ReportMetric("report_acknowledged_hashes", (), "Hashes in batches that the master acknowledged.")
HEARTBEATS = ReportMetric("report_heartbeats", (), "Heartbeats that the master answered.")
FULL_SYNCS = ReportMetric("report_full_syncs", (), "Times that the master was told everything.")
RESYNCS = ReportMetric("report_resyncs", (), "Times that a part of the engine listed all that it holds.")
OVERFLOWS = ReportMetric("report_overflows", (), "Times that more waited to be told than may.")
REFUSED = ReportMetric("report_refused_hashes", (), "Hashes that the master does not take.")
FAILURES = ReportMetric("report_failures", ("where",), "What failed, by where.")
REPORT_METRICS = (HASHES, ACKNOWLEDGED, HEARTBEATS, FULL_SYNCS, RESYNCS, OVERFLOWS, REFUSED, FAILURES)
"""Every counter that :class:`ReportMeter` gives."""


class Reading(NamedTuple):
    """``amount`` more of ``metric`` with the label values ``labels``."""

    metric: ReportMetric
    labels: tuple[str, ...]
    amount: int


class ReportMeter:
    """What was counted since the last look, for one reader."""

    def __init__(self, stats: Callable[[], ReporterStats]) -> None:
        self._stats = stats
        self._last: dict[tuple[str, tuple[str, ...]], int] = {}

    def read(self) -> list[Reading]:
        """What is not zero of it."""
        news = []
        for metric, labels, total in _totals(self._stats()):
            amount = total - self._last.get((metric.name, labels), 0)
            if amount:
                self._last[metric.name, labels] = total
                news.append(Reading(metric, labels, amount))
        return news


def _totals(stats: ReporterStats) -> Iterator[tuple[ReportMetric, tuple[str, ...], int]]:
    for change, hashes in (("came", stats.came), ("left", stats.left)):
        for tier, count in hashes.items():
            yield HASHES, (_name_of(tier), change), count
    client = stats.client
    yield ACKNOWLEDGED, (), client.hashes
    yield HEARTBEATS, (), client.heartbeats
    yield FULL_SYNCS, (), client.full_syncs
    yield RESYNCS, (), stats.resyncs
    yield OVERFLOWS, (), stats.overflows + client.overflows
    yield REFUSED, (), client.refused
    yield FAILURES, ("master",), client.failures
    yield FAILURES, ("engine",), stats.failures


def _name_of(tier: int) -> str:
    return _TIER_NAMES.get(tier, "other")
