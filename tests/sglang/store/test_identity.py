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
    if facts and name != "pp size":  # a new layout of the same model takes the place of the old one on the disk
        assert start(stores, tmp_path, mha_pool()).batch_exists(keys) == 2


STAGES = {"keys and values": mha_pool, "latents": mla_pool}


@pytest.mark.parametrize("kind", STAGES)
@pytest.mark.parametrize("first", [10, 11], ids=["same", "other"])
def test_a_stage_with_as_many_other_layers_finds_nothing(stores: Stores, tmp_path: Path, kind: str, first: int) -> None:
    """The second of three stages with layers 10 to 12, and then with others, as SGLANG_PP_LAYER_PARTITION has it."""
    keys, facts = hashes(2), {"pp": (1, 3), "mla": kind == "latents"}
    before = start(stores, tmp_path, STAGES[kind](start=10), **facts)
    assert before.batch_set_v1(keys, rows(0, 1)) == [True, True]
    before.close()
    same = first == 10
    after = start(stores, tmp_path, STAGES[kind](start=first), **facts)
    assert after.batch_exists(keys) == (2 if same else 0)
    assert after.batch_get_v1(keys, rows(2, 3)) == [same, same]


@pytest.mark.parametrize("name", [PoolName.SWA, PoolName.MAMBA, PoolName.DRAFT, PoolName.INDEXER])
@pytest.mark.parametrize("anchor", [10, 0], ids=["counted from the model's", "counted from the stage's"])
def test_side_pools_of_other_layers_are_apart(
    stores: Stores, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: PoolName, anchor: int
) -> None:
    """A side pool counts layers from its own first one, and so do all pools of a model with several kinds."""
    key = hashes(1)
    asked = PoolTransfer(name, rows(3), keys=key)

    def life(moved: int) -> UMBPStore:
        monkeypatch.setenv("SGLANG_PP_LAYER_PARTITION", f"{10 + moved},11,{11 - moved}")
        sides = {name: mha_pool()}
        pool = mha_pool(start=anchor + moved if anchor else 0)
        tiers = {"ssd_dir": str(tmp_path), "ssd_capacity": "64MiB", "ssd_engines": 4}
        return stores(storage_config(extra=tiers, pp=(1, 3)), pool, sides)

    before = life(0)
    assert before.batch_set_v2([asked]) == {name: [True]}
    assert before.batch_set_v1(key, rows(3)) == [True]
    assert before.batch_get_v2([asked]) == {name: [True]}
    before.close()
    after = life(1)
    assert after.batch_get_v2([asked]) == {name: [False]}
    assert after.batch_exists(key) == 0


def test_without_stages_it_does_not_matter_where_layers_are_counted_from(
    stores: Stores, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was stored by a model that is not divided is found whatever else is set."""
    keys = hashes(2)
    first = start(stores, tmp_path, mha_pool())
    first.batch_set_v1(keys, rows(0, 1))
    first.close()
    monkeypatch.setenv("SGLANG_PP_LAYER_PARTITION", "3")
    assert start(stores, tmp_path, mha_pool(start=1)).batch_exists(keys) == 2


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
