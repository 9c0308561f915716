"""Moves batches of objects between buffers, arena pages and slab slots, on several threads."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from itertools import pairwise
from typing import TypeVar

from umbp_connectors.pool.arena import Arena
from umbp_connectors.pool.books import Books, Wanted
from umbp_connectors.pool.buffers import Bytes, round_up
from umbp_connectors.pool.checksums import copy_checksummed, object_checksum
from umbp_connectors.pool.demoter import Demoter
from umbp_connectors.pool.outcomes import GetStatus, PutStatus
from umbp_connectors.pool.slab import ALIGNMENT, SlabFile
from umbp_core.directory import Copy
from umbp_core.errors import TierUnavailable, TransferError
from umbp_core.tiers import Tier

Status = TypeVar("Status")

_CHUNK = 64
"""Objects per visit to the books, at most: their lock is held for about a hundred microseconds."""
_CHUNK_BYTES = 16 << 20
"""Bytes per visit, at most: what is stored can be read, and written to SSD, while the rest of its batch is copied."""
_SHARE_BYTES = 1 << 20
"""From about here a second thread pays off."""
_SHARED_OBJECT_BYTES = 192 << 10
"""Objects that are smaller on average are left to one thread: several would wait for each other's GIL after each."""


class BatchMover:
    """Put and get for one open pool.  Any number of threads may call at once.

    ``arena`` is open.  ``prefix`` is the identity's digest, the first part of every object key.  A batch is split into
    shares for ``copy_threads`` threads, of which the caller is one; loads from the slab run on ``io_threads`` others.
    """

    def __init__(self, books: Books, arena: Arena, prefix: bytes, copy_threads: int, io_threads: int) -> None:
        self._books = books
        self._pages = arena.array
        # What is being written cannot be evicted: all threads together must not need the whole arena for it.
        self._chunk = max(1, min(_CHUNK, _CHUNK_BYTES // arena.page_bytes, arena.pages // (2 * max(1, copy_threads))))
        self._prefix = prefix
        self._slab: SlabFile | None = None
        self._demoter: Demoter | None = None
        self._copy_threads = copy_threads
        self._copies = ThreadPoolExecutor(max(1, copy_threads - 1), "umbp-copy")
        self._loads = ThreadPoolExecutor(io_threads, "umbp-load")
        self._lock = threading.Lock()
        self.puts: Counter[PutStatus] = Counter()
        self.gets: Counter[GetStatus] = Counter()

    def use_ssd(self, slab: SlabFile, demoter: Demoter) -> None:
        """Read from ``slab``, and tell ``demoter`` what was stored.  Before the first put."""
        self._slab = slab
        self._demoter = demoter

    def put(self, keys: Sequence[bytes], views: Sequence[Bytes], depths: Sequence[int]) -> list[PutStatus]:
        """Copy ``views`` into the pool under ``keys``."""
        statuses = self._shared(views, lambda start, stop: self._put_share(keys, views, depths, start, stop))
        with self._lock:
            self.puts.update(statuses)
        return statuses

    def get(self, keys: Sequence[bytes], views: Sequence[Bytes]) -> list[GetStatus]:
        """Copy the objects under ``keys`` into ``views``, verified."""
        statuses = self._shared(views, lambda start, stop: self._get_share(keys, views, start, stop))
        with self._lock:
            self.gets.update(statuses)
        return statuses

    def close(self, idle: bool) -> None:
        """End the threads; unless ``idle``, without waiting for the calls under way."""
        self._copies.shutdown(wait=idle)
        self._loads.shutdown(wait=idle)

    def _shared(self, views: Sequence[Bytes], work: Callable[[int, int], list[Status]]) -> list[Status]:
        """``work`` on ranges that together are the whole batch, one range per thread; their results in order."""
        count = len(views)
        nbytes = sum(view.nbytes for view in views)
        worth_sharing = nbytes >= _SHARED_OBJECT_BYTES * count
        shares = max(1, min(self._copy_threads, nbytes // _SHARE_BYTES, count)) if worth_sharing else 1
        bounds = [count * share // shares for share in range(shares + 1)]
        others = [self._copies.submit(work, start, stop) for start, stop in pairwise(bounds[1:])]
        try:
            results = work(0, bounds[1])
        finally:
            wait(others)
        for other in others:
            results += other.result()
        return results

    # -- put

    def _put_share(
        self, keys: Sequence[bytes], views: Sequence[Bytes], depths: Sequence[int], start: int, stop: int
    ) -> list[PutStatus]:
        statuses: list[PutStatus] = []
        for first in range(start, stop, self._chunk):
            part = slice(first, min(first + self._chunk, stop))
            statuses += self._put_chunk(keys[part], views[part], depths[part])
        return statuses

    def _put_chunk(self, keys: Sequence[bytes], views: Sequence[Bytes], depths: Sequence[int]) -> list[PutStatus]:
        owner = self._books.new_owner()
        places = self._books.reserve_new(owner, keys, [view.nbytes for view in views], depths)
        written: dict[bytes, bytes] = {}
        statuses: list[PutStatus] = []
        pages, prefix = self._pages, self._prefix
        try:
            for key, view, place in zip(keys, views, places, strict=True):
                if isinstance(place, PutStatus):
                    statuses.append(place)
                    continue
                written[key] = copy_checksummed(prefix + key, pages[place, : view.nbytes], view)
                statuses.append(PutStatus.STORED)
        finally:
            self._books.settle(owner, written, Tier.DRAM)
        if self._demoter is not None and written:
            self._demoter.add(written)
        return statuses

    # -- get

    def _get_share(self, keys: Sequence[bytes], views: Sequence[Bytes], start: int, stop: int) -> list[GetStatus]:
        statuses: list[GetStatus] = []
        loads: list[tuple[int, Future[GetStatus]]] = []
        owner = self._books.new_owner()
        try:
            for first in range(start, stop, self._chunk):
                part = slice(first, min(first + self._chunk, stop))
                copies = self._books.pin(owner, keys[part])
                for key, view, copy in zip(keys[part], views[part], copies, strict=True):
                    if copy is not None and copy.tier is Tier.SSD and copy.nbytes == view.nbytes:
                        loads.append((len(statuses), self._loads.submit(self._load, key, view, copy)))
                    statuses.append(self._get_one(owner, key, view, copy))
        finally:
            wait([load for _, load in loads])
            self._books.unpin(owner)
        for index, load in loads:
            statuses[index] = load.result()
        return statuses

    def _get_one(self, owner: str, key: bytes, view: Bytes, copy: Copy | None) -> GetStatus:
        """Deliver from DRAM; for a copy on SSD only say what is known before its bytes are there."""
        if copy is None:
            return GetStatus.MISS
        if copy.nbytes != view.nbytes:
            return GetStatus.SIZE_MISMATCH
        if copy.tier is Tier.SSD:
            return GetStatus.SSD
        page = self._pages[copy.pages[0], : copy.nbytes]
        if copy_checksummed(self._prefix + key, view, page) == copy.checksum:
            return GetStatus.DRAM
        self._books.drop(key, Tier.DRAM, copy)
        (second,) = self._books.pin(owner, [key])
        if second is None or second.tier is not Tier.SSD:
            return GetStatus.CORRUPT
        return self._load(key, view, second)

    def _load(self, key: bytes, view: Bytes, copy: Copy) -> GetStatus:
        """Read a pinned copy from its slot, deliver it, and keep it in DRAM if there is room."""
        slab = self._slab
        if slab is None:
            return GetStatus.MISS
        owner = self._books.new_owner()
        page = self._books.reserve(owner, Wanted(key, copy.nbytes, copy.depth), Tier.DRAM)
        verified: dict[bytes, bytes] = {}
        try:
            if page is None:
                slab.read_into(copy.pages[0], view)
                found = object_checksum(self._prefix + key, view)
            else:
                whole = self._pages[page, : round_up(copy.nbytes, ALIGNMENT)]
                slab.read_into(copy.pages[0], whole)
                found = copy_checksummed(self._prefix + key, view, whole[: copy.nbytes])
            if found == copy.checksum:
                verified[key] = found
        except (TransferError, TierUnavailable):
            verified = {}
        finally:
            if page is not None:
                self._books.settle(owner, verified, Tier.DRAM)
        if not verified:
            self._books.drop(key, Tier.SSD, copy)
            return GetStatus.CORRUPT
        return GetStatus.SSD
