"""Lists of hashes as one field of bytes: a hundred of them cost a few microseconds, where a list would cost tens.

::

    offset  0   u8    mode
            1   u32   how many
            5   u32   width (FIXED), separator (SEPARATED), 0 (LENGTHS)
            9         FIXED      the hashes, one after the other, each of that width (at least 1)
                      SEPARATED  the hashes with one separator, a byte that is in none of them, between two
                      LENGTHS    a u16 per hash, then the hashes

Whoever packs chooses the mode, whoever unpacks takes all three.  An empty list is LENGTHS.  Integers are little-endian.
"""

from __future__ import annotations

import enum
import struct
from array import array
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import accumulate, chain, pairwise

import numpy as np

from umbp_core.errors import InvalidRequest, ProtocolError
from umbp_core.joined import JoinedHashes
from umbp_core.wire import bounds
from umbp_core.wire.columns import pack_column, unpack_column

_HEAD = struct.Struct("<BII")
_HEAD_BYTES = _HEAD.size
_SEPARATOR = 0
_SEPARATORS = [bytes((value,)) for value in range(256)]
_CHUNK = 256
"""Hashes that one compiled format takes apart."""
_WORTH = 4
"""Hashes from which on it is worth while to leave a list as it is."""
_LARGE = 4096
"""Bytes from which on numpy counts faster."""


class Packing(enum.IntEnum):
    """How a list is packed."""

    LENGTHS = 0
    FIXED = 1
    SEPARATED = 2


EMPTY = _HEAD.pack(Packing.LENGTHS, 0, 0)
"""No hashes."""
PART = 8192
"""Hashes, at most, of one part of a list that is unpacked in parts."""
_PART_BYTES = PART * 16
_PACKED_LENGTHS, _PACKED_FIXED, _PACKED_SEPARATED = map(int, Packing)


def pack_hashes(hashes: Sequence[bytes]) -> bytes:
    """``hashes``, in their order.  Raises ``InvalidRequest`` when they are too many, or one too long."""
    count = len(hashes)
    if not count:
        return EMPTY
    if count > bounds.HASHES:
        raise InvalidRequest(f"{count} hashes are above the bound of {bounds.HASHES}; send them in parts")
    joined = b"\0".join(hashes)
    if len(joined) > bounds.HASH_BYTES and max(map(len, hashes)) > bounds.HASH_BYTES:
        raise InvalidRequest(f"a hash is longer than {bounds.HASH_BYTES} bytes; no index takes it")
    if _occurrences(joined, _SEPARATOR) == count - 1:
        return _HEAD.pack(_PACKED_SEPARATED, count, _SEPARATOR) + joined
    lengths = list(map(len, hashes))
    if min(lengths) == lengths[0] == max(lengths):
        return _HEAD.pack(_PACKED_FIXED, count, lengths[0]) + b"".join(hashes)
    return b"".join([_HEAD.pack(Packing.LENGTHS, count, 0), pack_column("H", lengths), *hashes])


def count_hashes(blob: bytes) -> int:
    """How many hashes ``blob`` says that it holds, without unpacking them.  Raises ``ProtocolError``."""
    if len(blob) < _HEAD_BYTES:
        raise ProtocolError(f"a packed list has {len(blob)} bytes, its head alone {_HEAD_BYTES}")
    return int.from_bytes(blob[1:5], "little")


def unpack_hashes(blob: bytes, limit: int = bounds.HASHES) -> list[bytes]:
    """The hashes of ``blob``, at most ``limit``.  Raises ``ProtocolError`` before anything is made of what is wrong."""
    mode, count, parameter = _head_of(blob, limit)
    if mode == _PACKED_SEPARATED:
        return _unpack_separated(blob[_HEAD_BYTES:], count, parameter)
    if mode == _PACKED_FIXED:
        _check_fixed(blob, count, parameter)
        return _unpack_fixed(blob[_HEAD_BYTES:], count, parameter)
    return _unpack_lengths(blob, count)


def view_hashes(blob: bytes, limit: int = bounds.HASHES) -> Sequence[bytes]:
    """Like :func:`unpack_hashes`, but what need not be taken apart to be understood is left as it is."""
    mode, count, parameter = _head_of(blob, limit)
    if mode != _PACKED_SEPARATED or count < _WORTH or len(blob) > bounds.HASH_BYTES or parameter >= len(_SEPARATORS):
        return unpack_hashes(blob, limit)
    data = blob[_HEAD_BYTES:]
    if _occurrences(data, parameter) != count - 1:
        raise _not_separated(count)
    return JoinedHashes(data, _SEPARATORS[parameter], count)


def unpack_in_parts(blob: bytes, limit: int = bounds.HASHES) -> Iterator[list[bytes]]:
    """Like :func:`unpack_hashes`, up to ``PART`` hashes at a time, for those who have other things to do in between."""
    mode, count, parameter = _head_of(blob, limit)
    if count <= PART:
        yield unpack_hashes(blob, limit)
    elif mode == _PACKED_LENGTHS:
        yield from _lengths_in_parts(blob, count)
    elif mode == _PACKED_FIXED:
        _check_fixed(blob, count, parameter)
        step = PART * parameter
        for at in range(_HEAD_BYTES, len(blob), step):
            part = blob[at : at + step]
            yield _unpack_fixed(part, len(part) // parameter, parameter)
    else:
        data = blob[_HEAD_BYTES:]
        if parameter >= len(_SEPARATORS) or _occurrences(data, parameter) != count - 1:
            raise _not_separated(count)
        yield from _split_in_parts(data, _SEPARATORS[parameter])


def _head_of(blob: bytes, limit: int) -> tuple[int, int, int]:
    """Mode, count and parameter."""
    if len(blob) < _HEAD_BYTES:
        raise ProtocolError(f"a packed list has {len(blob)} bytes, its head alone {_HEAD_BYTES}")
    head: tuple[int, int, int] = _HEAD.unpack_from(blob)
    mode, count, parameter = head
    if count > limit:
        raise ProtocolError(f"{count} hashes are above the bound of {limit}; send them in parts")
    if mode > _PACKED_SEPARATED or (mode == _PACKED_LENGTHS and parameter):
        raise ProtocolError(f"packing mode {mode} with parameter {parameter} is not known")
    return head


def _unpack_separated(data: bytes, count: int, separator: int) -> list[bytes]:
    if not count or separator >= len(_SEPARATORS):
        raise _not_separated(count)
    hashes = data.split(_SEPARATORS[separator], count)  # into count + 1 parts at most
    if len(hashes) != count:
        raise _not_separated(count)
    return hashes if len(data) <= bounds.HASH_BYTES else _checked(hashes)


def _occurrences(data: bytes, value: int) -> int:
    """How often the byte ``value`` is in ``data``."""
    if len(data) < _LARGE:
        return data.count(value)
    return int(np.count_nonzero(np.frombuffer(data, np.uint8) == value))


def _not_separated(count: int) -> ProtocolError:
    return ProtocolError(f"a packed list does not hold the {count} hashes between separators that it claims")


def _check_fixed(blob: bytes, count: int, width: int) -> None:
    if not count or not 0 < width <= bounds.HASH_BYTES or len(blob) - _HEAD_BYTES != count * width:
        raise ProtocolError(f"a packed list does not hold the {count} hashes of {width} bytes that it claims")


def _checked(hashes: list[bytes]) -> list[bytes]:
    """``hashes``, none of which is too long."""
    if max(map(len, hashes)) > bounds.HASH_BYTES:
        raise ProtocolError(f"a hash is longer than {bounds.HASH_BYTES} bytes")
    return hashes


def _split_in_parts(data: bytes, separator: bytes) -> Iterator[list[bytes]]:
    at = 0
    while True:
        end = data.find(separator, at + _PART_BYTES)
        part = data[at:] if end < 0 else data[at:end]
        hashes = _checked(part.split(separator))
        for begin in range(0, len(hashes), PART):
            yield hashes[begin : begin + PART]
        if end < 0:
            return
        at = end + 1


def _unpack_fixed(data: bytes, count: int, width: int) -> list[bytes]:
    rest = count % _CHUNK
    tail = _format(width, rest).unpack_from(data, len(data) - rest * width) if rest else ()
    if rest == count:
        return list(tail)
    body = memoryview(data)[: len(data) - rest * width]
    return [*chain.from_iterable(_format(width, _CHUNK).iter_unpack(body)), *tail]


def _unpack_lengths(blob: bytes, count: int) -> list[bytes]:
    start = _lengths_end(blob, count)
    ends = array("Q", accumulate(unpack_column("H", blob[_HEAD_BYTES:start], count), initial=start))
    _check_end(blob, ends[-1])
    return [blob[begin:end] for begin, end in pairwise(ends)]


def _lengths_in_parts(blob: bytes, count: int) -> Iterator[list[bytes]]:
    at = start = _lengths_end(blob, count)
    total = np.frombuffer(blob, "<u2", count, _HEAD_BYTES).sum(dtype=np.uint64)
    _check_end(blob, start + int(total))
    for column in range(_HEAD_BYTES, start, 2 * PART):
        lengths = blob[column : min(column + 2 * PART, start)]
        ends = array("Q", accumulate(unpack_column("H", lengths, len(lengths) // 2), initial=at))
        yield [blob[begin:end] for begin, end in pairwise(ends)]
        at = ends[-1]


def _lengths_end(blob: bytes, count: int) -> int:
    """Where the lengths end, and the hashes begin."""
    start = _HEAD_BYTES + 2 * count
    if start > len(blob):
        raise ProtocolError(f"a packed list ends within its {count} lengths")
    return start


def _check_end(blob: bytes, end: int) -> None:
    if end != len(blob):
        raise ProtocolError(f"a packed list has {len(blob)} bytes, by its lengths {end}")


@lru_cache(maxsize=256)
def _format(width: int, count: int) -> struct.Struct:
    """Takes ``count`` hashes of ``width`` bytes apart in one call."""
    return struct.Struct(f"{width}s" * count)
