"""What the messages of UMBP's wire mean: between them and the values of ``umbp_core.master``.  Pure functions."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from umbp_connectors.wire_grpc import messages as pb
from umbp_connectors.wire_grpc.messages import Message
from umbp_core.errors import InvalidRequest
from umbp_core.journal import Delta
from umbp_core.master.model import Heartbeat, Registration, TierCapacity
from umbp_core.master.samples import CounterDelta, GaugeValue, HistogramDelta, MetricSample

ADD = 0
REMOVE = 1


def registration_of(message: Message) -> Registration:
    """Who introduces itself."""
    return Registration(
        node_id=message.node_id,
        node_address=message.node_address,
        peer_address=message.peer_address,
        engine_desc=message.engine_desc,
        capacities=capacities_of(message.tier_capacities),
        tags=tuple(message.tags),
    )


def registration_message(registration: Registration) -> Message:
    """The reverse; what this wire cannot say, the incarnation, is left out."""
    return pb.RegisterClientRequest(
        node_id=registration.node_id,
        node_address=registration.node_address,
        peer_address=registration.peer_address,
        engine_desc=registration.engine_desc,
        tier_capacities=_capacity_messages(registration.capacities),
        tags=registration.tags,
    )


def capacities_of(entries: Iterable[Message]) -> tuple[TierCapacity, ...]:
    """The capacities that a node tells."""
    return tuple(
        TierCapacity(entry.tier, entry.total_capacity_bytes, entry.available_capacity_bytes) for entry in entries
    )


def deltas_of(events: Iterable[Message]) -> list[Delta]:
    """What changed.  Raises ``InvalidRequest`` for kinds of events that are not known."""
    deltas = []
    for event in events:
        kind = event.kind
        if kind == ADD:
            deltas.append(Delta(event.key, event.tier, event.size))
        elif kind == REMOVE:
            deltas.append(Delta(event.key, event.tier, None))
        else:
            raise InvalidRequest(
                f"event kind {kind} of key {event.key[:64]!r} is not known, and nothing was applied; "
                f"send ADD ({ADD}) or REMOVE ({REMOVE})"
            )
    return deltas


def heartbeat_message(heartbeat: Heartbeat) -> Message:
    """A sign of life as it is sent."""
    return pb.HeartbeatRequest(
        node_id=heartbeat.node_id,
        bundles=[
            pb.EventBundle(seq=bundle.seq, events=[_event(delta) for delta in bundle.deltas])
            for bundle in heartbeat.bundles
        ],
        is_full_sync=heartbeat.full_sync,
        tier_capacities=_capacity_messages(heartbeat.capacities or ()),
        delta_seq_baseline=heartbeat.baseline,
        tier_kv_counts=[pb.TierKvCount(tier=tier, count=count) for tier, count in (heartbeat.counts or {}).items()],
    )


def samples_of(entries: Iterable[Message]) -> list[MetricSample]:
    """The metrics that a node hands over; those without a value are left out."""
    samples = []
    for entry in entries:
        kind = entry.WhichOneof("value")
        if kind is not None:
            labels = tuple((label.name, label.value) for label in entry.labels)
            samples.append(MetricSample(entry.name, _READ_VALUE[kind](entry), entry.help, labels))
    return samples


def metrics_message(node_id: str, samples: Sequence[MetricSample]) -> Message:
    """The metrics of a node as they are sent."""
    metrics = [
        pb.MetricSample(
            name=sample.name,
            help=sample.help,
            labels=[pb.MetricLabel(name=name, value=value) for name, value in sample.labels],
            **_value_field(sample.value),
        )
        for sample in samples
    ]
    return pb.ReportMetricsRequest(node_id=node_id, metrics=metrics)


def _capacity_messages(capacities: Iterable[TierCapacity]) -> list[Message]:
    return [
        pb.TierCapacity(tier=tier, total_capacity_bytes=total, available_capacity_bytes=available)
        for tier, total, available in capacities
    ]


def _event(delta: Delta) -> Message:
    key, tier, size = delta
    if size is None:
        return pb.KvEvent(kind=REMOVE, key=key, tier=tier)
    return pb.KvEvent(key=key, tier=tier, size=size)


def _histogram_of(entry: Message) -> HistogramDelta:
    histogram = entry.histogram_aggregate
    return HistogramDelta(tuple(histogram.bounds), tuple(histogram.bucket_counts), histogram.count, histogram.sum)


_READ_VALUE: dict[str, Callable[[Message], CounterDelta | GaugeValue | HistogramDelta]] = {
    "counter_delta": lambda entry: CounterDelta(entry.counter_delta),
    "gauge_value": lambda entry: GaugeValue(entry.gauge_value),
    "histogram_aggregate": _histogram_of,
}


def _value_field(value: CounterDelta | GaugeValue | HistogramDelta) -> dict[str, Any]:
    if isinstance(value, CounterDelta):
        return {"counter_delta": value.delta}
    if isinstance(value, GaugeValue):
        return {"gauge_value": value.value}
    histogram = pb.HistogramAggregate(
        bounds=value.bounds, bucket_counts=value.cumulative, count=value.observed, sum=value.total
    )
    return {"histogram_aggregate": histogram}
