"""What the store is told: our configuration and what SGLang says about the rank, in one checked record."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from umbp_connectors.config import resolve
from umbp_connectors.config_model import UmbpConfig
from umbp_connectors.hookspecs import SsdTierSpec
from umbp_connectors.offload import GateMaker
from umbp_connectors.plugins import create_manager
from umbp_connectors.tier_ports import SsdTier
from umbp_core.errors import ConfigError
from umbp_core.eviction import EvictionPolicy
from umbp_sglang.node_facts import data_parallel

ENGINE_KEYS = frozenset(
    {
        "allocator",
        "backend_name",
        "class_name",
        "hicache_storage_pass_prefix_keys",
        "interface_v1",
        "module_path",
        "prefetch_threshold",
        "prefetch_timeout_base",
        "prefetch_timeout_per_ki_token",
        "tp_lcm_size",
    }
)
"""Keys of the extra config that SGLang itself reads; some of them it takes out before a backend sees the rest."""
_LAYER_SPLIT = "SGLANG_PP_LAYER_PARTITION"


@dataclass(frozen=True, slots=True)
class RankFacts:
    """This process among those of one engine, as SGLang's ``HiCacheStorageConfig`` has it.

    ``replicated`` says that all TP ranks hold the same KV (MLA); then only the ``writer`` stores it.  ``head_parts`` is
    the number of equal ranges into which ``tp_lcm_size`` cuts all heads, 0 when heads are not cut.  ``dp_size`` caches
    are independent of each other, whether SGLang has replicas or data-parallel attention.  ``layer_split`` is how many
    layers each pipeline stage was given; empty where SGLang divides them evenly.
    """

    model: str = ""
    tp_rank: int = 0
    tp_size: int = 1
    pp_rank: int = 0
    pp_size: int = 1
    cp_rank: int = 0
    cp_size: int = 1
    dcp_rank: int = 0
    dcp_size: int = 1
    dp_rank: int = 0
    dp_size: int = 1
    replicated: bool = False
    writer: bool = True
    head_parts: int = 0
    layer_split: str = ""

    @property
    def stores_kv(self) -> bool:
        """Whether this rank stores KV pages, or another one does for it."""
        return self.writer or not self.replicated


@dataclass(frozen=True, slots=True)
class StoreSettings:
    """Everything that a store is made of besides SGLang's host pools."""

    config: UmbpConfig
    rank: RankFacts
    make_eviction: Callable[[], EvictionPolicy]
    make_ssd_gate: GateMaker | None = None
    page_metrics: bool = False
    """Whether SGLang collects the store's page counts (``get_stats``)."""
    make_ssd: Callable[[SsdTierSpec], SsdTier] | None = None
    """Opens the tier below DRAM, whichever plug-in offers it."""


def read_settings(storage_config: Any, env: Mapping[str, str] | None = None) -> StoreSettings:
    """The settings of a store that SGLang makes with ``storage_config`` (a ``HiCacheStorageConfig``).

    ``env`` is the process's own by default.  Raises ``ConfigError`` with one line per problem: an unknown key with the
    nearest known one, a wrong value, an eviction policy that nobody offers, a ``tp_lcm_size`` that this TP size does
    not divide.
    """
    resolved = resolve(storage_config.extra_config or {}, env, engine_keys=ENGINE_KEYS)
    plugins = create_manager(resolved.config)
    return StoreSettings(
        resolved.config,
        _rank_facts(storage_config, os.environ if env is None else env),
        plugins.eviction_maker(),
        plugins.ssd_gate_maker(),
        bool(storage_config.enable_storage_metrics),
        plugins.make_ssd_tier,
    )


def _rank_facts(storage_config: Any, env: Mapping[str, str]) -> RankFacts:
    replicated = bool(storage_config.is_mla_model)
    dp_rank, dp_size = data_parallel()
    return RankFacts(
        model=storage_config.model_name or "",
        tp_rank=int(storage_config.tp_rank),
        tp_size=int(storage_config.tp_size),
        pp_rank=int(storage_config.pp_rank),
        pp_size=int(storage_config.pp_size),
        cp_rank=int(storage_config.attn_cp_rank),
        cp_size=int(storage_config.attn_cp_size),
        dcp_rank=int(storage_config.dcp_rank),
        dcp_size=int(storage_config.dcp_size),
        dp_rank=int(storage_config.dp_rank) or dp_rank,  # SGLang tells a storage that of attention only
        dp_size=dp_size,
        replicated=replicated,
        writer=bool(storage_config.is_storage_writer),
        head_parts=0 if replicated else _head_parts(storage_config.tp_lcm_size, int(storage_config.tp_size)),
        layer_split=env.get(_LAYER_SPLIT, "").replace(" ", ""),
    )


def _head_parts(tp_lcm_size: object, tp_size: int) -> int:
    if tp_lcm_size is None:
        return 0
    if not isinstance(tp_lcm_size, int) or tp_lcm_size < 1 or tp_lcm_size % tp_size:
        raise ConfigError(
            f"tp_lcm_size {tp_lcm_size!r} is not a multiple of this engine's TP size {tp_size}; "
            "give the least common multiple of the TP sizes that are to share their pages"
        )
    return tp_lcm_size
