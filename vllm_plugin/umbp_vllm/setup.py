"""Builds the two halves from vLLM's configuration: everything that happens once, at start."""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from umbp_connectors import logs
from umbp_connectors.config import UmbpConfig, resolve
from umbp_connectors.hookspecs import DramTierSpec, SsdTierSpec
from umbp_connectors.plugins import PluginHost, create_manager
from umbp_connectors.reporting.opening import open_reporter
from umbp_connectors.tier_ports import DramTier, SsdTier
from umbp_connectors.transfer.engine import TransferEngine
from umbp_core.errors import ConfigError, UmbpError
from umbp_core.ids import Identity, digest_of
from umbp_core.scheduler import Limits
from umbp_vllm import compat
from umbp_vllm.bands import bands_needed
from umbp_vllm.copiers import make_copier
from umbp_vllm.copy_plan import PageArena
from umbp_vllm.engine_args import SERVING_KEY
from umbp_vllm.geometry import KvGeometry
from umbp_vllm.groups import failures_by_block, kv_groups
from umbp_vllm.hashing import hash_stability
from umbp_vllm.layer_gate import LayerGate
from umbp_vllm.layout import kv_is_replicated, layout_digest
from umbp_vllm.layout_groups import geometry_of
from umbp_vllm.leader import Leader
from umbp_vllm.metadata import PROTOCOL_VERSION, RankHello
from umbp_vllm.namespace import namespace_of, rank_scope
from umbp_vllm.node import facts_of
from umbp_vllm.pool import LeaderSetup
from umbp_vllm.reporting import Reporting
from umbp_vllm.sharing import SharedSlab, share_arena, share_slab
from umbp_vllm.worker import Worker

logger = logging.getLogger("vllm.umbp.setup")

LAYERWISE = "layerwise"
"""The value of ``load_mode``."""

BY_LAYER = "layer"
"""The value of ``store_granularity``."""


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
    config = _config_of(transfer.kv_connector_extra_config)
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
    if config.mode != "local":
        raise ConfigError(
            f"mode {config.mode!r} is not for vLLM yet, whose pool lives in its own processes; set mode 'local'"
        )
    return config


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
    setup = LeaderSetup(
        config=settings.config,
        plugins=settings.plugins,
        groups=groups,
        alignment=math.lcm(*(group.block_tokens for group in groups)),
        ranks=parallel.tensor_parallel_size * parallel.pipeline_parallel_size,
        identity=_identity(namespace),
        folder=_folder(namespace, parallel, settings),
        share_loads=bool(vllm_config.cache_config.enable_prefix_caching),
        persistent=stability.stable,
        kv_events=_kv_events(vllm_config),
        may_load=_may_load(vllm_config, kv_cache_config),
        may_store=bool(vllm_config.kv_transfer_config.is_kv_producer),
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
    parallel = vllm_config.parallel_config
    tp_size, world_rank = parallel.tensor_parallel_size, parallel.rank
    pp_rank, tp_rank = divmod(world_rank, tp_size)
    geometry = geometry_of(kv_cache_config, kv_caches)
    namespace, _ = namespace_of(vllm_config, kv_cache_config, settings.config.namespace)
    layout = layout_digest(kv_cache_config, geometry)
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
    copier = make_copier(geometry, cast(PageArena, arena))
    copier.open()
    identity = Identity(namespace, layout, rank_scope(vllm_config, tp_rank, pp_rank, shared))
    engine = TransferEngine(
        copier,
        arena,
        slab.slab if slab is not None else None,
        identity,
        layers=copier,
        world_rank=world_rank,
        object_bytes=dict(enumerate(object_bytes)),
        clock=time.monotonic,
        io_threads=settings.config.io_threads,
        observer=settings.plugins,
        scheduler=settings.plugins.make_scheduler(_limits(settings.config)),
    )
    engine.start()
    hello = RankHello(
        version=PROTOCOL_VERSION,
        world_rank=world_rank,
        writer_rank=writer_rank,
        identity=_identity(namespace),
        layout=layout,
        page_bytes=arena.page_bytes,
        dram_pages=arena.pages,
        ssd_slots=slab.slab.slots if slab is not None else 0,
        slot_bytes=slab.slab.slot_bytes if slab is not None else 0,
        object_bytes=object_bytes,
        problem=problem,
        prefix=identity.digest,
    )
    bands = bands_needed(geometry)
    gate = LayerGate(engine, bands, time.monotonic)
    silent = compat.layers_that_do_not_ask(vllm_config, list(bands))
    _look_at_bands(geometry, silent, settings)
    return Worker(
        hello, engine, copier, gate, [copier, arena, *([slab] if slab else [])], writes=writes, by_layer=not silent
    )


def _limits(config: UmbpConfig) -> Limits:
    return Limits(
        loads=config.max_concurrent_loads,
        stores=config.max_concurrent_stores,
        demotions=config.max_concurrent_demotions,
        blocks=config.max_transfer_blocks,
    )


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


def _identity(namespace: str) -> bytes:
    return digest_of({"namespace": namespace})


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
        _warn_of_whole_blocks(reason)
    return reason is None


def _warn_of_whole_blocks(reason: str) -> None:
    logger.warning("umbp: blocks are stored whole although store_granularity is %s: %s", BY_LAYER, reason)


def _look_at_bands(geometry: KvGeometry, silent: Sequence[str], settings: Settings) -> None:
    """Say where stores by layer change nothing on this rank; they are right all the same."""
    if settings.config.store_granularity != BY_LAYER:
        return
    pages = [page.layers for group in geometry.groups for page in group.layer_pages]
    if pages and all(len(layers) > 1 for layers in pages):
        _warn_of_whole_blocks(f"in the KV layout {geometry.layout_name} the layers of a block cannot be told apart")
    elif silent:
        logger.warning("umbp: layers %s are stored when their step has ended: they do not say before", silent)


def _refuse_context_parallel(parallel: Any) -> None:
    sizes = [
        compat.optional(parallel, name, 1) for name in ("decode_context_parallel_size", "prefill_context_parallel_size")
    ]
    if any(size > 1 for size in sizes):
        raise ConfigError(
            "umbp does not support context parallelism yet; start without --decode-context-parallel-size and "
            "--prefill-context-parallel-size, or without --kv-connector umbp"
        )
