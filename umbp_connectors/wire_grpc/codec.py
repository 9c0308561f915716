"""What protobuf's own classes do not give: messages in pieces, the encoding of hashes, a fast answer to a match.

A message is a row of fields, and to parse two messages one after the other into one object is, by protobuf's
definition, to parse their concatenation.  So a large message may be cut between any two fields and parsed piece by
piece, with other work in between.  Pure functions; no I/O.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from google.protobuf.message import DecodeError

from umbp_connectors.wire_grpc.messages import MatchExternalKvResponse, Message, MessageClass, TierHashes
from umbp_core.errors import InvalidRequest, ProtocolError
from umbp_core.master.model import ExternalMatch

MAX_MESSAGE = 64 << 20
"""Bytes of a message, both ways, as UMBP's master and client have it."""
LENGTH_DELIMITED = 2
_VARINT, _FIXED64, _GROUP, _END_GROUP, _FIXED32 = 0, 1, 3, 4, 5
_MAX_VARINT = 10
_MAX_DEPTH = 100
_TIER_TAG = b"\x08"
_KNOWN_BUCKETS = 8
"""Different buckets of one match that are remembered while it is read."""


class MessageTooLarge(InvalidRequest):
    """An answer would pass :data:`MAX_MESSAGE`; ask for less at a time."""


class Field(NamedTuple):
    """One field of a message: its number, its wire type, where it starts, where its payload starts, where it ends."""

    number: int
    wire_type: int
    start: int
    payload: int
    end: int


def parse(message_class: MessageClass, data: bytes) -> Message:
    """The message that ``data`` is, at one go.  Raises ``ProtocolError``."""
    try:
        return message_class.FromString(data)
    except DecodeError as error:
        raise _malformed(message_class) from error


def parse_more(message: Message, data: bytes) -> None:
    """Read ``data``, which goes on where the last piece was cut, into ``message``.  Raises ``ProtocolError``."""
    try:
        message.MergeFromString(data)
    except DecodeError as error:
        raise _malformed(type(message)) from error


def fields(data: bytes) -> Iterator[Field]:
    """The fields of a message, whatever they mean.  Raises ``ProtocolError`` where it cannot be one."""
    position = 0
    while position < len(data):
        field = _field(data, position)
        position = field.end
        yield field


def cut(data: bytes, piece_fields: int) -> Iterator[bytes]:
    """The message in pieces of ``piece_fields`` fields at most.  Raises ``ProtocolError`` where it cannot be one."""
    position, size = 0, len(data)
    while position < size:
        begin = position
        for _ in range(piece_fields):
            # Short strings, of which messages that are worth cutting consist: one byte of tag, one of length.
            if position + 1 < size and data[position] & 0x87 == LENGTH_DELIMITED and data[position + 1] < 0x80:
                position += 2 + data[position + 1]
            elif position < size:
                position = _field(data, position).end
            else:
                break
        if position > size:
            raise _ended()
        yield data[begin:position]


def _field(data: bytes, start: int) -> Field:
    tag, position = _varint(data, start)
    number, wire_type = tag >> 3, tag & 7
    payload = position
    if wire_type == LENGTH_DELIMITED:
        length, payload = _varint(data, position)
        position = payload + length
    else:
        position = _skip(data, position, number, wire_type)
    if position > len(data):
        raise _ended()
    return Field(number, wire_type, start, payload, position)


def _ended() -> ProtocolError:
    return ProtocolError("a message ends in the middle of a field; it was cut on its way")


def require_utf8(items: Sequence[bytes], data: bytes = b"\xff") -> None:
    """Raises ``ProtocolError`` unless every one of ``items``, hashes or keys, is UTF-8.

    ``data`` is the message they were read from: almost always it is ASCII as a whole, which is seen at once.
    """
    if data.isascii() or b"".join(items).isascii():
        return
    for item in items:
        try:
            item.decode()
        except UnicodeDecodeError as error:
            raise ProtocolError(
                f"{item[:64]!r} is not UTF-8, and hashes and keys are strings on this wire; send it in hex"
            ) from error


def encode_varint(value: int) -> bytes:
    """``value`` as a varint; negative numbers are those of 64 bits."""
    value &= (1 << 64) - 1
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def encode_text(tag: bytes, text: str) -> bytes:
    """A string field; nothing when it is empty, as proto3 has it."""
    if not text:
        return b""
    data = text.encode()
    return tag + encode_varint(len(data)) + data


class MatchWriter:
    """Writes a ``MatchExternalKvResponse``.

    The hashes of a bucket are written by protobuf, once per list however many buckets it is in; what is around them
    is put together here.  Raises :class:`MessageTooLarge` as soon as the answer cannot be sent.
    """

    def __init__(self) -> None:
        self._parts: list[bytes] = []
        self._size = 0

    def node(self, node_id: str, peer_address: str, buckets: Sequence[tuple[int, bytes]]) -> None:
        """Add what one node holds: per tier, what :func:`encode_hashes` made of its hashes."""
        parts = [encode_text(b"\x0a", node_id), encode_text(b"\x12", peer_address)]
        for tier, hashes in buckets:
            head = b"\x08" + encode_varint(tier) if tier else b""
            parts += [b"\x1a", encode_varint(len(head) + len(hashes)), head, hashes]
        size = sum(map(len, parts))
        self._parts += [b"\x0a", encode_varint(size), *parts]
        self._size += size + 6
        if self._size > MAX_MESSAGE:
            raise too_large()

    def finish(self) -> bytes:
        """The message."""
        return b"".join(self._parts)


def read_matches(data: bytes) -> list[ExternalMatch]:
    """A ``MatchExternalKvResponse``; what several nodes or tiers hold alike is read once.  Raises ``ProtocolError``."""
    known: deque[tuple[bytes, list[bytes]]] = deque(maxlen=_KNOWN_BUCKETS)
    matches = []
    for match in parse(MatchExternalKvResponse, data).matches:
        tiers = dict(_read_bucket(bucket, known) for bucket in match.hashes_by_tier)
        matches.append(ExternalMatch(match.node_id, match.peer_address, tiers))
    return matches


def _read_bucket(data: bytes, known: deque[tuple[bytes, list[bytes]]]) -> tuple[int, list[bytes]]:
    """Tier and hashes of a ``TierHashes``; a tier that does not stand first, as writers put it, is found too."""
    end = _varint(data, 1)[1] if data.startswith(_TIER_TAG) else 0
    tier: int = parse(TierHashes, data[:end]).tier
    rest = data[end:]
    for same, hashes in known:
        if same == rest:
            return tier, hashes.copy()
    bucket = parse(TierHashes, rest)
    hashes = list(bucket.hashes)
    if bucket.tier:
        return bucket.tier, hashes
    known.append((rest, hashes))
    return tier, hashes


def encode_hashes(hashes: Sequence[bytes]) -> bytes:
    """The hashes of a ``TierHashes``, without its tier."""
    data: bytes = TierHashes(hashes=hashes).SerializeToString()
    return data


def too_large() -> MessageTooLarge:
    """What is raised when an answer does not fit a message."""
    return MessageTooLarge(f"the answer has more than the {MAX_MESSAGE} bytes of a message; ask for less at once")


def _malformed(message_class: MessageClass) -> ProtocolError:
    name = message_class.DESCRIPTOR.name
    return ProtocolError(f"the bytes are not a {name}, or a string in it is not UTF-8")


def _varint(data: bytes, position: int) -> tuple[int, int]:
    try:
        value = data[position]
        if value < 0x80:
            return value, position + 1
        value &= 0x7F
        for index in range(1, _MAX_VARINT):
            byte = data[position + index]
            value |= (byte & 0x7F) << (7 * index)
            if byte < 0x80:
                return value, position + index + 1
    except IndexError:
        raise ProtocolError("a message ends in the middle of a number; it was cut on its way") from None
    raise ProtocolError(f"a number in a message has more than {_MAX_VARINT} bytes")


def _skip(data: bytes, position: int, number: int, wire_type: int) -> int:
    """The end of a field that has no length of its own."""
    if wire_type == _GROUP:
        return _skip_group(data, position, number)
    skip = _SKIP.get(wire_type)
    if skip is None:
        raise ProtocolError(f"a message has a field of wire type {wire_type}, which does not stand where it may")
    return skip(data, position)


def _skip_group(data: bytes, position: int, number: int) -> int:
    """Groups are of proto2 and not used by UMBP, but a message may carry any field that is not known."""
    nested = [number]
    while nested:
        tag, position = _varint(data, position)
        number, wire_type = tag >> 3, tag & 7
        if wire_type == _GROUP:
            nested.append(number)
            if len(nested) > _MAX_DEPTH:
                raise ProtocolError(f"a message nests groups deeper than {_MAX_DEPTH}")
        elif wire_type == _END_GROUP:
            if nested.pop() != number:
                raise ProtocolError("a message ends a group that it did not begin")
        elif wire_type == LENGTH_DELIMITED:
            length, position = _varint(data, position)
            position += length
        else:
            position = _skip(data, position, number, wire_type)
    return position


_SKIP: dict[int, Callable[[bytes, int], int]] = {
    _VARINT: lambda data, position: _varint(data, position)[1],
    _FIXED64: lambda _data, position: position + 8,
    _FIXED32: lambda _data, position: position + 4,
}
