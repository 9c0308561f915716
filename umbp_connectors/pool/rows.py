"""Objects that are rows of one array: neighbours are copied together.

Every copy and every checksum lets go of the GIL and takes it again.  Two threads that do so for each object of 256 KiB
wait for each other about as long as they copy; with several objects per copy they reach nearly twice the rate
(measured on two virtual processors: 18 instead of 12 GB/s, where one thread that only copies has 10).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import overload

import numpy as np

from umbp_connectors.pool.buffers import (
    Bytes,
    ReadableBuffer,
    ScatteredSource,
    View,
    WritableBuffer,
    as_view,
    is_writeable,
)
from umbp_connectors.pool.checksums import object_checksum

TOGETHER_BYTES = 2 << 20
"""What is copied in one go, at most.

More meets the other thread at the GIL less often, but is read from memory twice: of 256 KiB a put of 128 pages takes a
twentieth longer with 4 MiB in one go (medians of 80 calls, two virtual processors).  With a MiB, pages of a MiB would
be copied one by one, which costs a third where they lie in many pieces.
"""


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
    return [as_view(buffer) for buffer in buffers]


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


def count_stretches(views: Views) -> int:
    """How many copies it takes at least, when the pages lie well."""
    if isinstance(views, RowViews):
        return sum(1 for _ in stretches(views, range(len(views))))
    return len(views)


def stretches(views: Views, pages: Sequence[int | None]) -> Iterator[tuple[int, int]]:
    """The objects as ranges of which each is copied in one go: neighbours both in ``views`` and in ``pages``.

    A range is no larger than ``TOGETHER_BYTES``, unless it is a single object.  An object without page is alone.
    """
    if not isinstance(views, RowViews):
        yield from ((index, index + 1) for index in range(len(views)))
        return
    numbers, most = views.numbers, TOGETHER_BYTES // max(1, views.nbytes_each)
    start = 0
    for index in range(1, len(pages)):
        page, before = pages[index], pages[index - 1]
        if (
            index - start < most
            and page is not None
            and before is not None
            and page == before + 1
            and numbers[index] == numbers[index - 1] + 1
        ):
            continue
        yield start, index
        start = index
    if len(pages):
        yield start, len(pages)


def copy_rows_in(object_keys: Sequence[bytes], pages: Bytes, rows: Bytes) -> list[bytes]:
    """Copy ``rows`` to ``pages``, shape (objects, bytes); the checksums of the pages then."""
    pages.reshape(rows.shape)[...] = rows
    return [object_checksum(key, page) for key, page in zip(object_keys, pages, strict=True)]


def copy_rows_out(object_keys: Sequence[bytes], rows: Bytes, pages: Bytes) -> list[bytes]:
    """Copy ``pages``, shape (objects, bytes), to ``rows``; the checksums of the pages.

    Nobody changes a page that is pinned, so what was hashed is what was copied.
    """
    checksums = [object_checksum(key, page) for key, page in zip(object_keys, pages, strict=True)]
    rows[...] = pages.reshape(rows.shape)
    return checksums
