"""SGLang's page hashes as block keys."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable, Iterator, Sequence

_HASH_BYTES = 32
_FIRST_CHUNK = 16
_GROWTH = 8


def block_keys(hashes: Sequence[str]) -> list[bytes]:
    """The block key of each page: the 32 bytes that its 64 hexadecimal digits stand for.

    A name of any other form, which only the oldest interface of SGLang may hand over, counts by its SHA-256.
    """
    try:
        joined = bytes.fromhex("".join(hashes))
    except ValueError:
        return [_key_of(name) for name in hashes]
    if len(joined) != _HASH_BYTES * len(hashes) or not _all_long(hashes):
        return [_key_of(name) for name in hashes]
    return list(struct.unpack(f"{_HASH_BYTES}s" * len(hashes), joined))


def leading(hashes: Sequence[str], count: Callable[[list[bytes]], int]) -> int:
    """How many of ``hashes``, from the first on, ``count`` finds; asks in growing parts, so that a miss ends it early.

    ``count`` tells of a list of block keys how many it finds from the first on without a gap.
    """
    found = 0
    for start, stop in _chunks(len(hashes)):
        part = count(block_keys(hashes[start:stop]))
        found += part
        if part < stop - start:
            break
    return found


def _chunks(total: int) -> Iterator[tuple[int, int]]:
    start, size = 0, _FIRST_CHUNK
    while start < total:
        stop = min(start + size, total)
        yield start, stop
        start, size = stop, size * _GROWTH


def _all_long(hashes: Sequence[str]) -> bool:
    """Whether each has 64 digits, so that none of them borrowed some from its neighbour."""
    return set(map(len, hashes)) <= {2 * _HASH_BYTES}


def _key_of(name: str) -> bytes:
    try:
        key = bytes.fromhex(name)
    except ValueError:
        key = b""
    return key if len(key) == _HASH_BYTES else hashlib.sha256(b"name\0" + name.encode()).digest()
