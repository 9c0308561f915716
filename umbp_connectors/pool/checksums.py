"""The checksum that every object carries (law L1).

xxh3-128 over the object key followed by exactly the object's bytes.  The key is part of it, so that the right bytes
in the wrong place do not verify: a stale slot, another model's block or another rank's part is a miss.

xxhash releases the GIL while it reads a large buffer (measured on 4.1: a second Python thread keeps its whole core
during ``update`` of 256 MiB), therefore transfer threads may verify side by side.
"""

from __future__ import annotations

import numpy as np
from xxhash import xxh3_128

from umbp_connectors.pool.buffers import Bytes, ReadableBuffer
from umbp_core.errors import VerificationError
from umbp_core.ops import CHECKSUM_BYTES

_PIECE = 512 << 10
"""Half of the second-level cache of a small core."""


def object_checksum(object_key: bytes, data: ReadableBuffer) -> bytes:
    """The 16 bytes that vouch for ``data`` (C-contiguous, any length) under ``object_key``.  Any thread.

    Raises ``ValueError`` or ``BufferError`` when the memory is in pieces.
    """
    hasher = xxh3_128(object_key)
    hasher.update(data.data if isinstance(data, np.ndarray) else data)
    return hasher.digest()


def copy_checksummed(object_key: bytes, target: Bytes, source: Bytes) -> bytes:
    """Copy ``source`` to ``target`` (flat, of equal size) and return the checksum of what is there then.

    It is taken from ``target``, so that a copy that goes wrong is found as well, and piece by piece while the piece is
    still in the core's cache: for 4 MiB that makes the checksum cost half.
    """
    hasher = xxh3_128(object_key)
    if source.nbytes <= _PIECE:
        target[...] = source
        hasher.update(target.data)
        return hasher.digest()
    for start in range(0, source.nbytes, _PIECE):
        piece = target[start : start + _PIECE]
        piece[...] = source[start : start + _PIECE]
        hasher.update(piece.data)
    return hasher.digest()


def verify_object(object_key: bytes, data: ReadableBuffer, expected: bytes) -> None:
    """Check ``data`` against the ``expected`` checksum, 16 bytes.

    Raises ``VerificationError`` when they differ, and when ``expected`` is not a checksum at all: an object whose
    checksum nobody knows is not served.
    """
    if len(expected) != CHECKSUM_BYTES:
        raise VerificationError(
            f"object {object_key.hex()}: its checksum has {len(expected)} bytes instead of {CHECKSUM_BYTES}; "
            "the object counts as lost and is computed again"
        )
    if object_checksum(object_key, data) != expected:
        raise VerificationError(
            f"object {object_key.hex()}: the bytes are not those that were stored; "
            "the object counts as lost and is computed again"
        )
