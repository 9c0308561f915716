"""The pools of a daemon: one for each identity, within one amount of memory."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

from umbp_connectors.config_model import UmbpConfig
from umbp_connectors.daemon.messages import TOKEN_BYTES, Attach
from umbp_connectors.hookspecs import SsdTierSpec
from umbp_connectors.offload import GateMaker
from umbp_connectors.pool.buffers import round_up
from umbp_connectors.pool.local import LocalPool
from umbp_connectors.pool.outcomes import GetStatus
from umbp_connectors.pool.settings import LocalPoolConfig, local_pool_config
from umbp_connectors.pool.slab import ALIGNMENT
from umbp_connectors.tier_ports import SsdTier
from umbp_core.errors import TierUnavailable, UmbpError
from umbp_core.eviction import EvictionPolicy

logger = logging.getLogger(__name__)


class KeptPool:
    """A pool of the daemon, the clients that it has, and how many of its pages each of them holds.  Any thread."""

    def __init__(self, pool: LocalPool, pages: int, page_bytes: int) -> None:
        self.pool = pool
        self.arena = os.urandom(TOKEN_BYTES)
        self.pages = pages
        self.page_bytes = page_bytes
        self.labels: dict[bytes, str] = {}
        self.left_at = 0.0
        """When its last client left."""
        self.lent: Counter[GetStatus] = Counter()
        """What became of what its clients asked for."""
        self._lock = threading.Lock()
        self._connections: Counter[bytes] = Counter()
        self._held: Counter[bytes] = Counter()
        self._opening = threading.Lock()
        self._is_open = False
        self._failed = ""

    @property
    def namespace(self) -> str:
        """Whose objects these are."""
        return self.pool.identity.namespace

    @property
    def nbytes(self) -> int:
        """Bytes of its arena."""
        return self.pages * self.page_bytes

    @property
    def clients(self) -> list[str]:
        """What its clients call themselves."""
        with self._lock:
            return sorted(self.labels[client] for client in self._connections)

    @property
    def is_idle(self) -> bool:
        """Whether it has no client."""
        with self._lock:
            return not self._connections

    @property
    def is_open(self) -> bool:
        """Whether it can be used already."""
        return self._is_open

    def open(self) -> None:
        """Open the pool, once; others who call wait for that.  Raises as ``LocalPool.open`` does."""
        with self._opening:
            if self._failed:
                raise TierUnavailable(self._failed)
            if self._is_open:
                return
            try:
                self.pool.open()
            except UmbpError as error:
                self._failed = str(error)
                raise
            self._is_open = True

    def join(self, client: bytes, label: str) -> None:
        """``client`` has one more connection."""
        with self._lock:
            self._connections[client] += 1
            self.labels[client] = label

    def leave(self, client: bytes) -> None:
        """``client`` has one connection less."""
        with self._lock:
            self._connections[client] -= 1
            if self._connections[client] <= 0:
                del self._connections[client]
                del self.labels[client]
            self.left_at = time.monotonic()

    def take(self, client: bytes, pages: int) -> int:
        """How many of ``pages`` more pages ``client`` may hold; they count as held from now on.

        All clients together never hold more than half of the arena for longer than one of their calls takes.
        """
        with self._lock:
            limit = max(1, self.pages // (2 * max(1, len(self._connections))))
            taken = max(0, min(pages, limit - self._held[client]))
            self._held[client] += taken
            return taken

    def count_lent(self, statuses: Iterable[GetStatus]) -> None:
        """Count what became of objects that were asked for."""
        with self._lock:
            self.lent.update(statuses)

    def put_back(self, client: bytes, pages: int) -> None:
        """``client`` holds so many pages less."""
        with self._lock:
            self._held[client] -= pages
            if self._held[client] <= 0:
                del self._held[client]


class PoolKeeper:
    """Opens pools when they are wanted, keeps them when their clients have left, and closes them for lack of memory.

    The makers are those of ``ClientSpec``.  ``config.dram_capacity`` is for all pools together, ``config.daemon_quota``
    for those of one namespace.  A pool keeps the size that it was opened with.  Any thread.
    """

    def __init__(
        self,
        config: UmbpConfig,
        make_eviction: Callable[[], EvictionPolicy],
        make_ssd_gate: GateMaker | None = None,
        make_ssd: Callable[[SsdTierSpec], SsdTier] | None = None,
    ) -> None:
        self._config = config
        self._make_eviction = make_eviction
        self._make_ssd_gate = make_ssd_gate
        self._make_ssd = make_ssd
        self._lock = threading.Lock()
        self._pools: dict[bytes, KeptPool] = {}
        self._closed = False

    @property
    def dram_bytes(self) -> int:
        """What all pools together may have of DRAM."""
        return self._config.dram_capacity

    @contextmanager
    def attached(self, wanted: Attach) -> Iterator[KeptPool]:
        """The pool that ``wanted`` names, open, with one connection more as long as this lasts.

        Raises ``TierUnavailable`` when it cannot be had, ``ConfigError`` when it does not fit this machine.
        """
        with self._lock:
            kept, idle = self._find(wanted)
            kept.join(wanted.client, wanted.label)
        try:
            for pool in idle:
                pool.close()
            self._open(kept)
            yield kept
        finally:
            kept.leave(wanted.client)

    def pools(self) -> list[KeptPool]:
        """Those that can be used."""
        with self._lock:
            return [kept for kept in self._pools.values() if kept.is_open]

    def close(self, timeout: float) -> None:
        """Close all of them at once, each within its own ``timeout`` and a little; idempotent."""
        with self._lock:
            self._closed = True
            pools, self._pools = list(self._pools.values()), {}
        if pools:
            with ThreadPoolExecutor(len(pools), "umbp-close") as threads:
                for kept in pools:
                    threads.submit(kept.pool.close, timeout)

    def _open(self, kept: KeptPool) -> None:
        try:
            kept.open()
        except UmbpError:
            with self._lock:
                if self._pools.get(kept.pool.identity.digest) is kept:
                    del self._pools[kept.pool.identity.digest]
            raise

    def _find(self, wanted: Attach) -> tuple[KeptPool, list[LocalPool]]:
        """The pool, which may be new, and those that have to be closed before it is opened.  With the lock held."""
        if self._closed:
            raise TierUnavailable("the daemon is stopping")
        digest = wanted.identity.digest
        page_bytes = round_up(wanted.object_bytes, ALIGNMENT)
        kept = self._pools.get(digest)
        if kept is not None:
            if kept.page_bytes != page_bytes:
                raise TierUnavailable(
                    f"pool {digest.hex()[:12]} has pages of {kept.page_bytes} bytes, and {page_bytes} are wanted; "
                    "clients of one identity have the same layout"
                )
            return kept, []
        asked = max(1, wanted.dram_bytes // page_bytes) * page_bytes
        going, room = self._room(wanted.namespace, asked)
        pages = min(asked, room) // page_bytes
        if pages < 1:
            raise TierUnavailable(
                f"{max(0, room)} bytes of DRAM are left for namespace {wanted.namespace!r}, and a page has "
                f"{page_bytes}; give the daemon a larger dram_capacity or daemon_quota, or the other engines less"
            )
        if pages * page_bytes < asked:
            logger.warning(
                "umbp: pool %s of %s gets %.2f GiB of DRAM instead of %.2f: that is what is left",
                digest.hex()[:12],
                wanted.namespace,
                pages * page_bytes / 2**30,
                asked / 2**30,
            )
        for name in going:
            logger.info("umbp: pool %s, which nobody uses, makes room", name.hex()[:12])
        closing = [self._pools.pop(name).pool for name in going]
        pool = LocalPool(wanted.identity, self._pool_config(wanted, pages * page_bytes))
        kept = self._pools[digest] = KeptPool(pool, pages, page_bytes)
        return kept, closing

    def _room(self, namespace: str, asked: int) -> tuple[list[bytes], int]:
        """Which idle pools, longest left first, have to go for ``asked`` bytes, and how much room there is then."""
        capacity = self._config.dram_capacity
        quota = self._config.daemon_quota or capacity
        left = capacity - sum(kept.nbytes for kept in self._pools.values())
        mine = quota - sum(kept.nbytes for kept in self._pools.values() if kept.namespace == namespace)
        going: list[bytes] = []
        for digest, kept in sorted(self._pools.items(), key=lambda item: item[1].left_at):
            is_mine = kept.namespace == namespace
            if min(left, mine) >= asked:
                break
            if kept.is_idle and (left < asked or is_mine):
                going.append(digest)
                left += kept.nbytes
                mine += kept.nbytes if is_mine else 0
        return going, min(left, mine)

    def _pool_config(self, wanted: Attach, dram_bytes: int) -> LocalPoolConfig:
        return local_pool_config(
            self._config,
            object_bytes=wanted.object_bytes,
            dram_bytes=dram_bytes,
            eviction=self._make_eviction,
            rank=wanted.rank,
            ranks=wanted.ranks,
            ssd_share=wanted.ssd_share,
            make_ssd=self._make_ssd,
            make_ssd_gate=self._make_ssd_gate,
        )
