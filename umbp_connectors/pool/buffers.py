"""Views of memory: what the pool takes and gives."""

from __future__ import annotations

import mmap
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

Bytes: TypeAlias = NDArray[np.uint8]
"""A one- or two-dimensional array of bytes."""

ReadableBuffer: TypeAlias = bytes | bytearray | memoryview | mmap.mmap | NDArray[Any]
"""Anything C-contiguous whose bytes can be read in place."""

WritableBuffer: TypeAlias = bytearray | memoryview | mmap.mmap | NDArray[Any]
"""Anything C-contiguous whose bytes can be written in place."""


_UINT8 = np.dtype(np.uint8)
_CLOSE = (1,)


def round_up(nbytes: int, unit: int) -> int:
    """The smallest multiple of ``unit`` that is at least ``nbytes``."""
    return -(-nbytes // unit) * unit


def address_of(view: Bytes) -> int:
    """Where the first byte of ``view`` lies in this process."""
    address: int = view.__array_interface__["data"][0]
    return address


def as_bytes(buffer: ReadableBuffer) -> Bytes:
    """``buffer`` as a flat array of bytes, without copying.

    Raises ``ValueError`` when the memory is not C-contiguous.
    """
    if isinstance(buffer, np.ndarray):
        if buffer.ndim == 1 and buffer.dtype == _UINT8 and buffer.strides == _CLOSE:
            return buffer
        if not buffer.flags.c_contiguous:
            raise ValueError("the buffer is not contiguous; copy it into one piece first")
        return buffer.reshape(-1).view(np.uint8)
    return np.frombuffer(buffer, dtype=np.uint8)
