"""The SSD tier of a local pool: slab, catalogue, and the threads that wait for the disk."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from umbp_connectors.hookspecs import SsdTierSpec
from umbp_connectors.pool.arena import Arena
from umbp_connectors.pool.books import Books
from umbp_connectors.pool.capacity import catalogue_allowance
from umbp_connectors.pool.catalogue import Catalogue
from umbp_connectors.pool.demoter import Demoter
from umbp_connectors.pool.durability import Durability, TellingSync
from umbp_connectors.pool.fence import ReadFence, WriteFence
from umbp_connectors.pool.folder import RankFolder, open_rank_slab
from umbp_connectors.pool.io import IoThreads, Task
from umbp_connectors.pool.loads import Loader
from umbp_connectors.pool.settings import LocalPoolConfig
from umbp_connectors.pool.stripes import Stripes
from umbp_connectors.tier_ports import SsdTier
from umbp_core.errors import TierUnavailable, TransferError
from umbp_core.ids import Identity
from umbp_core.ports import Clock
from umbp_core.tiers import Tier

logger = logging.getLogger(__name__)

_LAST_READ_S = 5.0
"""How long the threads get together for the reads that they are in when a pool closes."""

_LAST_SYNC_S = 5.0
"""The same for bringing to the device what was written last."""


@dataclass(slots=True)
class FlushMark:
    """What one who flushes was told of the losses of an SSD tier: its own, as each has to hear of all of them."""

    told: int = 0


@dataclass(frozen=True, slots=True)
class PoolSsd:
    """An open SSD tier.  ``restored`` objects were found in it."""

    tier: SsdTier
    folder: RankFolder
    catalogue: Catalogue
    demoter: Demoter
    threads: IoThreads
    loader: Loader
    fence: ReadFence
    books: Books
    restored: int
    sync: TellingSync

    @property
    def losses(self) -> int:
        """What the disk refused so far: objects, and bringing to the device what it had taken."""
        return self.demoter.lost + self.sync.failed

    def flush(self, timeout: float, mark: FlushMark) -> bool:
        """Wait until what was stored is on the device and in the catalogue, for at most ``timeout`` seconds.

        False too when the disk refused something since ``mark``, which is set to now.
        """
        known = mark.told
        written = self._written(timeout)
        mark.told = self.losses
        return mark.told == known and written and not self.catalogue.unrecorded()

    def _written(self, timeout: float) -> bool:
        """The same, of what got as far as being written."""
        deadline = time.monotonic() + timeout
        self.catalogue.seal()  # what it has it records meanwhile
        if not self.demoter.drain(timeout):
            return False
        task = Task(self.sync)
        self.threads.submit([task])
        # Both at once: a row that is on the device before its bytes leads to what does not verify, as after any kill.
        barrier = self.catalogue.seal()
        try:
            if not task.wait(max(0.0, deadline - time.monotonic())):
                self.threads.withdraw([task])
                return False
        except (TransferError, TierUnavailable) as error:
            logger.warning("%s", error)
            return False
        return self.catalogue.wait_written(barrier, max(0.0, deadline - time.monotonic()))

    def secure(self, keys: Sequence[bytes], deadline: float | None) -> list[bytes]:
        """Wait until what was stored is on the device, until ``deadline``; those of ``keys`` that are there then."""
        patience = self.loader.patience_s if deadline is None else max(0.0, deadline - time.monotonic())
        if not keys or not self._written(patience):
            return []
        unrecorded = self.catalogue.unrecorded()
        return [key for key in self.books.held(keys, Tier.SSD) if key not in unrecorded]

    def confirm_forgotten(self, timeout: float) -> None:
        """Wait until a restart does not find either what was forgotten.  Raises ``TierUnavailable`` when it may."""
        if not self.catalogue.wait_written(self.catalogue.seal(), timeout):
            raise TierUnavailable(
                f"{self.catalogue.path}: the disk did not take that objects are forgotten; "
                "forget them again when it does"
            )

    def close(self, timeout: float) -> None:
        """Write what is still to be demoted and recorded, each for ``timeout`` seconds, and let the folder go."""
        self.threads.close(_LAST_READ_S)
        self.demoter.close(timeout)
        self.catalogue.close(timeout)
        self.tier.close(_LAST_SYNC_S)
        self.folder.close()


def open_ssd(
    identity: Identity, config: LocalPoolConfig, stripes: Stripes, books: Books, arena: Arena, clock: Clock
) -> PoolSsd | None:
    """Take the folder and restore into ``books`` what an earlier life left there.

    ``None`` without a folder, and with one that cannot be used, which costs one warning.
    """
    if config.ssd_dir is None:
        return None
    page_bytes, namespace = arena.page_bytes, config.ssd_namespace or identity.namespace
    with contextlib.ExitStack() as undo:
        try:
            tier = _tier(namespace, identity.layout, config, config.ssd_dir, page_bytes)
            undo.callback(tier.close)
            if tier.slab.slot_bytes < page_bytes:
                raise TierUnavailable(f"slots of {tier.slab.slot_bytes} bytes hold no object of {page_bytes}")
            folder = RankFolder(config.ssd_dir, namespace, config.rank)
            folder.open(config.patience_s)
            undo.callback(folder.close)
            catalogue = _catalogue(identity, folder, tier.slots, page_bytes, stripes, config.durability)
            rows = catalogue.open()
        except TierUnavailable as error:
            logger.warning("the SSD tier is off: %s", error)
            return None
        undo.callback(catalogue.close)
        if tier.is_new:
            # The slab that these were about was removed, by a user or to make room.
            catalogue.forget(row.key for row in rows)
            rows = []
        fence = ReadFence(clock, config.ssd_failures, config.ssd_retry_s)
        restored = books.add_ssd(tier.slots, catalogue, rows, fence)
        write_fence = WriteFence(clock, config.ssd_retry_s)
        demoter = Demoter(books, arena, tier.slab, tier.slots, config.demote_threads, write_fence)
        demoter.ask(config.make_ssd_gate, clock)
        threads = IoThreads(config.io_threads, config.copy_threads, page_bytes, "umbp-load")
        loader = Loader(books, arena.array, tier.slab, stripes, threads, fence, config.ssd_timeout_s)
        demoter.start()
        threads.start()
        undo.pop_all()
    sync = TellingSync(tier.slab.sync)
    return PoolSsd(tier, folder, catalogue, demoter, threads, loader, fence, books, restored, sync)


def may_hold_something(identity: Identity, config: LocalPoolConfig) -> bool:
    """Whether an SSD tier that is off may hold objects, which a later life would find."""
    if config.ssd_dir is None:
        return False
    folder = RankFolder(config.ssd_dir, config.ssd_namespace or identity.namespace, config.rank)
    try:
        _catalogue_path(identity, folder).stat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError:  # nobody can say
        return True
    return True


def _catalogue_path(identity: Identity, folder: RankFolder) -> Path:
    return folder.path / f"catalogue-{identity.digest.hex()[:12]}.sqlite"


def _tier(namespace: str, layout: bytes, config: LocalPoolConfig, ssd_dir: Path, page_bytes: int) -> SsdTier:
    if config.make_ssd is not None:
        return config.make_ssd(
            SsdTierSpec(
                namespace,
                layout,
                page_bytes,
                config.rank,
                config.ranks,
                config.ssd_engines,
                own_catalogue=True,
                share=config.ssd_share,
                patience_s=config.patience_s,
            )
        )
    return open_rank_slab(
        ssd_dir,
        namespace,
        config.rank,
        layout,
        page_bytes,
        config.ssd_capacity,
        config.ranks,
        config.direct_io,
        own_catalogue=True,
        engines=config.ssd_engines,
        share=config.ssd_share,
        patience_s=config.patience_s,
        durability=config.durability,
    )


def _catalogue(
    identity: Identity, folder: RankFolder, slots: int, page_bytes: int, stripes: Stripes, durability: Durability
) -> Catalogue:
    digest = identity.digest
    return Catalogue(
        _catalogue_path(identity, folder),
        digest,
        stripes.count,
        slots=slots,
        slot_bytes=page_bytes,
        max_bytes=catalogue_allowance(slots, stripes.count),
        durability=durability,
        about={"layouts": identity.layout, "prefixes": b"".join(stripes.prefixes)},
    )
