"""Page bitmap allocator: which pages of one tier are in use.

Pages are numbered globally: those of buffer ``b`` follow those of buffer ``b - 1``.  An object takes
``pages_for(nbytes)`` pages, of which the last may be filled only in part.  Sizes are bytes.

The map holds one byte per page, seen both as a ``bytearray`` (whose ``find`` is the C library's scan) and
as a numpy array (for sets of pages).  A single page is the common case and costs no scan: it comes from a
short stack of pages freed last, or from a cursor below which everything is in use.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from umbp_core.errors import StateError

_FREE = 0
_USED = 1
_STACK_LIMIT = 1024
"""Bound on remembered freed pages; what does not fit is found again by the cursor."""


class PageAllocator:
    """Hands out pages of ``page_bytes`` from buffers of ``buffer_bytes`` each.

    The remainder of a buffer that is smaller than a page is not used.  Raises ``StateError`` when
    ``page_bytes`` is not positive or a buffer has a negative size.  Not thread-safe.
    """

    def __init__(self, page_bytes: int, buffer_bytes: Sequence[int]) -> None:
        if page_bytes < 1:
            raise StateError(f"a page of {page_bytes} bytes cannot hold anything; give at least 1")
        if any(size < 0 for size in buffer_bytes):
            raise StateError(f"buffer sizes {list(buffer_bytes)} contain a negative one; give sizes in bytes")
        self._page_bytes = page_bytes
        self._free_in = [size // page_bytes for size in buffer_bytes]
        self._starts: list[int] = []
        total = 0
        for count in self._free_in:
            self._starts.append(total)
            total += count
        self._total = total
        self._free = total
        self._map = bytearray(total)
        self._array = np.frombuffer(self._map, dtype=np.uint8)
        # Every free page is in the stack or at or above the cursor.  The stack may also hold pages that
        # are in use again; they are recognised when they are popped.
        self._stack: list[int] = []
        self._cursor = 0

    @property
    def page_bytes(self) -> int:
        """Bytes of one page."""
        return self._page_bytes

    @property
    def total_pages(self) -> int:
        """Pages of all buffers together."""
        return self._total

    @property
    def free_pages(self) -> int:
        """Pages not in use."""
        return self._free

    def pages_for(self, nbytes: int) -> int:
        """Pages that an object of ``nbytes`` takes.  Raises ``StateError`` when ``nbytes`` is below 1."""
        if nbytes < 1:
            raise StateError(f"an object of {nbytes} bytes takes no page; only objects of at least 1 byte are stored")
        return -(-nbytes // self._page_bytes)

    def locate(self, page: int) -> tuple[int, int]:
        """``(buffer, index in that buffer)`` of ``page``.  Raises ``StateError`` when there is no such page."""
        if not 0 <= page < self._total:
            raise StateError(f"page {page} does not exist; there are {self._total} pages")
        buffer = bisect_right(self._starts, page) - 1
        return buffer, page - self._starts[buffer]

    def allocate(self, nbytes: int) -> tuple[int, ...] | None:
        """Pages for an object of ``nbytes``, in the order of its bytes; ``None`` when too few are free.

        Tries a contiguous run in one buffer (first buffer, lowest start), then any pages of one buffer, then
        pages of several buffers.  All or nothing.  Raises ``StateError`` when ``nbytes`` is below 1.
        """
        count = self.pages_for(nbytes)
        if count > self._free:
            return None
        pages = (self._pop_page(),) if count == 1 else self._run(count) or self._scattered(count)
        self._take(pages)
        return pages

    def allocate_each(self, count: int) -> list[int] | None:
        """A page for each of ``count`` objects of one page at most; ``None`` when too few are free.

        The same pages as ``count`` calls of :meth:`allocate`, in one, and in ascending order: neighbours lie together.
        """
        if count > self._free:
            return None
        stack, used = self._stack, self._map
        pages: list[int] = []
        while len(pages) < count:
            if stack:
                page = stack.pop()
                if used[page]:
                    continue
            else:
                page = used.find(_FREE, self._cursor)
                self._cursor = page + 1
            used[page] = _USED
            pages.append(page)
        pages.sort()
        self._book(pages, -1)
        return pages

    def claim(self, pages: Sequence[int]) -> None:
        """Mark exactly ``pages`` as in use, as a catalogue of an earlier life says.

        Raises ``StateError`` when one is out of range, in use or named twice; nothing is changed then.
        """
        for page in pages:
            if not 0 <= page < self._total:
                raise StateError(f"page {page} cannot be claimed: there are {self._total} pages; drop the record")
            if self._map[page]:
                raise StateError(f"page {page} cannot be claimed: it is in use; drop the record")
        if len(set(pages)) != len(pages):
            raise StateError(f"pages {list(pages)} cannot be claimed: one is named twice; drop the record")
        self._take(pages)

    def free(self, pages: Iterable[int]) -> int:
        """Give ``pages`` back; returns how many were in use.  Others, also unknown ones, are left alone."""
        used, stack, total = self._map, self._stack, self._total
        freed: list[int] = []
        for page in pages:
            if not 0 <= page < total or not used[page]:
                continue
            used[page] = _FREE
            freed.append(page)
            if len(stack) < _STACK_LIMIT:
                stack.append(page)
            elif page < self._cursor:
                self._cursor = page
        self._book(freed, 1)
        return len(freed)

    def _take(self, pages: Sequence[int]) -> None:
        for page in pages:
            self._map[page] = _USED
        self._book(pages, -1)

    def _book(self, pages: Sequence[int], change: int) -> None:
        """Count ``pages`` as taken (-1) or given back (1)."""
        self._free += change * len(pages)
        if len(self._starts) == 1:
            self._free_in[0] += change * len(pages)
            return
        for page in pages:
            self._free_in[bisect_right(self._starts, page) - 1] += change

    def _pop_page(self) -> int:
        while self._stack:
            page = self._stack.pop()
            if not self._map[page]:
                return page
        page = self._map.find(_FREE, self._cursor)
        self._cursor = page + 1
        return page

    def _run(self, count: int) -> tuple[int, ...] | None:
        pattern = bytes(count)
        for start, end in self._ranges(count):
            first = self._map.find(pattern, start, end)
            if first >= 0:
                return tuple(range(first, first + count))
        return None

    def _scattered(self, count: int) -> tuple[int, ...]:
        start, end = next(self._ranges(count), (0, self._total))
        free = np.flatnonzero(self._array[start:end] == _FREE)[:count]
        return tuple((free + start).tolist())

    def _ranges(self, count: int) -> Iterator[tuple[int, int]]:
        """Page ranges of the buffers with at least ``count`` free pages, in buffer order."""
        for buffer, free in enumerate(self._free_in):
            if free >= count:
                start = self._starts[buffer]
                yield start, self._starts[buffer + 1] if buffer + 1 < len(self._starts) else self._total
