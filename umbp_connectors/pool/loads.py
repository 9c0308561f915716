"""Loads from the slab for callers who wait no longer than they want.

A load reads into a page of the arena, or where that is full into a buffer of its thread; only then does it take hold of
the caller's memory, for one copy from memory to memory, and only if the caller still waits.  So a caller who leaves in
time leaves nobody behind who would touch its memory, whatever the disk does.
"""

from __future__ import annotations

import enum
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from umbp_connectors.pool.books import Books
from umbp_connectors.pool.buffers import Bytes, View, round_up
from umbp_connectors.pool.checksums import copy_checksummed
from umbp_connectors.pool.fence import ReadFence
from umbp_connectors.pool.io import IoThreads
from umbp_connectors.pool.outcomes import GetStatus
from umbp_connectors.pool.slab import ALIGNMENT
from umbp_connectors.pool.stripes import Stripes
from umbp_connectors.tier_ports import Slots
from umbp_core.directory import Copy
from umbp_core.errors import TierUnavailable, TransferError
from umbp_core.tiers import Tier

_FAIR_S = 0.02
"""Who gave the disk less time than this has not found out whether it answers."""


class WantedLoad(NamedTuple):
    """An object that a call wants from SSD: its place in the call, its key, its copy, and where it shall go.

    Without a ``view`` it only comes to DRAM.
    """

    place: int
    key: bytes
    copy: Copy
    view: View | None


class LoadState(enum.Enum):
    """How far a load is."""

    WAITING = "waiting"
    """Nothing touches the caller's memory; the caller may leave."""
    DELIVERING = "delivering"
    """The caller's memory is being written, from memory: the caller waits for it."""
    ENDED = "ended"
    GIVEN_UP = "given_up"
    """The caller has left."""


class Load:
    """One object on its way from its slot."""

    __slots__ = ("_batch", "_loader", "copy", "error", "key", "place", "state", "status", "view")

    def __init__(self, loader: Loader, batch: LoadBatch, wanted: WantedLoad) -> None:
        self._loader = loader
        self._batch = batch
        self.place, self.key, self.copy, self.view = wanted
        self.state = LoadState.WAITING
        self.status = GetStatus.TIMED_OUT
        self.error: Exception | None = None

    def run(self, spare: Callable[[], Bytes]) -> None:
        """Read and deliver, unless the caller has left or another load of the same object is under way."""
        if not self._loader.lead(self):
            return
        try:
            if self.state is LoadState.WAITING:
                self._batch.end(self, self._read(spare))
        finally:
            self._loader.follow(self.key)

    def fail(self, error: Exception) -> None:
        """End with what the caller is to see."""
        self.error = error
        self._batch.end(self, GetStatus.CORRUPT)

    def _read(self, spare: Callable[[], Bytes]) -> GetStatus:
        books, batch = self._loader.books, self._batch
        owner = books.new_owner()
        found = books.begin_load(owner, self.key, self.copy)
        if found is None:
            return GetStatus.MISS
        source, page = found
        keeps = source.tier is Tier.SSD and page is not None
        verified = False
        lender = None
        try:
            if page is None and batch.lender is not None:
                return GetStatus.MISS
            buffer = spare() if page is None else self._loader.pages[page]
            if source.tier is Tier.SSD:
                self._loader.slab.read_into(source.pages[0], buffer[: round_up(source.nbytes, ALIGNMENT)])
            view = batch.claim(self)
            lender = batch.lender if self.state is LoadState.DELIVERING else None
            verified = self._deliver(view, buffer[: source.nbytes]) == source.checksum
        except (TransferError, TierUnavailable):
            verified = False
        finally:
            books.end_load(owner, self.key, {self.key: source.checksum} if verified and keeps else {}, lender)
        if not verified:
            books.drop(self.key, source.tier, source)
            return GetStatus.CORRUPT
        return GetStatus.SSD

    def _deliver(self, view: View | None, data: Bytes) -> bytes:
        stripes = self._loader.stripes
        if view is None:
            return stripes.checksum(self.key, data)
        return copy_checksummed(stripes.prefixes[0] + self.key, view, data)


class LoadBatch:
    """The loads of one call.  Several threads may :meth:`add`; the call's own then has to :meth:`finish`.

    With a ``lender`` no bytes are delivered: the objects come to DRAM and stay pinned there for that owner.
    """

    def __init__(self, loader: Loader, lender: str | None = None) -> None:
        self._loader = loader
        self.lender = lender
        self._changed = threading.Condition()
        self._loads: list[Load] = []
        self._open = 0
        self._began = 0.0
        self._permit: int | None = None
        self._refused = False

    def add(self, wanted: Sequence[WantedLoad]) -> bool:
        """Begin to load ``wanted``, whose copies the call has pinned; false when the disk is to be left alone."""
        fence = self._loader.fence
        with self._changed:
            if self._permit is None and not self._refused:
                self._began = time.monotonic()
                self._permit = fence.enter()
                self._refused = self._permit is None
            if self._refused:
                fence.refuse(len(wanted))
                return False
            loads = [Load(self._loader, self, each) for each in wanted]
            self._loads += loads
            self._open += len(loads)
        self._loader.submit(loads)
        return True

    def finish(self, deadline: float | None) -> list[tuple[int, GetStatus]]:
        """Wait for the loads until ``deadline``; returns places and statuses.  Nobody touches a view any more.

        Without a deadline the loader's own patience counts.  Raises what a load raised that it should not have.
        """
        if not self._loads:
            return []
        with self._changed:
            now = time.monotonic()
            wait = self._loader.patience_s if deadline is None else deadline - now
            self._changed.wait_for(lambda: not self._open, max(0.0, wait))
            late = [load for load in self._loads if load.state is LoadState.WAITING]
            for load in late:
                load.state, load.view = LoadState.GIVEN_UP, None
            self._open -= len(late)
        if late:
            self._loader.withdraw(late)
        with self._changed:
            self._changed.wait_for(lambda: not self._open)
        if self._permit is not None:
            fair = time.monotonic() - self._began >= _FAIR_S
            self._loader.fence.leave(self._permit, answered=len(late) < len(self._loads), fair=fair)
        for load in self._loads:
            if load.error is not None and load.state is LoadState.ENDED:
                raise load.error
        return [(load.place, load.status) for load in self._loads]

    def claim(self, load: Load) -> View | None:
        """Where the bytes of ``load`` go, if its caller still waits; it waits for them from now on."""
        with self._changed:
            if load.state is LoadState.WAITING:
                load.state = LoadState.DELIVERING
            return load.view

    def end(self, load: Load, status: GetStatus) -> None:
        """``load`` has ended."""
        with self._changed:
            if load.state is LoadState.GIVEN_UP:
                return
            load.state, load.status, load.view = LoadState.ENDED, status, None
            self._open -= 1
            if not self._open:
                self._changed.notify_all()


class Loader:
    """What the loads of one pool have in common.  ``threads`` is started.  ``patience_s`` bounds every wait."""

    def __init__(
        self,
        books: Books,
        pages: Bytes,
        slab: Slots,
        stripes: Stripes,
        threads: IoThreads,
        fence: ReadFence,
        patience_s: float,
    ) -> None:
        self.books = books
        self.pages = pages
        self.slab = slab
        self.stripes = stripes
        self.fence = fence
        self.patience_s = patience_s
        self._threads = threads
        self._lock = threading.Lock()
        self._followers: dict[bytes, list[Load]] = {}
        """Of every object that is being read, the loads that wait for that."""

    def submit(self, loads: Iterable[Load]) -> None:
        """Queue ``loads``."""
        self._threads.submit(loads)

    def withdraw(self, loads: Iterable[Load]) -> None:
        """Forget ``loads``, which their caller gave up, where they have not begun."""
        self._threads.withdraw(loads)
        with self._lock:
            for load in loads:
                waiting = self._followers.get(load.key, [])
                if load in waiting:
                    waiting.remove(load)

    def lead(self, load: Load) -> bool:
        """True when ``load`` is to read its object; otherwise it is queued again when the one that does has ended."""
        with self._lock:
            waiting = self._followers.get(load.key)
            if waiting is None:
                self._followers[load.key] = []
                return True
            waiting.append(load)
            return False

    def follow(self, key: bytes) -> None:
        """The load that led for ``key`` has ended."""
        with self._lock:
            waiting = self._followers.pop(key)
        if waiting:
            self._threads.submit(waiting)
