"""The weights behind SGLang's model name, as far as this process knows them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from umbp_connectors.adapter_origin import adapter_origin
from umbp_connectors.model_origin import model_origin
from umbp_sglang import compat

_DECIDING = (
    *("dtype", "quantization", "quantization_param_path", "model_impl", "json_model_override_args"),
    *("kv_cache_dtype", "qsa_indexer_dtype"),
)
"""Settings, besides the weights, that decide what KV a model computes, and in which form it lies in the host pools.

These keep both kinds of 8-bit floats as plain bytes and do not tell which of them they are.
"""
_DRAFT_DTYPE = "speculative_draft_kv_cache_dtype"
_DRAFT_QUANTIZATION = "spec.speculative_draft_model_quantization"
_RARE = (
    *("model.load_format", "model.model_loader_extra_config", "model.custom_weight_loader", "model.is_embedding"),
    *("model.modelopt_quant", "model.quantize_and_serve", "model.model_config_parser", "serving.weight_version"),
    *("spec.speculative_draft_load_format", _DRAFT_QUANTIZATION),
    *("spec.speculative_draft_window_size", "spec.speculative_draft_sink_size"),
    *("exec.mamba.mamba_ssm_dtype", "exec.moe.kt_method", "exec.dllm.dllm_algorithm"),
    *("exec.kernel.enable_precise_embedding_interpolation", "mm.mm_process_config"),
)
"""Settings that decide the weights or the KV as well; told only where they are not SGLang's own defaults."""
_DEFAULTS: tuple[object, ...] = (None, False, "", "auto", "default", "{}", "AMXINT4", [], {})
_FILES = (
    *("model.quantization_param_path", "model.modelopt_checkpoint_restore_path", "model.rl_quant_profile"),
    *("model.decrypted_config_file", "model.decrypted_draft_config_file"),
    *("exec.moe.kt_weight_path", "exec.dllm.dllm_algorithm_config"),
)
"""Settings that name a local file or folder of weights, scales or configuration, which may get another content."""
_DRAFT_ADAPTER = "uno_lora_path"


def known_weights() -> dict[str, object]:
    """What decides the KV that this process computes: the model, and the draft model whose layers may lie beside it.

    Besides them only what is there: settings that are not SGLang's defaults, other files, and LoRA adapters.
    """
    more = {
        "settings": _settings(),
        "files": {name: model_origin(str(Path(path).absolute()), None) for name in _FILES if (path := _setting(name))},
        "adapters": _adapters(),
    }
    return {"model": _model(), "draft": _draft(), **{kind: found for kind, found in more.items() if found}}


def _model() -> dict[str, object] | None:
    """What SGLang was told to load, with digests of local files; ``None`` outside of a server's process."""
    model = _published("model")
    path = compat.optional(model, "model_path")
    if not path:
        return None
    settings = {name: _plain(compat.optional(model, name)) for name in _DECIDING}
    dummy = compat.optional(model, "load_format") == "dummy"
    return {**model_origin(str(path), compat.optional(model, "revision")), **settings, "dummy": dummy}


def _draft() -> dict[str, object] | None:
    """The same for a draft model; ``None`` when there is none of its own."""
    spec = _published("spec")
    path = compat.optional(spec, "speculative_draft_model_path")
    if not path:
        return None
    revision = compat.optional(spec, "speculative_draft_model_revision")
    algorithm = _plain(compat.optional(spec, "speculative_algorithm"))
    dtype = _plain(compat.optional(spec, _DRAFT_DTYPE))
    return {**model_origin(str(path), revision), "algorithm": algorithm, "kv_cache_dtype": dtype}


def _adapters() -> dict[str, object]:
    """The adapters that SGLang was started with, by the id that requests for them have in the page hash.

    Those that it loads later have another id each time, so that their files need not be known.
    """
    lora = _published("lora")
    started = compat.optional(lora, "lora_paths") if compat.optional(lora, "enable_lora") else None
    found: dict[str, object] = {str(ref.lora_id): _adapter(str(ref.lora_path)) for ref in started or ()}
    path = compat.optional(_published("spec"), _DRAFT_ADAPTER)
    return {**found, _DRAFT_ADAPTER: _adapter(str(path))} if path else found


def _adapter(path: str) -> dict[str, object]:
    return dict(adapter_origin(path)._asdict())


def _settings() -> dict[str, object]:
    """The settings of ``_RARE`` that are not as SGLang has them by itself: a draft model is quantised as the model."""
    found = {name: value for name in _RARE if (value := _plain(_setting(name))) not in _DEFAULTS}
    if found.get(_DRAFT_QUANTIZATION) == _plain(_setting("model.quantization")):
        found.pop(_DRAFT_QUANTIZATION, None)
    return found


def _setting(name: str) -> Any:
    """The published setting ``part.name`` or ``part.group.name``; ``None`` where there is none."""
    part, *names = name.split(".")
    value = _published(part)
    for each in names:
        value = compat.optional(value, each)
    return value


def _published(name: str) -> Any:
    """One part of the configuration that SGLang publishes in each of its processes, ``None`` before it did."""
    try:
        return compat.find(f"sglang.srt.runtime_context:get_{name}")()
    except (LookupError, ValueError):
        return None


def _plain(value: Any) -> object:
    """``value`` as JSON; enums by name."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    return compat.optional(value, "name") or json.loads(json.dumps(value, default=str))
