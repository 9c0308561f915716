"""Connector statistics through vLLM's own channels: the periodic log line and its Prometheus registry.

Counters are kept as one flat ``dict[str, float]`` (``name|label|label``), so that they cross process
borders as plain data and add up by key.  The leader alone counts: it sees every rank's results.
"""

from __future__ import annotations

import functools
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorPromMetrics, KVConnectorStats

from umbp_connectors.reporting.stats import REPORT_METRICS, Reading
from umbp_core.ops import Direction, OpStatus

SEPARATOR = "|"

METRICS: dict[str, tuple[str, tuple[str, ...]]] = {
    "vllm:umbp_lookups": ("Requests whose prefix was looked up, once for each time they waited to be scheduled.", ()),
    "vllm:umbp_lookup_tokens": ("Tokens that lookups asked for beyond vLLM's own prefix cache.", ()),
    "vllm:umbp_hit_tokens": ("Tokens that loads were started for, by the tier that held them.", ("tier",)),
    "vllm:umbp_loaded_blocks": ("Blocks that loads brought, by the tier that held them.", ("tier",)),
    "vllm:umbp_lookup_waits": ("Lookups answered 'not yet', by cause.", ("cause",)),
    "vllm:umbp_ops": ("Transfers that ended, by direction and status.", ("direction", "status")),
    "vllm:umbp_bytes": (
        "Bytes moved over all ranks, by direction and the tier that they came from or went to.",
        ("direction", "tier"),
    ),
    "vllm:umbp_op_seconds": ("Seconds spent in transfers (slowest rank), by direction.", ("direction",)),
    "vllm:umbp_failed_blocks": ("Blocks that did not arrive, by direction and reason.", ("direction", "reason")),
    "vllm:umbp_stored_blocks": ("Blocks published, by tier.", ("tier",)),
    "vllm:umbp_evicted_blocks": ("Blocks that left a tier, by tier.", ("tier",)),
    "vllm:umbp_trimmed_blocks": ("Those of them that left because the tier was above its watermark.", ("tier",)),
    "vllm:umbp_dropped_stores": ("Blocks not stored, by reason.", ("reason",)),
    "vllm:umbp_refused_blocks": ("Times that an offload policy kept a block out of a tier.", ("tier", "policy")),
    "vllm:umbp_degraded": ("Times that the connector gave up a part of its service, by reason.", ("reason",)),
    **{f"vllm:umbp_{metric.name}": (metric.help, metric.labels) for metric in REPORT_METRICS},
}
"""Every counter: help text and label names (vLLM's ``model_name`` and ``engine`` come first)."""


@functools.cache
def counter(name: str, *labels: str) -> str:
    """The key of counter ``name`` with ``labels`` in the order of :data:`METRICS`."""
    return SEPARATOR.join((name, *labels))


_OF_OP: dict[tuple[Direction, OpStatus], tuple[str, str]] = {
    (direction, status): (
        counter("vllm:umbp_ops", direction.label, status.value),
        counter("vllm:umbp_op_seconds", direction.label),
    )
    for direction in Direction
    for status in OpStatus
}

_MOVED = {
    direction: counter("vllm:umbp_bytes", direction.label, tier)
    for direction, tier in ((Direction.LOAD, "dram"), (Direction.STORE, "dram"), (Direction.DEMOTE, "ssd"))
}
_READ_FROM_SSD = counter("vllm:umbp_bytes", Direction.LOAD.label, "ssd")


class UmbpStats(KVConnectorStats):
    """Counters since the last report."""

    def reset(self) -> None:
        """Start from zero."""
        self.data: dict[str, float] = {}

    def add(self, name: str, amount: float, *labels: str) -> None:
        """Add ``amount`` to counter ``name`` with ``labels`` in the order of :data:`METRICS`."""
        self.count(counter(name, *labels), amount)

    def count(self, key: str, amount: float) -> None:
        """Add ``amount`` to the counter whose key is :func:`counter`'s."""
        data = self.data
        data[key] = data.get(key, 0) + amount

    def op_ended(
        self, direction: Direction, status: OpStatus, moved_bytes: int, seconds: float, from_ssd: float = 0.0
    ) -> None:
        """Count an op that ended; of a load, ``from_ssd`` is the part of its blocks that lay on SSD."""
        ops, took = _OF_OP[direction, status]
        data = self.data
        data[ops] = data.get(ops, 0) + 1
        data[took] = data.get(took, 0) + seconds
        ssd_bytes = round(moved_bytes * from_ssd) if from_ssd else 0
        if ssd_bytes:
            self.count(_READ_FROM_SSD, ssd_bytes)
        moved = _MOVED[direction]
        data[moved] = data.get(moved, 0) + moved_bytes - ssd_bytes

    def reported(self, reading: Reading) -> None:
        """Count what the reporter to a master counted."""
        self.add(f"vllm:umbp_{reading.metric.name}", reading.amount, *reading.labels)

    def take(self) -> UmbpStats | None:
        """What was counted since the last call, if anything; counting starts from zero."""
        if not self.data:
            return None
        taken = UmbpStats(data=self.data)
        self.reset()
        return taken

    def aggregate(self, other: KVConnectorStats) -> KVConnectorStats:
        """Add ``other``'s counters to these."""
        for key, amount in other.data.items():
            self.data[key] = self.data.get(key, 0) + amount
        return self

    def reduce(self) -> dict[str, int | float]:
        """What vLLM's log line shows."""
        short = {
            key.removeprefix("vllm:umbp_").replace(SEPARATOR, "."): round(amount, 4)
            for key, amount in sorted(self.data.items())
        }
        for direction in Direction:
            name = direction.label
            seconds = self.data.get(SEPARATOR.join(("vllm:umbp_op_seconds", name)), 0)
            bytes_of = counter("vllm:umbp_bytes", name, "")
            moved = sum(amount for key, amount in self.data.items() if key.startswith(bytes_of))
            if seconds:
                short[f"{name}_GB_per_s"] = round(moved / seconds / 1e9, 2)
        return short

    def is_empty(self) -> bool:
        """Whether nothing was counted."""
        return not self.data


class UmbpPromMetrics(KVConnectorPromMetrics):
    """Feeds :data:`METRICS` into the Prometheus registry of vLLM's API server."""

    def __init__(
        self,
        vllm_config: Any,
        metric_types: dict[Any, Any],
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> None:
        super().__init__(vllm_config, metric_types, labelnames, per_engine_labelvalues)
        self._counters = {
            name: self._counter_cls(name=name, documentation=text, labelnames=[*labelnames, *labels])
            for name, (text, labels) in METRICS.items()
        }

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        """Add one report of engine ``engine_idx``; unknown names (another version's) are ignored."""
        engine_labels = self.per_engine_labelvalues[engine_idx]
        for key, amount in transfer_stats_data.items():
            name, *labels = key.split(SEPARATOR)
            counter = self._counters.get(name)
            if counter is not None and len(labels) == len(METRICS[name][1]):
                counter.labels(*engine_labels, *labels).inc(amount)
