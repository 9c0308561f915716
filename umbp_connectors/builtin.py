"""The built-in parts, as a plug-in like any other: registered first, hence asked last."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

from umbp_connectors.config_model import UmbpConfig
from umbp_connectors.hookspecs import ClientSpec, DramTierSpec, OffloadSpec, SsdTierSpec, hookimpl
from umbp_connectors.tier_ports import DramTier, PoolClient, SsdTier
from umbp_core.errors import ConfigError
from umbp_core.eviction import POLICIES, EvictionPolicy
from umbp_core.offload import Frequency, OffloadPolicy, PassAll, Presence, PriorityThreshold
from umbp_core.scheduler import Limits, TransferScheduler

_OFFLOAD_POLICIES: Mapping[str, Callable[[UmbpConfig, OffloadSpec], OffloadPolicy]] = MappingProxyType(
    {
        "all": lambda config, spec: PassAll(),
        "presence": lambda config, spec: Presence(spec.present),
        "frequency": lambda config, spec: Frequency(config.offload_min_sightings, config.offload_window_s),
        "priority": lambda config, spec: PriorityThreshold(config.offload_min_priority),
    }
)


@hookimpl(trylast=True)
def umbp_make_tier(config: UmbpConfig, spec: DramTierSpec | SsdTierSpec) -> DramTier | SsdTier:
    """An arena of shared memory, or a slab file below ``ssd_dir``."""
    return _dram_tier(config, spec) if isinstance(spec, DramTierSpec) else _ssd_tier(config, spec)


@hookimpl(trylast=True)
def umbp_make_client(config: UmbpConfig, spec: ClientSpec) -> PoolClient | None:
    """A pool in this process for mode ``local``, in the host's daemon for mode ``daemon``."""
    return _pool(config, spec) if config.mode in ("local", "daemon") else None


@hookimpl(trylast=True)
def umbp_make_eviction(name: str) -> EvictionPolicy | None:
    """One of the core's policies."""
    return POLICIES[name]() if name in POLICIES else None


@hookimpl(trylast=True)
def umbp_make_offload_policy(config: UmbpConfig, name: str, spec: OffloadSpec) -> OffloadPolicy | None:
    """One of the core's policies."""
    make = _OFFLOAD_POLICIES.get(name)
    return None if make is None else make(config, spec)


@hookimpl(trylast=True)
def umbp_make_scheduler(limits: Limits) -> TransferScheduler:
    """The core's scheduler."""
    return TransferScheduler(limits)


def _dram_tier(config: UmbpConfig, spec: DramTierSpec) -> DramTier:
    from umbp_connectors.pool.arena import Arena

    arena = Arena(
        spec.page_bytes,
        spec.pages,
        spec.staging_pages,
        huge_pages=config.dram_use_hugepages,
        numa_node=config.dram_numa_node,
        prefault=config.dram_prefault,
    )
    arena.open()
    return arena


def _ssd_tier(config: UmbpConfig, spec: SsdTierSpec) -> SsdTier:
    from umbp_connectors.pool.folder import open_rank_slab

    if config.ssd_dir is None:
        raise ConfigError("an SSD tier needs a folder: set ssd_dir")
    return open_rank_slab(
        config.ssd_dir,
        spec.namespace,
        spec.rank,
        spec.layout,
        spec.slot_bytes,
        config.ssd_capacity,
        spec.ranks,
        config.ssd_direct_io,
        own_catalogue=spec.own_catalogue,
        engines=spec.engines,
        share=spec.share,
        patience_s=spec.patience_s,
        durability=config.ssd_durability,
    )


def _pool(config: UmbpConfig, spec: ClientSpec) -> PoolClient:
    from umbp_connectors.daemon.making import pool_maker
    from umbp_connectors.pool.settings import local_pool_config

    pool = pool_maker(config)(
        spec.identity,
        local_pool_config(
            config,
            object_bytes=spec.object_bytes,
            dram_bytes=config.dram_capacity // spec.ranks,
            eviction=spec.make_eviction,
            rank=spec.rank,
            ranks=spec.ranks,
            make_ssd=spec.make_ssd,
            make_ssd_gate=spec.make_ssd_gate,
        ),
    )
    pool.open()
    return pool
