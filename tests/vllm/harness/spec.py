"""What engine is simulated, and the vLLM configuration objects that describe it."""

from __future__ import annotations

import copy
import functools
import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from vllm.config import (
    CacheConfig,
    DeviceConfig,
    KVEventsConfig,
    KVTransferConfig,
    ModelConfig,
    ParallelConfig,
    SchedulerConfig,
    SpeculativeConfig,
    VllmConfig,
)
from vllm.v1.core.kv_cache_utils import (
    generate_scheduler_kv_cache_config,
    get_kv_cache_configs,
    resolve_cache_hit_alignment_tokens,
    resolve_kv_cache_block_sizes,
)
from vllm.v1.kv_cache_interface import (
    ChunkedLocalAttentionSpec,
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheSpec,
    MLAAttentionSpec,
    SlidingWindowSpec,
)

VOCABULARY = 1000


@dataclass(frozen=True)
class GroupSpec:
    """Some layers of one attention kind; layers of one kind may end up in several KV groups, as vLLM decides."""

    kind: str = "full"
    """``full``, ``window``, ``chunk`` (chunked local attention) or ``mla``."""
    layers: int = 2
    heads: int = 2
    head_size: int = 8
    window: int = 0
    """Tokens of the sliding window, or of a chunk."""
    non_causal: bool = False
    """Tokens of a prompt see those behind them (``full``)."""

    def kv_spec(self, block_size: int) -> KVCacheSpec:
        """The vLLM spec of one of these layers on one rank."""
        common: dict[str, Any] = {"block_size": block_size, "head_size": self.head_size, "dtype": torch.bfloat16}
        builders = {
            "full": lambda: FullAttentionSpec(num_kv_heads=self.heads, non_causal=self.non_causal, **common),
            "window": lambda: SlidingWindowSpec(num_kv_heads=self.heads, sliding_window=self.window, **common),
            "chunk": lambda: ChunkedLocalAttentionSpec(
                num_kv_heads=self.heads, attention_chunk_size=self.window, **common
            ),
            "mla": lambda: MLAAttentionSpec(num_kv_heads=1, max_tp_shards=1, **common),
        }
        return builders[self.kind]()


@dataclass(frozen=True)
class EngineSpec:
    """One simulated engine.  Sizes are small so that a run of hundreds of steps takes well under a second."""

    connector: str
    extra: Mapping[str, Any] = field(default_factory=dict)
    """``kv_connector_extra_config``."""
    groups: tuple[GroupSpec, ...] = (GroupSpec(),)
    block_size: int = 4
    num_blocks: int = 192
    max_model_len: int = 256
    max_num_seqs: int = 16
    max_num_batched_tokens: int = 256
    tp: int = 1
    pp: int = 1
    data_parallel: tuple[int, int] = (0, 1)
    """Rank and size; the engines of a data-parallel group are independent of each other here."""
    layout: str = "LBHNC"
    prefix_caching: bool = True
    hash_algo: str = "sha256"
    v2_runner: bool = False
    """Model runner V2's convention: resumed requests arrive among the new ones."""
    deferred_save: bool = False
    """V1 runner with a draft model: ``wait_for_save`` comes after the step's results were collected."""
    async_scheduling: bool = False
    """Two batches in flight, scheduled by vLLM's ``AsyncScheduler``."""
    lazy_execution: bool = False
    """With two batches in flight, run a batch only when its output is asked for instead of at once."""
    failure_policy: str | None = None
    kv_role: str = "kv_both"
    draft_tokens: int = 0
    """Draft tokens per decode step (ngram style: no draft KV, some are rejected)."""
    engine_id: str = "engine"
    log_stats: bool = True
    kv_events: bool = False
    module_path: str | None = None

    @property
    def world_size(self) -> int:
        """Ranks, each with its own worker connector and KV buffer."""
        return self.tp * self.pp


@functools.cache
def _model_folder() -> str:
    """A folder with just the configuration of a tiny model; no weights and no tokenizer are ever read."""
    folder = Path(tempfile.mkdtemp(prefix="umbp-harness-model-"))
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "num_hidden_layers": 4,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 1 << 20,
        "torch_dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


def _transfer_config(spec: EngineSpec) -> KVTransferConfig:
    chosen: dict[str, Any] = {}
    if spec.failure_policy is not None:
        chosen["kv_load_failure_policy"] = spec.failure_policy
    if spec.module_path is not None:
        chosen["kv_connector_module_path"] = spec.module_path
    return KVTransferConfig(
        kv_connector=spec.connector,
        kv_role=spec.kv_role,
        engine_id=spec.engine_id,
        kv_connector_extra_config=dict(spec.extra),
        **chosen,
    )


def make_vllm_config(spec: EngineSpec) -> VllmConfig:
    """The configuration that ``vllm serve`` would have made for ``spec``."""
    folder = _model_folder()
    model = ModelConfig(
        model=folder,
        tokenizer=folder,
        skip_tokenizer_init=True,
        dtype="bfloat16",
        seed=0,
        max_model_len=spec.max_model_len,
    )
    speculative = None
    if spec.draft_tokens:
        speculative = SpeculativeConfig(
            method="ngram",
            num_speculative_tokens=spec.draft_tokens,
            prompt_lookup_max=4,
            prompt_lookup_min=2,
            target_model_config=model,
            target_parallel_config=ParallelConfig(),
        )
    config = VllmConfig(
        model_config=model,
        cache_config=CacheConfig(
            block_size=spec.block_size,
            enable_prefix_caching=spec.prefix_caching,
            prefix_caching_hash_algo=spec.hash_algo,
            num_gpu_blocks_override=spec.num_blocks,
        ),
        scheduler_config=SchedulerConfig(
            max_num_seqs=spec.max_num_seqs,
            max_num_batched_tokens=spec.max_num_batched_tokens,
            max_model_len=spec.max_model_len,
            enable_chunked_prefill=True,
            is_encoder_decoder=False,
        ),
        parallel_config=ParallelConfig(
            tensor_parallel_size=spec.tp,
            pipeline_parallel_size=spec.pp,
            distributed_executor_backend="mp",
        ),
        device_config=DeviceConfig("cpu"),
        kv_transfer_config=_transfer_config(spec),
        speculative_config=speculative,
        kv_events_config=KVEventsConfig(enable_kv_cache_events=spec.kv_events, publisher="null"),
    )
    # The CPU platform switches these off or to its own choice; the scheduler under test does not care.
    config.scheduler_config.async_scheduling = spec.async_scheduling
    config.cache_config.kv_cache_layout = spec.layout
    config.parallel_config.data_parallel_rank, config.parallel_config.data_parallel_size = spec.data_parallel
    return config


def layer_specs(spec: EngineSpec, pp_rank: int) -> dict[str, KVCacheSpec]:
    """The attention layers that a rank of pipeline stage ``pp_rank`` holds."""
    specs: dict[str, KVCacheSpec] = {}
    index = 0
    for layer in range(max(group.layers for group in spec.groups)):
        for group in spec.groups:
            if layer >= group.layers:
                continue
            stage = index * spec.pp // sum(g.layers for g in spec.groups)
            if stage == pp_rank:
                specs[f"model.layers.{index}.self_attn.attn"] = group.kv_spec(spec.block_size)
            index += 1
    return specs


@dataclass(frozen=True)
class Geometry:
    """vLLM's own decision about groups, tensors and block sizes, one configuration per rank."""

    ranks: tuple[KVCacheConfig, ...]
    scheduler: KVCacheConfig
    scheduler_block_size: int
    hash_block_size: int


def make_geometry(spec: EngineSpec, config: VllmConfig) -> Geometry:
    """Resolve the KV cache as ``EngineCore`` does, and record the results in ``config``."""
    per_rank = [layer_specs(spec, rank // spec.tp) for rank in range(spec.world_size)]
    ranks = get_kv_cache_configs(config, per_rank, [1 << 40] * spec.world_size)
    for rank in ranks:
        rank.kv_cache_layout = config.cache_config.kv_cache_layout
    scheduler = generate_scheduler_kv_cache_config(ranks)
    config.cache_config.num_gpu_blocks = scheduler.num_blocks
    config.cache_config.block_size = min(g.kv_cache_spec.block_size for g in scheduler.kv_cache_groups)
    block_size, hash_block_size = resolve_kv_cache_block_sizes(scheduler, config)
    alignment = resolve_cache_hit_alignment_tokens(scheduler, config, block_size, hash_block_size)
    for each in (*ranks, scheduler):
        each.hash_block_size = hash_block_size
        each.cache_hit_alignment_tokens = alignment
    return Geometry(tuple(ranks), scheduler, block_size, hash_block_size)


def rank_config(config: VllmConfig, rank: int) -> VllmConfig:
    """The configuration as worker ``rank`` sees it: a worker process sets its own rank in it."""
    own = copy.copy(config)
    own.parallel_config = copy.copy(config.parallel_config)
    own.parallel_config.rank = rank
    own.cache_config = copy.copy(config.cache_config)
    own.kv_transfer_config = copy.deepcopy(config.kv_transfer_config)
    return own
