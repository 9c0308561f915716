"""Tells a master what this engine holds: HBM as vLLM's block pool has it, DRAM and SSD as our directory has them.

Where the host's daemon has the pool, that is followed instead, in a thread of its own.  Everything here that the
scheduler's thread calls appends a reference to a feed and returns; words are made of it in the reporter's thread.
Nothing waits for a master, and nothing is lost for good while it is away (``docs/reporting.md``).
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from umbp_connectors.pool.books import Contents
from umbp_connectors.reporting.feed import Feed
from umbp_connectors.reporting.reporter import Reporter
from umbp_connectors.reporting.stats import Reading, ReportMeter
from umbp_connectors.reporting.words import Word
from umbp_core.directory import Change, Directory, EventKind
from umbp_core.master.model import TierCapacity
from umbp_core.ports import Clock
from umbp_core.tiers import Tier
from umbp_vllm import block_hooks, compat
from umbp_vllm.groups import KvGroup
from umbp_vllm.hbm_watch import All, BlockLog, BlockMirror, Note
from umbp_vllm.published import GroupWords, hash_form

logger = logging.getLogger("vllm.umbp.reporting")

CLOSE_TIMEOUT_S = 2.0
"""How long the end of the engine may wait for the master to be told."""
MEASURE_INTERVAL_S = 1.0

Decode: TypeAlias = "Callable[[Any], Iterable[Word]]"


@dataclass(frozen=True, slots=True)
class PoolListing:
    """Everything that the pool holds at one moment: block keys per tier."""

    keys: dict[Tier, list[bytes]]


PoolNews: TypeAlias = "Sequence[Change] | PoolListing"


class PoolMirror:
    """Makes words of the directory's changes.  The reporter's thread."""

    def __init__(self, words: GroupWords) -> None:
        self._words = words

    def decode(self, news: PoolNews) -> Iterator[Word]:
        """The words for ``news``, in its order."""
        if isinstance(news, PoolListing):
            for tier, keys in news.keys.items():
                yield self._words.replaced(tier, keys)
            return
        for change in news:
            came, gone = (change.keys, ()) if change.kind is EventKind.ADDED else ((), change.keys)
            yield from self._words.changed(change.tier, came, gone)


class PoolTeller:
    """The scheduler thread's half of what the pool holds."""

    def __init__(self, directory: Directory, tiers: Sequence[Tier], reporter: Reporter, decode: Decode) -> None:
        self._directory = directory
        self._tiers = tiers
        self._feed: Feed[PoolNews] = reporter.feed("pool", decode, self._listing)
        listing = self._listing()
        self._feed.tell(sum(map(len, listing.keys.values())), listing)

    def changed(self, changes: Sequence[Change]) -> None:
        """The directory changed like this; ``changes`` is not changed any more."""
        if changes:
            self._feed.tell(sum([len(change.keys) for change in changes]), changes)

    def _listing(self) -> PoolListing:
        return PoolListing({tier: self._directory.keys(tier) for tier in self._tiers})


class HostTeller:
    """What the host's daemon holds of this model; a ``PoolObserver`` in the thread that follows the daemon."""

    def __init__(self, reporter: Reporter, decode: Decode) -> None:
        self._now: Contents = list
        self._feed: Feed[PoolNews] = reporter.feed("pool", decode, lambda: PoolListing(dict(self._now())))

    def changed(self, changes: Sequence[Change], contents: Contents) -> None:
        """See ``PoolObserver``."""
        self._now = contents
        if changes:
            self._feed.tell(sum([len(change.keys) for change in changes]), changes)


class Gauge:
    """What the reporter counted: read in its own thread, now and then, for another one to take."""

    def __init__(self, reporter: Reporter, clock: Clock = time.monotonic) -> None:
        self._meter = ReportMeter(reporter.stats)
        self._clock = clock
        self._due = 0.0
        self._readings: deque[Reading] = deque()

    def beside(self, decode: Decode) -> Decode:
        """``decode`` that also reads the counters when it is time."""

        def decode_and_read(item: Any) -> Iterator[Word]:
            yield from decode(item)
            if self._clock() >= self._due:
                self._due = self._clock() + MEASURE_INTERVAL_S
                self._readings.extend(self._meter.read())

        return decode_and_read

    def take(self) -> Iterator[Reading]:
        """What was read since the last call."""
        while self._readings:
            yield self._readings.popleft()


@dataclass
class Reporting:
    """All that one engine tells.  Scheduler thread only."""

    reporter: Reporter
    groups: Sequence[KvGroup]
    hbm_block_bytes: int
    """Bytes of one of vLLM's KV blocks over all ranks."""
    caches_prefixes: bool
    """Whether vLLM's own prefix cache is on; without it HBM can serve nobody."""
    _log: BlockLog = field(default_factory=BlockLog, init=False)
    _hbm: Feed[list[Note]] | None = field(default=None, init=False)
    _gauge: Gauge = field(init=False)
    _capacities: list[Callable[[], Sequence[TierCapacity]]] = field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        self._gauge = Gauge(self.reporter)

    def start(self, block_pool: Any) -> None:
        """Follow vLLM's ``block_pool`` and start to report.  Never waits."""
        reason = block_hooks.cannot_watch(block_pool)
        if reason is not None:
            logger.warning(
                "umbp: what HBM holds is not reported, because this vLLM (%s) is not known: %s; DRAM and SSD are",
                compat.vllm_version(),
                reason,
            )
        elif self.caches_prefixes:
            mirror = BlockMirror(block_pool, self._words())
            self._hbm = self.reporter.feed("hbm", self._gauge.beside(mirror.decode), lambda: [All.UNKNOWN])
            block_hooks.watch_blocks(block_pool, self._log.note, self._emptied)
        self._capacities.append(lambda: [self._hbm_capacity(block_pool)])
        self.reporter.watch_capacities(lambda: [tier for some in tuple(self._capacities) for tier in some()])
        self.reporter.start()

    def follow_pool(self, directory: Directory, page_bytes: dict[Tier, int]) -> PoolTeller:
        """The pool is open: tell what its ``directory`` holds, and what changes from now on.

        ``page_bytes`` has the bytes of a page over all ranks, for each tier that there is.
        """
        decode = self._gauge.beside(PoolMirror(self._words()).decode)
        teller = PoolTeller(directory, tuple(page_bytes), self.reporter, decode)
        self._capacities.append(lambda: [_capacity(directory, tier, nbytes) for tier, nbytes in page_bytes.items()])
        return teller

    def follow_host(self, capacities: Callable[[], Sequence[TierCapacity]]) -> HostTeller:
        """The pool is in the host's daemon: what is to be told of whatever that holds.

        ``capacities`` says how full it is, and is called in the reporter's thread.
        """
        self._capacities.append(capacities)
        return HostTeller(self.reporter, self._gauge.beside(PoolMirror(self._words()).decode))

    def step(self) -> None:
        """A moment between two changes: tell what was noted of HBM.  At least once per engine step."""
        if self._hbm is not None:
            notes = self._log.take()
            if notes:
                self._hbm.tell(sum([1 if isinstance(note, All) else len(note) for note in notes]), notes)

    def readings(self) -> Iterator[Reading]:
        """What the reporter counted since the last call, at most a second old while anything happens."""
        return self._gauge.take()

    def close(self) -> None:
        """Unregister and end; bounded in time."""
        self.reporter.close(CLOSE_TIMEOUT_S)

    def _emptied(self) -> None:
        self._log.note(All.EMPTIED)
        self.step()

    def _words(self) -> GroupWords:
        return GroupWords(self.groups, hash_form())

    def _hbm_capacity(self, block_pool: Any) -> TierCapacity:
        free = block_pool.get_num_free_blocks()
        return TierCapacity(Tier.HBM, block_pool.num_gpu_blocks * self.hbm_block_bytes, free * self.hbm_block_bytes)


def _capacity(directory: Directory, tier: Tier, page_bytes: int) -> TierCapacity:
    stats = directory.stats(tier)
    return TierCapacity(tier, stats.total_pages * page_bytes, stats.free_pages * page_bytes)
