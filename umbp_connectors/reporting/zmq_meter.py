"""What followers count, handed to the master: a side process has no page of metrics of its own."""

from __future__ import annotations

from collections.abc import Iterator

from umbp_connectors.reporting.reporter import Reporter
from umbp_connectors.reporting.stats import ReportMeter
from umbp_connectors.reporting.zmq_follower import Follower
from umbp_core.master.samples import CounterDelta, MetricSample

Labels = tuple[tuple[str, str], ...]

BATCHES = "follow_batches_total"
CLEARS = "follow_clears_total"
LEFT_OUT = "follow_left_out_total"
HELPS = {
    BATCHES: "Batches of an engine's event stream, by what became of them.",
    CLEARS: "Times that all was forgotten that an engine had told, by the reason.",
    LEFT_OUT: "Hashes in places that are no tier of the node or removed and not there, and events that are not known.",
}
"""Every counter of a follower, as it is called at the master behind ``mori_umbp_``."""


class FollowMeter:
    """The counters of one follower and of its reporter.  One thread at a time."""

    def __init__(self, follower: Follower, reporter: Reporter) -> None:
        self._follower = follower
        self._reporter = reporter
        self._reports = ReportMeter(reporter.stats)
        self._told: dict[tuple[str, Labels], int] = {}
        self._owed: dict[tuple[str, str, Labels], int] = {}
        """What no master has taken yet, by name, help and labels."""

    def send(self, timeout: float) -> bool:
        """Hand over what was counted since the last time that the master took it; false when it does not now."""
        for name, labels, total in self._totals():
            self._owe(name, HELPS[name], labels, total - self._told.get((name, labels), 0))
            self._told[name, labels] = total
        for metric, values, amount in self._reports.read():
            self._owe(f"{metric.name}_total", metric.help, tuple(zip(metric.labels, values, strict=True)), amount)
        samples = [
            MetricSample(name, CounterDelta(amount), text, labels)
            for (name, text, labels), amount in self._owed.items()
        ]
        if samples and not self._reporter.client.report_metrics(samples, timeout):
            return False
        self._owed.clear()
        return True

    def _owe(self, name: str, text: str, labels: Labels, amount: int) -> None:
        if amount:
            self._owed[name, text, labels] = self._owed.get((name, text, labels), 0) + amount

    def _totals(self) -> Iterator[tuple[str, Labels, int]]:
        stats = self._follower.stats()
        batches = {
            "applied": stats.applied,
            "repeated": stats.repeated,
            "missed": stats.missed,
            "dropped": stats.dropped,
            "garbled": stats.garbled,
        }
        for what, count in batches.items():
            yield BATCHES, (("what", what),), count
        for why, count in stats.cleared.items():
            yield CLEARS, (("why", why),), count
        yield LEFT_OUT, (("what", "elsewhere"),), stats.elsewhere
        yield LEFT_OUT, (("what", "unknown"),), stats.unknown
        yield LEFT_OUT, (("what", "absent"),), stats.absent
