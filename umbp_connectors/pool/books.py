"""The directory of a pool that lives in one process: behind a lock, with a catalogue that follows it."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import compress

from umbp_connectors.pool.blank import BLANK, Blank, Filled
from umbp_connectors.pool.catalogue import Catalogue
from umbp_connectors.pool.catalogue_schema import CatalogueRow
from umbp_connectors.pool.changes import record, together
from umbp_connectors.pool.fence import ReadFence
from umbp_connectors.pool.observing import Contents, PoolObserver
from umbp_connectors.pool.outcomes import PutStatus
from umbp_core.directory import Change, Copy, Directory, TierSpace, TierStats
from umbp_core.errors import StateError
from umbp_core.eviction import EvictionPolicy
from umbp_core.grouping import BlockOf
from umbp_core.pages import PageAllocator
from umbp_core.tiers import Tier
from umbp_core.watermarks import Trimmer

__all__ = ["Books", "Contents", "Filled", "PoolObserver"]


class Books:
    """A :class:`Directory` for several threads.  Every call is short; none touches a byte of an object or the disk.

    An object takes one page in each tier.  Owners are the caller's strings (:meth:`new_owner`).  ``observer`` is told
    whatever becomes or stops being readable, what an earlier life left on SSD included.  ``block_of`` says which
    objects are evicted together.
    """

    def __init__(
        self,
        page_bytes: int,
        dram_pages: int,
        eviction: Callable[[], EvictionPolicy],
        observer: PoolObserver | None = None,
        block_of: BlockOf | None = None,
    ) -> None:
        self._page_bytes = page_bytes
        self._observer = observer
        self._eviction = eviction
        self._block_of = block_of
        self._dram = self._space(Tier.DRAM, dram_pages)
        self._directory = Directory([self._dram])
        self._lock = threading.Lock()
        self._catalogue: Catalogue | None = None
        self._fence: ReadFence | None = None
        self._numbers = itertools.count()
        self._writing: dict[str, set[bytes]] = {}
        """Owners that have reserved something, and what was evicted by name since."""
        self._void: set[str] = set()
        """Those of them that began before a clear: what they write is not published."""
        self._blank: dict[str, dict[int, Blank]] = {}
        """Pages without keys, by owner."""
        self._clears = 0
        self._trimmer: Trimmer | None = None
        self._trim_soon: Callable[[], None] = lambda: None

    def add_ssd(self, slots: int, catalogue: Catalogue, rows: Iterable[CatalogueRow], fence: ReadFence) -> int:
        """Manage ``slots`` slots too and restore ``rows`` into them; returns how many.  Before any other call.

        Rows that contradict each other or the tier's size are forgotten.  While ``fence`` lets nobody pass, what is on
        SSD only counts as not there.
        """
        self._directory = Directory([self._dram, self._space(Tier.SSD, slots)])
        self._catalogue = catalogue
        self._fence = fence
        restored = 0
        bad = []
        for row in rows:
            try:
                self._directory.restore(row.key, Tier.SSD, (row.slot,), row.nbytes, row.checksums, row.depth)
                restored += 1
            except StateError:
                bad.append(row.key)
        catalogue.forget(bad)
        with self._lock:
            found = self._directory.drain_changes()
            self._tell([together(found)] if found else [])
        return restored

    def keep_room(self, make: Callable[[Directory], Trimmer], soon: Callable[[], None]) -> None:
        """Let what ``make`` makes free room from now on; ``soon`` says, under the lock, that :meth:`trim` has to do."""
        with self._lock:
            self._trimmer, self._trim_soon = make(self._directory), soon
            self._follow()

    def trim(self, pages: int) -> int | None:
        """Free ``pages`` pages of every tier that is too full; how many objects went, ``None`` when no tier is."""
        with self._lock:
            if self._trimmer is None or not self._trimmer.is_due:
                return None
            gone = self._trimmer.step(pages)
            self._follow()
        return gone

    def call_observer(self) -> None:
        """Let the observer say what it may have put off, though nothing changed."""
        with self._lock:
            if self._observer is not None:
                self._observer.changed((), self._holdings)

    def new_owner(self) -> str:
        """An owner that nobody else uses."""
        return f"local-{next(self._numbers)}"

    def contains_many(self, keys: Sequence[bytes]) -> list[bool]:
        """For each of ``keys`` whether it can be read from some tier."""
        with self._lock:
            return self._readable(keys)

    def count_prefix(self, keys: Sequence[bytes]) -> int:
        """How many of ``keys`` from the first on can be read."""
        with self._lock:
            if self._ssd_counts():
                return self._directory.count_prefix(keys)
            copy = self._directory.copy
            return sum(1 for _ in itertools.takewhile(lambda key: copy(key, Tier.DRAM) is not None, keys))

    def reserve_new(
        self, owner: str, keys: Sequence[bytes], sizes: Sequence[int], depths: Sequence[int]
    ) -> list[int | PutStatus]:
        """A page of DRAM for each object that fits one and that the pool has nowhere, else why not; evicts."""
        fits = [0 < nbytes <= self._page_bytes for nbytes in sizes]
        places: list[int | PutStatus] = []
        with self._lock:
            directory = self._directory
            there = self._readable(keys)
            self._writing.setdefault(owner, set())
            new = [
                each
                for each, fit, present in zip(zip(keys, sizes, depths, strict=True), fits, there, strict=True)
                if fit and not present
            ]
            reserved = iter(directory.reserve_many(owner, new, Tier.DRAM))
            for key, fit, present in zip(keys, fits, there, strict=True):
                if not fit:
                    places.append(PutStatus.TOO_LARGE)
                elif present:
                    places.append(PutStatus.PRESENT)
                elif pages := next(reserved):
                    places.append(pages[0])
                else:
                    pending = directory.is_present_or_pending(key, Tier.DRAM)
                    places.append(PutStatus.PRESENT if pending else PutStatus.NO_ROOM)
            self._follow()
        return places

    def settle(self, owner: str, written: Mapping[bytes, bytes], tier: Tier) -> bool:
        """Publish what ``owner`` wrote, given its checksums; all that it reserved besides is given up.

        False when nothing is published, since the pool was cleared after ``owner`` had begun.
        """
        with self._lock:
            return self._settle(owner, written, tier)

    def reserve_blank(self, owner: str, count: int) -> list[int]:
        """Up to ``count`` pages of DRAM for objects whose keys are not known yet; evicts."""
        with self._lock:
            wanted = [(BLANK + b"%d" % next(self._numbers), self._page_bytes, 0) for _ in range(count)]
            places = self._directory.reserve_many(owner, wanted, Tier.DRAM)
            taken = {
                pages[0]: Blank(name, self._clears)
                for (name, _, _), pages in zip(wanted, places, strict=True)
                if pages is not None
            }
            self._blank.setdefault(owner, {}).update(taken)
            self._follow()
        return list(taken)

    def publish_blank(self, owner: str, filled: Sequence[Filled]) -> list[PutStatus]:
        """Publish what ``owner`` wrote to pages without keys.  What is not ``STORED`` leaves its page as it was.

        What was given before the last clear is refused once, with ``NO_ROOM``: its bytes may be older than that.
        Raises ``StateError``, with nothing changed, when a page is not the owner's, or named twice.
        """
        with self._lock:
            mine = self._blank.get(owner, {})
            pages = {each.page for each in filled}
            if len(pages) < len(filled) or not pages <= mine.keys():
                raise StateError(f"{owner} publishes pages that it does not have, or one of them twice")
            statuses = [self._publish_one(owner, mine, each) for each in filled]
            self._follow()
        return statuses

    def free_blank(self, owner: str, pages: Iterable[int]) -> None:
        """``owner`` gives these pages without keys back.  Raises ``StateError`` when it does not have one of them."""
        with self._lock:
            mine = self._blank.get(owner, {})
            for page in pages:
                blank = mine.pop(page, None)
                if blank is None:
                    raise StateError(f"{owner} gives page {page} back, which it does not have")
                self._directory.abort(owner, blank.name, Tier.DRAM)

    def end_blank(self, owner: str) -> None:
        """``owner`` has no pages without keys any more."""
        with self._lock:
            self._blank.pop(owner, None)
            self._directory.abort_owner(owner)

    def begin_demotions(self, owner: str, keys: Sequence[bytes]) -> dict[bytes, Copy]:
        """Pin what of ``keys`` is in DRAM and neither on SSD nor on its way there, until :meth:`end_demotions`."""
        with self._lock:
            directory = self._directory
            there = [key for key in keys if directory.copy(key, Tier.DRAM) is not None]
            going = [key for key in there if not directory.is_present_or_pending(key, Tier.SSD)]
            self._writing.setdefault(owner, set())
            return dict(zip(going, directory.pin(owner, going, Tier.DRAM), strict=True))

    def reserve_slots(self, owner: str, copies: Mapping[bytes, Copy]) -> dict[bytes, int]:
        """A slot of SSD for each of ``copies`` for which there is room; evicts."""
        with self._lock:
            wanted = [(key, copy.nbytes, copy.depth) for key, copy in copies.items()]
            places = self._directory.reserve_many(owner, wanted, Tier.SSD)
            self._follow()
        return {key: pages[0] for key, pages in zip(copies, places, strict=True) if pages is not None}

    def end_demotions(self, owner: str, written: Mapping[bytes, bytes]) -> None:
        """Publish what ``owner`` wrote to its slots, and end its pins.  Nothing is published that was cleared."""
        with self._lock:
            self._settle(owner, written, Tier.SSD)
            self._directory.unpin(owner)

    def begin_loads(self, owner: str, wanted: Iterable[tuple[bytes, Copy]]) -> list[tuple[Copy, int | None] | None]:
        """Pin each of these copies (on SSD) and reserve a page of DRAM for it; what was got of both.

        Of what came to DRAM meanwhile that copy is pinned and returned with its page; ``None`` for what is gone.
        """
        with self._lock:
            found = [self._begin_load(owner, key, copy) for key, copy in wanted]
            self._follow()
        return found

    def _begin_load(self, owner: str, key: bytes, copy: Copy) -> tuple[Copy, int | None] | None:
        directory = self._directory
        there = directory.copy(key, Tier.DRAM)
        if there is not None:
            directory.pin(owner, [key], Tier.DRAM)
            return there, there.pages[0]
        if directory.copy(key, Tier.SSD) != copy:
            return None
        directory.pin(owner, [key], Tier.SSD)
        self._writing.setdefault(owner, set())
        pages = directory.reserve(owner, key, Tier.DRAM, copy.nbytes, copy.depth)
        return copy, pages[0] if pages else None

    def end_loads(self, owner: str, written: Mapping[bytes, bytes], lent: Iterable[bytes], lender: str | None) -> None:
        """Publish what ``owner`` loaded into its pages, end its pins, and pin the copies of ``lent`` for ``lender``."""
        with self._lock:
            directory = self._directory
            self._settle(owner, written, Tier.DRAM)
            directory.unpin(owner)
            if lender is not None:
                directory.pin(lender, [key for key in lent if directory.copy(key, Tier.DRAM) is not None], Tier.DRAM)

    def pin(self, owner: str, keys: Sequence[bytes], tier: Tier | None = None, use: bool = True) -> list[Copy | None]:
        """Pin the fastest copy (or that in ``tier``) of each key that has one; with ``use`` it counts as used now."""
        with self._lock:
            directory = self._directory
            if tier is None:
                there = directory.contains_many(keys)
            else:
                there = [directory.copy(key, tier) is not None for key in keys]
            found = keys if all(there) else list(compress(keys, there))
            if use:
                directory.touch(found)
            copies = iter(directory.pin(owner, found, tier))
        return [next(copies) if present else None for present in there]

    def unpin(self, owner: str) -> None:
        """End all pins of ``owner``."""
        with self._lock:
            self._directory.unpin(owner)

    def drop(self, key: bytes, tier: Tier, seen: Copy) -> None:
        """Forget the copy of ``key`` in ``tier`` if it is still the one that was ``seen``: its bytes are bad."""
        with self._lock:
            if self._directory.copy(key, tier) == seen:
                self._directory.drop(key, tier)
                self._follow()

    def clear(self) -> int:
        """Forget everything that is published or being written; returns how many copies were published."""
        with self._lock:
            self._void |= self._writing.keys()
            self._clears += 1
            gone = sum(self._directory.clear(tier) for tier in self._tiers)
            if self._catalogue is not None:
                self._catalogue.forget_all()
            self._tell(self._directory.drain_changes())
        return gone

    def evict(self, keys: Iterable[bytes]) -> int:
        """Forget ``keys``, published or being written, in every tier; returns how many of them were published."""
        going = set(keys)
        with self._lock:
            for unwanted in self._writing.values():
                unwanted.update(going)
            gone = {key for tier in self._tiers for key in going if self._directory.drop(key, tier)}
            self._follow()
        return len(gone)

    def missing(self, keys: Sequence[bytes]) -> list[bytes]:
        """Those of ``keys`` of which there is no copy in any tier, also not one that is left alone just now."""
        with self._lock:
            there = self._directory.contains_many(keys)
        return [key for key, found in zip(keys, there, strict=True) if not found]

    def held(self, keys: Sequence[bytes], tier: Tier) -> list[bytes]:
        """Those of ``keys`` that can be read from ``tier``."""
        with self._lock:
            return [key for key in keys if self._directory.copy(key, tier) is not None]

    def holdings(self) -> dict[Tier, list[bytes]]:
        """Everything that is published, tier by tier."""
        with self._lock:
            return dict(self._holdings())

    def copies(self, tier: Tier) -> list[tuple[bytes, Copy]]:
        """Everything that is published in ``tier``, the latest last."""
        with self._lock:
            return self._directory.copies(tier)

    def stats(self, tier: Tier) -> TierStats | None:
        """Counts of ``tier``; ``None`` when the pool has no such tier."""
        with self._lock:
            if tier is Tier.SSD and self._catalogue is None:
                return None
            return self._directory.stats(tier)

    @property
    def _tiers(self) -> tuple[Tier, ...]:
        return (Tier.DRAM,) if self._catalogue is None else (Tier.DRAM, Tier.SSD)

    def _space(self, tier: Tier, pages: int) -> TierSpace:
        allocator = PageAllocator(self._page_bytes, [pages * self._page_bytes])
        told = tier is Tier.SSD or self._observer is not None
        return TierSpace(tier, allocator, self._eviction(), told, self._block_of)

    def _ssd_counts(self) -> bool:
        return self._fence is None or self._fence.passable

    def _readable(self, keys: Sequence[bytes]) -> list[bool]:
        if self._ssd_counts():
            return self._directory.contains_many(keys)
        return [self._directory.copy(key, Tier.DRAM) is not None for key in keys]

    def _settle(self, owner: str, written: Mapping[bytes, bytes], tier: Tier) -> bool:
        unwanted = self._writing.pop(owner, None)
        valid = owner not in self._void
        if valid:
            if unwanted:
                written = {key: checksum for key, checksum in written.items() if key not in unwanted}
            self._directory.commit_many(owner, written, tier)
        else:
            self._void.remove(owner)
        self._directory.abort_owner(owner)
        self._follow()
        return valid

    def _publish_one(self, owner: str, mine: dict[int, Blank], filled: Filled) -> PutStatus:
        page, key, nbytes, depth, checksum = filled
        blank = mine[page]
        if not 0 < nbytes <= self._page_bytes:
            return PutStatus.TOO_LARGE
        if blank.clears != self._clears:
            mine[page] = Blank(blank.name, self._clears)
            return PutStatus.NO_ROOM
        if self._directory.is_present_or_pending(key, Tier.DRAM):
            return PutStatus.PRESENT
        del mine[page]
        self._directory.abort(owner, blank.name, Tier.DRAM)
        self._directory.restore(key, Tier.DRAM, (page,), nbytes, checksum, depth)
        return PutStatus.STORED

    def _follow(self) -> None:
        """Tell the catalogue what changed on SSD, and the observer everything, in order.  With the lock held."""
        if self._trimmer is not None and self._trimmer.is_due:
            self._trim_soon()
        changes = self._directory.drain_changes()
        if not changes:
            return
        if self._catalogue is not None:
            record(self._catalogue, changes)
        self._tell(changes)

    def _tell(self, changes: Sequence[Change]) -> None:
        if changes and self._observer is not None:
            self._observer.changed(changes, self._holdings)

    def _holdings(self) -> list[tuple[Tier, list[bytes]]]:
        return [(tier, self._directory.keys(tier)) for tier in (Tier.DRAM, Tier.SSD)]
