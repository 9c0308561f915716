"""Pages of a pool that somebody else writes in place, in the arena's memory."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import final

from umbp_connectors.pool.books import Books, Filled
from umbp_connectors.pool.outcomes import PutStatus
from umbp_core.errors import StateError
from umbp_core.ops import CHECKSUM_BYTES


@final
class Grant:
    """Pages that are the writer's until it publishes what it wrote there, or discards them.

    ``places`` says for each object which page is its own, or why it has none.  Whichever of :meth:`publish` and
    :meth:`discard` comes first counts; whoever got the grant has to call one of them.  Any thread.
    """

    def __init__(
        self,
        keys: Sequence[bytes],
        places: Sequence[int | PutStatus],
        settle: Callable[[Mapping[bytes, bytes]], bool],
    ) -> None:
        self.places = tuple(places)
        self._granted = {key for key, place in zip(keys, places, strict=True) if not isinstance(place, PutStatus)}
        self._settle = settle
        self._lock = threading.Lock()
        self._published: bool | None = None

    @property
    def pages(self) -> int:
        """How many pages were granted."""
        return len(self._granted)

    def publish(self, written: Mapping[bytes, bytes]) -> bool:
        """Make readable what was written, given its checksums; the other pages are given back.

        False when nothing is: after :meth:`discard`, and when the pool was cleared or closed meanwhile.  Raises
        ``StateError``, with nothing changed, for a key that was not granted or what is no checksum.
        """
        if not self._granted.issuperset(written) or any(
            len(checksum) != CHECKSUM_BYTES for checksum in written.values()
        ):
            raise StateError("what is to be published was not granted, or has no checksum; publish what was written")
        return self._end(written)

    def discard(self) -> None:
        """Give all pages back, unless something is published; idempotent."""
        self._end({})

    def _end(self, written: Mapping[bytes, bytes]) -> bool:
        with self._lock:
            if self._published is None:
                self._published = self._settle(written) and bool(written)
            return self._published


@final
class PageStock:
    """Pages that are the writer's before it knows under which keys it will publish them.

    They stay so until they are published or given back, and whoever got the stock has to :meth:`close` it.  ``settle``
    publishes.  Any thread.
    """

    def __init__(self, books: Books, settle: Callable[[str, Sequence[Filled]], list[PutStatus]]) -> None:
        self._books = books
        self._settle = settle
        self._owner = books.new_owner()
        self._lock = threading.Lock()
        self._pages: set[int] = set()
        self._closed = False

    @property
    def pages(self) -> frozenset[int]:
        """What is in it."""
        with self._lock:
            return frozenset(self._pages)

    def take(self, count: int) -> list[int]:
        """Up to ``count`` more pages; evicts.  Raises ``StateError`` when it is closed."""
        with self._lock:
            self._check()
            taken = self._books.reserve_blank(self._owner, count) if count > 0 else []
            self._pages.update(taken)
            return taken

    def publish(self, filled: Sequence[Filled]) -> list[PutStatus]:
        """Make readable what was written.  The page of what is not ``STORED`` stays in the stock.

        What was taken before somebody cleared the pool is refused once, with ``NO_ROOM``: it may be older than that.
        Raises ``StateError``, with nothing changed, when a page is not in the stock or named twice, or it is closed.
        """
        with self._lock:
            self._check()
            statuses = self._settle(self._owner, filled)
            pairs = zip(filled, statuses, strict=True)
            self._pages.difference_update(each.page for each, status in pairs if status is PutStatus.STORED)
            return statuses

    def give_back(self, pages: Iterable[int]) -> None:
        """Nobody writes to these any more.  Raises ``StateError`` when one is not in the stock."""
        with self._lock:
            self._check()
            going = set(pages)
            if not going <= self._pages:
                raise StateError("pages are given back that are not in the stock; give back what was taken")
            self._books.free_blank(self._owner, going)
            self._pages -= going

    def close(self) -> int:
        """Give all pages back; idempotent.  Returns how many there were."""
        with self._lock:
            self._closed = True
            count = len(self._pages)
            self._pages.clear()
            self._books.end_blank(self._owner)
            return count

    def _check(self) -> None:
        if self._closed:
            raise StateError("this stock of pages is closed; ask the pool for another one")
