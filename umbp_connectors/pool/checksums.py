"""The checksum that every object carries (law L1).

xxh3-128 over the object key followed by exactly the object's bytes.  The key is part of it, so that the right bytes
in the wrong place do not verify: a stale slot, another model's block or another rank's part is a miss.

xxhash releases the GIL while it reads a large buffer (measured on 4.1: a second Python thread keeps its whole core
during ``update`` of 256 MiB), therefore transfer threads may verify side by side.
"""

from __future__ import annotations

import numpy as np
from xxhash import xxh3_128

from umbp_connectors.pool.buffers import PIECE_BYTES, Bytes, Pieces, ReadableBuffer, View
from umbp_core.errors import StateError, VerificationError
from umbp_core.ops import CHECKSUM_BYTES


def object_checksum(object_key: bytes, data: ReadableBuffer) -> bytes:
    """The 16 bytes that vouch for ``data`` (C-contiguous, any length) under ``object_key``.  Any thread.

    Raises ``ValueError`` or ``BufferError`` when the memory is in pieces.
    """
    hasher = xxh3_128(object_key)
    hasher.update(data.data if isinstance(data, np.ndarray) else data)
    return hasher.digest()


def copy_checksummed(object_key: bytes, target: View, source: View) -> bytes:
    """Copy ``source`` to ``target`` (of equal size, at most one of them in pieces); return the checksum of the bytes.

    It is taken from ``target``, so that a copy that goes wrong is found as well, and piece by piece while the piece is
    still in the core's cache: for 4 MiB that makes the checksum cost half.  Rows that are too short to be hashed one by
    one are hashed on the flat side.
    """
    hasher = xxh3_128(object_key)
    if not isinstance(source, Pieces):
        if isinstance(target, Pieces):
            _scatter(hasher, target, source)
        else:
            _copy(hasher, target, source)
    elif isinstance(target, Pieces):
        raise StateError("pieces are copied to or from a page, not to other pieces")
    else:
        _gather(hasher, target, source)
    return hasher.digest()


def _gather(hasher: xxh3_128, target: Bytes, source: Pieces) -> None:
    at = 0
    for part in source.parts:
        place = target[at : at + part.nbytes]
        at += part.nbytes
        if part.ndim == 1:
            _copy(hasher, place, part)
        else:
            place.reshape(part.shape)[...] = part
            hasher.update(place.data)


def _scatter(hasher: xxh3_128, target: Pieces, source: Bytes) -> None:
    at = 0
    for part in target.parts:
        place = source[at : at + part.nbytes]
        at += part.nbytes
        if part.ndim == 1:
            _copy(hasher, part, place)
        else:
            part[...] = place.reshape(part.shape)
            hasher.update(place.data)


def _copy(hasher: xxh3_128, target: Bytes, source: Bytes) -> None:
    """Both are flat."""
    if source.nbytes <= PIECE_BYTES:
        target[...] = source
        hasher.update(target.data)
        return
    for start in range(0, source.nbytes, PIECE_BYTES):
        piece = target[start : start + PIECE_BYTES]
        piece[...] = source[start : start + PIECE_BYTES]
        hasher.update(piece.data)


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
