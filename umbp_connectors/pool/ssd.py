"""The SSD tier of a local pool: slab, catalogue, and the threads that wait for the disk."""

from __future__ import annotations

import contextlib
import logging
import time
from dataclasses import dataclass

from umbp_connectors.pool.arena import Arena
from umbp_connectors.pool.books import Books
from umbp_connectors.pool.capacity import catalogue_allowance
from umbp_connectors.pool.catalogue import Catalogue
from umbp_connectors.pool.demoter import Demoter
from umbp_connectors.pool.fence import ReadFence
from umbp_connectors.pool.folder import RankSlab, open_rank_slab
from umbp_connectors.pool.io import IoThreads, Task
from umbp_connectors.pool.loads import Loader
from umbp_connectors.pool.settings import LocalPoolConfig
from umbp_core.errors import TierUnavailable, TransferError
from umbp_core.ids import Identity
from umbp_core.ports import Clock

logger = logging.getLogger(__name__)

_LAST_READ_S = 5.0
"""How long the threads get together for the reads that they are in when a pool closes."""


@dataclass(frozen=True, slots=True)
class PoolSsd:
    """An open SSD tier.  ``restored`` objects were found in it."""

    rank: RankSlab
    catalogue: Catalogue
    demoter: Demoter
    threads: IoThreads
    loader: Loader
    fence: ReadFence
    restored: int

    def flush(self, timeout: float) -> bool:
        """Wait until what was stored is on the device and in the catalogue, for at most ``timeout`` seconds."""
        deadline = time.monotonic() + timeout
        if not self.demoter.drain(timeout):
            return False
        task = Task(self.rank.slab.sync)
        self.threads.submit([task])
        try:
            if not task.wait(max(0.0, deadline - time.monotonic())):
                self.threads.withdraw([task])
                return False
        except (TransferError, TierUnavailable) as error:
            logger.warning("%s", error)
            return False
        return self.catalogue.flush(max(0.0, deadline - time.monotonic()))

    def close(self, timeout: float) -> None:
        """Write what is still to be demoted and recorded, each for ``timeout`` seconds, and let the folder go."""
        self.threads.close(_LAST_READ_S)
        self.demoter.close(timeout)
        self.catalogue.close(timeout)
        # Who is still at it is held by the disk.
        self.rank.close(timeout=0.0)


def open_ssd(
    identity: Identity, config: LocalPoolConfig, page_bytes: int, books: Books, arena: Arena, clock: Clock
) -> PoolSsd | None:
    """Take the folder and restore into ``books`` what an earlier life left there.

    ``None`` without a folder, and with one that cannot be used, which costs one warning.
    """
    if config.ssd_dir is None:
        return None
    with contextlib.ExitStack() as undo:
        try:
            rank = open_rank_slab(
                config.ssd_dir,
                identity.namespace,
                config.rank,
                identity.layout,
                page_bytes,
                config.ssd_capacity,
                config.ranks,
                config.direct_io,
                own_catalogue=True,
                engines=config.ssd_engines,
                share=config.ssd_share,
                patience_s=config.patience_s,
            )
            undo.callback(rank.close)
            catalogue = _catalogue(identity, rank, page_bytes)
            rows = catalogue.open()
        except TierUnavailable as error:
            logger.warning("the SSD tier is off: %s", error)
            return None
        undo.callback(catalogue.close)
        if rank.slab.is_new:
            # The slab that these were about was removed, by a user or to make room.
            catalogue.forget(row.key for row in rows)
            rows = []
        fence = ReadFence(clock, config.ssd_failures, config.ssd_retry_s)
        restored = books.add_ssd(rank.slots, catalogue, rows, fence)
        demoter = Demoter(books, arena, rank.slab, config.demote_threads)
        threads = IoThreads(config.io_threads, page_bytes, "umbp-load")
        loader = Loader(books, arena.array, rank.slab, identity.digest, threads, fence, config.ssd_timeout_s)
        demoter.start()
        threads.start()
        undo.pop_all()
    return PoolSsd(rank, catalogue, demoter, threads, loader, fence, restored)


def _catalogue(identity: Identity, rank: RankSlab, page_bytes: int) -> Catalogue:
    digest = identity.digest
    return Catalogue(
        rank.slab.path.with_name(f"catalogue-{digest.hex()[:12]}.sqlite"),
        digest,
        1,
        slots=rank.slots,
        slot_bytes=page_bytes,
        max_bytes=catalogue_allowance(rank.slots, 1),
    )
