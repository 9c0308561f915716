"""SGLang's page hashes as block keys."""

from __future__ import annotations

import hashlib
import struct
from binascii import unhexlify
from collections.abc import Callable, Iterator, Sequence

_HASH_BYTES = 32
_FIRST_CHUNK = 16
_GROWTH = 8


def block_keys(hashes: Sequence[str]) -> list[bytes]:
    """The block key of each page: the 32 bytes that its 64 hexadecimal digits stand for.

    A name of any other form, which only the oldest interface of SGLang may hand over, counts by its SHA-256.
    """
    count = len(hashes)
    try:
        joined = unhexlify("".join(hashes))
    except ValueError:
        return [_key_of(name) for name in hashes]
    # So many digits, and a line end after each 64 of them, are names of 64 digits: none borrowed some of its neighbour.
    ends = "\n".join(hashes)[2 * _HASH_BYTES :: 2 * _HASH_BYTES + 1]
    if len(joined) != _HASH_BYTES * count or ends != "\n" * (count - 1):
        return [_key_of(name) for name in hashes]
    return list(struct.unpack(f"{_HASH_BYTES}s" * count, joined))


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


def _key_of(name: str) -> bytes:
    try:
        key = bytes.fromhex(name) if len(name) == 2 * _HASH_BYTES else b""
    except ValueError:
        key = b""
    return key if len(key) == _HASH_BYTES else hashlib.sha256(b"name\0" + name.encode()).digest()
