"""``tp_lcm_size``: engines of different TP sizes share the pages that they cut into the same ranges of heads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from sglang.srt.mem_cache.hicache_storage import PoolHitPolicy, PoolName, PoolTransfer

from tests.sglang.store.conftest import Stores
from tests.sglang.store.pools import PAGE, hashes, mha_pool, rows, storage_config, wipe
from umbp_core.errors import ConfigError

ALL_HEADS = 4


def heads_of(pool: Any, page: int) -> list[bytes]:
    """Keys and values of each head of a page."""
    data = pool.get_data_page(page * PAGE, flat=False)[:, 0]
    return [bytes(data[:, head].contiguous().view(torch.uint8).numpy()) for head in range(pool.head_num)]


def config(folder: Path, tp: tuple[int, int], lcm: int | None = ALL_HEADS) -> Any:
    return storage_config(extra={"ssd_dir": str(folder), "ssd_capacity": "32MiB"}, tp=tp, lcm=lcm)


@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1), (2, 4), (4, 2), (4, 1), (1, 4)])
def test_another_tp_size_reads_the_same_pages(stores: Stores, tmp_path: Path, before: int, after: int) -> None:
    keys, want = hashes(2), [b""] * ALL_HEADS
    for rank in range(before):
        pool = mha_pool("page_head", heads=ALL_HEADS // before)
        pool.kv_buffer.view(-1).view(torch.uint8).add_(rank)
        first = rank * pool.head_num
        want[first : first + pool.head_num] = heads_of(pool, 5)
        store = stores(config(tmp_path, (rank, before)), pool)
        assert store.batch_set_v1(keys, rows(4, 5)) == [True, True]
        store.close()
    found = []
    for rank in range(after):
        pool = mha_pool("page_head", heads=ALL_HEADS // after)
        wipe(pool)
        store = stores(config(tmp_path, (rank, after)), pool)
        assert store.batch_exists(keys) == 2
        assert store.batch_get_v1(keys, rows(0, 1)) == [True, True]
        found += heads_of(pool, 1)
    assert found == want


@pytest.mark.parametrize("side", [PoolName.SWA, PoolName.DRAFT])
@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 4), (4, 1)])
def test_side_pools_of_heads_are_cut_too(
    stores: Stores, tmp_path: Path, side: PoolName, before: int, after: int
) -> None:
    """Without them, KV that is found could not be restored.  They may have other heads than KV."""
    keys, want, tail = hashes(2), [b""] * 2 * ALL_HEADS, PoolHitPolicy.TRAILING_PAGES
    for rank in range(before):
        window = mha_pool("page_head", heads=2 * ALL_HEADS // before)
        window.kv_buffer.view(-1).view(torch.uint8).add_(rank)
        first = rank * window.head_num
        want[first : first + window.head_num] = heads_of(window, 3)
        store = stores(
            config(tmp_path, (rank, before)), mha_pool("page_head", heads=ALL_HEADS // before), {side: window}
        )
        assert store.batch_set_v2([PoolTransfer(side, rows(2, 3), keys=keys)]) == {side: [True, True]}
        assert store.batch_set_v1(keys, rows(4, 5)) == [True, True]
        store.close()
    found = []
    for rank in range(after):
        window = mha_pool("page_head", heads=2 * ALL_HEADS // after)
        wipe(window)
        store = stores(config(tmp_path, (rank, after)), mha_pool("page_head", heads=ALL_HEADS // after), {side: window})
        hits = store.batch_exists_v2(keys, [PoolTransfer(side, keys=keys[-1:], hit_policy=tail)])
        assert hits.kv_hit_pages == 2
        assert store.batch_get_v2([PoolTransfer(side, rows(6), keys=keys[-1:])]) == {side: [True]}
        found += heads_of(window, 6)
    assert found == want


def test_a_side_pool_whose_heads_cannot_be_cut_is_each_tp_sizes_own(stores: Stores, tmp_path: Path) -> None:
    keys = hashes(1)
    for tp, there in (((0, 1), False), ((0, 2), False), ((0, 1), True)):
        pool, window = mha_pool("page_head", heads=ALL_HEADS // tp[1]), mha_pool("page_head", heads=1)
        store = stores(config(tmp_path, tp), pool, {PoolName.SWA: window})
        asked = PoolTransfer(PoolName.SWA, rows(0), keys=keys)
        assert store.batch_get_v2([asked]) == {PoolName.SWA: [there]}
        assert store.batch_set_v2([asked]) == {PoolName.SWA: [True]}
        assert store.batch_set_v1(keys, rows(0)) == [True]
        store.close()


def test_a_page_is_there_when_all_its_ranges_are(stores: Stores, tmp_path: Path) -> None:
    keys = hashes(1)
    half = stores(config(tmp_path, (0, 2)), mha_pool("page_head", heads=2))
    half.batch_set_v1(keys, rows(0))
    half.close()
    whole = stores(config(tmp_path, (0, 1)), mha_pool("page_head", heads=4))
    assert whole.batch_exists(keys) == 0
    assert whole.batch_get_v1(keys, rows(0)) == [False]


@pytest.mark.parametrize("layout", ["page_first", "page_head"])
def test_without_it_tp_sizes_share_nothing(stores: Stores, tmp_path: Path, layout: str) -> None:
    keys = hashes(1)
    one = stores(config(tmp_path, (0, 1), None), mha_pool(layout))
    one.batch_set_v1(keys, rows(0))
    one.close()
    two = stores(config(tmp_path, (0, 2), None), mha_pool(layout))
    assert two.batch_exists(keys) == 0


def test_heads_that_cannot_be_cut_are_refused_at_the_start(stores: Stores, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be cut"):
        stores(config(tmp_path, (0, 1), 3), mha_pool("page_head", heads=4))
    with pytest.raises(ConfigError, match="tp_lcm_size 6 is not a multiple of this engine's TP size 4"):
        stores(config(tmp_path, (0, 4), 6), mha_pool("page_head"))
