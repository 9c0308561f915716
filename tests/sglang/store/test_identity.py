"""Who shares pages with whom: only engines that agree in everything."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from sglang.srt.mem_cache.hicache_storage import PoolName, PoolTransfer

from tests.sglang.store.conftest import Stores
from tests.sglang.store.pools import hashes, mha_pool, mla_pool, rows, storage_config
from umbp_sglang.store import UMBPStore

OTHERS = {
    "model": ({"model": "other"}, {}),
    "format tag": ({"model": "tiny-unified-token-major"}, {}),
    "namespace": ({"extra": {"namespace": "team-b"}}, {}),
    "tp size": ({"tp": (0, 2)}, {}),
    "tp rank": ({"tp": (1, 2)}, {}),
    "pp rank": ({"pp": (1, 2)}, {}),
    "cp rank": ({"cp": (1, 2)}, {}),
    "layout": ({}, {"layout": "page_first_direct"}),
    "page_head": ({}, {"layout": "page_head"}),
    "layer_first": ({}, {"layout": "layer_first"}),
    "dtype": ({}, {"dtype": torch.float16}),
    "heads": ({}, {"heads": 1}),
}


def start(stores: Stores, folder: Path, pool: Any, extra: dict[str, Any] | None = None, **facts: Any) -> UMBPStore:
    tiers = {"ssd_dir": str(folder), "ssd_capacity": "64MiB", "ssd_engines": 4, **(extra or {})}
    return stores(storage_config(extra=tiers, **facts), pool)


@pytest.mark.parametrize("name", OTHERS)
def test_whoever_differs_finds_nothing(stores: Stores, tmp_path: Path, name: str) -> None:
    keys = hashes(2)
    first = start(stores, tmp_path, mha_pool())
    assert first.batch_set_v1(keys, rows(0, 1)) == [True, True]
    first.close()
    facts, shape = OTHERS[name]
    other = start(stores, tmp_path, mha_pool(**shape), **facts)
    assert other.batch_exists(keys) == 0
    other.close()
    if facts:  # a new layout of the same model takes the place of the old one on the disk
        assert start(stores, tmp_path, mha_pool()).batch_exists(keys) == 2


def test_the_number_of_pages_makes_no_difference(stores: Stores, tmp_path: Path) -> None:
    keys = hashes(2)
    first = start(stores, tmp_path, mha_pool(pages=8))
    first.batch_set_v1(keys, rows(0, 1))
    first.close()
    assert start(stores, tmp_path, mha_pool(pages=16)).batch_exists(keys) == 2


def test_what_all_ranks_hold_is_the_same_for_every_tp_size(stores: Stores, tmp_path: Path) -> None:
    keys = hashes(2)
    first = start(stores, tmp_path, mla_pool(), mla=True, tp=(0, 4))
    first.batch_set_v1(keys, rows(0, 1))
    first.close()
    assert start(stores, tmp_path, mla_pool(), mla=True, tp=(0, 2)).batch_exists(keys) == 2


def test_pools_of_one_engine_are_apart(stores: Stores) -> None:
    """Two pools of the same shape: a draft model's page is not the model's."""
    store = stores(storage_config(), mha_pool(), {"draft": mha_pool()})
    keys = hashes(1)
    store.batch_set_v1(keys, rows(0))
    asked = PoolTransfer(PoolName.DRAFT, rows(0), keys=keys)
    assert store.batch_get_v2([asked]) == {PoolName.DRAFT: [False]}
