"""Copies what was stored in DRAM to SSD, in the background."""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections import Counter, OrderedDict, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from umbp_connectors.offload import GateMaker, OffloadGate
from umbp_connectors.pool.arena import Arena
from umbp_connectors.pool.books import Books
from umbp_connectors.pool.buffers import round_up
from umbp_connectors.pool.fence import WriteFence
from umbp_connectors.pool.neighbours import in_runs
from umbp_connectors.pool.slab import ALIGNMENT
from umbp_connectors.tier_ports import SlotRuns, Slots
from umbp_core.directory import Copy
from umbp_core.errors import TierUnavailable, TransferError
from umbp_core.ports import Clock
from umbp_core.tiers import Tier

_LAST_WRITE_S = 5.0
"""How long the threads get together for the writes that they are in."""

_TOGETHER = 32
"""Objects per visit to the books, at most."""
_TOGETHER_BYTES = 8 << 20
"""The same in bytes: what is written counts as being on SSD only when the last of them is."""
_LEAST_BYTES = 1 << 20
"""What is left is divided among the threads, but not into less than this: a visit costs the same for one object."""

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class _Outcome:
    """What became of the objects that a thread took from the queue: the checksums of those that it wrote."""

    written: dict[bytes, bytes] = field(default_factory=dict)
    failed: int = 0
    dropped: int = 0
    waiting: Sequence[bytes] = ()
    """What is to be tried again when another thread has found out whether the disk works."""


class Demoter:
    """Threads that write a copy of every object of a queue from its arena page into one of ``slots`` slab slots.

    The page is pinned meanwhile.  The copy keeps the checksum that the object got when it was stored, so that bytes
    that change on the way are found out when they are read.  What is gone from DRAM before its turn is skipped: it
    costs a hit, not correctness.  While ``fence`` lets nothing pass, what comes is dropped and counted.
    """

    def __init__(self, books: Books, arena: Arena, slab: Slots, slots: int, threads: int, fence: WriteFence) -> None:
        self._books = books
        self._arena = arena
        self._slab = slab
        self._runs = slab if isinstance(slab, SlotRuns) else None
        # What is being written cannot be evicted: all threads together take a quarter of either tier at most for it.
        few = min(arena.pages, slots) // (4 * max(1, threads))
        self._together = max(1, min(_TOGETHER, _TOGETHER_BYTES // arena.page_bytes, few))
        self._least = _LEAST_BYTES // arena.page_bytes
        self._threads = [
            threading.Thread(target=self._work, name=f"umbp-demote-{number}", daemon=True) for number in range(threads)
        ]
        self._changed = threading.Condition()
        self._queue: OrderedDict[bytes, None] = OrderedDict()
        self._expected: set[bytes] = set()
        """What is being published and will be queued."""
        self._taken: set[bytes] = set()
        """What the threads took from the queue and are not through with."""
        self._busy = 0
        self._closing = False
        self._fence = fence
        self._dropped = 0
        self._done = 0
        self._failed = 0
        self._lost = 0
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

    @property
    def lost(self) -> int:
        """Objects so far that the disk refused, or were not tried because it does."""
        with self._changed:
            return self._lost

    def __contains__(self, key: object) -> bool:
        """Whether ``key`` is to be written, or is being written.  Takes no lock: it is asked under the books'.

        What moves on to the next of them is in both for a moment, never in neither; so they are asked in this order.
        """
        return key in self._expected or key in self._queue or key in self._taken

    @contextmanager
    def expecting(self, keys: Iterable[bytes]) -> Iterator[None]:
        """``keys`` are to be written, but for those that were not :meth:`add`-ed when this ends."""
        expected = list(keys)
        self._expected.update(expected)
        try:
            yield
        finally:
            self._expected.difference_update(expected)

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
            self._queue.update(dict.fromkeys(keys))
            passable = self._fence.passable
            allowed = self._arena.pages if passable else before
            while len(self._queue) > allowed:
                self._queue.popitem(last=False)
                self._dropped += 1
                self._lost += not passable
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
        """Thread: some objects at a time until closed."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closing or self._is_due())
                if self._closing:
                    return
                tries = self._fence.doubtful
                keys = self._take()
                self._busy += 1
            outcome = _Outcome()
            try:
                self._demote(keys, outcome)
            except Exception:  # thread top: what is wrong with these must not end the writing of the others
                outcome.failed += 1
                logger.exception("%d objects from %s on stay in DRAM only", len(keys), keys[0].hex())
            finally:
                with self._changed:
                    self._settle(keys, outcome)
                    if tries or (not self._queue and not self._busy):  # who waits for less is woken for nothing
                        self._changed.notify_all()

    def _settle(self, keys: Sequence[bytes], outcome: _Outcome) -> None:
        """A thread is through with ``keys``."""
        if self._closing:
            outcome.dropped += len(outcome.waiting)
        else:
            for key in reversed(outcome.waiting):
                self._queue[key] = None
                self._queue.move_to_end(key, last=False)
        self._done += len(outcome.written)
        self._failed += outcome.failed
        self._dropped += outcome.dropped
        self._lost += outcome.failed + outcome.dropped
        self._busy -= 1
        self._taken.difference_update(keys)

    def _is_due(self) -> bool:
        """Whether there is something to write, and no other thread finds out just now whether that is possible."""
        return next(self._ready(), None) is not None and not self._fence.trying

    def _ready(self) -> Iterator[bytes]:
        """What can be written next: nothing that a thread has already.

        What is stored again after it was cleared waits until that one is through.
        """
        return (key for key in self._queue if key not in self._taken)

    def _take(self) -> list[bytes]:
        """What a thread writes next: less when little is left, so that all end at about the same time."""
        share = max(self._least, -(-len(self._queue) // len(self._threads)))
        # A write that tries whether the disk works again may fail: then no more than one object was evicted for it.
        count = 1 if self._fence.doubtful else min(self._together, share)
        keys = list(itertools.islice(self._ready(), count))
        self._taken.update(keys)
        for key in keys:
            del self._queue[key]
        return keys

    def _demote(self, keys: Sequence[bytes], outcome: _Outcome) -> None:
        """Write what of ``keys`` is still to be written, as far as there is room and the fence lets it pass."""
        owner = self._books.new_owner()
        try:
            copies = self._books.begin_demotions(owner, keys)
            # First of all, so that nothing is evicted for what is not tried.
            permit = self._fence.enter() if copies else None
            if permit is not None:
                self._write(copies, self._books.reserve_slots(owner, copies), permit, outcome)
            elif self._fence.passable:  # for one thread, which is at it or was
                outcome.waiting = list(copies)
            else:
                outcome.dropped += len(copies)
        finally:
            self._books.end_demotions(owner, outcome.written)

    def _write(
        self, copies: Mapping[bytes, Copy], slots: Mapping[bytes, int], permit: int | None, outcome: _Outcome
    ) -> None:
        """Write ``copies`` to their ``slots``; ``permit`` is for the first."""
        left = deque(self._neighbours(copies, slots))
        while left:
            run = left.popleft()
            if permit is None or self._closing:
                outcome.dropped += len(run) + sum(map(len, left))
                return
            try:
                self._store([copies[key] for key in run], slots[run[0]])
            except Exception as error:  # noqa: BLE001 - op boundary: one object must not keep the others in DRAM
                if len(run) > 1:
                    left.extendleft([key] for key in reversed(run))  # which of them is it?
                    continue
                outcome.failed += 1
                self._refuse(run[0], permit, error)
            else:
                self._fence.written(permit)
                outcome.written.update((key, copies[key].checksum) for key in run)
            permit = self._fence.enter() if left else None

    def _neighbours(self, copies: Mapping[bytes, Copy], slots: Mapping[bytes, int]) -> list[list[bytes]]:
        """The keys of ``slots`` in runs that can be written in one go: their slots follow each other and are full."""

        def slot_of(key: bytes) -> int | None:
            full = round_up(copies[key].nbytes, ALIGNMENT) == self._slab.slot_bytes
            return slots[key] if full and self._runs is not None else None

        return in_runs(sorted(slots, key=slots.__getitem__), slot_of)

    def _store(self, copies: Sequence[Copy], slot: int) -> None:
        """Write ``copies`` to the slots from ``slot`` on."""
        # Whole sectors go without a copy; what lies behind an object in its page does no harm.
        pages = [self._arena.page_array(copy.pages[0], round_up(copy.nbytes, ALIGNMENT)) for copy in copies]
        if self._runs is not None and len(pages) > 1:
            self._runs.write_run(slot, pages)
        else:
            self._slab.write_from(slot, pages[0])

    def _refuse(self, key: bytes, permit: int, error: Exception) -> None:
        if not isinstance(error, TierUnavailable | TransferError):
            logger.error("object %s stays in DRAM only", key.hex(), exc_info=error)
        elif self._fence.failed(permit, isinstance(error, TierUnavailable)):
            logger.warning("nothing is written to SSD for a while: %s", error)
        elif isinstance(error, TransferError):
            logger.warning("object %s stays in DRAM only: %s", key.hex(), error)
