"""Columns: many numbers, flags or names as one field of bytes.

Numbers lie one after the other, little-endian, at a fixed width.  A bitmap has one bit per position of the list that it
speaks of, the lowest bit of the first byte for the first; the bits behind the last position are 0.
"""

from __future__ import annotations

import sys
from array import array
from collections.abc import Iterable, Sequence
from functools import lru_cache
from itertools import compress
from typing import TypeVar

import numpy as np

from umbp_core.errors import InvalidRequest, ProtocolError

T = TypeVar("T")

WIDTHS = {"B": 1, "H": 2, "i": 4, "I": 4, "q": 8, "Q": 8, "d": 8}
"""Type codes, as the ``struct`` module has them, to bytes per number."""
_FOREIGN = sys.byteorder != "little"


def pack_column(code: str, values: Iterable[float]) -> bytes:
    """``values`` as numbers of the type ``code``.  Raises ``InvalidRequest`` when one does not fit it."""
    try:
        column = array(code, values)
    except (OverflowError, TypeError) as error:
        raise InvalidRequest(f"a number does not fit its {8 * WIDTHS[code]} bits on the wire: {error}") from None
    if _FOREIGN:
        column.byteswap()
    return column.tobytes()


def check_column(code: str, blob: bytes, count: int) -> None:
    """Raises ``ProtocolError`` when ``blob`` has more or fewer than ``count`` numbers."""
    if len(blob) != WIDTHS[code] * count:
        raise ProtocolError(f"a column of {count} numbers of {WIDTHS[code]} bytes has {len(blob)} bytes")


def unpack_column(code: str, blob: bytes, count: int) -> array[int]:
    """The ``count`` integers of ``blob``.  Raises ``ProtocolError`` when there are more or fewer."""
    check_column(code, blob, count)
    column = array(code)
    column.frombytes(blob)
    if _FOREIGN:
        column.byteswap()
    return column


def unpack_floats(blob: bytes, count: int) -> array[float]:
    """The ``count`` numbers of ``blob``, of 8 bytes each.  Raises ``ProtocolError`` when there are more or fewer."""
    check_column("d", blob, count)
    column = array("d")
    column.frombytes(blob)
    if _FOREIGN:
        column.byteswap()
    return column


def bitmap_bytes(count: int) -> int:
    """The length of a bitmap of ``count`` positions."""
    return (count + 7) >> 3


@lru_cache(maxsize=256)
def full_bitmap(count: int) -> bytes:
    """The bitmap with all of ``count`` positions."""
    return ((1 << count) - 1).to_bytes(bitmap_bytes(count), "little")


def pack_bitmap(flags: Sequence[bool]) -> bytes:
    """The positions at which ``flags`` are true."""
    return np.packbits(np.frombuffer(bytes(flags), dtype=np.uint8), bitorder="little").tobytes()


def unpack_bitmap(bitmap: bytes, count: int) -> bytes:
    """One byte per position, 0 or 1.  Raises ``ProtocolError`` when ``bitmap`` is not one of ``count`` positions."""
    if len(bitmap) != bitmap_bytes(count) or (count & 7 and bitmap[-1] >> (count & 7)):
        raise ProtocolError(f"{len(bitmap)} bytes are no bitmap of {count} positions")
    return np.unpackbits(np.frombuffer(bitmap, dtype=np.uint8), count=count, bitorder="little").tobytes()


def select(items: Sequence[T], bitmap: bytes) -> list[T]:
    """Those of ``items`` whose position is in ``bitmap``, in their order.  Raises ``ProtocolError``."""
    if bitmap == full_bitmap(len(items)):
        return list(items)
    return list(compress(items, unpack_bitmap(bitmap, len(items))))
