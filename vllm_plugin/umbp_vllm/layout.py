"""The KV cache of one rank as raw bytes, and the identity of that layout.

Nothing here imports an engine: the configuration is read through the few attributes that vLLM 0.28 to 0.33
have in common, and everything else from the fields that its version declares.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch

from umbp_core.errors import ConfigError
from umbp_core.ids import digest_of
from umbp_vllm.geometry import GroupGeometry, Region
from umbp_vllm.layout_groups import NO_LAYERS, Storages, declared, group_geometry, layer_spec

FORMAT_VERSION = 1
"""Version of the object's byte order; part of every identity, raised when the order changes."""

ARENA_ALIGNMENT = 4096
"""Arena pages are multiples of this many bytes: what direct I/O and huge pages ask for."""

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


@dataclass(frozen=True)
class KvGeometry:
    """The KV cache of one rank as raw bytes.

    ``storages`` are flat ``uint8`` tensors over the engine's own allocations; holding them keeps that memory
    alive.  Groups may share bytes: a block id belongs to one group at a time.  Immutable; any thread.
    """

    num_blocks: int
    groups: tuple[GroupGeometry, ...]
    storages: tuple[torch.Tensor, ...]
    layout_name: str = ""

    def __post_init__(self) -> None:
        for group in self.groups:
            for region in group.regions:
                self._check(group, region)

    @classmethod
    def from_config(cls, kv_cache_config: Any, kv_caches: Mapping[str, torch.Tensor]) -> KvGeometry:
        """The geometry of ``kv_caches`` as vLLM registers them, laid out as its ``kv_cache_config`` says.

        Raises ``ConfigError`` when a group cannot be kept per block, or when configuration and tensors
        contradict each other.
        """
        if not kv_caches or not kv_cache_config.kv_cache_tensors:
            raise ConfigError("vLLM registered no KV cache; start this model without --kv-connector umbp")
        storages = Storages(kv_caches)
        groups = tuple(
            group_geometry(index, group, kv_cache_config, storages)
            for index, group in enumerate(kv_cache_config.kv_cache_groups)
        )
        layout_name = str(declared(kv_cache_config).get("kv_cache_layout") or "")
        return cls(int(kv_cache_config.num_blocks), groups, storages.flat(), layout_name)

    def _check(self, group: GroupGeometry, region: Region) -> None:
        room = self.storages[region.storage].numel()
        smallest = min(region.offset, region.piece_stride, region.block_stride, region.piece_bytes - 1)
        if smallest < 0 or region.pieces < 1 or region.end(self.num_blocks) > room:
            raise ConfigError(
                f"KV group {group.index}: {region} does not fit its allocation of {room} bytes with {self.num_blocks} "
                "blocks; this KV layout is not understood, start the engine without umbp and report its version"
            )

    @property
    def device(self) -> torch.device:
        """The device that holds the KV cache."""
        return self.storages[0].device

    def object_bytes(self, group: int) -> int:
        """Bytes of one object of KV group ``group``."""
        return self.groups[group].object_bytes

    @property
    def page_bytes(self) -> int:
        """The arena page that holds an object of any group: the largest object, rounded up to 4096."""
        largest = max(group.object_bytes for group in self.groups)
        return max(1, -(-largest // ARENA_ALIGNMENT)) * ARENA_ALIGNMENT


def layout_descriptor(kv_cache_config: Any, geometry: KvGeometry) -> dict[str, object]:
    """The canonical description of an object's bytes; JSON types only.

    Two engines whose descriptors differ never share bytes, even when all sizes agree.  It contains neither
    addresses nor the number of blocks, so it survives a restart with more or less memory.
    """
    specs = [group.kv_cache_spec for group in kv_cache_config.kv_cache_groups]
    return {
        "format": FORMAT_VERSION,
        "layout": geometry.layout_name,
        "groups": [_describe_group(group, specs[group.index]) for group in geometry.groups],
    }


def layout_digest(kv_cache_config: Any, geometry: KvGeometry) -> bytes:
    """SHA-256 of :func:`layout_descriptor`."""
    return digest_of(layout_descriptor(kv_cache_config, geometry))


def _describe_group(group: GroupGeometry, spec: Any) -> dict[str, object]:
    layers = [[layer, _describe_spec(layer_spec(spec, layer))] for layer in group.layers]
    return {
        "kind": group.kind,
        "block_tokens": group.block_tokens,
        "object_bytes": group.object_bytes,
        "layers": layers,
        "page_orders": [[list(dimension) for dimension in order] for order in group.page_orders],
    }


def _describe_spec(spec: Any) -> dict[str, object]:
    fields = declared(spec)
    known = {name: _plain(fields[name]) for name in _SPEC_FIELDS if fields.get(name) is not None}
    return {"spec": type(spec).__name__, "page_bytes": int(spec.real_page_size_bytes), **known}


def _plain(value: object) -> int | str:
    """``value`` as JSON: enums and dtypes by name, fractions as text."""
    if type(value) is int or type(value) is str:
        return value
    if isinstance(value, Fraction):
        return f"{value.numerator}/{value.denominator}"
    return str(value)


def kv_is_replicated(kv_cache_config: Any, geometry: KvGeometry, tp_size: int) -> bool:
    """Whether every tensor-parallel rank holds the same KV bytes, so that one copy serves all.

    vLLM says so from 0.31 on (``kv_tp_replicas``); before, it is true of models all of whose groups are MLA.
    """
    replicas = declared(kv_cache_config).get("kv_tp_replicas")
    if replicas is not None:
        return tp_size > 1 and int(replicas) == tp_size
    return tp_size > 1 and all(group.kind in ("mla", NO_LAYERS) for group in geometry.groups)
