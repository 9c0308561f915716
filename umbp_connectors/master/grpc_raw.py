"""Reads and writes the large messages of UMBP's wire without stopping the loop, and matches without waste.

A request above :data:`WHOLE` bytes is parsed in pieces, an answer of more than :data:`SLICE` hashes is written in
pieces; the loop serves others in between.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

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

WHOLE = 1 << 20
"""Bytes of a message that is parsed at one go: half a millisecond, or 8 when somebody fills it with empty strings."""
SLICE = 8192
"""Hashes, events or fields that are looked at before the loop may do something else: a millisecond or two."""
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
    for start in range(0, len(items), SLICE):
        part = items[start : start + SLICE]
        if not ascii_only:
            require_utf8(part)
        result += part
        await breathe()
    return result


async def read_heartbeat(data: bytes) -> Heartbeat:
    """A heartbeat.  Raises ``ProtocolError``, and ``InvalidRequest`` for kinds of events that are not known."""
    if len(data) <= WHOLE:
        message = parse(pb.HeartbeatRequest, data)
        return _heartbeat(message, [await _bundle(bundle) for bundle in message.bundles])
    rest, bundles, parts = bytearray(), [], []
    for count, field in enumerate(fields(data), start=1):
        if field.number == _BUNDLES and field.wire_type == LENGTH_DELIMITED:
            parts.append((field.payload, field.end))
        else:
            rest += data[field.start : field.end]
        if count % SLICE == 0:
            await breathe()
    message = parse(pb.HeartbeatRequest, bytes(rest))
    for count, (start, end) in enumerate(parts, start=1):
        bundles.append(await _bundle(await read(pb.EventBundle, data[start:end])))
        if count % SLICE == 0:
            await breathe()
    return _heartbeat(message, bundles)


async def write_matches(matches: Iterable[NodeMatch], address_of: Callable[[str], str]) -> bytes:
    """The answer to a match.  Raises ``MessageTooLarge``."""
    writer = MatchWriter()
    written: dict[int, bytes] = {}
    for match in matches:
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
    parts = []
    for start in range(0, len(hashes), SLICE):
        parts.append(encode_hashes(hashes[start : start + SLICE]))
        await breathe()
    return b"".join(parts)


async def _bundle(message: Message) -> Bundle:
    events = message.events
    if len(events) <= SLICE:
        return Bundle(message.seq, _deltas(events))
    deltas: list[Delta] = []
    for start in range(0, len(events), SLICE):
        deltas += _deltas(events[start : start + SLICE])
        await breathe()
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
