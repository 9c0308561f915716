"""The geometry that is read from vLLM's own configuration classes, against vLLM's own views of the same memory."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from vllm.v1.kv_cache_interface import (
    ChunkedLocalAttentionSpec,
    CrossAttentionSpec,
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheGroupSpec,
    KVCacheTensor,
    MambaSpec,
    MLAAttentionSpec,
    SlidingWindowSpec,
    UniformTypeKVCacheSpecs,
    compute_layout_strides,
)
from vllm.v1.kv_cache_layout import KVCacheLayout
from vllm.v1.worker.utils import allocate_kv_cache

from umbp_core.errors import ConfigError
from umbp_vllm.geometry import KvGeometry

CPU = torch.device("cpu")
LAYOUTS = list(KVCacheLayout)
BLOCKS = 7


def full(**changes: Any) -> FullAttentionSpec:
    spec = FullAttentionSpec(block_size=16, num_kv_heads=2, head_size=8, dtype=torch.bfloat16)
    return replace(spec, **changes)


def names(prefix: str, count: int) -> list[str]:
    return [f"{prefix}{number}" for number in range(count)]


def group_tensors(
    layout: KVCacheLayout, layers_by_spec: Sequence[tuple[Any, list[str]]], block_bytes: int
) -> list[KVCacheTensor]:
    """What vLLM's planner makes of one group (``get_kv_cache_config_from_groups``)."""
    tensors, offset = [], 0
    for spec, layers in layers_by_spec:
        fixed = block_bytes if layout.is_block_outermost else None
        strides = compute_layout_strides(
            spec, BLOCKS, len(layers), layout, fixed_strides=(None, fixed, None, None, None)
        )
        tensors.append(KVCacheTensor(block_bytes * BLOCKS, layers, strides[0], strides[1], offset))
        offset += len(layers) * (spec.page_size_bytes if layout.is_block_outermost else strides[0])
    return tensors


def make(
    layout: KVCacheLayout,
    groups: Sequence[tuple[Any, list[str]]],
    kernel_block_sizes: list[int] | None = None,
) -> tuple[KVCacheConfig, dict[str, torch.Tensor]]:
    """A configuration whose groups lie over each other, and vLLM's views of it."""

    def by_spec(spec: Any, layers: list[str]) -> list[tuple[Any, list[str]]]:
        if isinstance(spec, UniformTypeKVCacheSpecs):
            return [(spec.kv_cache_specs[layer], [layer]) for layer in layers]
        return [(spec, layers)]

    sizes = [sum(s.page_size_bytes * len(names) for s, names in by_spec(*group)) for group in groups]
    tensors = itertools.chain.from_iterable(group_tensors(layout, by_spec(*group), max(sizes)) for group in groups)
    config = KVCacheConfig(
        num_blocks=BLOCKS,
        kv_cache_tensors=list(tensors),
        kv_cache_groups=[KVCacheGroupSpec(layers, spec) for spec, layers in groups],
        kv_cache_layout=layout.name,
    )
    return config, allocate_kv_cache(config, CPU, layout, kernel_block_sizes)


def view_bytes(view: torch.Tensor, block: int, dimension: int = 0) -> list[int]:
    """The bytes of a block that a view reaches, as offsets into its storage."""
    size = view.element_size()
    offsets = torch.arange(view.untyped_storage().nbytes()).as_strided(
        (*view.shape, size), (*(stride * size for stride in view.stride()), 1), view.storage_offset() * size
    )
    per_block = view.shape[dimension] // BLOCKS
    return sorted(offsets.narrow(dimension, block * per_block, per_block).reshape(-1).tolist())


def object_bytes(geometry: KvGeometry, group: int, block: int) -> list[tuple[int, int]]:
    """(storage, offset) of every byte of an object, in its order."""
    return [
        (region.storage, region.offset + piece * region.piece_stride + block * region.block_stride + byte)
        for region in geometry.groups[group].regions
        for piece in range(region.pieces)
        for byte in range(region.piece_bytes)
    ]


def check_group(geometry: KvGeometry, group: int, layers: Sequence[str], views: dict[str, torch.Tensor]) -> None:
    """Every object holds each byte of its block's views exactly once and no other byte."""
    for block in range(BLOCKS):
        expected = sorted(byte for layer in layers for byte in view_bytes(views[layer], block))
        assert sorted(byte for _, byte in object_bytes(geometry, group, block)) == expected
    assert geometry.groups[group].layers == tuple(layers)


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.statement("connector", 84)
def test_an_object_is_exactly_what_the_views_of_its_block_reach(layout: KVCacheLayout, layers: int) -> None:
    config, views = make(layout, [(full(), names("l", layers))])
    geometry = KvGeometry.from_config(config, views)
    check_group(geometry, 0, names("l", layers), views)
    assert geometry.object_bytes(0) == layers * full().page_size_bytes
    assert geometry.layout_name == layout.name
    assert len(geometry.storages) == 1
    assert geometry.device == CPU


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_block_outermost_layouts_give_one_run_per_block_and_the_others_one_pattern(layout: KVCacheLayout) -> None:
    config, views = make(layout, [(full(), names("l", 3))])
    (region,) = KvGeometry.from_config(config, views).groups[0].regions
    pieces = {"LBHNC": 3, "LBNHC": 3, "LHBNC": 6}
    assert region.pieces == pieces.get(layout.name, 1)


@pytest.mark.parametrize("layout", [KVCacheLayout.LBHNC, KVCacheLayout.LBNHC])
def test_split_kernel_blocks_change_nothing_about_where_the_bytes_are(layout: KVCacheLayout) -> None:
    whole = KvGeometry.from_config(*make(layout, [(full(), names("l", 2))]))
    config, views = make(layout, [(full(), names("l", 2))], [4])
    split = KvGeometry.from_config(config, views)
    assert views["l0"].shape[0] == 4 * BLOCKS
    assert split.groups[0].regions == whole.groups[0].regions
    check_group(split, 0, names("l", 2), views)


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
@pytest.mark.statement("connector", 83)
def test_the_order_in_which_layers_are_registered_means_nothing(layout: KVCacheLayout) -> None:
    config, views = make(layout, [(full(), names("l", 12))])
    geometry = KvGeometry.from_config(config, views)
    other = KvGeometry.from_config(config, {name: views[name] for name in sorted(views, reverse=True)})
    assert geometry.groups == other.groups
    assert geometry.groups[0].layers == tuple(names("l", 12))


@pytest.mark.parametrize("layout", [KVCacheLayout.LBHNC, KVCacheLayout.BLHNC])
def test_padding_at_the_end_of_a_page_does_not_belong_to_the_object(layout: KVCacheLayout) -> None:
    spec = full(page_size_padded=full().page_size_bytes + 512)
    config, views = make(layout, [(spec, names("l", 3))])
    geometry = KvGeometry.from_config(config, views)
    check_group(geometry, 0, names("l", 3), views)
    assert geometry.object_bytes(0) == 3 * full().page_size_bytes


@pytest.mark.parametrize("layout", [KVCacheLayout.LBHNC, KVCacheLayout.BLHNC])
@pytest.mark.statement("connector", 84)
def test_groups_over_the_same_bytes_each_have_their_own_pattern(layout: KVCacheLayout) -> None:
    window = SlidingWindowSpec(block_size=16, num_kv_heads=2, head_size=8, dtype=torch.bfloat16, sliding_window=32)
    chunked = ChunkedLocalAttentionSpec(
        block_size=16, num_kv_heads=2, head_size=8, dtype=torch.bfloat16, attention_chunk_size=64
    )
    groups = [(full(), names("f", 2)), (window, names("w", 2)), (chunked, names("c", 1))]
    config, views = make(layout, groups)
    geometry = KvGeometry.from_config(config, views)
    for number, (_, layers) in enumerate(groups):
        check_group(geometry, number, layers, views)
    assert [group.kind for group in geometry.groups] == ["full_attention", "sliding_window", "chunked_local"]
    shared = set(object_bytes(geometry, 0, 3)) & set(object_bytes(geometry, 1, 3))
    assert shared == set(object_bytes(geometry, 0, 3))


@pytest.mark.parametrize("layout", [KVCacheLayout.LBHNC, KVCacheLayout.BLHNC])
@pytest.mark.statement("connector", 84)
def test_layers_of_different_sizes_in_one_group(layout: KVCacheLayout) -> None:
    mla = MLAAttentionSpec(block_size=16, num_kv_heads=1, head_size=24, dtype=torch.bfloat16)
    specs = {"a": mla, "b": replace(mla, head_size=4), "c": mla}
    uniform = UniformTypeKVCacheSpecs(block_size=16, kv_cache_specs=specs)
    config, views = make(layout, [(uniform, ["a", "b", "c"])])
    geometry = KvGeometry.from_config(config, views)
    check_group(geometry, 0, ["a", "b", "c"], views)
    assert geometry.object_bytes(0) == uniform.page_size_bytes
    assert geometry.groups[0].kind == "mla"


def test_a_pipeline_stage_may_have_no_layer_of_a_group() -> None:
    config, views = make(KVCacheLayout.LBHNC, [(full(), names("l", 2))])
    empty = UniformTypeKVCacheSpecs(block_size=16, kv_cache_specs={})
    config.kv_cache_groups.append(KVCacheGroupSpec([], empty))
    geometry = KvGeometry.from_config(config, views)
    assert (geometry.groups[1].kind, geometry.object_bytes(1)) == ("no_layers", 0)


MAMBA = MambaSpec(block_size=16, shapes=((256,),), dtypes=(torch.bfloat16,))
CROSS = CrossAttentionSpec(block_size=16, num_kv_heads=2, head_size=8, dtype=torch.bfloat16)


@dataclass(frozen=True, kw_only=True)
class _RingSpec(FullAttentionSpec):
    """A subclass whose pages may hold anything."""


RING = _RingSpec(block_size=16, num_kv_heads=2, head_size=8, dtype=torch.bfloat16)


@pytest.mark.parametrize("spec", [MAMBA, CROSS, RING], ids=lambda spec: type(spec).__name__)
def test_state_that_is_not_a_list_of_blocks_per_token_is_refused(spec: Any) -> None:
    config, views = make(KVCacheLayout.LBHNC, [(full(), ["a"]), (spec, ["s"])])
    with pytest.raises(ConfigError, match=f"KV group 1 is a {type(spec).__name__}, .*without --kv-connector umbp"):
        KvGeometry.from_config(config, views)


@pytest.mark.parametrize("change", [{"host_resident": True}, {"enable_kv_transfer": False}])
def test_groups_that_vllm_keeps_to_itself_are_refused(change: dict[str, bool]) -> None:
    config, views = make(KVCacheLayout.LBHNC, [(full(), ["a"])])
    config.kv_cache_groups[0] = replace(config.kv_cache_groups[0], **change)
    with pytest.raises(ConfigError, match="KV group 0 is kept by vLLM in host memory or rebuilt"):
        KvGeometry.from_config(config, views)


def test_a_configuration_that_contradicts_the_views_is_refused() -> None:
    config, views = make(KVCacheLayout.LBHNC, [(full(), ["a", "b"])])
    with pytest.raises(ConfigError, match=r"'b' starts at byte 0 of its allocation but .* says 7168"):
        KvGeometry.from_config(config, {"a": views["a"], "b": views["a"]})
    with pytest.raises(ConfigError, match="no single KV tensor for layer 'b'"):
        KvGeometry.from_config(config, {"a": views["a"]})
    with pytest.raises(ConfigError, match="registered no KV cache"):
        KvGeometry.from_config(config, {})
    with pytest.raises(ConfigError, match="does not fit its allocation"):
        KvGeometry.from_config(replace(config, num_blocks=BLOCKS + 1), views)


@dataclass
class Tensor28:
    """``KVCacheTensor`` of vLLM 0.28."""

    size: int
    shared_by: list[str]
    offset: int = 0
    block_stride: int = 0


@dataclass
class Group28:
    layer_names: list[str]
    kv_cache_spec: Any
    is_eagle_group: bool = False


@dataclass
class Config28:
    num_blocks: int
    kv_cache_tensors: list[Tensor28]
    kv_cache_groups: list[Group28] = field(default_factory=list)


PAGE = 2 * 16 * 2 * 8 * 2  # K and V, tokens, heads, head size, bytes


def raw() -> torch.Tensor:
    return torch.zeros(BLOCKS * PAGE, dtype=torch.int8).view(torch.bfloat16)


VIEWS_28 = {
    "blocks first": (lambda: raw().view(BLOCKS, 2, 16, 2, 8), 0),
    "K and V first": (lambda: raw().view(2, BLOCKS, 16, 2, 8), 1),
    "heads before tokens": (lambda: raw().view(BLOCKS, 2, 2, 16, 8).permute(0, 1, 3, 2, 4), 0),
    "K and V first in shape only": (lambda: raw().view(BLOCKS, 2, 16, 2, 8).transpose(0, 1), 1),
    "split kernel blocks": (lambda: raw().view(4 * BLOCKS, 2, 4, 2, 8), 0),
}


@pytest.mark.parametrize(("view", "dimension"), VIEWS_28.values(), ids=VIEWS_28.keys())
def test_in_0_28_the_strides_of_the_registered_views_count(view: Any, dimension: int) -> None:
    views = {"a": view(), "b": view()}
    tensors = [Tensor28(BLOCKS * PAGE, ["a"]), Tensor28(BLOCKS * PAGE, ["b"])]
    geometry = KvGeometry.from_config(Config28(BLOCKS, tensors, [Group28(["a", "b"], full())]), views)
    for block in range(BLOCKS):
        expected = [(n, byte) for n, layer in enumerate("ab") for byte in view_bytes(views[layer], block, dimension)]
        assert sorted(object_bytes(geometry, 0, block)) == expected


def test_in_0_28_packed_blocks_of_several_groups_share_one_allocation() -> None:
    flat = torch.zeros(BLOCKS * 2 * PAGE, dtype=torch.int8)
    slots = [flat.view(BLOCKS, 2 * PAGE)[:, at : at + PAGE].view(torch.bfloat16) for at in (0, PAGE)]
    views = {layer: slots[n].view(BLOCKS, 2, 16, 2, 8) for n, layer in ((0, "a"), (1, "b"), (0, "c"))}
    tensors = [
        Tensor28(flat.numel(), ["a", "c"], 0, 2 * PAGE),
        Tensor28(flat.numel(), ["b"], PAGE, 2 * PAGE),
    ]
    groups = [Group28(["a", "b"], full()), Group28(["c"], full())]
    geometry = KvGeometry.from_config(Config28(BLOCKS, tensors, groups), views)
    check_group(geometry, 0, ["a", "b"], views)
    check_group(geometry, 1, ["c"], views)
    assert [len(group.regions) for group in geometry.groups] == [1, 1]
    assert geometry.groups[0].regions[0].pieces == 1


def test_in_0_28_views_without_a_block_dimension_or_with_unknown_gaps_are_refused() -> None:
    config = Config28(BLOCKS, [Tensor28(BLOCKS * PAGE, ["a"])], [Group28(["a"], full())])
    with pytest.raises(ConfigError, match="has no dimension for 7 blocks"):
        KvGeometry.from_config(config, {"a": raw().view(16, 2, BLOCKS, 2, 8)})
    with pytest.raises(ConfigError, match=f"does not hold blocks of {PAGE} bytes in a known pattern"):
        KvGeometry.from_config(config, {"a": raw().view(BLOCKS, 2, 16, 2, 8)[:, :1]})
    two = Config28(2, [Tensor28(2 * PAGE, ["a"])], [Group28(["a"], full())])
    with pytest.raises(ConfigError, match="has no dimension for 2 blocks"):
        KvGeometry.from_config(two, {"a": torch.zeros(2, 2, 16, 2, 8, dtype=torch.bfloat16)})


def test_a_configuration_of_an_unknown_form_is_refused() -> None:
    @dataclass
    class Strange:
        size: int

    config = Config28(BLOCKS, [], [Group28(["a"], full())])
    config.kv_cache_tensors = [Strange(1)]  # type: ignore[list-item]
    with pytest.raises(ConfigError, match="umbp does not know"):
        KvGeometry.from_config(config, {"a": raw().view(BLOCKS, 2, 16, 2, 8)})
