"""SGLang's own backend for the original runs over this pool when `mori.umbp` is ours: nothing of it is changed."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.sglang.store.pools import PAGE, contents, hashes, mha_pool, mla_pool, rows, storage_config, wipe
from umbp_connectors.compat import mori


@pytest.fixture(autouse=True)
def as_mori(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in [name for name in sys.modules if name == "mori" or name.startswith("mori.")]:
        monkeypatch.delitem(sys.modules, name)
    mori.install()
    yield
    for name in ("mori", "mori.umbp"):
        sys.modules.pop(name, None)


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Callable[..., Any]]:
    """Makes the backend as SGLang's controller does, by its own names for everything."""
    from sglang.srt.mem_cache.storage.umbp.umbp_store import UMBPStore

    made: list[Any] = []

    def make(pool: Any, *, mla: bool = False) -> Any:
        config = storage_config(mla=mla)
        config.extra_config = {
            "dram_capacity_bytes": 4 << 20,
            "ssd_enabled": True,
            "ssd_storage_dir": str(tmp_path / "ssd"),
            "ssd_capacity_bytes": 8 << 20,
            "ssd_durability_mode": "relaxed",
            "eviction_policy": "prefix_aware_lru",
        }
        made.append(UMBPStore(config, pool))
        return made[-1]

    yield make
    for store in made:
        if store.client is not None:
            store.client.close()


@pytest.mark.parametrize("kind", ["mha-page_first", "mha-page_first_direct", "mha-page_head", "mla-page_first"])
def test_pages_come_back_bit_for_bit_also_after_a_restart(
    make: Callable[..., Any], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("UMBP_NAMESPACE", "model, weights, layout")
    family, layout = kind.split("-")
    pool = mha_pool(layout) if family == "mha" else mla_pool(layout)
    store = make(pool, mla=family == "mla")
    keys, pages = hashes(6), [0, 3, 5, 1, 7, 2]
    before = contents(pool, pages)
    assert store.batch_exists(keys) == 0
    assert store.batch_set_v1(keys, rows(*pages)) == [True] * 6
    assert store.batch_exists([*keys, *hashes(2)]) == 6
    wipe(pool)
    assert store.batch_get_v1(keys, rows(*pages)) == [True] * 6
    assert contents(pool, pages) == before
    client = store.client
    store.close()
    client.close()
    again = make(pool, mla=family == "mla")
    assert again.batch_exists(keys) == 6
    wipe(pool)
    elsewhere = [10, 11, 12, 13, 14, 15]
    assert again.batch_get_v1(keys, rows(*elsewhere)) == [True] * 6
    assert contents(pool, elsewhere) == before
    again.clear()
    assert again.batch_exists(keys) == 0
    assert again.batch_get_v1(keys, rows(*elsewhere)) == [False] * 6


def test_without_a_namespace_a_restart_finds_nothing(make: Callable[..., Any]) -> None:
    """The keys that the backend makes do not say which model a page is of."""
    pool, keys = mha_pool(), hashes(3)
    store = make(pool)
    assert store.batch_set_v1(keys, rows(0, 1, 2)) == [True] * 3
    assert store.client.flush()
    store.client.close()
    again = make(pool)
    assert again.batch_exists(keys) == 0
    assert again.batch_set_v1(keys, rows(3, 4, 5)) == [True] * 3


def test_the_host_allocator_gives_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    from sglang.srt.mem_cache.storage.umbp.umbp_host_allocator import UMBPHostTensorAllocator

    monkeypatch.setenv("SGLANG_HICACHE_HOST_HUGEPAGE", "0")
    allocator = UMBPHostTensorAllocator()
    tensor = allocator.allocate((PAGE, 1000), torch.bfloat16)
    tensor.fill_(1.5)
    assert (tensor.shape, tensor.dtype) == ((PAGE, 1000), torch.bfloat16)
    assert allocator.mapped_size_for(tensor.data_ptr()) >= tensor.numel() * 2
    assert ctypes.string_at(tensor.data_ptr(), 2) == tensor.view(torch.uint8).flatten()[:2].numpy().tobytes()
