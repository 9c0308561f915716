"""What must agree before two engines share bytes, and whether one copy serves all tensor-parallel ranks."""

from __future__ import annotations

import json
from dataclasses import replace
from fractions import Fraction
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheGroupSpec,
    KVCacheSpec,
    KVCacheTensor,
    KVQuantMode,
    MLAAttentionSpec,
    SlidingWindowSpec,
    compute_layout_strides,
)
from vllm.v1.kv_cache_layout import KVCacheLayout
from vllm.v1.worker.utils import allocate_kv_cache

from umbp_vllm.geometry import KvGeometry
from umbp_vllm.layout import kv_is_replicated, layout_descriptor, layout_digest

COMMON: dict[str, Any] = {"block_size": 16, "num_kv_heads": 2, "head_size": 8, "dtype": torch.bfloat16}
FULL = FullAttentionSpec(**COMMON)
MLA = MLAAttentionSpec(**{**COMMON, "num_kv_heads": 1, "head_size": 32})
NO_BACKENDS = SimpleNamespace(compilation_config=SimpleNamespace(static_forward_context={}))
"""vLLM's configuration where it has no layers."""


def registered(
    spec: KVCacheSpec = FULL,
    layers: tuple[str, ...] = ("a", "b"),
    blocks: int = 5,
    layout: KVCacheLayout = KVCacheLayout.LBHNC,
    kernel_block: int | None = None,
    replicas: int = 1,
) -> tuple[KVCacheConfig, KvGeometry]:
    block_bytes = spec.page_size_bytes * len(layers)
    fixed = block_bytes if layout.is_block_outermost else None
    strides = compute_layout_strides(spec, blocks, len(layers), layout, fixed_strides=(None, fixed, None, None, None))
    config = KVCacheConfig(
        num_blocks=blocks,
        kv_cache_tensors=[KVCacheTensor(block_bytes * blocks, list(layers), strides[0], strides[1])],
        kv_cache_groups=[KVCacheGroupSpec(list(layers), spec)],
        kv_cache_layout=layout.name,
        kv_tp_replicas=replicas,
    )
    views = allocate_kv_cache(config, torch.device("cpu"), layout, None if kernel_block is None else [kernel_block])
    return config, KvGeometry.from_config(config, views)


def digest(**changes: Any) -> bytes:
    return layout_digest(*registered(**changes), NO_BACKENDS)


def test_the_descriptor_is_json_and_states_every_agreed_fact() -> None:
    descriptor = layout_descriptor(*registered(), NO_BACKENDS)
    assert json.loads(json.dumps(descriptor)) == descriptor
    spec = {
        "spec": "FullAttentionSpec",
        "page_bytes": 1024,
        "num_kv_heads": 2,
        "head_size": 8,
        "head_size_v": 8,
        "dtype": "torch.bfloat16",
        "kv_quant_mode": "NONE",
        "tokens_per_state": 1,
    }
    assert descriptor == {
        "format": 1,
        "layout": "LBHNC",
        "groups": [
            {
                "kind": "full_attention",
                "block_tokens": 16,
                "object_bytes": 2048,
                "layers": [["a", spec], ["b", spec]],
                "page_orders": [[[0, 1], [1, 2], [2, 16], [3, 16]]],
            }
        ],
    }


def test_neither_the_number_of_blocks_nor_padding_changes_the_identity() -> None:
    assert digest(blocks=3) == digest(blocks=9)
    for layout in KVCacheLayout:
        assert digest(blocks=3, layout=layout) == digest(blocks=9, layout=layout)
    assert digest(spec=replace(FULL, page_size_padded=2048)) == digest()


SAME_SIZE = {
    "heads and head size": {"spec": replace(FULL, num_kv_heads=4, head_size=4, head_size_v=4)},
    "K and V of other sizes": {"spec": replace(FULL, head_size=12, head_size_v=4)},
    "dtype": {"spec": replace(FULL, dtype=torch.float16)},
    "quantisation": {"spec": replace(FULL, kv_quant_mode=KVQuantMode.FP8_PER_TENSOR)},
    "tokens per block": {"spec": replace(FULL, block_size=32, head_size=4, head_size_v=4)},
    "states per token": {"spec": replace(FULL, block_size=8, tokens_per_state=Fraction(1, 2))},
    "sliding window": {"spec": SlidingWindowSpec(**COMMON, sliding_window=32)},
    "another window": {"spec": SlidingWindowSpec(**COMMON, sliding_window=48)},
    "MLA": {"spec": MLA},
    "order of the layers": {"layers": ("b", "a")},
    "other layers": {"layers": ("a", "c")},
    "tokens before heads": {"layout": KVCacheLayout.LBNHC},
    "heads outermost": {"layout": KVCacheLayout.LHBNC},
    "blocks outermost": {"layout": KVCacheLayout.BLHNC},
    "blocks outermost, tokens before heads": {"layout": KVCacheLayout.BLNHC},
    "layers inside heads": {"layout": KVCacheLayout.BHLNC},
    "split kernel blocks": {"kernel_block": 8},
}


@pytest.mark.parametrize("changes", SAME_SIZE.values(), ids=SAME_SIZE.keys())
def test_equal_sizes_are_not_equal_layouts(changes: dict[str, Any]) -> None:
    config, geometry = registered(**changes)
    assert geometry.object_bytes(0) == registered()[1].object_bytes(0)
    assert layout_digest(config, geometry, NO_BACKENDS) != digest()


def test_no_two_of_these_layouts_share_an_identity() -> None:
    digests = [digest(), *(digest(**changes) for changes in SAME_SIZE.values())]
    assert len(set(digests)) == len(digests)


@pytest.mark.parametrize(
    ("replicas", "tp_size", "expected"), [(1, 1, False), (2, 2, True), (1, 2, False), (2, 4, False), (4, 4, True)]
)
def test_kv_is_replicated_when_vllm_counts_as_many_replicas_as_ranks(
    replicas: int, tp_size: int, *, expected: bool
) -> None:
    assert kv_is_replicated(*registered(spec=MLA, replicas=replicas), tp_size) is expected


@pytest.mark.parametrize(("spec", "tp_size", "expected"), [(MLA, 2, True), (MLA, 1, False), (FULL, 2, False)])
def test_before_0_31_mla_alone_is_replicated(spec: KVCacheSpec, tp_size: int, *, expected: bool) -> None:
    config, geometry = registered(spec=spec)

    class Silent:
        """``KVCacheConfig`` without ``kv_tp_replicas``."""

        kv_cache_groups = config.kv_cache_groups

    assert kv_is_replicated(Silent(), geometry, tp_size) is expected
