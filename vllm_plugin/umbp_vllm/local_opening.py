"""Opens the leader's pool where the directory is its own, and the ranks' memory and disks are the tiers."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from umbp_connectors.leader.demotions import DemotionQueue
from umbp_connectors.leader.ssd import SsdCatalogue, open_ssd_catalogue
from umbp_connectors.pool.settings import watermarks_of
from umbp_core.directory import Directory, TierSpace
from umbp_core.pages import PageAllocator
from umbp_core.tiers import Tier
from umbp_core.watermarks import Trimmer
from umbp_vllm.metadata import RankHello
from umbp_vllm.opening import LeaderSetup, Opening
from umbp_vllm.pool import LeaderPool
from umbp_vllm.reporting import Reporting

logger = logging.getLogger("vllm.umbp.pool")


def open_local_pool(opening: Opening, reporting: Reporting | None) -> LeaderPool:
    """The pool in the workers' memory, and on their disks with what an earlier life left there.

    Raises ``ConfigError`` when the workers cannot work together or have no memory to offer.
    """
    opening.check()
    setup, hellos = opening.setup, opening.hellos
    pages = min(hello.dram_pages for hello in hellos)
    catalogue = _open_catalogue(setup, hellos)
    directory = _directory(setup, hellos, pages, catalogue)
    restored = catalogue.restore(directory) if catalogue is not None else 0
    _announce(hellos, pages, catalogue, restored)
    teller = None if reporting is None else reporting.follow_pool(directory, _page_bytes(hellos, catalogue))
    demotions = _demotions(opening, directory) if catalogue is not None else None
    return opening.pool(
        directory,
        directory,
        opening.matcher(directory),
        kv_events=setup.kv_events,
        catalogue=catalogue,
        demotions=demotions,
        teller=teller,
        trimmer=_trimmer(opening, directory, demotions),
    )


def _demotions(opening: Opening, directory: Directory) -> DemotionQueue:
    config = opening.setup.config
    return DemotionQueue(
        directory,
        opening.clock,
        limit=config.max_pending_demotions,
        timeout_s=config.store_timeout_s,
        new_op_id=opening.op_ids,
    )


def _trimmer(opening: Opening, directory: Directory, demotions: DemotionQueue | None) -> Trimmer | None:
    """What keeps room in the tiers that there are, where the configuration asks for it."""
    marks = watermarks_of(opening.setup.config)
    if demotions is None:
        marks.pop(Tier.SSD, None)
    return Trimmer(directory, marks, () if demotions is None else demotions) if marks else None


def _open_catalogue(setup: LeaderSetup, hellos: Sequence[RankHello]) -> SsdCatalogue | None:
    """The SSD catalogue, or ``None``, with one sentence in the log, where SSD cannot be used."""
    if setup.config.ssd_dir is None or setup.config.ssd_enabled is False:
        return None
    if not setup.persistent:
        logger.warning("umbp: the SSD tier is off, because block hashes would differ after a restart")
        return None
    without = [hello for hello in hellos if hello.ssd_slots < 1]
    if without:
        logger.warning("umbp: the SSD tier is off: %s", without[0].problem or "ssd_capacity is too small for one block")
        return None
    return open_ssd_catalogue(
        setup.config.ssd_dir,
        setup.folder,
        layouts=tuple(hello.layout for hello in hellos),
        slots=min(hello.ssd_slots for hello in hellos),
        slot_bytes=tuple(hello.slot_bytes for hello in hellos),
        durability=setup.config.ssd_durability,
        prefixes=tuple(hello.prefix for hello in hellos),
        writers=tuple(hello.writer_rank for hello in hellos),
        fitted=_are_fitted(hellos),
    )


def _are_fitted(hellos: Sequence[RankHello]) -> bool:
    """Whether all slabs were fitted to the same number of slots."""
    writers = [hello for hello in hellos if hello.writer_rank == hello.world_rank]
    return all(hello.fitted for hello in writers) and len({hello.ssd_slots for hello in writers}) == 1


def _directory(
    setup: LeaderSetup, hellos: Sequence[RankHello], pages: int, catalogue: SsdCatalogue | None
) -> Directory:
    page_bytes = max(hello.page_bytes for hello in hellos)
    policy = setup.plugins.make_eviction
    spaces = [
        TierSpace(Tier.DRAM, PageAllocator(page_bytes, [pages * page_bytes]), policy(setup.config.eviction_policy))
    ]
    if catalogue is not None:
        spaces.append(
            TierSpace(
                Tier.SSD,
                PageAllocator(page_bytes, [catalogue.slots * page_bytes]),
                policy(setup.config.eviction_policy),
            )
        )
    return Directory(spaces)


def _page_bytes(hellos: Sequence[RankHello], catalogue: SsdCatalogue | None) -> dict[Tier, int]:
    """Bytes of one page over all ranks that own memory, for each tier that there is."""
    writers = [hello for hello in hellos if hello.writer_rank == hello.world_rank]
    sizes = {Tier.DRAM: sum(hello.page_bytes for hello in writers)}
    return sizes if catalogue is None else {**sizes, Tier.SSD: sum(hello.slot_bytes for hello in writers)}


def _announce(hellos: Sequence[RankHello], pages: int, catalogue: SsdCatalogue | None, restored: int) -> None:
    sizes = _page_bytes(hellos, catalogue)
    dram = pages * sizes[Tier.DRAM]
    ssd = "no SSD tier (set ssd_dir to keep KV over restarts)"
    if catalogue is not None:
        slots = catalogue.slots * sizes[Tier.SSD]
        ssd = f"SSD tier of {slots / 2**30:.2f} GiB with {restored} blocks from before"
    logger.info(
        "umbp: pool open for %d rank(s): DRAM tier of %.2f GiB (%d blocks), %s", len(hellos), dram / 2**30, pages, ssd
    )
