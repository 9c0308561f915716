"""Objects that are rows of one array: neighbours are copied together.

Every copy and every checksum lets go of the GIL and takes it again.  Two threads that do so for each object of 256 KiB
wait for each other about as long as they copy; with several objects per copy they reach nearly twice the rate
(measured on two virtual processors: 18 instead of 12 GB/s, where one thread that only copies has 10).  More than a
core's cache holds would be read from memory twice, to be copied and to be hashed: with 2 MiB in one go instead of half
of one, a put takes 4 % longer and a get 10 (medians of 80 calls of 128 objects of 256 KiB, 2 MiB of cache).
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Sequence
from typing import Any, overload

import numpy as np
from numpy.lib.stride_tricks import as_strided
from xxhash import xxh3_128

from umbp_connectors.pool.buffers import (
    Bytes,
    ReadableBuffer,
    ScatteredSource,
    View,
    WritableBuffer,
    address_of,
    as_view,
    is_writeable,
)
from umbp_connectors.pool.checksums import object_checksum

ALONE_BYTES = 192 << 10
"""Copies that are smaller on average are left to one thread: several would wait for each other's GIL after each."""
_CLOSE = (1,)
_SMALL_BYTES = 1 << 20
"""Rows up to here are copied in one go each, however many pieces they are in."""


class ObjectRows(Sequence[Bytes]):
    """``whole[number]`` for each of ``numbers``: what a put or a get takes in place of a list of these arrays.

    ``whole`` is an array of bytes (uint8) whose first axis are the rows and whose last one is contiguous; each row is
    one object, its bytes in C order.
    """

    __slots__ = ("numbers", "whole")

    def __init__(self, whole: Bytes, numbers: Sequence[int]) -> None:
        self.whole = whole
        self.numbers = numbers

    def __len__(self) -> int:
        return len(self.numbers)

    @overload
    def __getitem__(self, index: int) -> Bytes: ...

    @overload
    def __getitem__(self, index: slice) -> ObjectRows: ...

    def __getitem__(self, index: int | slice) -> Bytes | ObjectRows:
        if isinstance(index, slice):
            return ObjectRows(self.whole, self.numbers[index])
        row: Bytes = self.whole[self.numbers[index]]
        return row


class RowViews(Sequence[View]):
    """The rows as views, made when they are asked for."""

    __slots__ = ("_rows", "nbytes_each")

    def __init__(self, rows: ObjectRows) -> None:
        self._rows = rows
        self.nbytes_each = rows.whole[:1].nbytes

    def __len__(self) -> int:
        return len(self._rows.numbers)

    @overload
    def __getitem__(self, index: int) -> View: ...

    @overload
    def __getitem__(self, index: slice) -> RowViews: ...

    def __getitem__(self, index: int | slice) -> View | RowViews:
        return RowViews(self._rows[index]) if isinstance(index, slice) else as_view(self._rows[index])

    @property
    def numbers(self) -> Sequence[int]:
        """Which rows they are."""
        return self._rows.numbers

    @property
    def are_small(self) -> bool:
        """Whether a row is copied and hashed in one go, also where no neighbour is; larger ones piece by piece."""
        return self.nbytes_each <= _SMALL_BYTES

    @property
    def is_writeable(self) -> bool:
        """Whether bytes can be put there."""
        return bool(self._rows.whole.flags.writeable)

    def together(self, first: int, stop: int) -> Bytes:
        """The neighbours ``first`` to ``stop`` (excluded) as one array."""
        number = self._rows.numbers[first]
        rows: Bytes = self._rows.whole[number : number + stop - first]
        return rows


Views = list[View] | RowViews
"""The memory of a batch's objects."""


def views_of(buffers: Sequence[ScatteredSource]) -> Views:
    """``buffers`` as views.

    Raises ``ValueError`` when the last axis of an array is not contiguous, and for rows that do not exist.
    """
    if isinstance(buffers, ObjectRows):
        whole, numbers = buffers.whole, buffers.numbers
        if whole.dtype != np.uint8 or whole.ndim < 2 or whole.strides[-1] != 1:
            raise ValueError("rows of objects are bytes whose last axis is contiguous; give a list of buffers instead")
        if numbers and not 0 <= min(numbers) <= max(numbers) < len(whole):
            raise ValueError(f"rows {min(numbers)} to {max(numbers)} of an array that has {len(whole)}")
        return RowViews(buffers)
    return _side_by_side(buffers) or [as_view(buffer) for buffer in buffers]


def _side_by_side(buffers: Sequence[ScatteredSource]) -> RowViews | None:
    """``buffers`` as rows, if they are small arrays of bytes, of one size, and neighbours in one piece of memory.

    Found out for objects whose copies threads could not share otherwise: for larger ones it costs more than it gains.
    """
    first = buffers[0] if len(buffers) > 1 else None
    if not isinstance(first, np.ndarray) or first.ndim != 1 or not 0 < first.nbytes < ALONE_BYTES:
        return None
    base, shape, dtype = first.base, first.shape, first.dtype
    if base is None or dtype != np.uint8:
        return None
    for buffer in buffers:
        # Of one object's memory, so that all of it lives as long as the first one's does.
        if not isinstance(buffer, np.ndarray) or buffer.base is not base or buffer.strides != _CLOSE:
            return None
        if buffer.shape != shape or buffer.dtype is not dtype:
            return None
    addresses, nbytes = _addresses(buffers), first.nbytes
    if not addresses or addresses != [addresses[0] + nbytes * number for number in range(len(buffers))]:
        return None
    whole = as_strided(first, (len(buffers), first.nbytes), (first.nbytes, 1))
    return RowViews(ObjectRows(whole, range(len(buffers))))


def _addresses(arrays: Sequence[Any]) -> list[int]:
    """Where these arrays, of more than nothing, lie; nothing when some of them are for reading only and some not.

    ``__array_interface__`` takes four times as long, which counts for objects whose copies take 15 us.
    """
    with contextlib.suppress(TypeError):  # there is one for reading only
        return list(map(ctypes.addressof, map(ctypes.c_char.from_buffer, arrays)))
    return [] if any(array.flags.writeable for array in arrays) else list(map(address_of, arrays))


def targets_of(buffers: Sequence[ReadableBuffer | WritableBuffer | tuple[WritableBuffer, ...]]) -> Views | None:
    """The same for memory to write to; ``None`` when some of it is for reading only."""
    views = views_of(buffers)
    if isinstance(views, RowViews):
        return views if views.is_writeable else None
    return views if all(map(is_writeable, views)) else None


def sizes_of(views: Views) -> list[int]:
    """Bytes of each object."""
    if isinstance(views, RowViews):
        return [views.nbytes_each] * len(views)
    return [view.nbytes for view in views]


def stretches(views: Views, pages: Sequence[int | None], most: int) -> list[tuple[int, int]]:
    """The objects that have a page, as ranges of which each is copied in one go: neighbours in ``views`` and ``pages``.

    A range has at most ``most`` objects; large ones are alone.
    """
    if not isinstance(views, RowViews) or not views.are_small:
        return [(index, index + 1) for index, page in enumerate(pages) if page is not None]
    found: list[tuple[int, int]] = []
    start = next_number = next_page = -1
    for index, (page, number) in enumerate(zip(pages, views.numbers, strict=True)):
        if page != next_page or number != next_number or index - start >= most:
            if start >= 0:
                found.append((start, index))
            start = index
            if page is None:
                start = next_page = -1
                continue
        next_page, next_number = page + 1, number + 1
    if start >= 0:
        found.append((start, len(pages)))
    return found


def copy_rows_in(object_keys: Sequence[bytes], pages: Bytes, rows: Bytes) -> list[bytes]:
    """Copy ``rows`` to ``pages``, shape (objects, bytes); the checksums of the pages then."""
    pages.reshape(rows.shape)[...] = rows
    return _checksums(object_keys, pages)


def copy_rows_out(object_keys: Sequence[bytes], rows: Bytes, pages: Bytes) -> list[bytes]:
    """Copy ``pages``, shape (objects, bytes), to ``rows``; the checksums of the pages.

    Nobody changes a page that is pinned, so what is hashed is what was copied.
    """
    rows[...] = pages.reshape(rows.shape)
    return _checksums(object_keys, pages)


def _checksums(object_keys: Sequence[bytes], pages: Bytes) -> list[bytes]:
    """As :func:`object_checksum` of each of ``pages``, with as little between two of them as Python can do."""
    if not pages.flags.c_contiguous:  # a row is no slice of flat memory then
        return [object_checksum(key, page) for key, page in zip(object_keys, pages, strict=True)]
    nbytes, flat = pages.shape[1], pages.reshape(-1).data
    checksums = []
    at = 0
    for key in object_keys:
        hasher = xxh3_128(key)
        hasher.update(flat[at : at + nbytes])
        checksums.append(hasher.digest())
        at += nbytes
    return checksums
