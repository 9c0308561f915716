"""Moves batches of objects between buffers, arena pages and slab slots, on several threads."""

from __future__ import annotations

import contextlib
import threading
import time
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from umbp_connectors.pool.arena import Arena
from umbp_connectors.pool.books import Books, Filled
from umbp_connectors.pool.copies import copy_in, copy_out
from umbp_connectors.pool.demoter import Demoter
from umbp_connectors.pool.granting import Grant, PageStock
from umbp_connectors.pool.lending import LentObject, Loan
from umbp_connectors.pool.loads import LoadBatch, Loader, WantedLoad
from umbp_connectors.pool.outcomes import GetStatus, PutStatus
from umbp_connectors.pool.put_batch import PutBatch
from umbp_connectors.pool.rows import Views, sizes_of
from umbp_connectors.pool.shares import CopyShares
from umbp_connectors.pool.staged import StagedPut
from umbp_connectors.pool.stripes import Stripes
from umbp_core.directory import Copy
from umbp_core.tiers import Tier

_CHUNK = 128
"""Objects per visit to the books, at most: their lock is held for some hundred microseconds."""
_CHUNK_BYTES = 64 << 20
"""Bytes per visit, at most: what is stored can be read while the rest of its batch is copied."""
_CHUNK_BYTES_WITH_SSD = 8 << 20
"""The same of a put with an SSD, which writes what is stored while the rest of its batch is copied."""


@dataclass(frozen=True, slots=True)
class GetBatch:
    """What one get wants, and who pins it.  ``loads`` is what comes from SSD."""

    keys: Sequence[bytes]
    views: Views
    deadline: float | None
    owner: str
    loads: LoadBatch | None


@dataclass(slots=True)
class _Stage:
    """What the threads of one staged put have written so far, as this owner."""

    owner: str
    written: dict[bytes, bytes] = field(default_factory=dict)


class BatchMover:
    """Put and get for one open pool.  Any number of threads may call at once.

    ``arena`` is open.  Objects of several ``stripes`` can only be lent, and published out of a stock.  A batch is split
    into shares for ``copy_threads`` threads, of which the caller is one.  These copy from memory to memory only and
    look at the deadline before each object, so that they never keep a caller for long; what is on SSD is left to the
    loader.
    """

    def __init__(self, books: Books, arena: Arena, stripes: Stripes, copy_threads: int) -> None:
        self._books = books
        self._pages = arena.array
        # What is being written cannot be evicted: a put must not need the whole arena for it.
        self._chunk = max(1, min(_CHUNK, _CHUNK_BYTES // arena.page_bytes, arena.pages // 2))
        self._chunk_with_ssd = max(1, min(self._chunk, _CHUNK_BYTES_WITH_SSD // arena.page_bytes))
        self._stripes = stripes
        self._prefix = stripes.prefixes[0]
        self._loader: Loader | None = None
        self._demoter: Demoter | None = None
        self._shares = CopyShares(copy_threads)
        self._lock = threading.Lock()
        self._closed = False
        self.puts: Counter[PutStatus] = Counter()
        self.gets: Counter[GetStatus] = Counter()

    def use_ssd(self, loader: Loader, demoter: Demoter) -> None:
        """Read through ``loader``, and tell ``demoter`` what was stored.  Before the first put."""
        self._loader = loader
        self._demoter = demoter

    def put(self, batch: PutBatch) -> list[PutStatus]:
        """Copy ``batch`` into the pool."""
        statuses: list[PutStatus] = []
        for part in self._chunks(batch):
            owner = self._books.new_owner()
            written: dict[bytes, bytes] = {}
            try:
                statuses += self._write(owner, part, written)
            finally:
                self._settle(owner, written)
        with self._lock:
            self.puts.update(statuses)
        return statuses

    def stage(self, batch: PutBatch) -> StagedPut:
        """Copy ``batch`` into the pool without letting anybody read it yet."""
        stage = _Stage(self._books.new_owner())
        statuses: list[PutStatus] = []
        try:
            for part in self._chunks(batch):
                statuses += self._write(stage.owner, part, stage.written)
        finally:
            if len(statuses) != len(batch.keys):
                self._books.settle(stage.owner, {}, Tier.DRAM)
        return StagedPut(statuses, lambda publish: self._settle_stage(stage, statuses, publish))

    def grant(self, keys: Sequence[bytes], sizes: Sequence[int], depths: Sequence[int]) -> Grant:
        """Pages of DRAM for somebody else to write ``keys`` into; evicts."""
        owner = self._books.new_owner()
        places = self._books.reserve_new(owner, keys, sizes, depths)
        with self._lock:
            self.puts.update(place for place in places if isinstance(place, PutStatus))
        return Grant(keys, places, lambda written: self._settle_grant(owner, written))

    def stock(self) -> PageStock:
        """Pages of DRAM for somebody else to write to before it knows the keys; none yet."""
        return PageStock(self._books, self._settle_stock)

    def get(self, keys: Sequence[bytes], views: Views, deadline: float | None) -> list[GetStatus]:
        """Copy the objects under ``keys`` into ``views``, verified."""
        loads = LoadBatch(self._loader) if self._loader is not None else None
        batch = GetBatch(keys, views, deadline, self._books.new_owner(), loads)
        loaded: list[tuple[int, GetStatus]] = []
        statuses: list[GetStatus] = []
        try:
            for first in range(0, len(keys), self._chunk):
                statuses += self._get_chunk(batch, first)
        finally:
            try:
                if loads is not None:
                    loaded = loads.finish(deadline)
            finally:
                self._books.unpin(batch.owner)
        for index, status in loaded:
            statuses[index] = status
        if self._demoter is not None and self._demoter.asks:
            self._demoter.used([key for key, status in zip(keys, statuses, strict=True) if status is GetStatus.DRAM])
        with self._lock:
            self.gets.update(statuses)
        return statuses

    def lend(self, keys: Sequence[bytes], deadline: float | None) -> Loan:
        """Pin the objects under ``keys`` in DRAM, bringing them there from SSD until ``deadline``."""
        owner = self._books.new_owner()
        loads = LoadBatch(self._loader, lender=owner) if self._loader is not None else None
        objects = [LentObject(GetStatus.MISS)] * len(keys)
        with contextlib.ExitStack() as undo:
            undo.callback(self._books.unpin, owner)
            copies = self._books.pin(owner, keys)
            wanted = [
                WantedLoad(index, key, copy, None)
                for index, (key, copy) in enumerate(zip(keys, copies, strict=True))
                if copy is not None and copy.tier is Tier.SSD
            ]
            if loads is not None and wanted and loads.add(wanted):
                ended = loads.finish(deadline)
                loaded = self._books.pin(owner, [keys[index] for index, _ in ended], Tier.DRAM)
                for (index, status), copy in zip(ended, loaded, strict=True):
                    objects[index] = _lent(copy, status) if status.hit else LentObject(status)
            undo.pop_all()
        for index, copy in enumerate(copies):
            if copy is not None and copy.tier is Tier.DRAM:
                objects[index] = _lent(copy, GetStatus.DRAM)
        if self._demoter is not None and self._demoter.asks:
            self._demoter.used([key for key, lent in zip(keys, objects, strict=True) if lent.status is GetStatus.DRAM])
        return Loan(objects, lambda: self._books.unpin(owner))

    def read(self, key: bytes, start: int, most: int) -> list[tuple[Copy, bytes]]:
        """The copy of ``key`` in DRAM and some of its bytes, verified; nothing when there is none that is good."""
        owner = self._books.new_owner()
        try:
            (copy,) = self._books.pin(owner, [key], Tier.DRAM, use=False)
            if copy is None:
                return []
            data = self._pages[copy.pages[0], : copy.nbytes][start : start + most].tobytes()
            return [(copy, data)] if self._is_sound(key, copy) else []
        finally:
            self._books.unpin(owner)

    def check(self, keys: Sequence[bytes]) -> int:
        """Verify what lies in DRAM under ``keys``; returns how many objects there were forgotten as bad."""
        owner = self._books.new_owner()
        try:
            copies = self._books.pin(owner, keys, Tier.DRAM, use=False)
            pairs = zip(keys, copies, strict=True)
            return sum(copy is not None and not self._is_sound(key, copy) for key, copy in pairs)
        finally:
            self._books.unpin(owner)

    def _is_sound(self, key: bytes, copy: Copy) -> bool:
        """Whether the bytes of a pinned ``copy`` in DRAM are what was stored; otherwise it is forgotten."""
        sound = self._stripes.checksum(key, self._pages[copy.pages[0], : copy.nbytes]) == copy.checksum
        if not sound:
            self._books.drop(key, Tier.DRAM, copy)
        return sound

    def close(self, idle: bool) -> None:
        """End the threads; unless ``idle``, without waiting for the calls under way.  Staged puts come to nothing."""
        self._closed = True
        self._shares.close(idle)

    # -- put

    def _chunks(self, batch: PutBatch) -> Iterator[PutBatch]:
        chunk = self._chunk if self._demoter is None else self._chunk_with_ssd
        for first in range(0, len(batch.keys), chunk):
            yield batch.part(first, first + chunk)

    def _write(self, owner: str, batch: PutBatch, written: dict[bytes, bytes]) -> list[PutStatus]:
        """Copy ``batch`` into pages that ``owner`` reserves; adds the checksums to ``written``."""
        if _is_over(batch.deadline):
            return [PutStatus.TIMED_OUT] * len(batch.keys)
        places = self._books.reserve_new(owner, batch.keys, sizes_of(batch.views), batch.depths)
        pages = [None if isinstance(place, PutStatus) else place for place in places]
        statuses = [place if isinstance(place, PutStatus) else PutStatus.TIMED_OUT for place in places]

        def copy(first: int, stop: int) -> None:
            page = pages[first]
            if page is not None and not _is_over(batch.deadline):
                keys, there = batch.keys[first:stop], self._pages[page : page + stop - first]
                found = copy_in(self._prefix, batch.keys, batch.views, first, there)
                written.update(zip(keys, found, strict=True))
                statuses[first:stop] = [PutStatus.STORED] * (stop - first)

        self._shares.run(batch.views, pages, copy)
        return statuses

    def _settle(self, owner: str, written: Mapping[bytes, bytes]) -> bool:
        """Publish what was ``written``, give the rest back, and have it demoted; whether it is published."""
        with self._expecting(written):
            done = self._books.settle(owner, written, Tier.DRAM)
            if done:
                self._demote(written)
        return done

    def _settle_stage(self, stage: _Stage, statuses: Sequence[PutStatus], publish: bool) -> bool:
        publish = publish and not self._closed
        done = self._settle(stage.owner, stage.written if publish else {}) and publish
        if done:
            with self._lock:
                self.puts.update(statuses)
        return done

    def _settle_grant(self, owner: str, written: Mapping[bytes, bytes]) -> bool:
        done = self._settle(owner, {} if self._closed else written) and not self._closed
        if done:
            with self._lock:
                self.puts[PutStatus.STORED] += len(written)
        return done

    def _settle_stock(self, owner: str, filled: Sequence[Filled]) -> list[PutStatus]:
        if self._closed:
            return [PutStatus.NO_ROOM] * len(filled)
        with self._expecting([each.key for each in filled]):
            statuses = self._books.publish_blank(owner, filled)
            pairs = zip(filled, statuses, strict=True)
            self._demote([each.key for each, status in pairs if status is PutStatus.STORED])
        with self._lock:
            self.puts.update(statuses)
        return statuses

    def _expecting(self, keys: Iterable[bytes]) -> contextlib.AbstractContextManager[None]:
        """Around what publishes ``keys`` and has them demoted: no room is kept with them between the two."""
        return contextlib.nullcontext() if self._demoter is None else self._demoter.expecting(keys)

    def _demote(self, written: Collection[bytes]) -> None:
        if self._demoter is not None and written:
            self._demoter.add(written)

    # -- get

    def _get_chunk(self, batch: GetBatch, first: int) -> list[GetStatus]:
        """Deliver the objects from ``first`` on."""
        part = slice(first, first + self._chunk)
        keys, views = batch.keys[part], batch.views[part]
        if _is_over(batch.deadline):
            return [GetStatus.TIMED_OUT] * len(keys)
        copies = self._books.pin(batch.owner, keys)
        pages: list[int | None] = [None] * len(keys)
        statuses = [GetStatus.MISS] * len(keys)
        wanted: list[WantedLoad] = []
        for index, (copy, nbytes) in enumerate(zip(copies, sizes_of(views), strict=True)):
            if copy is None:
                continue
            if copy.nbytes != nbytes:
                statuses[index] = GetStatus.SIZE_MISMATCH
            elif copy.tier is Tier.SSD:
                wanted.append(WantedLoad(first + index, keys[index], copy, views[index]))
            else:
                pages[index] = copy.pages[0]
        if wanted:
            from_ssd = self._load(batch, wanted)
            for load in wanted:
                statuses[load.place - first] = from_ssd

        def deliver(start: int, stop: int) -> None:
            statuses[start:stop] = self._deliver(batch, first + start, copies[start:stop])

        self._shares.run(views, pages, deliver)
        return statuses

    def _deliver(self, batch: GetBatch, first: int, copies: Sequence[Copy | None]) -> list[GetStatus]:
        """Deliver the objects from ``first`` on, whose ``copies`` lie side by side in DRAM."""
        if _is_over(batch.deadline):
            return [GetStatus.TIMED_OUT] * len(copies)
        there = [copy for copy in copies if copy is not None]
        page = there[0].pages[0]
        found = copy_out(self._prefix, batch.keys, batch.views, first, self._pages[page : page + len(there)])
        return [
            GetStatus.DRAM if checksum == copy.checksum else self._get_instead(batch, first + index, copy)
            for index, (checksum, copy) in enumerate(zip(found, there, strict=True))
        ]

    def _get_instead(self, batch: GetBatch, index: int, bad: Copy) -> GetStatus:
        """Forget the ``bad`` copy in DRAM, and deliver the object from SSD if it is there."""
        key = batch.keys[index]
        self._books.drop(key, Tier.DRAM, bad)
        (second,) = self._books.pin(batch.owner, [key])
        if second is None or second.tier is not Tier.SSD:
            return GetStatus.CORRUPT
        began = self._load(batch, [WantedLoad(index, key, second, batch.views[index])])
        return GetStatus.CORRUPT if began is GetStatus.MISS else began

    @staticmethod
    def _load(batch: GetBatch, wanted: Sequence[WantedLoad]) -> GetStatus:
        """Begin to load ``wanted``; what to say about them until they end."""
        began = batch.loads is not None and batch.loads.add(wanted)
        return GetStatus.SSD if began else GetStatus.MISS


def _lent(copy: Copy | None, status: GetStatus) -> LentObject:
    if copy is None:
        return LentObject(GetStatus.MISS)
    return LentObject(status, copy.pages[0], copy.nbytes, copy.checksum)


def _is_over(deadline: float | None) -> bool:
    return deadline is not None and time.monotonic() >= deadline
