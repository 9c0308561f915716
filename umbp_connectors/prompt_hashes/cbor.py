"""Canonical CBOR (RFC 8949, section 4.2) of what a block's hash covers."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import TypeAlias

Item: TypeAlias = "int | bytes | str | Sequence[Item] | None"

_UNSIGNED, _NEGATIVE, _BYTES, _TEXT, _ARRAY = (major << 5 for major in (0, 1, 2, 3, 4))
_NULL = b"\xf6"
_INLINE = 24
"""Numbers below this are part of the first byte."""
_WIDTHS = ((24, 1), (25, 2), (26, 4), (27, 8))
"""The first byte's low bits, and how many bytes of number follow."""


def encode(item: Item) -> bytes:
    """``item`` in its only canonical form; integers are those of 64 bits and a sign."""
    if isinstance(item, int):
        return _head(_UNSIGNED, item) if item >= 0 else _head(_NEGATIVE, -1 - item)
    if item is None:
        return _NULL
    if isinstance(item, bytes):
        return _head(_BYTES, len(item)) + item
    if isinstance(item, str):
        text = item.encode()
        return _head(_TEXT, len(text)) + text
    return _head(_ARRAY, len(item)) + b"".join(map(encode, item))


@lru_cache(maxsize=1 << 16)
def _head(major: int, number: int) -> bytes:
    """The beginning of an item: its kind with a number, in as few bytes as hold it."""
    if number < _INLINE:
        return bytes((major | number,))
    for low, width in _WIDTHS:
        if number < 1 << 8 * width:
            return bytes((major | low,)) + number.to_bytes(width, "big")
    raise OverflowError(f"{number} does not fit 64 bits; CBOR would need a big number here, which no block has")
