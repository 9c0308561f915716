"""The weights behind SGLang's model name, as far as this process knows them."""

from __future__ import annotations

import json
from typing import Any

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


def known_weights() -> dict[str, object]:
    """What decides the KV that this process computes: the model, and the draft model whose layers may lie beside it."""
    return {"model": _model(), "draft": _draft()}


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
