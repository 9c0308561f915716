"""The installed SGLang's storage interface: what it declares, what our store has of it, what records it passes."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

import pytest
import torch
from sglang.srt.mem_cache import hicache_storage
from sglang.srt.mem_cache.hicache_storage import (
    HiCacheStorage,
    HiCacheStorageConfig,
    HiCacheStorageExtraInfo,
    PoolHitPolicy,
    PoolName,
    PoolTransfer,
    PoolTransferResult,
)

from umbp_sglang.store import UMBPStore

LOOK = "SGLang changed {what}. Read the place, bring umbp_sglang up to date, then correct this table."

METHODS = {
    "register_mem_pool_host": ["mem_pool_host"],
    "register_mem_host_pool_v2": ["host_pool", "host_pool_name"],
    "on_host_pools_registered": [],
    "batch_exists": ["keys", "extra_info=None"],
    "batch_exists_v2": ["keys", "pool_transfers=None", "extra_info=None"],
    "batch_get_v1": ["keys", "host_indices", "extra_info=None"],
    "batch_set_v1": ["keys", "host_indices", "extra_info=None"],
    "batch_get_v2": ["transfers", "extra_info=None"],
    "batch_set_v2": ["transfers", "extra_info=None"],
    "get": ["key", "target_location=None", "target_sizes=None"],
    "batch_get": ["keys", "target_locations=None", "target_sizes=None"],
    "set": ["key", "value=None", "target_location=None", "target_sizes=None"],
    "batch_set": ["keys", "values=None", "target_locations=None", "target_sizes=None"],
    "exists": ["key"],
    "clear": [],
    "get_stats": [],
}
"""Every public method of ``HiCacheStorage`` with its parameters; as of 0.5.23."""
ABSTRACT = {"get", "batch_get", "set", "batch_set", "exists"}
NOT_DECLARED = {"close": []}
"""Found by name: SGLang calls it where a backend has it."""

RECORDS: dict[type, dict[str, object]] = {
    HiCacheStorageConfig: {
        "tp_rank": ...,
        "tp_size": ...,
        "pp_rank": ...,
        "pp_size": ...,
        "attn_cp_rank": ...,
        "attn_cp_size": ...,
        "is_mla_model": ...,
        "enable_storage_metrics": ...,
        "is_page_first_layout": ...,
        "model_name": ...,
        "tp_lcm_size": None,
        "should_split_heads": False,
        "dp_rank": 0,
        "extra_config": None,
        "dcp_size": 1,
        "dcp_rank": 0,
        "logical_page_size": None,
    },
    HiCacheStorageExtraInfo: {"prefix_keys": None, "extra_info": None},
    PoolTransfer: {
        "name": ...,
        "host_indices": None,
        "device_indices": None,
        "keys": None,
        "hit_policy": PoolHitPolicy.ALL_PAGES,
        "nodes_to_load": None,
        "indices_from_pool": None,
        "block_pages": 0,
        "group_pages": 0,
    },
    PoolTransferResult: {"kv_hit_pages": ..., "extra_pool_hit_pages": ..., "restorable_prefix_pages": None},
}
"""Fields in their order and their defaults; ``...`` where there is none."""

POOLS = {
    "kv",
    "mamba",
    "swa",
    "auxiliary_swa",
    "indexer",
    "draft",
    "draft_indexer",
    "draft_swa",
    "deepseek_v4_c1",
    "deepseek_v4_c1_indexer",
    "deepseek_v4_c1_indexer_scale",
    "deepseek_v4_c2",
    "deepseek_v4_c2_indexer",
    "deepseek_v4_c2_indexer_scale",
    "deepseek_v4_c4",
    "deepseek_v4_c4_indexer",
    "deepseek_v4_c4_indexer_scale",
    "deepseek_v4_c4_indexer_state",
    "deepseek_v4_c4_rope",
    "deepseek_v4_c4_state",
    "deepseek_v4_c128",
    "deepseek_v4_c128_rope",
    "deepseek_v4_c128_state",
}


def parameters(function: Any) -> list[str]:
    """Names, with defaults where there are some, of all parameters but ``self``."""
    found = list(inspect.signature(function).parameters.values())[1:]
    assert all(parameter.kind is parameter.POSITIONAL_OR_KEYWORD for parameter in found)
    return [p.name if p.default is p.empty else f"{p.name}={p.default!r}" for p in found]


def test_the_base_class_declares_what_we_know() -> None:
    public = {name: value for name, value in vars(HiCacheStorage).items() if not name.startswith("_")}
    assert set(public) == set(METHODS), LOOK.format(what="the methods of HiCacheStorage")
    assert HiCacheStorage.__abstractmethods__ == ABSTRACT, LOOK.format(what="which methods a backend must have")


@pytest.mark.parametrize("name", METHODS)
def test_a_method_takes_what_we_know(name: str) -> None:
    assert parameters(getattr(HiCacheStorage, name)) == METHODS[name], LOOK.format(what=f"HiCacheStorage.{name}")


@pytest.mark.parametrize("name", {**METHODS, **NOT_DECLARED})
def test_our_store_has_the_method_with_the_same_parameters(name: str) -> None:
    ours = getattr(UMBPStore, name)
    assert getattr(HiCacheStorage, name, None) is not ours, f"{name} is the base class's, which does nothing or raises"
    assert parameters(ours) == {**METHODS, **NOT_DECLARED}[name]


def test_our_store_is_a_storage_that_can_be_made() -> None:
    assert issubclass(UMBPStore, HiCacheStorage)
    assert UMBPStore.__abstractmethods__ == frozenset()
    assert UMBPStore.__name__ == "UMBPStore", "cached_tokens_details and the logs show it"


@pytest.mark.parametrize("arguments", [("config", "host pool"), ("config", {}), ("config",)])
def test_our_store_is_made_in_each_of_the_ways_that_sglang_has(arguments: tuple[object, ...]) -> None:
    """As a registered backend, as ``dynamic``, and as those of SGLang that take the configuration only."""
    bound = inspect.signature(UMBPStore).bind(*arguments).arguments
    assert tuple(bound.values()) == arguments


@pytest.mark.parametrize("record", RECORDS, ids=lambda record: record.__name__)
def test_a_record_has_the_fields_that_we_know(record: type) -> None:
    fields = {
        field.name: ... if field.default is dataclasses.MISSING else field.default
        for field in dataclasses.fields(record)
    }
    assert list(fields.items()) == list(RECORDS[record].items()), LOOK.format(what=record.__name__)


def test_names_and_policies_are_those_that_we_know() -> None:
    assert {pool.value for pool in PoolName} == POOLS, LOOK.format(what="the names of pools")
    assert {policy.value for policy in PoolHitPolicy} == {"all_pages", "trailing_pages", "block_groups"}
    assert str(PoolName.KV) == "kv"
    assert hash(PoolName.KV) == hash("kv"), "results are looked up under the name or the member"
    assert hicache_storage.STORAGE_BATCH_SIZE == 128


@pytest.mark.parametrize(
    ("mla", "tp_rank", "dcp_rank", "dcp_size", "writes"),
    [
        (False, 3, 0, 1, True),
        (True, 0, 0, 1, True),
        (True, 1, 0, 1, False),
        (True, 1, 1, 2, True),
        (True, 2, 0, 2, False),
    ],
)
def test_who_writes(mla: bool, tp_rank: int, dcp_rank: int, dcp_size: int, writes: bool) -> None:
    config = HiCacheStorageConfig(
        tp_rank, 4, 0, 1, 0, 1, mla, False, False, "m", dcp_size=dcp_size, dcp_rank=dcp_rank, logical_page_size=64
    )
    assert config.is_storage_writer is writes


def test_a_false_ends_the_run_that_counts() -> None:
    """Results are per page, but only those up to the first failure are used."""
    results = {"swa": [True, False, True], "mamba": [True], "indexer": []}
    assert hicache_storage.count_pool_hits(results) == {"swa": 1, "mamba": 1, "indexer": 0}


def test_indices_are_one_dimensional_int64_of_the_cpu() -> None:
    """What the host pools hand out, which is what v1 and v2 calls pass on."""
    from sglang.srt.mem_cache.pool_host.base import HostKVCache

    source = inspect.getsource(HostKVCache.clear)
    assert "torch.arange(self.logical_size, dtype=torch.int64)" in source, LOOK.format(what="the host pools' indices")
    assert torch.arange(3, dtype=torch.int64).device.type == "cpu"
