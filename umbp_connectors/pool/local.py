"""A whole pool in one process: put, get and exists for batches of objects given as buffers."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from umbp_connectors.pool.arena import Arena
from umbp_connectors.pool.batches import BatchMover
from umbp_connectors.pool.books import Books, PoolObserver
from umbp_connectors.pool.buffers import ScatteredSource, ScatteredTarget, round_up
from umbp_connectors.pool.granting import Grant, PageStock
from umbp_connectors.pool.lending import ArenaOffer, Loan
from umbp_connectors.pool.outcomes import GetStatus, PoolCounters, PutStatus, secured
from umbp_connectors.pool.put_batch import put_batch
from umbp_connectors.pool.rows import targets_of
from umbp_connectors.pool.settings import LocalPoolConfig
from umbp_connectors.pool.slab import ALIGNMENT
from umbp_connectors.pool.ssd import FlushMark, PoolSsd, may_hold_something, open_ssd
from umbp_connectors.pool.staged import StagedPut
from umbp_connectors.pool.stripes import Stripes
from umbp_connectors.pool.trimming import RoomKeeper
from umbp_core.directory import Copy, TierStats
from umbp_core.errors import ConfigError, StateError, TierUnavailable
from umbp_core.ids import Identity
from umbp_core.ports import Clock
from umbp_core.tiers import Tier

__all__ = ["GetStatus", "LocalPool", "LocalPoolConfig", "PoolCounters", "PutStatus", "StagedPut"]

logger = logging.getLogger(__name__)

CLOSE_TIMEOUT_S = 10.0
_FORGET_S = 2.0
"""How long a disk may take to take that everything is forgotten."""


@dataclass(frozen=True, slots=True)
class _Parts:
    """What an open pool consists of."""

    arena: Arena
    books: Books
    mover: BatchMover
    ssd: PoolSsd | None
    room: RoomKeeper | None
    mark: FlushMark


class LocalPool:
    """Objects of one rank over a DRAM arena and, if configured, a slab file that survives a restart.

    Every object is stored with an xxh3-128 of its identity and bytes and verified whenever it is read, from DRAM too.
    What is stored in DRAM is copied to SSD in the background; what is read from SSD comes back to DRAM.  Bytes move
    once each way, without the GIL.  Any thread may call, after :meth:`open`.
    """

    def __init__(self, identity: Identity, config: LocalPoolConfig, clock: Clock = time.monotonic) -> None:
        self._identity = identity
        self._config = config
        self._clock = clock
        self._observer: PoolObserver | None = None
        self._parts: _Parts | None = None
        self._state = threading.Condition()
        self._calls = 0

    @property
    def identity(self) -> Identity:
        """What all objects of this pool have in common."""
        return self._identity

    @property
    def page_bytes(self) -> int:
        """Bytes that an object takes in each tier."""
        return round_up(self._config.object_bytes, ALIGNMENT)

    @property
    def stripes(self) -> Stripes:
        """How each page is divided among ranks; one stripe unless the configuration names several."""
        prefixes = self._config.prefixes or (self._identity.digest,)
        return Stripes(prefixes, self.page_bytes // len(prefixes))

    @property
    def is_strict(self) -> bool:
        """Whether a put waits until its objects are on SSD.  Raises ``StateError`` when closed."""
        return self._config.durability == "strict" and self._opened().ssd is not None

    def observe(self, observer: PoolObserver) -> None:
        """Tell ``observer`` whatever becomes or stops being readable, from :meth:`open` on.  Closing is not told.

        Raises ``StateError`` when the pool is open: what it holds would not be told.
        """
        if self._parts is not None:
            raise StateError("this pool is open already; name its observer before")
        self._observer = observer

    def call_observer(self) -> None:
        """Call the observer with no changes, so that it can say what it put off.  Raises ``StateError`` when closed."""
        self._opened().books.call_observer()

    def open(self) -> None:
        """Map the arena, take the SSD folder and restore what an earlier life left there.

        An SSD folder that cannot be used costs one warning: the pool works without it.  Raises ``ConfigError`` when
        the DRAM size does not fit an object or the machine, and when the share of the SSD is none.
        """
        if self._parts is not None:
            raise StateError("this pool is already open")
        config = self._config
        if not 0 < config.ssd_share <= 1:
            raise ConfigError(f"an SSD share of {config.ssd_share} is no part of a whole; give one above 0 and up to 1")
        pages = config.dram_bytes // self.page_bytes if self.page_bytes else 0
        if pages < 1:
            raise ConfigError(
                f"a DRAM tier of {config.dram_bytes} bytes does not hold one object of {config.object_bytes} bytes; "
                "set a larger DRAM size"
            )
        placed = (config.huge_pages, config.numa_node, config.prefault, config.shared_memory)
        arena = Arena(self.page_bytes, pages, 0, *placed)
        with contextlib.ExitStack() as undo:
            arena.open()
            undo.callback(arena.close)
            books = Books(self.page_bytes, pages, config.eviction, self._observer, config.block_of)
            mover = BatchMover(books, arena, self.stripes, config.copy_threads)
            ssd = open_ssd(self._identity, config, self.stripes, books, arena, self._clock)
            if ssd is not None:
                undo.callback(ssd.close, CLOSE_TIMEOUT_S)
                mover.use_ssd(ssd.loader, ssd.demoter)
            room = _keep_room(config, books, ssd)
            undo.pop_all()
        self._parts = _Parts(arena, books, mover, ssd, room, FlushMark())

    def put(
        self,
        keys: Sequence[bytes],
        buffers: Sequence[ScatteredSource],
        depths: Sequence[int] | None = None,
        timeout: float | None = None,
    ) -> list[PutStatus]:
        """Store ``buffers[i]`` under block key ``keys[i]``, for all ``i``; fastest when they are ``ObjectRows``.

        ``depths`` are the blocks' places in their prefix chains, for eviction.  An object can be read when the call
        returns.  What is not copied after ``timeout`` seconds is ``TIMED_OUT``; with the durability `strict`, what is
        not on the device by then is ``VOLATILE``.  Raises ``StateError`` when the pool is closed, ``ValueError`` when
        the arguments do not match.
        """
        self._check_whole()
        batch = put_batch(keys, buffers, depths, _deadline(timeout))
        with self._using() as parts:
            statuses = parts.mover.put(batch)
            ssd = parts.ssd
            if ssd is None or not self.is_strict:
                return statuses
            return secured(keys, statuses, lambda stored: ssd.secure(stored, batch.deadline))

    def stage(
        self,
        keys: Sequence[bytes],
        buffers: Sequence[ScatteredSource],
        depths: Sequence[int] | None = None,
        timeout: float | None = None,
    ) -> StagedPut:
        """As :meth:`put`, but nobody can read the objects before :meth:`StagedPut.publish`.

        Until it is published or discarded, its pages are taken and others who put the same keys are told ``PRESENT``.
        """
        self._check_whole()
        batch = put_batch(keys, buffers, depths, _deadline(timeout))
        with self._using() as parts:
            return parts.mover.stage(batch)

    def get(
        self, keys: Sequence[bytes], buffers: Sequence[ScatteredTarget], timeout: float | None = None
    ) -> list[GetStatus]:
        """Fill ``buffers[i]``, whose size must be the object's, with the object under ``keys[i]``, for all ``i``.

        What is not there after ``timeout`` seconds is ``TIMED_OUT``.  When the call returns, nobody writes to the
        buffers any more, whatever the disk does.  Raises ``StateError`` when the pool is closed, ``ValueError`` when
        the arguments do not match.
        """
        self._check_whole()
        deadline = _deadline(timeout)
        views = targets_of(buffers)
        if views is None or len(keys) != len(views):
            raise ValueError(f"{len(keys)} keys need as many buffers that can be written, got {len(buffers)}")
        with self._using() as parts:
            return parts.mover.get(keys, views, deadline)

    def exists(self, keys: Sequence[bytes], timeout: float | None = None) -> list[bool]:
        """Which of ``keys`` can be read now.  Raises ``StateError`` when closed.

        Never waits for the disk, so that it needs no ``timeout``.
        """
        return self._opened().books.contains_many(keys)

    def count_prefix(self, keys: Sequence[bytes], timeout: float | None = None) -> int:
        """How many of ``keys``, from the first on and without a gap, can be read now; ``timeout`` as in `exists`."""
        return self._opened().books.count_prefix(keys)

    def lend(self, keys: Sequence[bytes], timeout: float | None = None) -> Loan:
        """Let somebody read the objects under ``keys`` in place, in the arena's memory (:meth:`arena_offer`).

        They stay there until the loan is released.  What is on SSD is brought to DRAM first; what is not there after
        ``timeout`` seconds is ``TIMED_OUT``.  Whoever reads has to verify the bytes.  Raises ``StateError`` when the
        pool is closed.
        """
        with self._using() as parts:
            return parts.mover.lend(keys, _deadline(timeout))

    def grant(self, keys: Sequence[bytes], sizes: Sequence[int], depths: Sequence[int] | None = None) -> Grant:
        """Let somebody write objects of ``sizes[i]`` bytes under ``keys[i]`` in place (:meth:`arena_offer`).

        Nobody can read them before the grant is published; until it is published or discarded, its pages are taken and
        others who put the same keys are told ``PRESENT``.  Raises ``StateError`` when the pool is closed.
        """
        self._check_whole()
        places = depths if depths is not None else [0] * len(keys)
        if not len(keys) == len(sizes) == len(places):
            raise ValueError(f"{len(keys)} keys, {len(sizes)} sizes and {len(places)} depths do not match")
        with self._using() as parts:
            return parts.mover.grant(keys, sizes, places)

    def stock(self) -> PageStock:
        """Let somebody write objects in place (:meth:`arena_offer`) before it knows under which keys.

        The stock is empty at first.  Raises ``StateError`` when the pool is closed.
        """
        with self._using() as parts:
            return parts.mover.stock()

    def check(self, keys: Sequence[bytes]) -> int:
        """Verify what lies in DRAM under ``keys``, and forget what is bad there; returns how many objects that were."""
        with self._using() as parts:
            return parts.mover.check(keys)

    def read(self, key: bytes, start: int, most: int) -> list[tuple[Copy, bytes]]:
        """The copy of ``key`` in DRAM, and up to ``most`` of its bytes from ``start`` on, verified: one pair or none.

        What is bad there is forgotten.  Raises ``StateError`` when the pool is closed.
        """
        with self._using() as parts:
            return parts.mover.read(key, start, most)

    def arena_offer(self) -> ArenaOffer:
        """The memory that lent objects lie in.  The descriptor stays the pool's.

        Raises ``StateError`` when closed, and without ``shared_memory``.
        """
        arena = self._opened().arena
        return ArenaOffer(arena.fd, arena.page_bytes, arena.pages)

    def clear(self) -> int:
        """Forget every object, for good; returns how many copies could be read.

        What other calls, staged puts included, are writing now is not published.  Raises ``TierUnavailable`` when the
        disk does not take it, or the SSD tier is off and holds some: a restart could find them again.
        """
        with self._using() as parts:
            gone = parts.books.clear()
            if parts.ssd is not None:
                parts.ssd.confirm_forgotten(_FORGET_S)
            elif may_hold_something(self._identity, self._config):
                raise TierUnavailable(
                    f"the SSD tier in {self._config.ssd_dir} is off, and what is in it was not forgotten; "
                    "clear again when it is on, or use `umbp pool clear`"
                )
        return gone

    def forget_all(self) -> int:
        """As :meth:`clear`, but a restart finds nothing either only once :meth:`flush` was true."""
        with self._using() as parts:
            return parts.books.clear()

    def evict(self, keys: Iterable[bytes]) -> int:
        """Forget the objects under ``keys`` in every tier; returns how many of them could be read.

        What other calls, staged puts included, are writing under them now is not published.  A restart does not find
        them either once :meth:`flush` was true.
        """
        with self._using() as parts:
            return parts.books.evict(keys)

    def flush_mark(self) -> FlushMark:
        """For somebody with flushes of his own: what the disk refused before is none of his business."""
        with self._using() as parts:
            return FlushMark(parts.ssd.losses if parts.ssd else 0)

    def flush(self, timeout: float, mark: FlushMark | None = None) -> bool:
        """Wait until what was stored is on SSD and would be found after a restart, for at most ``timeout`` seconds.

        True when it is; false when time ran out or the disk refused something since the last flush with this ``mark``
        (by default the pool's).  Without an SSD tier: true.
        """
        with self._using() as parts:
            ssd = parts.ssd
            return True if ssd is None else ssd.flush(timeout, mark or parts.mark)

    def secure(self, keys: Sequence[bytes], timeout: float) -> list[bytes]:
        """:meth:`flush`, and those of ``keys`` that are on SSD then: none when not all was written in time."""
        with self._using() as parts:
            return [] if parts.ssd is None else parts.ssd.secure(keys, _deadline(timeout))

    def wait_prefaulted(self, timeout: float) -> bool:
        """Wait until the arena's pages are present, for at most ``timeout`` seconds; true when prefaulting ended."""
        return self._opened().arena.wait_prefaulted(timeout)

    def counters(self) -> PoolCounters:
        """What happened so far."""
        parts = self._opened()
        ssd = parts.ssd
        return PoolCounters(
            puts={status: parts.mover.puts[status] for status in PutStatus},
            gets={status: parts.mover.gets[status] for status in GetStatus},
            restored=ssd.restored if ssd else 0,
            demoted=ssd.demoter.demoted if ssd else 0,
            demotions_failed=ssd.demoter.failed if ssd else 0,
            fenced=ssd.fence.raised if ssd else 0,
            fenced_loads=ssd.fence.kept_away if ssd else 0,
            demotions_dropped=ssd.demoter.dropped if ssd else 0,
            demotions_refused=ssd.demoter.refused if ssd else {},
            trimmed=parts.room.trimmed if parts.room else {},
        )

    def holdings(self) -> dict[Tier, list[bytes]]:
        """The keys of all objects that can be read, by tier.  Takes time in proportion to them."""
        return self._opened().books.holdings()

    def missing(self, keys: Sequence[bytes]) -> list[bytes]:
        """Those of ``keys`` of which there is no copy in any tier, also not on a disk that is left alone just now."""
        return self._opened().books.missing(keys)

    def copies(self, tier: Tier) -> list[tuple[bytes, Copy]]:
        """Every object that can be read from ``tier``, the latest last.  Takes time in proportion to them."""
        return self._opened().books.copies(tier)

    def stats(self, tier: Tier) -> TierStats | None:
        """How full ``tier`` is; ``None`` when the pool has no such tier."""
        return self._opened().books.stats(tier)

    def close(self, timeout: float = CLOSE_TIMEOUT_S) -> None:
        """Wait for the calls under way, write what is still to be demoted, give everything back; idempotent.

        Each of these gets ``timeout`` seconds, and a read or write under way five more; what is not written then is
        not there after a restart.  What a disk does not let go is left behind.
        """
        with self._state:
            parts, self._parts = self._parts, None
            idle = self._state.wait_for(lambda: self._calls == 0, timeout)
        if parts is None:
            return
        if not idle:
            logger.warning("the pool is closed while calls are under way that do not end")
        if parts.room is not None:
            parts.room.close()
        parts.mover.close(idle)
        if parts.ssd is not None:
            parts.ssd.close(timeout)
        parts.arena.close()

    def _check_whole(self) -> None:
        if len(self._config.prefixes) > 1:
            raise StateError("objects of this pool consist of the parts of several ranks; use lend() and stock()")

    def _opened(self) -> _Parts:
        parts = self._parts
        if parts is None:
            raise StateError("this pool is not open")
        return parts

    @contextlib.contextmanager
    def _using(self) -> Iterator[_Parts]:
        """The parts, kept from being closed meanwhile."""
        with self._state:
            parts = self._opened()
            self._calls += 1
        try:
            yield parts
        finally:
            with self._state:
                self._calls -= 1
                self._state.notify_all()


def _keep_room(config: LocalPoolConfig, books: Books, ssd: PoolSsd | None) -> RoomKeeper | None:
    """What empties the tiers that may not be full, started; ``None`` when all of them may."""
    there = (Tier.DRAM,) if ssd is None else (Tier.DRAM, Tier.SSD)
    marks = {tier: config.watermarks[tier] for tier in there if tier in config.watermarks}
    if not marks:
        return None
    room = RoomKeeper(books, marks, () if ssd is None else ssd.demoter)
    room.start()
    return room


def _deadline(timeout: float | None) -> float | None:
    return None if timeout is None else time.monotonic() + timeout
