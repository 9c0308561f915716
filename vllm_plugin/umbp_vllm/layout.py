"""The identity of a KV cache's layout: what must agree before two engines share bytes."""

from __future__ import annotations

import dataclasses
import enum
from typing import Any

from umbp_core.ids import digest_of
from umbp_vllm import compat
from umbp_vllm.geometry import GroupGeometry, KvGeometry
from umbp_vllm.layout_groups import NO_LAYERS, layer_spec

FORMAT_VERSION = 1
"""Version of the object's byte order; part of every identity, raised when the order changes."""

_SPEC_FIELDS = (
    "num_kv_heads",
    "head_size",
    "head_size_v",
    "dtype",
    "kv_quant_mode",
    "num_head_slots",
    "state_content_bytes",
    "tokens_per_state",
    "compress_ratio",
    "cache_dtype_str",
    "model_version",
    "cache_role",
    "sliding_window",
    "attention_chunk_size",
)
"""Spec fields that say what the bytes of a page mean; a version of vLLM that lacks one leaves it out."""


def layout_descriptor(kv_cache_config: Any, geometry: KvGeometry, vllm_config: Any) -> dict[str, object]:
    """The canonical description of an object's bytes; JSON types only.

    Two engines whose descriptors differ never share bytes, even when all sizes agree.  It contains neither
    addresses nor the number of blocks, so it survives a restart with more or less memory.  ``vllm_config`` is that of
    the worker that has the layers: how an attention backend packs a page, only the backend knows.
    """
    specs = [group.kv_cache_spec for group in kv_cache_config.kv_cache_groups]
    return {
        "format": FORMAT_VERSION,
        "layout": geometry.layout_name,
        "groups": [_describe_group(group, specs[group.index], vllm_config) for group in geometry.groups],
    }


def layout_digest(kv_cache_config: Any, geometry: KvGeometry, vllm_config: Any) -> bytes:
    """SHA-256 of :func:`layout_descriptor`."""
    return digest_of(layout_descriptor(kv_cache_config, geometry, vllm_config))


def _describe_group(group: GroupGeometry, spec: Any, vllm_config: Any) -> dict[str, object]:
    layers = [[layer, _describe_layer(layer, layer_spec(spec, layer), vllm_config)] for layer in group.layers]
    return {
        "kind": group.kind,
        "block_tokens": group.block_tokens,
        "object_bytes": group.object_bytes,
        "layers": layers,
        "page_orders": [[list(dimension) for dimension in order] for order in group.page_orders],
    }


def _describe_layer(layer: str, spec: Any, vllm_config: Any) -> dict[str, object]:
    return {**_describe_spec(spec), **compat.page_writer(vllm_config, layer, spec)}


def _describe_spec(spec: Any) -> dict[str, object]:
    fields = {field.name: spec.__dict__[field.name] for field in dataclasses.fields(spec)}
    known = {name: _plain(fields[name]) for name in _SPEC_FIELDS if fields.get(name) is not None}
    return {"spec": type(spec).__name__, "page_bytes": int(spec.real_page_size_bytes), **known}


def _plain(value: object) -> int | str:
    """``value`` as JSON: enums by name (their ``str`` differs between Pythons), fractions and dtypes as text."""
    if isinstance(value, enum.Enum):
        return value.name
    if isinstance(value, int):
        return int(value)
    return str(value)


def kv_is_replicated(kv_cache_config: Any, geometry: KvGeometry, tp_size: int) -> bool:
    """Whether every tensor-parallel rank holds the same KV bytes, so that one copy serves all.

    vLLM says so from 0.31 on (``kv_tp_replicas``); before, it is true of models all of whose groups are MLA.
    """
    if tp_size > 1 and compat.kv_tp_replicas(kv_cache_config) == tp_size:
        return True
    silent = compat.optional(kv_cache_config, "kv_tp_replicas") is None
    return tp_size > 1 and silent and all(group.kind in ("mla", NO_LAYERS) for group in geometry.groups)
