"""The groups of an engine's KV cache configuration as regions of raw bytes.

The strides come from ``KVCacheTensor`` (vLLM 0.29 and later), never from tensor shapes, so that every
physical layout, padded pages and split kernel blocks are covered by the same few cases.  vLLM 0.28 has no
strides in its configuration; there they are read from the registered tensors (:mod:`umbp_vllm.layout_views`).

Which bytes belong to a block: the *unpadded* page of each layer.  vLLM never reads or writes the padding that
``page_size_padded`` adds, and leaving it out keeps an object's bytes a function of the tokens alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from umbp_core.errors import ConfigError
from umbp_vllm import compat
from umbp_vllm.geometry import GroupGeometry, KvGeometry, LayerPages, Region, flat_storage, merged
from umbp_vllm.layout_views import block_dimension, page_order, view_regions

KINDS: Mapping[str, str] = {
    "FullAttentionSpec": "full_attention",
    "MLAAttentionSpec": "mla",
    "SlidingWindowSpec": "sliding_window",
    "SlidingWindowMLASpec": "sliding_window_mla",
    "ChunkedLocalAttentionSpec": "chunked_local",
}
"""Spec class -> kind.  Exact classes: a subclass may keep other state in its pages."""

NO_LAYERS = "no_layers"
"""Kind of a group that has no layer on this pipeline stage."""


def geometry_of(kv_cache_config: Any, kv_caches: Mapping[str, torch.Tensor]) -> KvGeometry:
    """See :meth:`umbp_vllm.geometry.KvGeometry.from_config`."""
    if not kv_caches or not kv_cache_config.kv_cache_tensors:
        raise ConfigError("vLLM registered no KV cache; start this model without --kv-connector umbp")
    storages = Storages(kv_caches)
    groups = tuple(
        group_geometry(index, group, kv_cache_config, storages)
        for index, group in enumerate(kv_cache_config.kv_cache_groups)
    )
    layout_name = compat.kv_cache_layout(kv_cache_config) or ""
    return KvGeometry(int(kv_cache_config.num_blocks), groups, storages.flat(), layout_name)


class Storages:
    """The distinct allocations behind the registered tensors, numbered in order of first use."""

    def __init__(self, kv_caches: Mapping[str, torch.Tensor]) -> None:
        self._views = kv_caches
        self._numbers: dict[int, int] = {}
        self._flat: list[torch.Tensor] = []

    def view(self, layer: str) -> torch.Tensor:
        """The tensor that vLLM registered for ``layer``.  Raises ``ConfigError`` when there is no single one."""
        view = self._views.get(layer)
        if not isinstance(view, torch.Tensor):
            raise ConfigError(
                f"vLLM registered no single KV tensor for layer {layer!r}, which its configuration places; "
                "start this model without --kv-connector umbp"
            )
        return view

    def place(self, layer: str) -> tuple[int, int]:
        """(storage number, byte offset of block 0) of ``layer``."""
        view = self.view(layer)
        base = view.untyped_storage().data_ptr()
        if base not in self._numbers:
            self._numbers[base] = len(self._flat)
            self._flat.append(flat_storage(view))
        return self._numbers[base], view.storage_offset() * view.element_size()

    def flat(self) -> tuple[torch.Tensor, ...]:
        """The storages placed so far as flat ``uint8`` tensors.  Raises ``ConfigError`` unless on one device."""
        if len({tensor.device for tensor in self._flat}) != 1:
            raise ConfigError("the KV cache is spread over several devices of one rank; umbp needs it on one")
        return tuple(self._flat)


def group_geometry(index: int, group: Any, config: Any, storages: Storages) -> GroupGeometry:
    """KV group ``index`` of ``config``; its storages are numbered in ``storages``.

    Raises ``ConfigError`` when the group cannot be kept per block or its layout is not understood.
    """
    if compat.optional(group, "host_resident", False) or index not in compat.transfer_group_ids(config):
        raise ConfigError(
            f"KV group {index} is kept by vLLM in host memory or rebuilt by it (HiSparse), so umbp cannot hold its "
            "blocks; start this model without --kv-connector umbp"
        )
    place = _PLACERS[_source(config)]
    num_blocks = int(config.num_blocks)
    names = set(group.layer_names)
    parts = [
        part
        for tensor in config.kv_cache_tensors
        for part in place(tensor, names, _PageSpecs(index, group.kv_cache_spec), num_blocks, storages)
    ]
    return GroupGeometry(
        index=index,
        kind="+".join(sorted({part.kind for part in parts})) or NO_LAYERS,
        block_tokens=int(group.kv_cache_spec.block_size),
        layers=tuple(layer for part in parts for layer in part.layers),
        regions=merged([region for part in parts for region in part.regions]),
        page_orders=tuple(part.page_order for part in parts),
        layer_pages=tuple(pages for part in parts for pages in part.layer_pages()),
    )


def _source(config: Any) -> compat.GeometrySource:
    try:
        return compat.geometry_source(config)
    except TypeError as error:
        raise ConfigError(str(error)) from error


def layer_spec(group_spec: Any, layer: str) -> Any:
    """The spec of ``layer``: its own in a ``UniformTypeKVCacheSpecs`` group, else the group's."""
    if type(group_spec).__name__ == "UniformTypeKVCacheSpecs":
        return group_spec.kv_cache_specs[layer]
    return group_spec


@dataclass(frozen=True, slots=True)
class _PageSpecs:
    """What a group's spec says about the pages of its layers."""

    group: int
    spec: Any

    def kind(self, layer: str) -> str:
        name = type(layer_spec(self.spec, layer)).__name__
        if name not in KINDS:
            raise ConfigError(
                f"KV group {self.group} is a {name}, whose state is not a list of blocks per token (Mamba, linear and "
                "cross attention are such); umbp keeps full, MLA, sliding-window and chunked-local attention. "
                "Start this model without --kv-connector umbp."
            )
        return KINDS[name]

    def page_bytes(self, layer: str) -> int:
        return int(layer_spec(self.spec, layer).real_page_size_bytes)

    def is_padded(self, layer: str) -> bool:
        return int(layer_spec(self.spec, layer).page_size_bytes) != self.page_bytes(layer)


class _Part(NamedTuple):
    """Layers of one group that one ``KVCacheTensor`` places."""

    kind: str
    layers: tuple[str, ...]
    regions: list[Region]
    page_order: tuple[tuple[int, int], ...]

    def layer_pages(self) -> list[LayerPages]:
        """One per layer where each has a region of its own; else all layers together."""
        if len(self.regions) != len(self.layers):
            return [LayerPages(self.layers, tuple(self.regions))]
        return [LayerPages((layer,), (region,)) for layer, region in zip(self.layers, self.regions, strict=True)]


def _place_by_strides(
    tensor: Any, names: set[str], specs: _PageSpecs, num_blocks: int, storages: Storages
) -> list[_Part]:
    """0.29 and later: a tensor places layers of a single group, and says where."""
    layers = tuple(tensor.layers)
    if not layers or layers[0] not in names:
        return []
    kind = specs.kind(layers[0])
    places = [storages.place(layer) for layer in layers]
    for number, (layer, (_, start)) in enumerate(zip(layers, places, strict=True)):
        expected = tensor.offset + number * tensor.layer_stride
        if start != expected:
            raise ConfigError(
                f"layer {layer!r} starts at byte {start} of its allocation but vLLM's configuration says {expected}; "
                "this KV layout is not understood, start the engine without umbp and report its version"
            )
    regions = _strided_regions(tensor, places, specs, num_blocks)
    # Every registered view is [B, H, N, C].
    return [_Part(kind, layers, regions, page_order(storages.view(layers[0]), 0, num_blocks))]


def _place_by_views(
    tensor: Any, names: set[str], specs: _PageSpecs, num_blocks: int, storages: Storages
) -> list[_Part]:
    """0.28: a tensor is shared by one layer of each group, and only the registered views know the strides."""
    parts = []
    for layer in tensor.shared_by:
        if layer in names:
            kind = specs.kind(layer)
            view = storages.view(layer)
            storage, _ = storages.place(layer)
            regions = view_regions(view, storage, num_blocks, specs.page_bytes(layer))
            order = page_order(view, block_dimension(view, num_blocks), num_blocks)
            parts.append(_Part(kind, (layer,), regions, order))
    return parts


def _strided_regions(
    tensor: Any, places: Sequence[tuple[int, int]], specs: _PageSpecs, num_blocks: int
) -> list[Region]:
    """The regions of one ``KVCacheTensor`` from its own strides."""
    page, padded = specs.page_bytes(tensor.layers[0]), specs.is_padded(tensor.layers[0])
    count, block, layer = len(places), int(tensor.block_stride), int(tensor.layer_stride)
    if block < page:
        # Heads lie outside blocks (LHBNC): the page is cut into head slices, num_blocks apart.
        slices, rest = divmod(page, block)
        if rest or padded:
            raise ConfigError(f"pages of {page} bytes cannot consist of slices {block} bytes apart; layout unknown")
        return [Region(storage, start, slices, num_blocks * block, block, block) for storage, start in places]
    if count > 1 and layer < page:
        # Heads lie outside layers but inside blocks (BHLNC): all layers of a block are one run.
        if padded or count * page > block:
            raise ConfigError(f"{count} interleaved pages of {page} bytes do not fill blocks {block} bytes apart")
        return [Region(places[0][0], places[0][1], 1, count * page, block, count * page)]
    return [Region(storage, start, 1, page, block, page) for storage, start in places]


_PLACERS: Mapping[compat.GeometrySource, Callable[[Any, set[str], _PageSpecs, int, Storages], list[_Part]]] = {
    compat.GeometrySource.STRIDES: _place_by_strides,
    compat.GeometrySource.SHARED_BY: _place_by_views,
}
