"""Builds the two halves from vLLM's configuration: everything that happens once, at start."""

from __future__ import annotations

import functools
import logging
import math
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from umbp_connectors import logs
from umbp_connectors.config import UmbpConfig, resolve
from umbp_connectors.hookspecs import DramTierSpec, SsdTierSpec
from umbp_connectors.plugins import PluginHost, create_manager
from umbp_connectors.pool.folder import RankSlab
from umbp_connectors.reporting.opening import open_reporter
from umbp_connectors.tier_ports import DramTier, SsdTier
from umbp_core.errors import ConfigError, UmbpError
from umbp_core.ids import Identity
from umbp_vllm import compat
from umbp_vllm.engine_args import SERVING_KEY
from umbp_vllm.groups import failures_by_block, kv_groups, layer_specs
from umbp_vllm.hashing import hash_stability
from umbp_vllm.host_opening import open_host_pool
from umbp_vllm.host_setup import door_maker, make_host_worker
from umbp_vllm.layout import kv_is_replicated, layout_digest
from umbp_vllm.layout_groups import geometry_of
from umbp_vllm.leader import Leader
from umbp_vllm.local_opening import open_local_pool
from umbp_vllm.metadata import PROTOCOL_VERSION, RankHello
from umbp_vllm.namespace import namespace_digest, namespace_of, rank_scope
from umbp_vllm.node import facts_of
from umbp_vllm.opening import LeaderSetup, OpenPool
from umbp_vllm.rank_kit import BY_LAYER, asks_by_layer, kit_maker, warn_of_whole_blocks
from umbp_vllm.reporting import Reporting
from umbp_vllm.sharing import SharedSlab, share_arena, share_slab
from umbp_vllm.worker import Worker

logger = logging.getLogger("vllm.umbp.setup")

LAYERWISE = "layerwise"
"""The value of ``load_mode``."""

LOCAL, DAEMON = "local", "daemon"
"""The values of ``mode``."""


@dataclass(frozen=True, slots=True)
class Settings:
    """What both halves know from the configuration alone."""

    config: UmbpConfig
    plugins: PluginHost


def settings_of(vllm_config: Any) -> Settings:
    """Resolve our configuration and make vLLM recompute blocks whose load failed.

    vLLM reads its failure policy after it has created the connector, from the same object, and its
    default is to fail the request.  Raises ``ConfigError`` for a bad configuration, which stops the start.
    """
    transfer = vllm_config.kv_transfer_config
    config = _shared_if_sensible(_config_of(transfer.kv_connector_extra_config), vllm_config)
    logs.join("vllm", config.log_level)
    transfer.kv_load_failure_policy = config.load_failure_policy
    notice = compat.version_notice(compat.vllm_version())
    if notice is not None:
        logger.warning("%s", notice)
    return Settings(config, create_manager(config))


def needs_layers(extra_config: Mapping[str, Any]) -> bool:
    """Whether loads or stores go layer by layer if they can.  Raises ``ConfigError`` for a bad configuration."""
    config = _config_of(extra_config)
    return config.load_mode == LAYERWISE or config.store_granularity == BY_LAYER


def _config_of(extra_config: Mapping[str, Any]) -> UmbpConfig:
    """Our configuration; where the engine serves was put beside the user's keys and is none of them."""
    config = resolve(extra={key: value for key, value in extra_config.items() if key != SERVING_KEY}).config
    if config.mode not in (LOCAL, DAEMON):
        raise ConfigError(f"mode {config.mode!r} is not for vLLM; set mode 'local' or 'daemon'")
    return config


def _shared_if_sensible(config: UmbpConfig, vllm_config: Any) -> UmbpConfig:
    """``config``, but a pool of the engine's own where no other engine can ask for what this one would share."""
    if config.mode != DAEMON or hash_stability(vllm_config, os.environ).stable:
        return config
    return config.model_copy(update={"mode": LOCAL})


def make_leader(
    vllm_config: Any, kv_cache_config: Any, settings: Settings, reporting: Reporting | None = None
) -> Leader:
    """The scheduler half.  Raises ``ConfigError`` for models whose KV cannot be kept per block."""
    parallel = vllm_config.parallel_config
    _refuse_context_parallel(parallel)
    groups = kv_groups(kv_cache_config, compat.hash_tokens(vllm_config, kv_cache_config))
    stability = hash_stability(vllm_config, os.environ)
    if not stability.stable:
        logger.warning("umbp: %s", stability.advice)
    settings.plugins.make_eviction(settings.config.eviction_policy)  # a wrong name stops the start, here and now
    settings.plugins.check_offload_policies()
    _warn_of_mla_on_cpu(vllm_config)
    namespace, _ = namespace_of(vllm_config, kv_cache_config, settings.config.namespace)
    open_pool: OpenPool = open_local_pool
    if settings.config.mode == DAEMON:
        open_pool = functools.partial(open_host_pool, door_maker(vllm_config, settings.config, namespace))
    by_prefix = _serves_by_prefix(vllm_config, kv_cache_config)
    setup = LeaderSetup(
        config=settings.config,
        plugins=settings.plugins,
        groups=groups,
        alignment=math.lcm(*(group.block_tokens for group in groups)),
        ranks=parallel.tensor_parallel_size * parallel.pipeline_parallel_size,
        identity=namespace_digest(namespace),
        folder=_folder(namespace, parallel, settings),
        share_loads=bool(vllm_config.cache_config.enable_prefix_caching),
        persistent=stability.stable,
        kv_events=_kv_events(vllm_config),
        open_pool=open_pool,
        may_load=by_prefix and _may_load(vllm_config, kv_cache_config),
        may_store=by_prefix and bool(vllm_config.kv_transfer_config.is_kv_producer),
        tokens_per_step=1 + int(vllm_config.num_speculative_tokens),
        layerwise=_layerwise(vllm_config, kv_cache_config, settings),
        stores_by_layer=_stores_by_layer(vllm_config, settings),
    )
    return Leader(setup, time.monotonic, reporting)


def make_reporting(vllm_config: Any, kv_cache_config: Any, settings: Settings) -> Reporting | None:
    """What tells the master, not started; ``None`` when none is configured.

    Raises ``ConfigError`` for a model or a configuration that cannot work, as :func:`make_leader` does.
    """
    parallel = vllm_config.parallel_config
    hash_tokens = compat.hash_tokens(vllm_config, kv_cache_config)
    groups = kv_groups(kv_cache_config, hash_tokens)
    facts = facts_of(vllm_config, groups, hash_tokens, _engines(parallel, settings), _engine_rank(parallel))
    reporter = open_reporter(settings.config, facts)
    if reporter is None:
        return None
    ranks = parallel.tensor_parallel_size * parallel.pipeline_parallel_size
    tensor_bytes = sum(tensor.size for tensor in kv_cache_config.kv_cache_tensors)
    return Reporting(
        reporter,
        groups,
        hbm_block_bytes=tensor_bytes // kv_cache_config.num_blocks * ranks,
        caches_prefixes=bool(vllm_config.cache_config.enable_prefix_caching),
    )


def make_worker(vllm_config: Any, kv_cache_config: Any, settings: Settings, kv_caches: dict[str, Any]) -> Worker:
    """This rank's half, with its arena, slab and transfer engine running."""
    if settings.config.mode == DAEMON:
        namespace, _ = namespace_of(vllm_config, kv_cache_config, settings.config.namespace)
        return make_host_worker(vllm_config, kv_cache_config, settings.config, settings.plugins, kv_caches, namespace)
    parallel = vllm_config.parallel_config
    tp_size, world_rank = parallel.tensor_parallel_size, parallel.rank
    pp_rank, tp_rank = divmod(world_rank, tp_size)
    geometry = geometry_of(kv_cache_config, kv_caches)
    namespace, _ = namespace_of(vllm_config, kv_cache_config, settings.config.namespace)
    layout = layout_digest(kv_cache_config, geometry, vllm_config)
    plan = _RankPlan(settings, geometry.page_bytes, tp_size, parallel.pipeline_parallel_size)
    arena, shared = plan.open_arena(tp_rank, replicated=kv_is_replicated(kv_cache_config, geometry, tp_size))
    writer_rank = pp_rank * tp_size if shared else world_rank
    writes = writer_rank == world_rank
    spec = SsdTierSpec(
        namespace=_folder(namespace, parallel, settings),
        layout=layout,
        slot_bytes=geometry.page_bytes,
        rank=writer_rank,
        ranks=parallel.pipeline_parallel_size if shared else tp_size * parallel.pipeline_parallel_size,
        engines=_engines(parallel, settings),
    )
    slab, problem = _rank_slab(settings, spec, shared=shared, writes=writes)
    object_bytes = tuple(geometry.object_bytes(group.index) for group in geometry.groups)
    identity = Identity(namespace, layout, rank_scope(vllm_config, tp_rank, pp_rank, shared))
    kit = kit_maker(settings.config, settings.plugins, geometry, identity, world_rank, slab)(b"", arena)
    hello = RankHello(
        version=PROTOCOL_VERSION,
        world_rank=world_rank,
        writer_rank=writer_rank,
        identity=namespace_digest(namespace),
        layout=layout,
        page_bytes=arena.page_bytes,
        dram_pages=arena.pages,
        ssd_slots=slab.slab.slots if slab is not None else 0,
        slot_bytes=slab.slab.slot_bytes if slab is not None else 0,
        object_bytes=object_bytes,
        problem=problem,
        prefix=identity.digest,
        fitted=isinstance(slab, RankSlab) and slab.fitted,
    )
    by_layer = asks_by_layer(vllm_config, geometry, settings.config)
    clears_early = compat.clears_before_fences(vllm_config, kv_cache_config)
    return Worker(hello, kit, writes=writes, by_layer=by_layer, clears_early=clears_early)


@dataclass(frozen=True, slots=True)
class _RankPlan:
    """How this rank's share of the capacities is cut into pages and slots."""

    settings: Settings
    page_bytes: int
    tp_size: int
    pp_size: int

    def pages(self, ranks: int) -> int:
        """Pages of one of ``ranks`` equal shares of the DRAM capacity."""
        capacity = self.settings.config.dram_capacity
        pages = capacity // ranks // self.page_bytes
        if pages < 1:
            raise ConfigError(
                f"dram_capacity of {capacity} bytes over {ranks} rank(s) holds not even one KV block "
                f"of {self.page_bytes} bytes; set at least dram_capacity={ranks * self.page_bytes}"
            )
        return pages

    def open_arena(self, tp_rank: int, *, replicated: bool) -> tuple[DramTier, bool]:
        """This rank's arena, and whether all TP ranks of its stage share one (they hold the same KV)."""
        if replicated:
            shared = share_arena(tp_rank, lambda: self._opened(self.pages(self.pp_size)))
            if shared is not None:
                return shared, True
        return self._opened(self.pages(self.tp_size * self.pp_size)), False

    def _opened(self, pages: int) -> DramTier:
        return self.settings.plugins.make_dram_tier(DramTierSpec(self.page_bytes, pages))


def _rank_slab(
    settings: Settings, spec: SsdTierSpec, *, shared: bool, writes: bool
) -> tuple[SsdTier | SharedSlab | None, str]:
    """This rank's slots: its own, or, where ranks share, the writer's opened for reading.

    ``None`` comes with the sentence that says why there are none; it is empty when none were asked for.
    """
    if settings.config.ssd_dir is None or settings.config.ssd_enabled is False:
        return None, ""
    owned: SsdTier | None = None
    problem = ""
    if writes:
        try:
            owned = settings.plugins.make_ssd_tier(spec)
        except UmbpError as error:
            problem = str(error)
    return share_slab(owned, problem) if shared else (owned, problem)


def _engines(parallel: Any, settings: Settings) -> int:
    """How many engines share the SSD folder."""
    return max(int(parallel.data_parallel_size), settings.config.ssd_engines)


def _folder(namespace: str, parallel: Any, settings: Settings) -> str:
    """This engine's folder below the SSD folder; data-parallel engines have one each.

    An engine of a dense model believes to be the only one (size 1, rank 0) and keeps its place as its index alone.
    """
    engines = _engines(parallel, settings)
    if engines == 1:
        return namespace
    return f"{namespace}-dp{_engine_rank(parallel)}of{engines}"


def _engine_rank(parallel: Any) -> int:
    """Which of the data-parallel engines this is."""
    rank = parallel.data_parallel_rank
    if parallel.data_parallel_size == 1:
        rank = compat.optional(parallel, "data_parallel_index", rank)
    return int(rank)


def _kv_events(vllm_config: Any) -> bool:
    events = vllm_config.kv_events_config
    return events is not None and bool(events.enable_kv_cache_events)


def _warn_of_mla_on_cpu(vllm_config: Any) -> None:
    if vllm_config.device_config.device_type == "cpu" and vllm_config.model_config.use_mla:
        logger.warning(
            "umbp: vLLM computes MLA on CPUs differently in prefill and decode, so answers after a hit may differ from "
            "those of a cold run although the KV is the same; its own prefix cache is off there for that reason"
        )


def _serves_by_prefix(vllm_config: Any, kv_cache_config: Any) -> bool:
    specs = [spec for group in kv_cache_config.kv_cache_groups for spec in layer_specs(group.kv_cache_spec)]
    reason = compat.why_not_by_prefix(vllm_config, specs)
    if reason is not None:
        logger.warning("umbp: nothing is stored or loaded for this model: %s", reason)
    return reason is None


def _may_load(vllm_config: Any, kv_cache_config: Any) -> bool:
    if not failures_by_block(kv_cache_config) and not compat.REPORTS_FAILED_REQUESTS:
        logger.warning(
            "umbp only stores: this vLLM has no way to hear of a failed load in a model with windows or several KV "
            "groups; use vLLM 0.30 or later to load as well"
        )
        return False
    return bool(vllm_config.kv_transfer_config.is_kv_consumer)


def _layerwise(vllm_config: Any, kv_cache_config: Any, settings: Settings) -> bool:
    """Whether hits in DRAM are loaded layer by layer; says why not where that was asked for in vain."""
    if settings.config.load_mode != LAYERWISE:
        return False
    reason = compat.why_not_layerwise(vllm_config)
    if settings.config.mode == DAEMON:
        reason = "what the daemon lends has to be loaded in time, which a forward pass that waits does not promise"
    if reason is None and not failures_by_block(kv_cache_config):
        reason = "vLLM hears of a failed load in such a model (windows, several KV groups) only before its step"
    if reason is not None:
        logger.warning("umbp: loads are asynchronous although load_mode is %s: %s", LAYERWISE, reason)
    return reason is None


def _stores_by_layer(vllm_config: Any, settings: Settings) -> bool:
    """Whether stores begin before their step has ended; says why not where that was asked for in vain."""
    if settings.config.store_granularity != BY_LAYER:
        return False
    reason = compat.why_not_store_by_layer(vllm_config)
    if reason is not None:
        warn_of_whole_blocks(reason)
    return reason is None


def _refuse_context_parallel(parallel: Any) -> None:
    sizes = [
        compat.optional(parallel, name, 1) for name in ("decode_context_parallel_size", "prefill_context_parallel_size")
    ]
    if any(size > 1 for size in sizes):
        raise ConfigError(
            "umbp does not support context parallelism yet; start without --decode-context-parallel-size and "
            "--prefill-context-parallel-size, or without --kv-connector umbp"
        )
