"""Copies what was stored in DRAM to SSD, in the background."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Iterable

from umbp_connectors.pool.arena import Arena
from umbp_connectors.pool.books import Books, Wanted
from umbp_connectors.pool.buffers import round_up
from umbp_connectors.pool.slab import ALIGNMENT, SlabFile
from umbp_core.errors import TierUnavailable, TransferError
from umbp_core.tiers import Tier

_LAST_WRITE_S = 5.0
"""How long the threads get together for the writes that they are in."""

logger = logging.getLogger(__name__)


class Demoter:
    """Threads that write a copy of every object of a queue from its arena page into a slab slot.

    The page is pinned meanwhile.  The copy keeps the checksum that the object got when it was stored, so that bytes
    that change on the way are found out when they are read.  What is gone from DRAM before its turn is skipped: it
    costs a hit, not correctness.
    """

    def __init__(self, books: Books, arena: Arena, slab: SlabFile, threads: int) -> None:
        self._books = books
        self._arena = arena
        self._slab = slab
        self._threads = [
            threading.Thread(target=self._work, name=f"umbp-demote-{number}", daemon=True) for number in range(threads)
        ]
        self._changed = threading.Condition()
        self._queue: deque[bytes] = deque()
        self._busy = 0
        self._closing = False
        self._refused: str | None = None
        self._done = 0
        self._failed = 0

    @property
    def demoted(self) -> int:
        """Objects written so far."""
        with self._changed:
            return self._done

    @property
    def failed(self) -> int:
        """Objects that could not be written."""
        with self._changed:
            return self._failed

    def start(self) -> None:
        """Start the threads."""
        for thread in self._threads:
            thread.start()

    def add(self, keys: Iterable[bytes]) -> None:
        """Queue objects that were just published in DRAM.  Does not wait.

        The queue cannot grow without bound: when it holds as many keys as there are pages, the oldest go.
        """
        with self._changed:
            if self._refused is not None:
                return
            self._queue.extend(keys)
            while len(self._queue) > self._arena.pages:
                self._queue.popleft()
            self._changed.notify(len(self._queue))

    def drain(self, timeout: float) -> bool:
        """Wait until nothing is queued or being written, for at most ``timeout`` seconds; true when so."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._queue and not self._busy, timeout)

    def close(self, timeout: float) -> None:
        """Write what is queued for at most ``timeout`` seconds, drop the rest, end the threads; idempotent.

        A thread whose disk does not answer is left behind.
        """
        self.drain(timeout)
        with self._changed:
            self._closing = True
            self._queue.clear()
            self._changed.notify_all()
        deadline = time.monotonic() + _LAST_WRITE_S
        for thread in self._threads:
            if thread.ident is not None:
                thread.join(max(0.0, deadline - time.monotonic()))

    def _work(self) -> None:
        """Thread: one object at a time until closed."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._queue or self._closing)
                if self._closing:
                    return
                key = self._queue.popleft()
                self._busy += 1
            written = refused = False
            try:
                written = self._demote(key)
            except TierUnavailable as error:
                refused = True
                self._stop_taking(error)
            except TransferError as error:
                refused = True
                logger.warning("object %s stays in DRAM only: %s", key.hex(), error)
            except Exception:
                refused = True
                logger.exception("object %s stays in DRAM only", key.hex())
            finally:
                with self._changed:
                    self._done += written
                    self._failed += refused
                    self._busy -= 1
                    self._changed.notify_all()

    def _demote(self, key: bytes) -> bool:
        """Write one object; false when there is nothing to write, or no room for it."""
        owner = self._books.new_owner()
        (copy,) = self._books.pin(owner, [key], Tier.DRAM, use=False)
        if copy is None:
            return False
        try:
            slot = self._books.reserve(owner, Wanted(key, copy.nbytes, copy.depth), Tier.SSD)
            if slot is None:
                return False
            written: dict[bytes, bytes] = {}
            try:
                # Whole sectors go without a copy; what lies behind the object in its page does no harm.
                self._slab.write_from(slot, self._arena.page_array(copy.pages[0], round_up(copy.nbytes, ALIGNMENT)))
                written[key] = copy.checksum
            finally:
                self._books.settle(owner, written, Tier.SSD)
        finally:
            self._books.unpin(owner)
        return True

    def _stop_taking(self, error: TierUnavailable) -> None:
        with self._changed:
            first, self._refused = self._refused is None, str(error)
            self._queue.clear()
        if first:
            logger.warning("nothing more is written to SSD: %s", error)
