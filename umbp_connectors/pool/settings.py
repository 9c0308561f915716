"""How large a local pool is, where it lies, and how patient it is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from umbp_connectors.config_model import UmbpConfig
from umbp_connectors.hookspecs import SsdTierSpec
from umbp_connectors.offload import GateMaker
from umbp_connectors.pool.durability import Durability
from umbp_connectors.pool.folder import PATIENCE_S
from umbp_connectors.tier_ports import SsdTier
from umbp_core.eviction import EvictionPolicy, LruPolicy
from umbp_core.grouping import BlockOf, block_of_text
from umbp_core.tiers import Tier
from umbp_core.watermarks import Watermarks


@dataclass(frozen=True, slots=True)
class LocalPoolConfig:
    """Sizes in bytes.  Without ``ssd_dir`` there is no SSD tier.

    ``object_bytes`` is the largest object; each takes one page of that size, rounded up to 4096.  ``ssd_capacity``
    bounds what everybody together keeps below ``ssd_dir``.  Pools that use the folder at the same time divide it up:
    every one of ``ssd_engines`` engines has an equal part, of which the pools of one namespace have ``ssd_share``
    (an engine's namespaces should come to 1), which ``ranks`` pools share evenly; ``rank`` is this one's place among
    them.  Engines that have the same identity, as those of a data-parallel group, need an ``ssd_namespace`` each: the
    name of their folder, which is otherwise the identity's namespace.

    A disk read gets ``ssd_timeout_s`` seconds in a call that names no time itself.  After ``ssd_failures`` calls in a
    row whose time was over before the disk gave them anything, it is left alone for ``ssd_retry_s`` seconds, later for
    longer ones; meanwhile what is on SSD only counts as not there.

    ``eviction`` makes a fresh policy for each tier, and ``block_of`` says which objects are evicted together.
    ``make_ssd_gate`` makes what decides which objects go to SSD; without it all do.  ``make_ssd`` opens the slots below
    DRAM in place of a slab file; what lies in them is written down below ``ssd_dir`` all the same.  ``durability`` says
    when what is on SSD survives a power failure; with `strict`, a put waits for that.

    ``prefixes`` are the digests of the identities that the parts of an object have, where it consists of those of
    several ranks; see :class:`~umbp_connectors.pool.stripes.Stripes`.

    ``shared_memory`` is what other processes can map; a pool that none of them reads in place is better off without.

    ``watermarks`` say how full which tier may get before it is emptied in the background; the others may be full.
    """

    object_bytes: int
    dram_bytes: int
    ssd_dir: Path | None = None
    ssd_capacity: int = 0
    rank: int = 0
    ranks: int = 1
    eviction: Callable[[], EvictionPolicy] = LruPolicy
    block_of: BlockOf | None = block_of_text
    copy_threads: int = 2
    io_threads: int = 4
    demote_threads: int = 4
    huge_pages: bool = False
    numa_node: int = -1
    prefault: bool = True
    shared_memory: bool = True
    direct_io: bool = True
    patience_s: float = PATIENCE_S
    ssd_timeout_s: float = 30.0
    ssd_failures: int = 3
    ssd_retry_s: float = 1.0
    ssd_share: float = 1.0
    ssd_engines: int = 1
    ssd_namespace: str = ""
    make_ssd: Callable[[SsdTierSpec], SsdTier] | None = None
    make_ssd_gate: GateMaker | None = None
    durability: Durability = "batched"
    prefixes: tuple[bytes, ...] = ()
    watermarks: Mapping[Tier, Watermarks] = field(default_factory=dict)


def watermarks_of(config: UmbpConfig) -> dict[Tier, Watermarks]:
    """How full which tier may get; nothing about one that may be full."""
    given = {
        Tier.DRAM: (config.dram_high_watermark, config.dram_low_watermark),
        Tier.SSD: (config.ssd_high_watermark, config.ssd_low_watermark),
    }
    return {
        tier: Watermarks(high, high if low is None else low)
        for tier, (high, low) in given.items()
        if high is not None and high < 1
    }


def local_pool_config(
    config: UmbpConfig,
    *,
    object_bytes: int,
    dram_bytes: int,
    eviction: Callable[[], EvictionPolicy],
    rank: int = 0,
    ranks: int = 1,
    ssd_share: float = 1.0,
    engines: int = 1,
    ssd_namespace: str = "",
    make_ssd: Callable[[SsdTierSpec], SsdTier] | None = None,
    make_ssd_gate: GateMaker | None = None,
    prefixes: tuple[bytes, ...] = (),
    shared_memory: bool = False,
) -> LocalPoolConfig:
    """The pool that the user's ``config`` asks for; what it cannot know is given, see :class:`LocalPoolConfig`.

    ``engines`` are known to use the folder together; the user may have said that there are more.
    """
    return LocalPoolConfig(
        object_bytes=object_bytes,
        dram_bytes=dram_bytes,
        ssd_dir=config.ssd_dir if config.ssd_active else None,
        ssd_capacity=config.ssd_capacity,
        rank=rank,
        ranks=ranks,
        eviction=eviction,
        copy_threads=config.copy_threads,
        io_threads=config.io_threads,
        demote_threads=config.io_threads,
        huge_pages=config.dram_use_hugepages,
        numa_node=config.dram_numa_node,
        prefault=config.dram_prefault,
        shared_memory=shared_memory,
        direct_io=config.ssd_direct_io,
        ssd_share=ssd_share,
        ssd_engines=max(engines, config.ssd_engines),
        ssd_namespace=ssd_namespace,
        make_ssd=make_ssd,
        make_ssd_gate=make_ssd_gate,
        durability=config.ssd_durability,
        prefixes=prefixes,
        watermarks=watermarks_of(config),
    )
