"""Pages that are stored come back as they were, in every layout and through every interface."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from sglang.srt.mem_cache.hicache_storage import HiCacheStorageExtraInfo

from tests.sglang.store.conftest import Stores
from tests.sglang.store.pools import (
    KINDS,
    PAGE,
    contents,
    hashes,
    mha_pool,
    page_bytes,
    pool_of,
    rows,
    storage_config,
    wipe,
)
from umbp_connectors.pool.local import LocalPool


@pytest.mark.parametrize("kind", KINDS)
def test_pages_come_back_into_other_pages(stores: Stores, kind: str) -> None:
    pool = pool_of(kind)
    store = stores(storage_config(mla=kind.startswith("mla")), pool)
    keys, want = hashes(3), contents(pool, [5, 2, 9])
    assert store.batch_set_v1(keys, rows(5, 2, 9)) == [True] * 3
    wipe(pool)
    assert store.batch_get_v1(keys, rows(1, 7, 3)) == [True] * 3
    assert contents(pool, [1, 7, 3]) == want
    assert contents(pool, [0, 2, 5]) == [bytes(len(want[0]))] * 3, "no other page was touched"


@pytest.mark.parametrize("kind", KINDS)
def test_flat_pages_and_pages_in_place_are_the_same_objects(stores: Stores, kind: str) -> None:
    """What the oldest interface stored, the newer one reads, and the other way round."""
    pool = pool_of(kind)
    store = stores(storage_config(mla=kind.startswith("mla")), pool)
    keys, want = hashes(2), contents(pool, [4, 6])
    assert store.batch_set(keys[:1], [pool.get_data_page(4 * PAGE)])
    assert store.batch_set_v1(keys[1:], rows(6)) == [True]
    wipe(pool)
    assert store.batch_get_v1(keys[:1], rows(0)) == [True]
    assert page_bytes(pool, 0) == want[0]
    target = pool.get_dummy_flat_data_page()
    assert store.get(keys[1], target) is target
    assert bytes(target.view(torch.uint8).numpy()) == want[1]


@pytest.mark.parametrize("kind", ["mha-page_first", "mha-layer_first", "mla-page_first"])
def test_pages_are_there_after_a_restart(stores: Stores, tmp_path: Path, kind: str) -> None:
    extra = {"ssd_dir": str(tmp_path), "ssd_capacity": "32MiB"}
    config = storage_config(extra=extra, mla=kind.startswith("mla"))
    pool = pool_of(kind)
    keys, want = hashes(4), contents(pool, range(4))
    first = stores(config, pool)
    assert all(first.batch_set_v1(keys, rows(0, 1, 2, 3)))
    first.close()
    again = pool_of(kind)
    wipe(again)
    store = stores(config, again)
    assert store.batch_exists(keys) == 4
    assert store.batch_get_v1(keys, rows(0, 1, 2, 3)) == [True] * 4
    assert contents(again, range(4)) == want


def test_a_page_is_written_once(stores: Stores) -> None:
    """The first writer's bytes stay: a hash names one content, and a second write would only cost time."""
    pool = mha_pool()
    store = stores(storage_config(), pool)
    keys, want = hashes(1), page_bytes(pool, 3)
    assert store.batch_set_v1(keys, rows(3)) == [True]
    assert store.batch_set_v1(keys, rows(4)) == [True]
    assert store.batch_get_v1(keys, rows(0)) == [True]
    assert page_bytes(pool, 0) == want


def test_the_first_missing_page_ends_a_lookup(stores: Stores) -> None:
    pool = mha_pool()
    store = stores(storage_config(), pool)
    keys = hashes(20)
    assert store.batch_exists(keys) == 0
    store.batch_set_v1(keys[:18], rows(*range(18)))
    assert store.batch_exists(keys) == 18
    assert store.batch_exists(keys[:5]) == 5
    assert store.batch_exists(keys[19:] + keys[:3]) == 0
    assert [store.exists(key) for key in keys[16:]] == [True, True, False, False]
    assert store.batch_exists([]) == 0


def test_missing_pages_are_told_one_by_one(stores: Stores) -> None:
    pool = mha_pool()
    store = stores(storage_config(), pool)
    keys = hashes(3)
    want = page_bytes(pool, 1)
    store.batch_set_v1(keys[1:2], rows(1))
    assert store.batch_get_v1(keys, rows(2, 3, 4)) == [False, True, False]
    assert page_bytes(pool, 3) == want
    assert store.batch_get(keys, [pool.get_dummy_flat_data_page() for _ in keys])[0] is None


def test_pages_know_how_deep_in_their_prompt_they_are(stores: Stores) -> None:
    """``hicache_storage_pass_prefix_keys``: what eviction by depth stands on."""
    seen: list[list[int] | None] = []

    class Recorded(LocalPool):
        def put(self, keys: Any, buffers: Any, depths: Any = None, timeout: float | None = None) -> Any:
            seen.append(depths)
            return super().put(keys, buffers, depths, timeout)

    store = stores(storage_config(), mha_pool(), make_pool=Recorded)
    store.batch_set_v1(hashes(2), rows(0, 1))
    store.batch_set_v1(hashes(2), rows(0, 1), HiCacheStorageExtraInfo(prefix_keys=hashes(5)))
    assert seen == [[0, 1], [5, 6]]


def test_clear_forgets_everything_at_once(stores: Stores) -> None:
    pool = mha_pool()
    store = stores(storage_config(), pool)
    keys = hashes(2)
    store.batch_set_v1(keys, rows(0, 1))
    store.clear()
    assert store.batch_exists(keys) == 0
    assert store.batch_get_v1(keys, rows(0, 1)) == [False, False]
    assert store.batch_set_v1(keys, rows(0, 1)) == [True, True]
    assert store.batch_exists(keys) == 2


@pytest.mark.parametrize(
    "indices",
    [rows(1), torch.arange(1, 2 * PAGE + 1), rows(1, 99), torch.cat([rows(1)[:2], rows(2)[:2], rows(3)])],
    ids=["too-few", "not-at-a-page", "outside", "in-pieces"],
)
def test_indices_that_are_no_pages_touch_nothing(stores: Stores, indices: torch.Tensor) -> None:
    pool = mha_pool()
    store = stores(storage_config(), pool)
    keys, before = hashes(2), contents(pool, range(24))
    assert store.batch_set_v1(keys, indices) == [False, False]
    assert store.batch_exists(keys) == 0
    assert store.batch_get_v1(keys, indices) == [False, False]
    assert contents(pool, range(24)) == before


def test_flat_pages_of_another_size_are_not_taken(stores: Stores) -> None:
    pool = mha_pool()
    store = stores(storage_config(), pool)
    key = hashes(1)[0]
    assert not store.set(key, torch.zeros(7))
    assert not store.set(key)
    assert store.get(key) is None
    assert not store.exists(key)


def test_a_store_that_is_closed_has_misses(stores: Stores) -> None:
    pool = mha_pool()
    store = stores(storage_config(), pool)
    keys = hashes(1)
    store.batch_set_v1(keys, rows(0))
    store.close()
    store.close()
    assert store.batch_exists(keys) == 0
    assert store.batch_get_v1(keys, rows(0)) == [False]
    assert store.batch_set_v1(keys, rows(0)) == [False]
    assert store.batch_get_v2([]) == {}
    store.clear()
