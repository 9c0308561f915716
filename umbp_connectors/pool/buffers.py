"""Views of memory: what the pool takes and gives, in one piece or in several."""

from __future__ import annotations

import ctypes
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

ScatteredSource: TypeAlias = ReadableBuffer | tuple[ReadableBuffer, ...]
"""An object to read: C-contiguous memory, an array whose last axis is contiguous, or a tuple of these (segments).

The object's bytes are the segments' in order, and an array's in C order.
"""

ScatteredTarget: TypeAlias = WritableBuffer | tuple[WritableBuffer, ...]
"""The same for an object to write."""

PIECE_BYTES = 512 << 10
"""What is copied and hashed in one go: half of the second-level cache of a small core."""
_ROW_BYTES = 16 << 10
"""Rows from this length on are copied one by one; shorter ones together, by one strided copy."""

_UINT8 = np.dtype(np.uint8)
_CLOSE = (1,)


class Pieces:
    """Memory in several places that together is one object.

    ``parts`` are arrays of bytes in the order of the object's bytes: flat ones, or small ones of more axes, whose last
    axis is contiguous.
    """

    __slots__ = ("nbytes", "parts")

    def __init__(self, parts: list[Bytes], nbytes: int | None = None) -> None:
        self.parts = parts
        self.nbytes: int = sum(part.nbytes for part in parts) if nbytes is None else nbytes


View: TypeAlias = Bytes | Pieces
"""One object's memory in a caller's process: flat, or in pieces."""


def round_up(nbytes: int, unit: int) -> int:
    """The smallest multiple of ``unit`` that is at least ``nbytes``."""
    return -(-nbytes // unit) * unit


def address_of(view: Bytes) -> int:
    """Where the first byte of ``view`` lies in this process."""
    address: int = view.__array_interface__["data"][0]
    return address


def memory_at(address: int, nbytes: int) -> Bytes:
    """``nbytes`` bytes of this process from ``address``, writable, without copying; to be kept alive by the caller.

    Raises ``ValueError`` when that cannot be memory.
    """
    if address <= 0 or nbytes < 0:
        raise ValueError(f"{nbytes} bytes at address {address} are no memory")
    if nbytes == 0:
        return np.empty(0, dtype=np.uint8)
    return np.frombuffer(memoryview((ctypes.c_ubyte * nbytes).from_address(address)), dtype=np.uint8)


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


def as_view(buffer: ScatteredSource) -> View:
    """``buffer``, in one piece or several, without copying.

    Raises ``ValueError`` when the last axis of an array is not contiguous.
    """
    if isinstance(buffer, tuple):
        return Pieces([part for segment in buffer for part in _parts_of(segment)])
    if not isinstance(buffer, np.ndarray):
        return as_bytes(buffer)
    if buffer.ndim == 2 and buffer.dtype == _UINT8:
        rows, row = buffer.shape
        apart, close = buffer.strides
        if close == 1 and row >= _ROW_BYTES and apart != row:
            # K and V of a page: what nearly every put and get consists of.  Small ones are copied in one go, since two
            # threads that copy wait for each other's GIL after every copy.
            return Pieces([buffer] if rows * row <= PIECE_BYTES else list(buffer), rows * row)
    if buffer.flags.c_contiguous:
        return as_bytes(buffer)
    return Pieces(_parts_of(buffer))


def is_writeable(view: View) -> bool:
    """Whether bytes can be put there."""
    return all(part.flags.writeable for part in view.parts) if isinstance(view, Pieces) else view.flags.writeable


def _parts_of(segment: ReadableBuffer) -> list[Bytes]:
    """One segment as rows, or as small arrays of rows that are too short to be copied one by one."""
    if not isinstance(segment, np.ndarray) or segment.flags.c_contiguous:
        return [as_bytes(segment)]
    if segment.shape[-1] > 1 and segment.strides[-1] != segment.itemsize:
        raise ValueError("the last axis of the buffer is not contiguous; copy it into one piece first")
    data: Bytes = segment.view(np.uint8)
    run, axis = 1, data.ndim
    while data.shape[axis - 1] == 1 or data.strides[axis - 1] == run:
        axis -= 1
        run *= data.shape[axis]
    if run < _ROW_BYTES:
        return _blocks_of(data)
    if axis == 1:
        return [row.reshape(-1) for row in data]
    return [data[index].reshape(-1) for index in np.ndindex(data.shape[:axis])]


def _blocks_of(data: Bytes) -> list[Bytes]:
    """``data`` cut along its first axes into arrays that fit a core's cache."""
    if data.nbytes <= PIECE_BYTES:
        return [data]
    step = PIECE_BYTES // (data.nbytes // len(data))
    if step:
        return [data[start : start + step] for start in range(0, len(data), step)]
    return [block for row in data for block in _blocks_of(row)]
