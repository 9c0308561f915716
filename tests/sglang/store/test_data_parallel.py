"""Data parallelism: ranks of one identity, each with a cache, and with a part of the SSD folder, of its own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from sglang.srt.runtime_context import get_parallel

from tests.sglang.store.conftest import Stores
from tests.sglang.store.pools import contents, hashes, mha_pool, mla_pool, rows, storage_config, wipe
from umbp_sglang.store import UMBPStore

CAPACITY = 32 << 20


def attention(rank: int, size: int) -> dict[str, Any]:
    """What SGLang publishes in a rank of data-parallel attention."""
    return _published(num_dp_ranks=size, tp_size=size, attn_dp_size=size, attn_dp_rank=rank, dp_rank=None)


def replica(rank: int, size: int) -> dict[str, Any]:
    """The same of a replica of the whole engine, of which it tells a storage nothing."""
    return _published(num_dp_ranks=size, tp_size=1, attn_dp_size=1, attn_dp_rank=0, dp_rank=rank)


def _published(tp_size: int, **facts: Any) -> dict[str, Any]:
    """With the sizes that SGLang compares with each other, whatever was published in this process before."""
    ones = dict.fromkeys(("attn_tp_size", "attn_cp_size", "moe_ep_size", "moe_dp_size"), 1)
    return {**ones, "tp_size": tp_size, "moe_tp_size": tp_size, **facts}


KINDS = pytest.mark.parametrize("place", [attention, replica])


def start(stores: Stores, folder: Path, place: dict[str, Any], engines: int = 1, **facts: Any) -> UMBPStore:
    tiers = {"ssd_dir": str(folder), "ssd_capacity": CAPACITY, "ssd_engines": engines}
    with get_parallel().override(**place):
        config = storage_config(extra=tiers, dp_rank=place["attn_dp_rank"], **facts)
        return stores(config, mla_pool() if facts.get("mla") else mha_pool())


def claims(folder: Path) -> dict[str, int]:
    """By the end of its name, what each folder may grow to."""
    found = [json.loads(path.read_text(encoding="utf-8")) for path in folder.glob("*/identity.json")]
    return {each["namespace"].rpartition("-")[2]: each["claimed_bytes"] for each in found}


@KINDS
def test_each_has_its_part_of_the_disk_and_finds_it_again(stores: Stores, tmp_path: Path, place: Any) -> None:
    keys = [hashes(2), hashes(2)]
    ranks = [start(stores, tmp_path, place(rank, 2)) for rank in range(2)]
    want = [contents(store.mem_pool_host, [rank, 5]) for rank, store in enumerate(ranks)]
    for rank, store in enumerate(ranks):
        assert store.batch_set_v1(keys[rank], rows(rank, 5)) == [True, True]
    assert claims(tmp_path) == {"dp0of2": CAPACITY // 2, "dp1of2": CAPACITY // 2}
    for store in ranks:
        store.close()
    for rank in (1, 0):
        again = start(stores, tmp_path, place(rank, 2))
        assert again.batch_exists(keys[rank]) == 2
        assert again.batch_exists(keys[1 - rank]) == 0, "they share nothing"
        wipe(again.mem_pool_host)
        assert again.batch_get_v1(keys[rank], rows(7, 8)) == [True, True]
        assert contents(again.mem_pool_host, [7, 8]) == want[rank]


@pytest.mark.parametrize(("engines", "parts"), [(2, 2), (4, 4)])
def test_ssd_engines_counts_them(stores: Stores, tmp_path: Path, engines: int, parts: int) -> None:
    """As with vLLM: it is how many use the folder altogether, of which those are known without it."""
    for rank in range(2):
        start(stores, tmp_path, attention(rank, 2), engines)
    assert list(claims(tmp_path).values()) == [CAPACITY // parts] * 2


@pytest.mark.parametrize("engines", [1, 2])
def test_an_engine_alone_keeps_its_folder(stores: Stores, tmp_path: Path, engines: int) -> None:
    start(stores, tmp_path, attention(0, 1), engines)
    ((name, claimed),) = claims(tmp_path).items()
    assert len(bytes.fromhex(name)) == 16, "the folder of before there were several"
    assert claimed == CAPACITY // engines


@KINDS
def test_ranks_read_at_the_writer_of_their_own_cache(stores: Stores, tmp_path: Path, place: Any) -> None:
    """All of them are children of one process and have one identity."""
    caches = [[start(stores, tmp_path, place(rank, 2), mla=True, tp=(tp, 2)) for tp in range(2)] for rank in range(2)]
    keys = hashes(1)
    assert caches[1][0].batch_set_v1(keys, rows(0)) == [True]
    assert [reader.batch_exists(keys) for _, reader in caches] == [0, 1]
