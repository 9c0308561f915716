"""The pools of a daemon: one for each identity, within one amount of memory."""

from __future__ import annotations

import functools
import logging
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from umbp_connectors.config_model import UmbpConfig
from umbp_connectors.daemon.companions import have_parts_of_same_blocks
from umbp_connectors.daemon.kept import KeptPool
from umbp_connectors.daemon.messages import Attach
from umbp_connectors.hookspecs import SsdTierSpec
from umbp_connectors.offload import GateMaker
from umbp_connectors.pool.buffers import round_up
from umbp_connectors.pool.local import LocalPool
from umbp_connectors.pool.settings import LocalPoolConfig, local_pool_config
from umbp_connectors.pool.slab import ALIGNMENT
from umbp_connectors.pool.stripes import group_of
from umbp_connectors.tier_ports import SsdTier
from umbp_core.errors import TierUnavailable, UmbpError
from umbp_core.eviction import EvictionPolicy
from umbp_core.ids import Identity

logger = logging.getLogger(__name__)


class PoolKeeper:
    """Opens pools when they are wanted, keeps them when their clients have left, and closes them for lack of memory.

    The makers are those of ``ClientSpec``.  ``config.dram_capacity`` is for all pools together, ``config.daemon_quota``
    for those of one namespace; both hold at any moment, also while one pool is closed for another.  A pool keeps the
    size that it was opened with.  Any thread.
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
        self._mapped: list[KeptPool] = []
        """Those that have memory: open, being opened, or being closed."""
        self._closed = False

    @property
    def dram_bytes(self) -> int:
        """What all pools together may have of DRAM."""
        return self._config.dram_capacity

    @contextmanager
    def attached(self, wanted: Attach) -> Iterator[tuple[KeptPool, int]]:
        """The pool that ``wanted`` names, open, and the number of the connection that it has more while this lasts.

        Raises ``TierUnavailable`` when it cannot be had, ``ConfigError`` when it does not fit this machine.
        """
        with self._lock:
            kept = self._find(wanted)
            number = kept.join(wanted.client, wanted.label)
        try:
            self._open(kept)
            yield kept, number
        finally:
            kept.leave(number)

    def pools(self) -> list[KeptPool]:
        """Those that can be used."""
        with self._lock:
            return [kept for kept in self._pools.values() if kept.is_open]

    def find(self, digest: bytes) -> KeptPool | None:
        """The pool with this digest of an identity, if it can be used."""
        with self._lock:
            kept = self._pools.get(digest)
        return kept if kept is not None and kept.is_open else None

    def keeps_in(self, folder: Path) -> bool:
        """Whether the SSD tier of its pools lies in ``folder``."""
        config = self._config
        return config.ssd_active and config.ssd_dir is not None and config.ssd_dir.resolve() == folder

    def close(self, timeout: float) -> None:
        """Close all of them at once, each within its own ``timeout`` and a little; idempotent."""
        with self._lock:
            self._closed = True
            pools = list(dict.fromkeys([*self._pools.values(), *self._mapped]))
            self._pools = {}
        if pools:
            with ThreadPoolExecutor(len(pools), "umbp-close") as threads:
                for kept in pools:
                    threads.submit(kept.close, timeout)

    def _open(self, kept: KeptPool) -> None:
        try:
            kept.open(lambda: self._make_room(kept))
        except UmbpError:
            with self._lock:
                self._mapped = [other for other in self._mapped if other is not kept]
                if self._keeps(kept):
                    del self._pools[kept.pool.identity.digest]
            raise

    def _make_room(self, kept: KeptPool) -> None:
        """Wait until nothing that is being closed is in the way of ``kept``, which has its memory from then on."""
        while (other := self._in_the_way(kept)) is not None:
            other.close()

    def _in_the_way(self, kept: KeptPool) -> KeptPool | None:
        """A pool that has to be closed before: for lack of memory, or because both have the same SSD folder."""
        with self._lock:
            self._mapped = others = [other for other in self._mapped if other is not kept and not other.is_closed]
            going = [other for other in others if not self._keeps(other)]
            if sum(other.nbytes for other in others) + kept.nbytes <= self._config.dram_capacity:
                going = [other for other in going if other.namespace == kept.namespace]
            if going:
                return going[0]
            others.append(kept)
            return None

    def _keeps(self, kept: KeptPool) -> bool:
        """Whether it is not to be closed.  With the lock held."""
        return self._pools.get(kept.pool.identity.digest) is kept

    def _find(self, wanted: Attach) -> KeptPool:
        """The pool, which may be new: it closes those that it takes the place of.  With the lock held."""
        if self._closed:
            raise TierUnavailable("the daemon is stopping")
        digest = wanted.identity.digest
        page_bytes = round_up(wanted.object_bytes, ALIGNMENT) * max(1, len(wanted.prefixes))
        kept = self._pools.get(digest)
        prefixes = tuple(wanted.prefixes) or (digest,)
        if digest != (prefixes[0] if len(prefixes) == 1 else group_of(wanted.namespace, prefixes).digest):
            raise TierUnavailable("the identity of these objects is not what follows from those of their parts")
        if kept is not None:
            if kept.stripes.prefixes != prefixes:
                raise TierUnavailable(f"the objects of pool {digest.hex()[:12]} are divided among other ranks")
            if kept.page_bytes != page_bytes:
                raise TierUnavailable(
                    f"pool {digest.hex()[:12]} has pages of {kept.page_bytes} bytes, and {page_bytes} are wanted; "
                    "clients of one identity have the same layout"
                )
            return kept
        asked = max(1, wanted.dram_bytes // page_bytes) * page_bytes
        going, room = self._room(wanted, asked)
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
        closing = [self._pools.pop(name) for name in going]
        pool = LocalPool(wanted.identity, self._pool_config(wanted, pages * page_bytes))
        place, companions = (wanted.rank, wanted.ranks), functools.partial(self._companions, wanted.identity)
        kept = self._pools[digest] = KeptPool(pool, pages, page_bytes, place, closing, companions)
        return kept

    def _companions(self, identity: Identity) -> list[LocalPool]:
        """The pools of the other ranks."""
        pools = [kept.pool for kept in self.pools()]
        return [pool for pool in pools if have_parts_of_same_blocks(pool.identity, identity)]

    def _room(self, wanted: Attach, asked: int) -> tuple[list[bytes], int]:
        """Which idle pools have to go for ``asked`` bytes, and how much room there is then.

        First those that have the SSD folder, then others, longest left first.
        """
        namespace = wanted.namespace
        capacity = self._config.dram_capacity
        quota = self._config.daemon_quota or capacity
        left = capacity - sum(kept.nbytes for kept in self._pools.values())
        mine = quota - sum(kept.nbytes for kept in self._pools.values() if kept.namespace == namespace)
        idle = {digest: kept for digest, kept in self._pools.items() if kept.is_idle}
        going: list[bytes] = []
        if self._config.ssd_active:
            going += [each for each in idle if idle[each].shares_folder(namespace, wanted.rank, wanted.ranks)]
            freed = sum(idle[each].nbytes for each in going)
            left, mine = left + freed, mine + freed
        for digest in sorted(idle.keys() - set(going), key=lambda each: idle[each].left_at):
            is_mine = idle[digest].namespace == namespace
            if min(left, mine) >= asked:
                break
            if left < asked or is_mine:
                going.append(digest)
                left += idle[digest].nbytes
                mine += idle[digest].nbytes if is_mine else 0
        return going, min(left, mine)

    def _pool_config(self, wanted: Attach, dram_bytes: int) -> LocalPoolConfig:
        return local_pool_config(
            self._config,
            object_bytes=round_up(wanted.object_bytes, ALIGNMENT) * len(wanted.prefixes) or wanted.object_bytes,
            dram_bytes=dram_bytes,
            eviction=self._make_eviction,
            rank=wanted.rank,
            ranks=wanted.ranks,
            ssd_share=wanted.ssd_share,
            make_ssd=self._make_ssd,
            make_ssd_gate=self._make_ssd_gate,
            prefixes=tuple(wanted.prefixes),
            shared_memory=True,
        )
