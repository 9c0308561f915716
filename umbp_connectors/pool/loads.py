"""Loads from the slab for callers who wait no longer than they want.

A load reads into a page of the arena, or where that is full into a buffer of its thread; only then does it take hold of
the caller's memory, for one copy from memory to memory, and only if the caller still waits.  So a caller who leaves in
time leaves nobody behind who would touch its memory, whatever the disk does.
"""

from __future__ import annotations

import contextlib
import enum
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from umbp_connectors.pool.books import Books
from umbp_connectors.pool.buffers import Bytes, View, round_up
from umbp_connectors.pool.checksums import copy_checksummed
from umbp_connectors.pool.fence import ReadFence
from umbp_connectors.pool.io import IoThreads, Turn
from umbp_connectors.pool.neighbours import in_runs
from umbp_connectors.pool.outcomes import GetStatus
from umbp_connectors.pool.slab import ALIGNMENT
from umbp_connectors.pool.stripes import Stripes
from umbp_connectors.tier_ports import SlotRuns, Slots
from umbp_core.directory import Copy
from umbp_core.errors import TierUnavailable, TransferError
from umbp_core.tiers import Tier

_TOGETHER = 32
"""Objects of a run, at most."""
_TOGETHER_BYTES = 1 << 20
"""The same in bytes: the first of them is delivered when the last has been read."""

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


_OVER = (LoadState.ENDED, LoadState.GIVEN_UP)


class Load:
    """One object on its way from its slot.  ``run`` is the one that it comes with."""

    __slots__ = ("batch", "copy", "error", "key", "place", "run", "state", "status", "view")

    def __init__(self, batch: LoadBatch, wanted: WantedLoad) -> None:
        self.batch = batch
        self.place, self.key, self.copy, self.view = wanted
        self.run: LoadRun | None = None
        self.state = LoadState.WAITING
        self.status = GetStatus.TIMED_OUT
        self.error: Exception | None = None


class _Part(NamedTuple):
    """A load that has begun: the copy it is from, and the page of DRAM it comes to, if there is one."""

    load: Load
    source: Copy
    page: int | None


class LoadRun:
    """Some objects of one call whose slots are side by side: a disk gives one large piece faster than small ones."""

    def __init__(self, loader: Loader, loads: Sequence[Load]) -> None:
        self._loader = loader
        self._loads = loads
        self._batch = loads[0].batch
        self._led: Sequence[Load] = ()
        """Those that no other run is reading."""
        for load in loads:
            load.run = self

    def run(self, turn: Turn) -> None:
        """Read and deliver, but for what the caller gave up or another run is reading."""
        self._led = self._loader.lead(self._loads)
        try:
            wanted = [load for load in self._led if load.state is LoadState.WAITING]
            if wanted:
                self._batch.end(self._load(wanted, turn))
        finally:
            self._loader.follow(self._led)

    def fail(self, error: Exception) -> None:
        """End with what the caller is to see."""
        for load in self._led:
            load.error = error
        self._batch.end(dict.fromkeys(self._led, GetStatus.CORRUPT))

    def _load(self, wanted: Sequence[Load], turn: Turn) -> dict[Load, GetStatus]:
        """Bring ``wanted`` to DRAM and to the caller; what became of each."""
        books, statuses = self._loader.books, dict.fromkeys(wanted, GetStatus.MISS)
        owner = books.new_owner()
        begun = books.begin_loads(owner, [(load.key, load.copy) for load in wanted])
        written: dict[bytes, bytes] = {}
        bad: list[_Part] = []
        try:
            pieces = self._pieces(wanted, begun)
            for number, piece in enumerate(pieces, 1):
                buffers = self._read(piece, turn)
                if number == len(pieces):
                    turn.leave()
                for part, buffer in zip(piece, buffers, strict=True):
                    if buffer is not None and self._deliver(part, buffer):
                        statuses[part.load] = GetStatus.SSD
                        if part.source.tier is Tier.SSD and part.page is not None:
                            written[part.load.key] = part.source.checksum
                    else:
                        statuses[part.load] = GetStatus.CORRUPT
                        bad.append(part)
        finally:
            lent = [load.key for load in wanted if load.state is LoadState.DELIVERING]
            books.end_loads(owner, written, lent, self._batch.lender)
        for part in bad:
            books.drop(part.load.key, part.source.tier, part.source)
        return statuses

    def _pieces(self, wanted: Sequence[Load], begun: Sequence[tuple[Copy, int | None] | None]) -> list[list[_Part]]:
        """What has ``begun``, divided into what is read in one go."""
        lends = self._batch.lender is not None
        parts = [
            _Part(load, *found)
            for load, found in zip(wanted, begun, strict=True)
            if found is not None and not (lends and found[1] is None)
        ]
        return in_runs(parts, lambda part: None if part.page is None else self._loader.slot_of(part.source))

    def _read(self, piece: Sequence[_Part], turn: Turn) -> list[Bytes | None]:
        """The bytes of each; ``None`` for what cannot be read."""
        pages, runs = self._loader.pages, self._loader.runs
        if len(piece) > 1 and runs is not None:
            whole = [pages[part.page] for part in piece]
            with contextlib.suppress(TransferError, TierUnavailable):
                runs.read_run(piece[0].source.pages[0], whole)
                return [page[: part.source.nbytes] for part, page in zip(piece, whole, strict=True)]
        return [self._read_one(part, turn) for part in piece]  # one of them may be what cannot be read

    def _read_one(self, part: _Part, turn: Turn) -> Bytes | None:
        source = part.source
        buffer = turn.spare() if part.page is None else self._loader.pages[part.page]
        if source.tier is Tier.SSD:
            try:
                self._loader.slab.read_into(source.pages[0], buffer[: round_up(source.nbytes, ALIGNMENT)])
            except (TransferError, TierUnavailable):
                return None
        return buffer[: source.nbytes]

    def _deliver(self, part: _Part, data: Bytes) -> bool:
        """Copy to the caller, if it still waits; whether the bytes are what they were."""
        stripes, key = self._loader.stripes, part.load.key
        view = self._batch.claim(part.load)
        if view is None:
            return stripes.checksum(key, data) == part.source.checksum
        return copy_checksummed(stripes.prefixes[0] + key, view, data) == part.source.checksum


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
            loads = [Load(self, each) for each in wanted]
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

    def end(self, statuses: Mapping[Load, GetStatus]) -> None:
        """These loads have ended, those that had not yet."""
        with self._changed:
            for load, status in statuses.items():
                if load.state not in _OVER:
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
        self.runs = slab if isinstance(slab, SlotRuns) else None
        self.stripes = stripes
        self.fence = fence
        self.patience_s = patience_s
        self._threads = threads
        # What is being read cannot be evicted: the reads under way take a quarter of the arena at most for it.
        few = len(pages) // (4 * threads.at_disk)
        self._together = max(1, min(_TOGETHER, _TOGETHER_BYTES // slab.slot_bytes, few))
        self._lock = threading.Lock()
        self._followers: dict[bytes, list[Load]] = {}
        """Of every object that is being read, the loads that wait for that."""

    def slot_of(self, copy: Copy) -> int | None:
        """The slot of a copy that can be read together with its neighbours: it is as long as a slot and a page."""
        full = round_up(copy.nbytes, ALIGNMENT) == self.slab.slot_bytes == self.pages.shape[1]
        return copy.pages[0] if copy.tier is Tier.SSD and full and self.runs is not None else None

    def submit(self, loads: Iterable[Load]) -> None:
        """Queue ``loads`` of one call, in runs of which every thread that may be at the disk gets one."""
        in_order = sorted(loads, key=lambda load: load.copy.pages[0])
        most = min(self._together, -(-len(in_order) // self._threads.at_disk))
        self._threads.submit(
            [LoadRun(self, run) for run in in_runs(in_order, lambda load: self.slot_of(load.copy), most)]
        )

    def withdraw(self, loads: Sequence[Load]) -> None:
        """Forget ``loads``, which their caller gave up, where they have not begun."""
        self._threads.withdraw({load.run for load in loads if load.run is not None})
        with self._lock:
            for load in loads:
                waiting = self._followers.get(load.key, [])
                if load in waiting:
                    waiting.remove(load)

    def lead(self, loads: Iterable[Load]) -> list[Load]:
        """Those that are to be read now; the others are queued again when the run that reads the same has ended."""
        led = []
        with self._lock:
            for load in loads:
                waiting = self._followers.get(load.key)
                if waiting is None:
                    self._followers[load.key] = []
                    led.append(load)
                else:
                    waiting.append(load)
        return led

    def follow(self, led: Iterable[Load]) -> None:
        """The loads that led have ended."""
        with self._lock:
            waiting = [load for leader in led for load in self._followers.pop(leader.key)]
        if waiting:
            self._threads.submit([LoadRun(self, [load]) for load in waiting])
