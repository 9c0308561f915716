"""Reads and writes the large messages of UMBP's wire without stopping the loop, and matches without waste.

A request above :data:`WHOLE` bytes is parsed in pieces, an answer of more than :data:`SLICE` hashes is written in
pieces; the loop serves others in between.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from typing import TypeVar

from umbp_connectors.master.service import breathe
from umbp_connectors.wire_grpc import convert
from umbp_connectors.wire_grpc import messages as pb
from umbp_connectors.wire_grpc.codec import (
    LENGTH_DELIMITED,
    MatchWriter,
    cut,
    encode_hashes,
    fields,
    parse,
    parse_more,
    require_utf8,
)
from umbp_connectors.wire_grpc.messages import Message, MessageClass
from umbp_core.index_match import NodeMatch
from umbp_core.journal import Bundle, Delta
from umbp_core.master.model import Heartbeat
from umbp_core.master.samples import MetricSample

T = TypeVar("T")

WHOLE = 1 << 20
"""Bytes of a message that is parsed at one go: half a millisecond, or 8 when somebody fills it with empty strings."""
SLICE = 8192
"""Hashes or fields that are looked at before the loop may do something else: a millisecond or two."""
OBJECTS = 1024
"""The same for messages in messages: events, bundles, metrics, routes, nodes of an answer."""
_BUNDLES = 2
"""The field of a heartbeat that carries bundles."""


async def read(message_class: MessageClass, data: bytes) -> Message:
    """The message that ``data`` is.  Raises ``ProtocolError``."""
    if len(data) <= WHOLE:
        return parse(message_class, data)
    message = message_class()
    for piece in cut(data, SLICE):
        parse_more(message, piece)
        await breathe()
    return message


async def read_items(items: Sequence[bytes], data: bytes) -> list[bytes]:
    """The hashes or keys of a repeated field of the message ``data``, as a list.  Raises ``ProtocolError``."""
    if len(items) <= SLICE:
        whole = list(items)
        require_utf8(whole, data)
        return whole
    ascii_only = data.isascii()
    result: list[bytes] = []
    async for start in in_turns(range(0, len(items), SLICE), 1):
        part = items[start : start + SLICE]
        if not ascii_only:
            require_utf8(part)
        result += part
    return result


async def read_heartbeat(data: bytes) -> Heartbeat:
    """A heartbeat.  Raises ``ProtocolError``, and ``InvalidRequest`` for kinds of events that are not known."""
    if len(data) <= WHOLE:
        message = parse(pb.HeartbeatRequest, data)
        return _heartbeat(message, [await _bundle(bundle) async for bundle in in_turns(message.bundles)])
    rest, spans = bytearray(), []
    for count, field in enumerate(fields(data), start=1):
        if field.number == _BUNDLES and field.wire_type == LENGTH_DELIMITED:
            spans.append((field.payload, field.end))
        else:
            rest += data[field.start : field.end]
        if count % OBJECTS == 0:
            await breathe()
    message = parse(pb.HeartbeatRequest, bytes(rest))
    bundles = [await _bundle(await read(pb.EventBundle, data[start:end])) async for start, end in in_turns(spans)]
    return _heartbeat(message, bundles)


async def read_samples(entries: Sequence[Message]) -> list[MetricSample]:
    """The metrics that a node hands over."""
    samples: list[MetricSample] = []
    async for start in in_turns(range(0, len(entries), OBJECTS), 1):
        samples += convert.samples_of(entries[start : start + OBJECTS])
    return samples


async def in_turns(items: Iterable[T], at_once: int = OBJECTS) -> AsyncIterator[T]:
    """``items``, others having their turn before each ``at_once`` of them but the first."""
    for count, item in enumerate(items):
        if count and count % at_once == 0:
            await breathe()
        yield item


async def write_matches(matches: Sequence[NodeMatch], address_of: Callable[[str], str]) -> bytes:
    """The answer to a match.  Raises ``MessageTooLarge``."""
    writer = MatchWriter()
    written: dict[int, bytes] = {}
    async for match in in_turns(matches):
        buckets = []
        for tier, hashes in match.tiers.items():
            data = written.get(id(hashes))
            if data is None:
                data = written[id(hashes)] = await _write_hashes(hashes)
            buckets.append((tier, data))
        writer.node(match.node, address_of(match.node), buckets)
    return writer.finish()


async def _write_hashes(hashes: Sequence[bytes]) -> bytes:
    if len(hashes) <= SLICE:
        return encode_hashes(hashes)
    slices = in_turns(range(0, len(hashes), SLICE), 1)
    return b"".join([encode_hashes(hashes[start : start + SLICE]) async for start in slices])


async def _bundle(message: Message) -> Bundle:
    events = message.events
    if len(events) <= OBJECTS:
        return Bundle(message.seq, _deltas(events))
    deltas: list[Delta] = []
    async for start in in_turns(range(0, len(events), OBJECTS), 1):
        deltas += _deltas(events[start : start + OBJECTS])
    return Bundle(message.seq, tuple(deltas))


def _deltas(events: Sequence[Message]) -> tuple[Delta, ...]:
    deltas = tuple(convert.deltas_of(events))
    require_utf8([delta.key for delta in deltas])
    return deltas


def _heartbeat(message: Message, bundles: list[Bundle]) -> Heartbeat:
    return Heartbeat(
        node_id=message.node_id,
        bundles=bundles,
        full_sync=message.is_full_sync,
        baseline=message.delta_seq_baseline,
        capacities=convert.capacities_of(message.tier_capacities) or None,
        counts={entry.tier: entry.count for entry in message.tier_kv_counts} or None,
    )
