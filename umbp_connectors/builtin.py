"""The built-in parts, as a plug-in like any other: registered first, hence asked last."""

from __future__ import annotations

from umbp_connectors.config_model import UmbpConfig
from umbp_connectors.hookspecs import DramTierSpec, SsdTierSpec, hookimpl
from umbp_connectors.tier_ports import DramTier, SsdTier
from umbp_core.eviction import POLICIES, EvictionPolicy
from umbp_core.scheduler import Limits, TransferScheduler


@hookimpl(trylast=True)
def umbp_make_tier(config: UmbpConfig, spec: DramTierSpec | SsdTierSpec) -> DramTier | SsdTier:
    """An arena of shared memory, or a slab file."""
    if isinstance(spec, DramTierSpec):
        from umbp_connectors.pool.arena import Arena

        return Arena(
            spec.page_bytes,
            spec.pages,
            spec.staging_pages,
            huge_pages=config.dram_use_hugepages,
            numa_node=config.dram_numa_node,
            prefault=config.dram_prefault,
        )
    from umbp_connectors.pool.slab import SlabFile

    return SlabFile(spec.path, spec.slot_bytes, spec.slots, direct_io=config.ssd_direct_io)


@hookimpl(trylast=True)
def umbp_make_eviction(name: str) -> EvictionPolicy | None:
    """One of the core's policies."""
    return POLICIES[name]() if name in POLICIES else None


@hookimpl(trylast=True)
def umbp_make_scheduler(limits: Limits) -> TransferScheduler:
    """The core's scheduler."""
    return TransferScheduler(limits)
