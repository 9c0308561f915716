"""Keeps room in a pool's tiers, in the background, where watermarks ask for it."""

from __future__ import annotations

import logging
import threading
from collections.abc import Container, Mapping

from umbp_connectors.pool.books import Books
from umbp_core.directory import Directory
from umbp_core.tiers import Tier
from umbp_core.watermarks import Trimmer, Watermarks

_PAGES = 16
"""Freed of each tier per visit to the books: their lock is held for one or two tenths of a millisecond."""
_BETWEEN_S = 0.0005
"""Pause between two visits, for everybody else's."""
_AGAIN_S = 0.1
"""Pause after a visit that found everything held: being read, written, lent, or waiting to go to SSD."""
_LAST_VISIT_S = 5.0

logger = logging.getLogger(__name__)


class RoomKeeper:
    """A thread that sleeps until a tier is fuller than its high watermark, and then empties it down to the low one.

    It evicts as a put does that finds no room.  What is ``waiting`` to go to SSD stays in DRAM until then.
    """

    def __init__(self, books: Books, marks: Mapping[Tier, Watermarks], waiting: Container[bytes]) -> None:
        self._books = books
        self._marks = marks
        self._waiting = waiting
        self._due = threading.Event()
        self._closing = threading.Event()
        self._trimmer: Trimmer | None = None
        self._thread = threading.Thread(target=self._work, name="umbp-trim", daemon=True)

    @property
    def trimmed(self) -> dict[Tier, int]:
        """Objects evicted so far, by tier."""
        return {} if self._trimmer is None else dict(self._trimmer.trimmed)

    def start(self) -> None:
        """Start the thread."""
        self._books.keep_room(self._make, self._due.set)
        self._thread.start()

    def close(self) -> None:
        """End the thread; idempotent."""
        self._closing.set()
        self._due.set()
        if self._thread.ident is not None:
            self._thread.join(_LAST_VISIT_S)

    def _make(self, directory: Directory) -> Trimmer:
        self._trimmer = Trimmer(directory, self._marks, self._waiting)
        return self._trimmer

    def _work(self) -> None:
        """Thread: until closed."""
        try:
            while True:
                self._due.wait()
                self._due.clear()
                while (gone := self._books.trim(_PAGES)) is not None:
                    if self._closing.wait(_BETWEEN_S if gone else _AGAIN_S):
                        return
                if self._closing.is_set():
                    return
        except Exception:  # thread top: a plug-in's eviction policy may raise; the pool goes on without free room
            logger.exception("no room is kept in this pool any more")
