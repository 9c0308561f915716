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
    "pp size": ({"pp": (0, 2)}, {}),
    "cp rank": ({"cp": (1, 2)}, {}),
    "cp size": ({"cp": (0, 2)}, {}),
    "layout": ({}, {"layout": "page_first_direct"}),
    "page_head": ({}, {"layout": "page_head"}),
    "layer_first": ({}, {"layout": "layer_first"}),
    "dtype": ({}, {"dtype": torch.float16}),
    "heads": ({}, {"heads": 1}),
    "heads for head size": ({}, {"heads": 4, "head_dim": 4}),
    "tokens of a page": ({}, {"page": 8, "heads": 1}),
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


@pytest.mark.parametrize("other", [{"tp": (1, 2), "dcp": (1, 2)}, {"tp": (0, 2)}], ids=["rank", "size"])
def test_parts_of_a_context_are_apart(stores: Stores, tmp_path: Path, other: dict[str, Any]) -> None:
    """SGLang divides the context for decoding (DCP) with MLA only, and not yet over our storage."""
    keys = hashes(2)
    first = start(stores, tmp_path, mla_pool(), mla=True, tp=(0, 2), dcp=(0, 2))
    assert first.batch_set_v1(keys, rows(0, 1)) == [True, True]
    first.close()
    second = start(stores, tmp_path, mla_pool(), mla=True, **other)
    assert second.batch_exists(keys) == 0
    second.close()
    assert start(stores, tmp_path, mla_pool(), mla=True, tp=(0, 2), dcp=(0, 2)).batch_exists(keys) == 2


def test_pools_of_one_engine_are_apart(stores: Stores) -> None:
    """Two pools of the same shape: a draft model's page is not the model's."""
    store = stores(storage_config(), mha_pool(), {"draft": mha_pool()})
    keys = hashes(1)
    store.batch_set_v1(keys, rows(0))
    asked = PoolTransfer(PoolName.DRAFT, rows(0), keys=keys)
    assert store.batch_get_v2([asked]) == {PoolName.DRAFT: [False]}
