"""SGLang's storage backend: its HiCache pages in our pool."""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from prometheus_client import CollectorRegistry
from sglang.srt.mem_cache.hicache_storage import (
    HiCacheStorage,
    HiCacheStorageConfig,
    HiCacheStorageExtraInfo,
    PoolHitPolicy,
    PoolTransfer,
    PoolTransferResult,
)

from umbp_core.breaker import Backoff, Breaker
from umbp_core.errors import ConfigError
from umbp_core.ports import Clock
from umbp_sglang.clearing import Clearing
from umbp_sglang.doors import Answer, Door
from umbp_sglang.hits import PrefixHits, leading_groups, prefixes_up_to, prefixes_with_tail
from umbp_sglang.host_pages import tensor_bytes
from umbp_sglang.keys import block_keys, leading
from umbp_sglang.pools import BATCH_PAGES, Budget, Moved, StagedPages, StorePool, depths_of
from umbp_sglang.registry import KV, PoolMaker, PoolRegistry
from umbp_sglang.reporting import NodeReporting, keep_reporting, kept_reporting, open_reporting
from umbp_sglang.settings import read_settings
from umbp_sglang.sidecars import Sidecars
from umbp_sglang.stats import StoreStats
from umbp_sglang.watching import PoolWatch
from umbp_sglang.weights import known_weights

__all__ = ["UMBPStore"]

logger = logging.getLogger(__name__)

_HOLDER = "storage"
_BACKOFF = Backoff(first=1.0, ceiling=30.0)
_CLEAR_BACKOFF = Backoff(first=0.2, ceiling=5.0)


class UMBPStore(HiCacheStorage):
    """HiCache's third level over DRAM and SSD: one object for each page, SGLang pool and rank.

    ``mem_pool_host`` is the host pool of KV; the ``dynamic`` backend passes a dict and registers the pool later.  The
    constructor and :meth:`register_mem_pool_host` raise ``ConfigError`` when the configuration or the host pool cannot
    be used; nothing else ever raises.  What goes wrong later is a miss, counted and logged once; every call ends within
    ``call_timeout_ms`` and a little.

    Safe for SGLang's threads: one that asks, one that reads, one that writes, and the scheduler.
    """

    def __init__(
        self,
        storage_config: HiCacheStorageConfig,
        mem_pool_host: Any = None,
        *,
        make_pool: PoolMaker | None = None,
        clock: Clock = time.monotonic,
    ) -> None:
        self._settings = read_settings(storage_config)
        self._timeout = self._settings.config.call_timeout_ms / 1000
        self._clock = clock
        self._pools = PoolRegistry(self._settings, known_weights(), make_pool)
        self._sidecars = Sidecars(self._settings.rank.stores_kv)
        self._stats = StoreStats()
        self._clearing = Clearing(
            self._pools.clear, Breaker(random.random, _CLEAR_BACKOFF, 1), clock, self._stats.degraded
        )
        self._gets = self._door("get")
        self._puts = self._door("put")
        self._asks = self._door("exists")
        self._watch = PoolWatch(self._stats, self._pools.pools, self._asks, clock)
        self._reporting: NodeReporting | None = None
        self._complete = False
        if mem_pool_host is not None and not isinstance(mem_pool_host, dict):
            self.register_mem_pool_host(mem_pool_host)

    @property
    def metrics(self) -> CollectorRegistry:
        """The store's Prometheus metrics."""
        return self._stats.registry

    @property
    def reporting(self) -> NodeReporting | None:
        """What tells a master about this rank; ``None`` when nothing does."""
        return self._reporting

    # What SGLang registers

    def register_mem_pool_host(self, mem_pool_host: Any) -> None:
        """Take the host pool of KV.  Raises ``ConfigError`` when its pages cannot be stored."""
        self._pools.bind_anchor(mem_pool_host)
        super().register_mem_pool_host(mem_pool_host)
        self._report_beside(mem_pool_host)

    def register_mem_host_pool_v2(self, host_pool: Any, host_pool_name: Any) -> None:
        """Take a pool by name; one that comes late is opened at once, one that cannot be stored is always missing."""
        super().register_mem_host_pool_v2(host_pool, host_pool_name)
        try:
            self._pools.add(str(host_pool_name), host_pool)
        except ConfigError as error:
            self._stats.degraded("pool_not_stored")
            logger.warning("umbp: %s", error)
        if self._complete:
            self._asks.answer(self._pools.open, None)

    def on_host_pools_registered(self) -> None:
        """Every pool is known: open them all."""
        self._complete = True
        if self._reporting is not None:
            self._reporting.hold(_HOLDER)
        self._asks.answer(self._pools.open, None)

    # Pages in place (v1), and pools by name (v2)

    def batch_exists(self, keys: list[str], extra_info: HiCacheStorageExtraInfo | None = None) -> int:
        """How many pages, from the first on without a gap, can be read now: KV, and side pools that are read whole."""
        budget = Budget(self._timeout)
        found = self._ask(lambda: self._pools.whole_prefix(keys, self._anchor_prefix(keys, budget), budget), 0)
        self._stats.looked_up(len(keys), found)
        return found

    def batch_exists_v2(
        self,
        keys: list[str],
        pool_transfers: list[PoolTransfer] | None = None,
        extra_info: HiCacheStorageExtraInfo | None = None,
    ) -> PoolTransferResult:
        """Which prefixes of the chain ``keys`` can be restored, when every pool must have its part."""
        hits = self._ask(lambda: self._prefixes(keys, pool_transfers or []), PrefixHits(0))
        self._stats.looked_up(len(keys), hits.usable)
        return PoolTransferResult(hits.usable, dict(hits.boundaries), hits.restorable)

    def batch_get_v1(
        self, keys: list[str], host_indices: Any, extra_info: HiCacheStorageExtraInfo | None = None
    ) -> list[bool]:
        """Fill the host pages of KV; which of them arrived."""
        return self._get(KV, keys, host_indices, Budget(self._timeout))

    def batch_set_v1(
        self, keys: list[str], host_indices: Any, extra_info: HiCacheStorageExtraInfo | None = None
    ) -> list[bool]:
        """Store the host pages of KV, and publish what side pools stored for them; which of them are there."""
        depth = len(extra_info.prefix_keys or ()) if extra_info is not None else 0
        budget = Budget(self._timeout)
        there = self._move_anchor(lambda: self._put_anchor(keys, host_indices, depth, budget), len(keys))
        self.tell_names()
        return there

    def batch_get_v2(
        self, transfers: list[PoolTransfer], extra_info: HiCacheStorageExtraInfo | None = None
    ) -> dict[str, list[bool]]:
        """Fill host pages of the named pools; for each pool which of them arrived."""
        budget = Budget(self._timeout)
        return {
            transfer.name: self._get(str(transfer.name), transfer.keys or [], transfer.host_indices, budget)
            for transfer in transfers
        }

    def batch_set_v2(
        self, transfers: list[PoolTransfer], extra_info: HiCacheStorageExtraInfo | None = None
    ) -> dict[str, list[bool]]:
        """Copy host pages of the named pools; they can be read as soon as the KV pages of the same hashes can.

        For each pool which of its pages are there.
        """
        self._sidecars.begin()
        depth = len(extra_info.prefix_keys or ()) if extra_info is not None else 0
        budget = Budget(self._timeout)
        return {transfer.name: self._set_side(transfer, depth, budget) for transfer in transfers}

    # Flat pages (v0)

    def get(self, key: str, target_location: Any = None, target_sizes: Any = None) -> Any:
        """Fill the flat page ``target_location`` with KV page ``key``; the same tensor, or ``None`` for a miss."""
        return self.batch_get([key], [target_location])[0]

    def batch_get(self, keys: list[str], target_locations: Any = None, target_sizes: Any = None) -> list[Any]:
        """The same for several pages."""
        targets = list(target_locations or [])
        if len(targets) != len(keys) or any(target is None for target in targets):
            return [None] * len(keys)
        ok = self._gets.move(lambda: self._get_flat(keys, targets), len(keys))
        return [target if there else None for target, there in zip(targets, ok, strict=True)]

    def set(self, key: str, value: Any = None, target_location: Any = None, target_sizes: Any = None) -> bool:
        """Store the flat page ``value`` as KV page ``key``."""
        return self.batch_set([key], [value])

    def batch_set(
        self, keys: list[str], values: Any = None, target_locations: Any = None, target_sizes: Any = None
    ) -> bool:
        """The same for several pages; whether all of them are there."""
        pages = list(values or [])
        if len(pages) != len(keys) or any(page is None for page in pages):
            return False
        return all(self._move_anchor(lambda: self._put_flat(keys, pages), len(keys)))

    def exists(self, key: str) -> bool:
        """Whether KV page ``key`` can be read now."""
        return self._ask(lambda: self._anchor_prefix([key], Budget(self._timeout)), 0) == 1

    # The whole store

    def clear(self) -> None:
        """Forget every page of every pool; when it returns, none of them is found any more.

        Where they cannot be forgotten yet, because the daemon is away, nothing is found or stored until they are.
        """
        self._sidecars.clear()
        self._clearing.ask()

    def get_stats(self) -> Any:
        """SGLang's ``StorageMetrics`` of the calls since the last time, or ``None`` when it collects none."""
        return self._asks.answer(self._stats.take_page_counts, None) if self._settings.page_metrics else None

    def close(self) -> None:
        """Write what is to be on SSD, give everything back; idempotent.  Later calls are misses."""
        self._sidecars.clear()
        if not self._clearing.done():
            logger.warning("umbp: closed before the storage could be cleared: what it holds will be found again")
        self._asks.answer(self._pools.close, None)
        self._watch.close()
        self._stats.ended()
        reporting, self._reporting = self._reporting, None
        if reporting is not None:
            self._asks.answer(lambda: reporting.release(_HOLDER), None)

    # Reporting

    def tell_names(self) -> None:
        """Tell under their own names the pages that SGLang has described (see ``page_ids``).  A storage thread."""
        reporting = self._reporting
        if reporting is not None and reporting.pool.pending:
            self._asks.answer(self._pools.call_observers, None)

    def _report_beside(self, host_pool: Any) -> None:
        """Report with what already does for the same caches, or with what the configuration says."""
        rank, config = self._settings.rank, self._settings.config
        if self._reporting is not None or not rank.stores_kv:
            return
        reporting = kept_reporting(host_pool) or open_reporting(config, rank.model, self._pools.page_tokens)
        if reporting is None:
            return
        keep_reporting(host_pool, reporting)
        self._reporting = reporting
        self._pools.tell(reporting.pool)
        reporting.watch(lambda: self._watched(reporting))

    def _watched(self, reporting: NodeReporting) -> dict[str, tuple[int, int]]:
        """Once a second, in the reporter's thread: count what was reported, and say how full the tiers are."""
        self._stats.reported(reporting.meter.read(), reporting.pages.untold)
        return self._pools.tiers()

    def _door(self, name: str) -> Door:
        return Door(name, Breaker(random.random, _BACKOFF), self._clock, self._stats.degraded, self._clearing.done)

    def _ask(self, work: Callable[[], Answer], miss: Answer) -> Answer:
        """What ``work`` finds, or ``miss`` when it fails."""
        found = self._asks.answer(work, miss)
        self._watch.called()
        return found

    def _anchor_prefix(self, keys: Sequence[str], budget: Budget) -> int:
        if self._gets.shut:
            self._stats.degraded("get_shut")
            return 0
        if not self._clearing.done():
            return 0
        if self._pools.logical:
            return len(keys)
        pool = self._pools.get(KV)
        return leading(keys, lambda part: pool.count_prefix(part, budget)) if pool is not None else 0

    def _prefixes(self, keys: list[str], transfers: Sequence[PoolTransfer]) -> PrefixHits:
        budget = Budget(self._timeout)
        hits = PrefixHits(self._anchor_prefix(keys, budget))
        chain = block_keys(keys[: hits.anchor]) if transfers else []
        for transfer in transfers:
            if not hits.usable:
                break
            name, pool = str(transfer.name), self._pools.get(str(transfer.name))
            if pool is None:
                hits.restrict(name, prefixes_up_to(hits.anchor, 0))
            elif transfer.hit_policy == PoolHitPolicy.TRAILING_PAGES:
                hits.restrict(name, prefixes_with_tail(pool.contains(chain, budget), len(transfer.keys or ())))
            elif transfer.hit_policy == PoolHitPolicy.BLOCK_GROUPS:
                present = pool.contains(block_keys(transfer.keys or []), budget)
                hits.boundaries[name] = transfer.block_pages * leading_groups(present, transfer.group_pages)
            else:
                hits.restrict(name, prefixes_up_to(hits.anchor, pool.count_prefix(chain, budget)))
        return hits

    def _get(self, name: str, keys: Sequence[str], host_indices: Any, budget: Budget) -> list[bool]:
        if name == KV and self._pools.logical:
            return [True] * len(keys)
        pool = self._pools.get(name)
        if pool is None:
            return [False] * len(keys)
        work = self._watch.counted("get", pool, lambda: pool.get(block_keys(keys), host_indices, budget))
        return self._gets.move(work, len(keys))

    def _move_anchor(self, work: Callable[[], Moved], pages: int) -> list[bool]:
        """Store KV pages; those that are turned away at the door have come all the same."""
        self._sidecars.come()
        return self._puts.move(work, pages)

    def _put_anchor(self, keys: Sequence[str], host_indices: Any, depth: int, budget: Budget) -> Moved:
        anchors = block_keys(keys)
        if self._pools.logical:
            self._sidecars.ready(anchors)
            return Moved([True] * len(keys))
        pool = self._pools.get(KV)
        allowed = self._sidecars.allowed(anchors)
        if pool is None or not allowed:
            return Moved([False] * len(keys))
        wanted, indices = anchors[:allowed], host_indices[: allowed * pool.access.rows]
        pages = (wanted, indices, depths_of(depth, allowed), budget)
        moved = self._put_pages(pool, wanted, partial(pool.put, *pages), partial(pool.stage, *pages))
        return moved.followed_by(len(keys) - allowed)

    def _put_pages(
        self, pool: StorePool, anchors: list[bytes], put: Callable[[], Moved], stage: Callable[[], StagedPages]
    ) -> Moved:
        """Store KV pages, with what side pools stored for them where there is something."""
        together = partial(self._put_together, anchors, stage)
        return self._watch.counted("put", pool, together if self._sidecars.awaited(anchors) else put)()

    def _put_together(self, anchors: list[bytes], stage: Callable[[], StagedPages]) -> Moved:
        """Store KV pages whose side pools' pages wait for them: those are published first, so none is found without."""
        staged = stage()
        self._sidecars.ready([anchor for anchor, ok in zip(anchors, staged.moved.ok, strict=True) if ok])
        published = staged.publish()
        return staged.moved if published else Moved([False] * len(anchors))

    def _set_side(self, transfer: PoolTransfer, depth: int, budget: Budget) -> list[bool]:
        keys, pool = transfer.keys or [], self._pools.get(str(transfer.name))
        if pool is None or transfer.host_indices is None:
            return [False] * len(keys)
        if str(transfer.name) == KV:
            return self._move_anchor(lambda: self._put_anchor(keys, transfer.host_indices, depth, budget), len(keys))
        ok: list[bool] = []
        for start in range(0, len(keys), BATCH_PAGES):
            part = block_keys(keys[start : start + BATCH_PAGES])
            rows = pool.access.rows
            indices = transfer.host_indices[start * rows : (start + len(part)) * rows]
            staging = self._staging(pool, part, indices, depths_of(depth + start, len(part)), budget)
            work = self._watch.counted("put", pool, staging)
            ok += self._puts.move(work, len(part))
        if str(transfer.indices_from_pool or "") == KV:
            self._sidecars.bar([key for key, there in zip(block_keys(keys), ok, strict=True) if not there])
        return ok

    def _staging(
        self, pool: StorePool, keys: list[bytes], indices: Any, depths: Sequence[int], budget: Budget
    ) -> Callable[[], Moved]:
        def stage() -> Moved:
            staged = pool.stage(keys, indices, depths, budget)
            self._sidecars.add(staged, self._missing_anchors(keys, budget))
            return staged.moved

        return stage

    def _missing_anchors(self, keys: list[bytes], budget: Budget) -> list[bytes]:
        """Of ``keys``, those whose KV page this rank is still to store."""
        if not self._settings.rank.stores_kv:
            return []
        anchor = self._pools.get(KV)
        if anchor is None:
            return keys if self._pools.logical else []
        return [key for key, there in zip(keys, anchor.contains(keys, budget), strict=True) if not there]

    def _get_flat(self, keys: Sequence[str], targets: Sequence[Any]) -> Moved:
        pool = self._uncut_anchor()
        if pool is None or not all(target.is_contiguous() for target in targets):
            return Moved([False] * len(keys))
        pages = [tensor_bytes(target) for target in targets]
        return self._watch.counted("get", pool, lambda: pool.get_flat(block_keys(keys), pages, self._timeout))()

    def _put_flat(self, keys: Sequence[str], values: Sequence[Any]) -> Moved:
        pool, anchors = self._uncut_anchor(), block_keys(keys)
        allowed = self._sidecars.allowed(anchors)
        pages = [tensor_bytes(value.contiguous()) for value in values[:allowed]]
        if pool is None or not allowed or any(page.nbytes != pool.access.object_bytes for page in pages):
            return Moved([False] * len(keys))
        flat = (anchors[:allowed], pages, self._timeout)
        moved = self._put_pages(pool, flat[0], partial(pool.put_flat, *flat), partial(pool.stage_flat, *flat))
        return moved.followed_by(len(keys) - allowed)

    def _uncut_anchor(self) -> StorePool | None:
        pool = self._pools.get(KV)
        return pool if pool is not None and pool.access.parts == 1 else None
