"""The groups of an engine's KV cache configuration as regions of raw bytes.

The strides come from ``KVCacheTensor`` (vLLM 0.29 and later), never from tensor shapes, so that every
physical layout, padded pages and split kernel blocks are covered by the same few cases.  vLLM 0.28 has no
strides in its configuration; there they are read from the registered tensors (:mod:`umbp_vllm.layout_views`).

Which bytes belong to a block: the *unpadded* page of each layer.  vLLM never reads or writes the padding that
``page_size_padded`` adds, and leaving it out keeps an object's bytes a function of the tokens alone.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from umbp_core.errors import ConfigError
from umbp_vllm.geometry import GroupGeometry, Region, flat_storage, merged
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


def declared(instance: Any) -> dict[str, Any]:
    """The fields that this version of vLLM declares on one of its dataclasses, with their values."""
    return {field.name: instance.__dict__[field.name] for field in dataclasses.fields(instance)}


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
    fields = declared(group)
    if fields.get("host_resident", False) or not fields.get("enable_kv_transfer", True):
        raise ConfigError(
            f"KV group {index} is kept by vLLM in host memory or rebuilt by it (HiSparse), so umbp cannot hold its "
            "blocks; start this model without --kv-connector umbp"
        )
    names = set(group.layer_names)
    regions: list[Region] = []
    layers: list[str] = []
    orders: list[tuple[tuple[int, int], ...]] = []
    for tensor in config.kv_cache_tensors:
        for placed in _placed_layers(tensor, names):
            spec = layer_spec(group.kv_cache_spec, placed[0])
            kind_of(index, spec)
            regions.extend(_tensor_regions(tensor, placed, spec, int(config.num_blocks), storages))
            layers.extend(placed)
            orders.append(_page_order(tensor, storages.view(placed[0]), int(config.num_blocks)))
    kinds = sorted({kind_of(index, layer_spec(group.kv_cache_spec, layer)) for layer in layers})
    return GroupGeometry(
        index=index,
        kind="+".join(kinds) or NO_LAYERS,
        block_tokens=int(group.kv_cache_spec.block_size),
        layers=tuple(layers),
        regions=merged(regions),
        page_orders=tuple(orders),
    )


def _page_order(tensor: Any, view: torch.Tensor, num_blocks: int) -> tuple[tuple[int, int], ...]:
    """From 0.29 on every registered view is ``[B, H, N, C]``; before, the block dimension has to be found."""
    blocks = 0 if "layer_stride" in declared(tensor) else block_dimension(view, num_blocks)
    return page_order(view, blocks, num_blocks)


def _placed_layers(tensor: Any, names: set[str]) -> list[tuple[str, ...]]:
    """The layers of ``tensor`` that belong to one group, in runs that share strides.

    From 0.29 on a tensor places layers of a single group; in 0.28 it is shared by one layer of each group.
    """
    fields = declared(tensor)
    if "layers" in fields:
        layers = tuple(tensor.layers)
        return [layers] if layers and layers[0] in names else []
    return [(layer,) for layer in tensor.shared_by if layer in names]


def layer_spec(group_spec: Any, layer: str) -> Any:
    """The spec of ``layer``: its own in a ``UniformTypeKVCacheSpecs`` group, else the group's."""
    if type(group_spec).__name__ == "UniformTypeKVCacheSpecs":
        return group_spec.kv_cache_specs[layer]
    return group_spec


def kind_of(group: int, spec: Any) -> str:
    """The kind of attention whose pages ``spec`` describes.  Raises ``ConfigError`` for kinds with other state."""
    name = type(spec).__name__
    if name not in KINDS:
        raise ConfigError(
            f"KV group {group} is a {name}, whose state is not a list of blocks per token (Mamba, linear and cross "
            "attention are such); umbp keeps full, MLA, sliding-window and chunked-local attention. "
            "Start this model without --kv-connector umbp."
        )
    return KINDS[name]


def _tensor_regions(tensor: Any, layers: Sequence[str], spec: Any, num_blocks: int, storages: Storages) -> list[Region]:
    """The regions of ``layers``, which ``tensor`` places, in order."""
    page = int(spec.real_page_size_bytes)
    if "layer_stride" not in declared(tensor):
        places = [storages.place(layer) for layer in layers]
        return [
            region
            for layer, (storage, _) in zip(layers, places, strict=True)
            for region in view_regions(storages.view(layer), storage, num_blocks, page)
        ]
    places = [storages.place(layer) for layer in layers]
    for number, (layer, (_, start)) in enumerate(zip(layers, places, strict=True)):
        expected = tensor.offset + number * tensor.layer_stride
        if start != expected:
            raise ConfigError(
                f"layer {layer!r} starts at byte {start} of its allocation but vLLM's configuration says {expected}; "
                "this KV layout is not understood, start the engine without umbp and report its version"
            )
    return _strided_regions(tensor, places, page, int(spec.page_size_bytes), num_blocks)


def _strided_regions(
    tensor: Any, places: Sequence[tuple[int, int]], page: int, padded: int, num_blocks: int
) -> list[Region]:
    """The regions of one ``KVCacheTensor`` from its own strides; ``page`` is unpadded, ``padded`` is not."""
    count, block, layer = len(places), int(tensor.block_stride), int(tensor.layer_stride)
    if block < page:
        # Heads lie outside blocks (LHBNC): the page is cut into head slices, num_blocks apart.
        slices, rest = divmod(page, block)
        if rest or padded != page:
            raise ConfigError(f"pages of {page} bytes cannot consist of slices {block} bytes apart; layout unknown")
        return [Region(storage, start, slices, num_blocks * block, block, block) for storage, start in places]
    if count > 1 and layer < page:
        # Heads lie outside layers but inside blocks (BHLNC): all layers of a block are one run.
        if padded != page or count * page > block:
            raise ConfigError(f"{count} interleaved pages of {page} bytes do not fill blocks {block} bytes apart")
        return [Region(places[0][0], places[0][1], 1, count * page, block, count * page)]
    return [Region(storage, start, 1, page, block, page) for storage, start in places]
