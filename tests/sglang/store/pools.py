"""SGLang's own host pools, made on plain memory, and what their pages hold."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from sglang.srt.mem_cache.hicache_storage import HiCacheStorageConfig
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool, MLATokenToKVPool
from sglang.srt.mem_cache.pool_host.mha import get_mha_host_pool_cls
from sglang.srt.mem_cache.pool_host.mla import MLATokenToKVPoolHost

PAGE = 4
"""Tokens per page."""
LAYERS = 3
PAGES = 24
LAYOUTS = ("page_first", "page_first_direct", "page_head", "layer_first")
MLA_LAYOUTS = ("page_first", "page_first_direct", "layer_first")

PATIENCE_MS = 60_000
"""What a call may take on a slow machine."""

_hashes = itertools.count(1)


def mha_pool(
    layout: str = "page_first",
    heads: int = 2,
    pages: int = PAGES,
    dtype: torch.dtype = torch.bfloat16,
    page: int = PAGE,
    head_dim: int = 8,
    start: int = 0,
) -> Any:
    """A host pool of keys and values, of the layers from ``start`` on."""
    device = MHATokenToKVPool(
        size=page,
        page_size=page,
        dtype=dtype,
        head_num=heads,
        head_dim=head_dim,
        layer_num=LAYERS,
        device="cpu",
        enable_memory_saver=False,
        start_layer=start,
        end_layer=start + LAYERS,
    )
    info = device.get_device_pool_infos()[0].buffer_info
    return _filled(
        get_mha_host_pool_cls(info)(
            info,
            1.0,
            0,
            page,
            layout,
            pin_memory=False,
            device_capacity_tokens=page,
            start_layer=start,
            end_layer=start + LAYERS,
            host_token_capacity=pages * page,
        )
    )


def mla_pool(layout: str = "page_first", pages: int = PAGES, start: int = 0) -> Any:
    """A host pool of latents, the same on every TP rank, of the layers from ``start`` on."""
    device = MLATokenToKVPool(
        size=PAGE,
        page_size=PAGE,
        dtype=torch.bfloat16,
        kv_lora_rank=16,
        qk_rope_head_dim=8,
        layer_num=LAYERS,
        device="cpu",
        enable_memory_saver=False,
        start_layer=start,
        end_layer=start + LAYERS,
    )
    return _filled(
        MLATokenToKVPoolHost(
            device.get_device_pool_infos()[0].buffer_info,
            1.0,
            0,
            PAGE,
            layout,
            pin_memory=False,
            device_capacity_tokens=PAGE,
            start_layer=start,
            end_layer=start + LAYERS,
            target_layer_num=LAYERS,
            host_token_capacity=pages * PAGE,
        )
    )


def pool_of(kind: str) -> Any:
    """The pool that ``mha-page_first`` and the like stand for."""
    family, layout = kind.split("-")
    return mha_pool(layout) if family == "mha" else mla_pool(layout)


KINDS = [f"mha-{layout}" for layout in LAYOUTS] + [f"mla-{layout}" for layout in MLA_LAYOUTS]


def rows(*pages: int) -> torch.Tensor:
    """The host indices of these pages."""
    return torch.cat([torch.arange(page * PAGE, (page + 1) * PAGE) for page in pages])


def page_bytes(pool: Any, page: int) -> bytes:
    """What SGLang itself says a page holds, in SGLang's order."""
    return bytes(pool.get_data_page(page * PAGE, flat=True).contiguous().view(torch.uint8).numpy())


def contents(pool: Any, pages: Sequence[int]) -> list[bytes]:
    return [page_bytes(pool, page) for page in pages]


def wipe(pool: Any) -> None:
    """Zeros everywhere."""
    pool.kv_buffer.view(torch.uint8).zero_()


def hashes(count: int) -> list[str]:
    """Page hashes that no test has had before."""
    return [(next(_hashes) * 0x9E3779B97F4A7C15 % 2**64).to_bytes(8, "big").hex() + "5a" * 24 for _ in range(count)]


def storage_config(
    *,
    extra: dict[str, Any] | None = None,
    tp: tuple[int, int] = (0, 1),
    mla: bool = False,
    model: str = "tiny",
    lcm: int | None = None,
    metrics: bool = False,
    pp: tuple[int, int] = (0, 1),
    cp: tuple[int, int] = (0, 1),
    dcp: tuple[int, int] = (0, 1),
    dp_rank: int = 0,
) -> HiCacheStorageConfig:
    """What SGLang's controller tells a backend; small tiers and much time unless ``extra`` says otherwise."""
    return HiCacheStorageConfig(
        tp_rank=tp[0],
        tp_size=tp[1],
        pp_rank=pp[0],
        pp_size=pp[1],
        attn_cp_rank=cp[0],
        attn_cp_size=cp[1],
        is_mla_model=mla,
        enable_storage_metrics=metrics,
        is_page_first_layout=True,
        model_name=model,
        tp_lcm_size=lcm,
        should_split_heads=lcm is not None and lcm > tp[1],
        dp_rank=dp_rank,
        dcp_rank=dcp[0],
        dcp_size=dcp[1],
        logical_page_size=PAGE * dcp[1],
        extra_config={"dram_capacity": "4MiB", "dram_prefault": False, "call_timeout_ms": PATIENCE_MS, **(extra or {})},
    )


def _filled(pool: Any) -> Any:
    flat = pool.kv_buffer.view(-1).view(torch.uint8)
    flat.copy_(torch.from_numpy(np.random.default_rng(3).integers(0, 256, flat.numel(), dtype=np.uint8)))
    return pool
