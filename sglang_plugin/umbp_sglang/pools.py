"""One SGLang pool in our pool: its pages as objects of one :class:`LocalPool` for each range of heads."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from umbp_connectors.daemon.client import DaemonPool
from umbp_connectors.pool.buffers import round_up
from umbp_connectors.pool.local import GetStatus, LocalPool, PutStatus, StagedPut
from umbp_connectors.pool.slab import ALIGNMENT
from umbp_core.directory import TierStats
from umbp_core.errors import StateError
from umbp_core.tiers import Tier
from umbp_sglang.host_pages import PageAccess, PageBuffer
from umbp_sglang.siblings import SiblingPool, SiblingServer

logger = logging.getLogger(__name__)

BATCH_PAGES = 128
"""Pages of one storage call of SGLang."""


class Shard(Protocol):
    """What a store needs of a pool: :class:`LocalPool` has it."""

    def put(
        self,
        keys: Sequence[bytes],
        buffers: Sequence[Any],
        depths: Sequence[int] | None = None,
        timeout: float | None = None,
    ) -> list[PutStatus]:
        """Store buffers."""

    def stage(
        self,
        keys: Sequence[bytes],
        buffers: Sequence[Any],
        depths: Sequence[int] | None = None,
        timeout: float | None = None,
    ) -> StagedPut:
        """Copy buffers, without making them readable yet."""

    def get(self, keys: Sequence[bytes], buffers: Sequence[Any], timeout: float | None = None) -> list[GetStatus]:
        """Fill buffers."""

    def exists(self, keys: Sequence[bytes], timeout: float | None = None) -> list[bool]:
        """Which of the keys can be read now."""

    def count_prefix(self, keys: Sequence[bytes], timeout: float | None = None) -> int:
        """How many can be read now, from the first on without a gap."""

    def clear(self) -> int:
        """Forget everything.  Raises ``TierUnavailable`` when that cannot be done now."""

    def stats(self, tier: Tier) -> TierStats | None:
        """How full a tier is; ``None`` when there is none of its own."""

    def open(self) -> None:
        """Make ready for calls."""

    def close(self) -> None:
        """Give everything back."""


class Budget:
    """The seconds that one call has for all its parts."""

    def __init__(self, seconds: float) -> None:
        self._until = time.monotonic() + seconds

    def left(self) -> float:
        """What is left of them, 0 when they are over."""
        return max(0.0, self._until - time.monotonic())


@dataclass(frozen=True, slots=True)
class Moved:
    """What became of each page of one call, and whether its time was over before its end."""

    ok: list[bool]
    late: bool = False
    fresh: int = 0
    """Of the pages that are ok: those that were really written, or came from SSD."""

    def followed_by(self, missing: int) -> Moved:
        """The same, of a call that had ``missing`` pages more."""
        return Moved(self.ok + [False] * missing, self.late, self.fresh) if missing else self


@dataclass(frozen=True, slots=True)
class StagedPages:
    """Pages that were copied and cannot be read yet."""

    moved: Moved
    _puts: tuple[StagedPut, ...]

    def publish(self) -> bool:
        """Make them readable; false when a pool was cleared or closed meanwhile."""
        return False not in [put.publish() for put in self._puts]

    def discard(self) -> None:
        """Give them up, unless they are published."""
        for put in self._puts:
            put.discard()


class StorePool:
    """The pages of one SGLang pool on this rank.

    ``shards[k]`` keeps part ``k`` of each page.  A page is there when all its parts are.  ``servers`` let sibling ranks
    read them.  Any thread.
    """

    def __init__(
        self, name: str, access: PageAccess, shards: Sequence[Shard], servers: Sequence[SiblingServer] = ()
    ) -> None:
        self.name = name
        self.access = access
        self.shards = tuple(shards)
        self._servers = tuple(servers)
        self._elsewhere = [shard for shard in self.shards if isinstance(shard, DaemonPool | SiblingPool)]
        self._failed = 0
        self._lock = threading.Lock()

    @property
    def page_bytes(self) -> int:
        """Bytes of one page on this rank."""
        return self.access.object_bytes * self.access.parts

    def put(self, keys: Sequence[bytes], indices: Any, depths: Sequence[int], budget: Budget) -> Moved:
        """Store the pages whose rows ``indices`` names.  Raises ``ValueError`` unless these are so many whole pages."""
        parts = self.access.sources(indices, len(keys))
        shards = zip(self.shards, parts, strict=True)
        return _kept([shard.put(keys, part, depths, budget.left()) for shard, part in shards])

    def stage(self, keys: Sequence[bytes], indices: Any, depths: Sequence[int], budget: Budget) -> StagedPages:
        """Copy them, to be published later.  Raises as :meth:`put` does."""
        parts = self.access.sources(indices, len(keys))
        puts = []
        with contextlib.ExitStack() as undo:
            for shard, part in zip(self.shards, parts, strict=True):
                puts.append(shard.stage(keys, part, depths, budget.left()))
                undo.callback(puts[-1].discard)
            undo.pop_all()
        return StagedPages(_kept([put.statuses for put in puts]), tuple(puts))

    def get(self, keys: Sequence[bytes], indices: Any, budget: Budget) -> Moved:
        """Fill the pages whose rows ``indices`` names.  Raises as :meth:`put` does.

        What did not arrive has undefined content.
        """
        parts = self.access.targets(indices, len(keys))
        moved = _hits([shard.get(keys, part, budget.left()) for shard, part in zip(self.shards, parts, strict=True)])
        self.access.deliver(indices, parts, moved.ok)
        return moved

    def put_flat(self, keys: Sequence[bytes], pages: Sequence[PageBuffer], timeout: float) -> Moved:
        """Store pages given as flat buffers; only for pools whose pages are not cut."""
        return _kept([self.shards[0].put(keys, pages, None, timeout)])

    def stage_flat(self, keys: Sequence[bytes], pages: Sequence[PageBuffer], timeout: float) -> StagedPages:
        """Copy flat pages, to be published later; only for pools whose pages are not cut."""
        put = self.shards[0].stage(keys, pages, None, timeout)
        return StagedPages(_kept([put.statuses]), (put,))

    def get_flat(self, keys: Sequence[bytes], pages: Sequence[PageBuffer], timeout: float) -> Moved:
        """Fill flat buffers; only for pools whose pages are not cut."""
        return _hits([self.shards[0].get(keys, pages, timeout)])

    def contains(self, keys: Sequence[bytes], budget: Budget) -> list[bool]:
        """Which pages can be read now."""
        first, *others = [shard.exists(keys, budget.left()) for shard in self.shards]
        return [all(parts) for parts in zip(first, *others, strict=True)] if others else first

    def count_prefix(self, keys: Sequence[bytes], budget: Budget) -> int:
        """How many can be read now, from the first on without a gap."""
        return min(shard.count_prefix(keys, budget.left()) for shard in self.shards)

    def take_unanswered(self) -> int:
        """Calls since the last time that nobody answered, or not in time, where another process keeps the pages."""
        if not self._elsewhere:
            return 0
        with self._lock, contextlib.suppress(StateError):  # it is being closed
            before, self._failed = self._failed, sum(shard.failed for shard in self._elsewhere)
            return self._failed - before
        return 0

    def tiers(self) -> dict[str, tuple[int, int]]:
        """Of each tier how many bytes are used, and how many there are.  Raises ``StateError`` when closed.

        A pool elsewhere may take a second to answer; one that does not is asked once, and has no tiers.
        """
        found: dict[str, tuple[int, int]] = {}
        slot = round_up(self.access.object_bytes, ALIGNMENT)
        for shard in self.shards:
            dram = shard.stats(Tier.DRAM)
            if dram is None:
                continue
            for tier, stats in ((Tier.DRAM, dram), (Tier.SSD, shard.stats(Tier.SSD))):
                if stats is not None:
                    used, total = found.get(tier.name.lower(), (0, 0))
                    taken = stats.total_pages - stats.free_pages
                    found[tier.name.lower()] = (used + taken * slot, total + stats.total_pages * slot)
        return found

    def refused(self) -> Mapping[str, int]:
        """How often each offload policy kept a page out of SSD.  Raises ``StateError`` when closed."""
        found: Counter[str] = Counter()
        for shard in self.shards:
            if isinstance(shard, LocalPool):
                found.update(shard.counters().demotions_refused)
        return found

    def ssd_events(self) -> Mapping[str, int]:
        """What happened on the way to and from SSD; empty without an SSD tier here.  Raises as :meth:`refused` does."""
        found: Counter[str] = Counter()
        for shard in self.shards:
            if isinstance(shard, LocalPool) and shard.stats(Tier.SSD) is not None:
                counted = shard.counters()
                found.update(
                    restored=counted.restored,
                    demoted=counted.demoted,
                    demotions_failed=counted.demotions_failed,
                    demotions_dropped=counted.demotions_dropped,
                    fenced=counted.fenced,
                    fenced_loads=counted.fenced_loads,
                )
        return found

    def clear(self) -> None:
        """Forget every page.  Raises what a shard raises that cannot."""
        for shard in self.shards:
            shard.clear()

    def open(self) -> None:
        """Make the shards and the servers ready.  Raises what they raise, with none of them left open."""
        with contextlib.ExitStack() as undo:
            for shard in self.shards:
                shard.open()
                undo.callback(shard.close)
            for server in self._servers:
                server.open()
                undo.callback(server.close)
            undo.pop_all()
        logger.info("umbp: pool %s open: pages of %.2f MiB, %s", self.name, self.page_bytes / 2**20, self._tiers_text())

    def close(self) -> None:
        """Give everything back; idempotent."""
        for server in self._servers:
            server.close()
        for shard in self.shards:
            shard.close()

    def _tiers_text(self) -> str:
        tiers = self.tiers()
        if "dram" not in tiers:
            return "read where the first rank keeps them"
        page = round_up(self.access.object_bytes, ALIGNMENT) * self.access.parts
        _, dram = tiers["dram"]
        text = f"DRAM tier of {dram / 2**30:.2f} GiB ({dram // page} pages)"
        if "ssd" not in tiers:
            return f"{text}, no SSD tier"
        used, ssd = tiers["ssd"]
        return f"{text}, SSD tier of {ssd / 2**30:.2f} GiB with {used // page} pages from before"


def depths_of(prefix_pages: int, pages: int) -> list[int]:
    """The places in their chain of ``pages`` pages that follow ``prefix_pages`` others."""
    return list(range(prefix_pages, prefix_pages + pages))


def _kept(statuses: list[list[PutStatus]]) -> Moved:
    """A page is stored when all its parts are."""
    stored, present = PutStatus.STORED, PutStatus.PRESENT
    (first, *others) = statuses
    if not others and first.count(stored) == len(first):  # nearly always: no part of a page is looked at alone
        return Moved([True] * len(first), fresh=len(first))
    late = any(PutStatus.TIMED_OUT in part for part in statuses)
    pages = list(zip(*statuses, strict=True))
    ok = [all(status is stored or status is present for status in page) for page in pages]
    return Moved(ok, late, sum(good and stored in page for good, page in zip(ok, pages, strict=True)))


def _hits(statuses: list[list[GetStatus]]) -> Moved:
    """A page arrived when all its parts did."""
    (first, *others) = statuses
    if not others and first.count(GetStatus.DRAM) == len(first):
        return Moved([True] * len(first))
    late = any(GetStatus.TIMED_OUT in part for part in statuses)
    pages = list(zip(*statuses, strict=True))
    ok = [all(status.hit for status in page) for page in pages]
    return Moved(ok, late, sum(good and GetStatus.SSD in page for good, page in zip(ok, pages, strict=True)))
