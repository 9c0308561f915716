"""SGLang's own host pool, controller functions and storage factory, put together without a server for the benchmark."""

from __future__ import annotations

import itertools
import queue
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from sglang.srt.managers.cache_controller import (
    HiCacheController,
    HiCacheStorageExtraInfo,
    PrefetchOperation,
    StorageOperation,
)
from sglang.srt.mem_cache.hicache_storage import STORAGE_BATCH_SIZE as BATCH
from sglang.srt.mem_cache.hicache_storage import HiCacheStorage, HiCacheStorageConfig
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool
from sglang.srt.mem_cache.pool_host.mha import MHATokenToKVPoolHost, get_mha_host_pool_cls
from sglang.srt.mem_cache.storage import StorageBackendFactory

__all__ = ["BATCH", "GEOMETRIES", "PAGE_TOKENS", "Rig", "Storage", "fresh_hashes", "host_pool"]

PAGE_TOKENS = 64
HEAD_DIM = 64

GEOMETRIES = {64 << 10: (4, 1), 256 << 10: (8, 2), 1 << 20: (16, 4), 4 << 20: (32, 8)}
"""Layers and KV heads of a bfloat16 model whose page, K and V of 64 tokens together, has so many bytes."""

_numbers = itertools.count(1)


def fresh_hashes(count: int = BATCH) -> list[str]:
    """Page hashes as SGLang's: 64 hexadecimal digits, never used before, and never hashed by Python yet."""
    return [(next(_numbers) * 0x9E3779B97F4A7C15 % 2**64).to_bytes(8, "big").hex() + "5a" * 24 for _ in range(count)]


def host_pool(page_bytes: int, pages: int, layout: str) -> MHATokenToKVPoolHost:
    """A real host pool of ``pages`` pages in ``layout``, every byte of it present and different from page to page."""
    layers, heads = GEOMETRIES[page_bytes]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    on_device = MHATokenToKVPool(
        size=PAGE_TOKENS,
        page_size=PAGE_TOKENS,
        dtype=torch.bfloat16,
        head_num=heads,
        head_dim=HEAD_DIM,
        layer_num=layers,
        device=device,
        enable_memory_saver=False,
    )
    info = on_device.get_device_pool_infos()[0].buffer_info
    pool = get_mha_host_pool_cls(info)(
        info,
        1.0,
        0,
        PAGE_TOKENS,
        layout,
        pin_memory=device != "cpu",
        device_capacity_tokens=PAGE_TOKENS,
        start_layer=0,
        end_layer=layers,
        host_token_capacity=pages * PAGE_TOKENS,
    )
    words = pool.kv_buffer.view(-1).view(torch.int64)
    torch.arange(words.numel(), out=words)
    return pool


@dataclass(frozen=True)
class Storage:
    """A backend as ``--hicache-storage-backend`` and its extra configuration name it.

    ``zero_copy`` is what SGLang's controller decides by the backend's name: whether it asks through the v1 interface.
    """

    label: str
    backend: str
    extra: dict[str, Any]
    zero_copy: bool


class Rig:
    """One backend on one host pool, driven by the functions that the controller's storage threads run.

    The threads themselves are not started: what is measured is one call, not a queue.
    """

    def __init__(self, pool: MHATokenToKVPoolHost, storage: Storage) -> None:
        self.pool = pool
        config = HiCacheStorageConfig(
            tp_rank=0,
            tp_size=1,
            pp_rank=0,
            pp_size=1,
            attn_cp_rank=0,
            attn_cp_size=1,
            is_mla_model=False,
            enable_storage_metrics=False,
            is_page_first_layout=pool.layout == "page_first",
            model_name="benchmark",
            extra_config=storage.extra,
        )
        self.backend: HiCacheStorage = StorageBackendFactory.create_backend(storage.backend, config, pool)
        self.backend.register_mem_pool_host(pool)
        self.backend.on_host_pools_registered()
        controller = HiCacheController.__new__(HiCacheController)
        controller.storage_backend = self.backend
        controller.mem_pool_host = controller.storage_host_pool = pool
        controller.page_size = PAGE_TOKENS
        controller.prefetch_sync_queue = queue.Queue()
        if storage.zero_copy:
            controller.page_get_func = controller._page_get_zero_copy
            controller.page_set_func = controller._page_set_zero_copy
        else:
            controller.page_get_func = controller._generic_page_get
            controller.page_set_func = controller._generic_page_set
        self._controller = controller

    def put(self, hashes: Sequence[str], first_page: int) -> Callable[[], None]:
        """What backs up the pages from ``first_page`` on, as the backup thread does; raises when one was refused.

        The scheduler, another thread, makes the operation; so does this.
        """
        operation = StorageOperation(self._indices(first_page, len(hashes)), [], hash_value=list(hashes))

        def run() -> None:
            self._controller._page_backup(operation)
            if operation.completed_tokens != len(hashes) * PAGE_TOKENS:
                raise SystemExit(f"only {operation.completed_tokens // PAGE_TOKENS} of {len(hashes)} pages were stored")

        return run

    def get(self, hashes: Sequence[str], first_page: int) -> Callable[[], None]:
        """What prefetches into the pages from ``first_page`` on, as the I/O thread does; raises when one did not come.

        The operation is made before, as for :meth:`put`.
        """
        operation = PrefetchOperation("benchmark", [])
        operation.hash_value = list(hashes)
        operation.host_indices = self._indices(first_page, len(hashes))

        def run() -> None:
            found = self._controller._page_transfer(operation)
            if found != len(hashes):
                raise SystemExit(f"only {found} of {len(hashes)} pages came back")

        return run

    def exists(self, hashes: Sequence[str]) -> int:
        """How many of ``hashes`` the backend has without a gap: one call, as the hybrid controller makes it."""
        return int(self.backend.batch_exists(list(hashes), HiCacheStorageExtraInfo()))

    def close(self) -> None:
        """Give back what the backend holds."""
        getattr(self.backend, "close", lambda: None)()

    @staticmethod
    def _indices(first_page: int, count: int) -> torch.Tensor:
        return torch.arange(first_page * PAGE_TOKENS, (first_page + count) * PAGE_TOKENS, dtype=torch.int64)


def pieces(pool: MHATokenToKVPoolHost) -> list[tuple[np.ndarray, ...]]:
    """The contiguous pieces of every page of ``pool``, in its own order, as arrays of bytes."""
    pointers, sizes = pool.get_page_buffer_meta(torch.arange(pool.size, dtype=torch.int64))
    flat = pool.kv_buffer.view(-1).view(torch.uint8).numpy()
    base = pool.kv_buffer.data_ptr()
    views = [flat[at - base : at - base + size] for at, size in zip(pointers, sizes, strict=True)]
    each = len(views) // pool.page_num
    return [tuple(views[page : page + each]) for page in range(0, len(views), each)]
