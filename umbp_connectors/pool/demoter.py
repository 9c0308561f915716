"""Copies what was stored in DRAM to SSD, in the background."""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Iterable, Sequence

from umbp_connectors.offload import GateMaker, OffloadGate
from umbp_connectors.pool.arena import Arena
from umbp_connectors.pool.books import Books, Wanted
from umbp_connectors.pool.buffers import round_up
from umbp_connectors.pool.fence import WriteFence
from umbp_connectors.pool.slab import ALIGNMENT
from umbp_connectors.tier_ports import Slots
from umbp_core.errors import TierUnavailable, TransferError
from umbp_core.ports import Clock
from umbp_core.tiers import Tier

_LAST_WRITE_S = 5.0
"""How long the threads get together for the writes that they are in."""

logger = logging.getLogger(__name__)


class Demoter:
    """Threads that write a copy of every object of a queue from its arena page into a slab slot.

    The page is pinned meanwhile.  The copy keeps the checksum that the object got when it was stored, so that bytes
    that change on the way are found out when they are read.  What is gone from DRAM before its turn is skipped: it
    costs a hit, not correctness.  While ``fence`` lets nothing pass, what comes is dropped and counted.
    """

    def __init__(self, books: Books, arena: Arena, slab: Slots, threads: int, fence: WriteFence) -> None:
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
        self._fence = fence
        self._dropped = 0
        self._done = 0
        self._failed = 0
        self._gate: OffloadGate | None = None
        self._refused: Counter[str] = Counter()

    def ask(self, make_gate: GateMaker | None, clock: Clock) -> None:
        """Let a gate decide from now on what is written, where there is anything to decide.  Before :meth:`start`.

        Raises ``ConfigError`` when the gate cannot be made.
        """
        if make_gate is not None:
            self._gate = make_gate(self._on_ssd, clock, self._count_refused)

    @property
    def asks(self) -> bool:
        """Whether there is a gate."""
        return self._gate is not None

    def _on_ssd(self, keys: Sequence[bytes]) -> list[bool]:
        held = set(self._books.held(keys, Tier.SSD))
        return [key in held for key in keys]

    def _count_refused(self, policy: str, objects: int) -> None:
        self._refused[policy] += objects

    @property
    def refused(self) -> dict[str, int]:
        """How often each policy of the gate kept an object out."""
        with self._changed:
            return dict(self._refused)

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

    @property
    def dropped(self) -> int:
        """Objects that were not even tried: the queue was full, or the tier is left alone."""
        with self._changed:
            return self._dropped

    def start(self) -> None:
        """Start the threads."""
        for thread in self._threads:
            thread.start()

    def used(self, keys: Sequence[bytes]) -> None:
        """Offer objects again that were read from DRAM: the gate may admit now what it refused."""
        self.add([key for key, there in zip(keys, self._on_ssd(keys), strict=True) if not there])

    def add(self, keys: Iterable[bytes]) -> None:
        """Queue objects that were just published in DRAM, as far as the gate admits them.  Does not wait.

        The queue cannot grow without bound: when it holds as many keys as there are pages, the oldest go.
        """
        with self._changed:
            before = len(self._queue)
            if self._gate is not None:
                keys = list(keys)
                keys = list(itertools.compress(keys, self._gate.admit(keys)))
            self._queue.extend(keys)
            allowed = self._arena.pages if self._fence.passable else before
            while len(self._queue) > allowed:
                self._queue.popleft()
                self._dropped += 1
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
            permit = self._fence.enter()
            written = refused = False
            try:
                if permit is not None:
                    written = self._demote(key)
                    self._fence.written(permit)
            except (TierUnavailable, TransferError) as error:
                refused = True
                self._refuse(key, permit or 0, error)
            except Exception:  # thread top: what is wrong with one object must not end the writing of the others
                refused = True
                logger.exception("object %s stays in DRAM only", key.hex())
            finally:
                with self._changed:
                    self._done += written
                    self._failed += refused
                    self._dropped += permit is None
                    self._busy -= 1
                    if not self._queue and not self._busy:  # who waits for less is woken for nothing, each time
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

    def _refuse(self, key: bytes, permit: int, error: TierUnavailable | TransferError) -> None:
        fenced = self._fence.failed(permit, isinstance(error, TierUnavailable))
        if fenced:
            logger.warning("nothing is written to SSD for a while: %s", error)
        elif isinstance(error, TransferError):
            logger.warning("object %s stays in DRAM only: %s", key.hex(), error)
