"""The namespace: everything that decides the meaning of stored KV and that the block hash does not contain.

Two engines share objects only when every fact here is equal, so a needless difference costs hits and a
missing one costs correctness.  The description is computed from what every process of an engine has, and
only from parts of the configuration that vLLM does not change in one of its processes: it must come out equal
in the scheduler, in every worker, and after a restart.  Layout and KV dtype in bytes are the layout digest's.
"""

from __future__ import annotations

import dataclasses
import enum
import os
import re
from collections.abc import Mapping
from typing import Any

from umbp_connectors.model_origin import model_origin
from umbp_core.ids import RankScope, digest_of
from umbp_vllm import compat
from umbp_vllm.hashing import describe_hashing
from umbp_vllm.model_length import length_facts

SCHEMA = 1
"""Raised when the form of the description changes, which voids everything stored before."""

_WORKER_KV_DTYPES = frozenset({"auto", "fp8", "fp8_e4m3", "fp8_ds_mla", "nvfp4_ds_mla"})


def namespace_of(
    vllm_config: Any,
    kv_cache_config: Any | None,
    extra: str,
    env: Mapping[str, str] | None = None,
    version: str | None = None,
) -> tuple[str, dict[str, object]]:
    """The namespace of this engine and the description that it is the digest of.

    ``extra`` is the user's own part (configuration ``namespace``); ``env`` and ``version`` are those of this
    process by default.  The description is plain JSON and may be logged.  Reads the configuration and samples
    of the weights when the model is a local path; what cannot be read counts as absent.
    """
    env = os.environ if env is None else env
    model = _model(vllm_config)
    description: dict[str, object] = {
        "schema": SCHEMA,
        "user": extra,
        "model": model,
        "cache": _cache(vllm_config, kv_cache_config),
        "hashing": describe_hashing(vllm_config, env, version),
        "parallel": _parallel(vllm_config.parallel_config),
        "draft": _draft(compat.optional(vllm_config, "speculative_config"), vllm_config.model_config),
    }
    return f"{_slug(str(model['name']))}-{digest_of(description).hex()[:32]}", description


def namespace_digest(namespace: str) -> bytes:
    """What leader and workers compare: 32 bytes that stand for ``namespace``."""
    return digest_of({"namespace": namespace})


def rank_scope(vllm_config: Any, tp_rank: int, pp_rank: int, replicated: bool, pcp_rank: int = 0) -> RankScope:
    """The part of the model's KV that one worker holds.

    ``replicated`` says that all TP ranks hold the same heads (MLA).  vLLM's decode context parallelism divides
    the tokens among neighbouring TP ranks, prefill context parallelism adds ranks of its own; both together are
    the scope's ``cp``.
    """
    parallel = vllm_config.parallel_config
    dcp = int(compat.optional(parallel, "decode_context_parallel_size", 1))
    pcp = int(compat.optional(parallel, "prefill_context_parallel_size", 1))
    return RankScope(
        tp_rank=tp_rank,
        tp_size=parallel.tensor_parallel_size,
        pp_rank=pp_rank,
        pp_size=parallel.pipeline_parallel_size,
        cp_rank=pcp_rank * dcp + tp_rank % dcp,
        cp_size=pcp * dcp,
        replicated=replicated,
    )


def _model(vllm_config: Any) -> dict[str, object]:
    """The weights and how they are computed with."""
    model = vllm_config.model_config
    multimodal = compat.optional(model, "multimodal_config")
    return {
        **model_origin(model.model, model.revision),
        "weights_from": compat.optional(model, "model_weights", "") or "",
        "dummy": compat.optional(compat.optional(vllm_config, "load_config"), "load_format") == "dummy",
        "dtype": str(model.dtype).removeprefix("torch."),
        "quantization": _plain(model.quantization),
        "quantization_config": _plain(compat.optional(model, "quantization_config")),
        "hf_overrides": _plain(compat.optional(model, "hf_overrides")),
        "implementation": _plain(compat.optional(model, "model_impl")),
        "class_overrides": _plain(compat.optional(model, "model_class_overrides")),
        "runner": _plain(compat.optional(model, "runner_type")),
        "convert": _plain(compat.optional(model, "convert_type")),
        "sliding_window_off": bool(compat.optional(model, "disable_sliding_window", False)),
        "mm_processor": _plain(compat.optional(multimodal, "mm_processor_kwargs")),
        "video_pruning": _plain(compat.optional(multimodal, "video_pruning_rate")),
        **_config_source(model),
        **_length(length_facts(model)),
        **_adapters(compat.optional(vllm_config, "lora_config"), model),
    }


def _config_source(model: Any) -> dict[str, object]:
    """Where the model's configuration comes from, as far as that is not where its weights do, as usual."""
    told: dict[str, object] = {}
    path = compat.optional(model, "hf_config_path")
    if path and path != model.model:
        told["config_from"] = model_origin(path, compat.optional(model, "_hf_config_revision") or model.revision)
    code = compat.optional(model, "code_revision")
    if code:
        told["code_revision"] = code
    form = _plain(compat.optional(model, "config_format", "auto"))
    if form != "auto":
        told["config_format"] = form
    return told


def _adapters(lora: Any | None, model: Any) -> dict[str, object]:
    """How LoRA adapters are applied, where that is not as usual; which ones is the block keys' matter."""
    told = {
        "modules": _plain(compat.optional(lora, "target_modules")),
        "tower": bool(compat.optional(lora, "enable_tower_connector_lora", False)),
        "dtype": str(compat.optional(lora, "lora_dtype", model.dtype)).removeprefix("torch."),
    }
    usual = {"modules": None, "tower": False, "dtype": str(model.dtype).removeprefix("torch.")}
    return {} if told == usual else {"adapters": told}


def _length(facts: Mapping[str, object]) -> dict[str, object]:
    return {"length": facts} if facts else {}


def _cache(vllm_config: Any, kv_cache_config: Any | None) -> dict[str, object]:
    """Kind of cache and tokens per block.

    The sizes are the groups' own, because only the scheduler's process has the resolved ``cache_config.block_size``.
    """
    cache = vllm_config.cache_config
    sizes = (
        [cache.block_size]
        if kv_cache_config is None
        else [group.kv_cache_spec.block_size for group in kv_cache_config.kv_cache_groups]
    )
    return {
        "dtype": _kv_dtype(str(cache.cache_dtype)),
        "dtype_skips": _plain(compat.optional(cache, "kv_cache_dtype_skip_layers") or []),
        "block_tokens": [int(size) for size in sizes],
        "match_unit": _plain(compat.optional(cache, "prefix_match_unit")),
        "mamba": [
            _plain(compat.optional(cache, name))
            for name in ("mamba_cache_dtype", "mamba_ssm_cache_dtype", "mamba_cache_mode")
        ],
    }


def _kv_dtype(dtype: str) -> str:
    """``dtype``, without differences that vLLM makes in workers only.

    Loading a model may turn ``auto`` into ``fp8`` (checkpoints with KV scales) and either into a packed format
    (sparse MLA), and the scheduler's process never learns of it.  Those differ in bytes per block or in the
    torch dtype, which is the layout digest's matter.
    """
    return "auto" if dtype in _WORKER_KV_DTYPES else dtype


def _parallel(parallel: Any) -> dict[str, object]:
    return {
        "tp": parallel.tensor_parallel_size,
        "pp": parallel.pipeline_parallel_size,
        "dcp": compat.optional(parallel, "decode_context_parallel_size", 1),
        "pcp": compat.optional(parallel, "prefill_context_parallel_size", 1),
        "cp_interleave": compat.optional(parallel, "cp_kv_cache_interleave_size", 1),
    }


def _draft(speculative: Any | None, target: Any) -> dict[str, object] | None:
    """The draft model, whose layers' KV lies in the same blocks; ``None`` without speculative decoding."""
    if speculative is None:
        return None
    model = compat.optional(speculative, "draft_model_config")
    return {
        **model_origin(compat.optional(speculative, "model") or "", compat.optional(speculative, "revision")),
        "method": _plain(compat.optional(speculative, "method")),
        "quantization": _plain(compat.optional(speculative, "quantization")),
        **_length(length_facts(model, target) if model is not None else {}),
    }


def _plain(value: Any) -> object:
    """``value`` as JSON; what has no such form counts by the qualified name of its function or class.

    Never by ``repr``, which may hold an address and so differ between processes.
    """
    if value is None or (isinstance(value, (bool, int, float, str)) and not isinstance(value, enum.Enum)):
        return value
    if isinstance(value, enum.Enum):
        return str(value.name)
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (set, frozenset)):
        return sorted((_plain(item) for item in value), key=str)
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: _plain(compat.optional(value, field.name)) for field in dataclasses.fields(value)}
    named = value if compat.optional(value, "__qualname__") else type(value)
    return f"{named.__module__}.{named.__qualname__}"


def _slug(model: str) -> str:
    """The last part of the model's name, for people who look at a listing."""
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", model.rstrip("/").rsplit("/", 1)[-1])
    return name[:48] or "model"
