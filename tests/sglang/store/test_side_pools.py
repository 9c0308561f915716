"""Side pools: their own hits, and pages that are published together with the KV pages they belong to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from sglang.srt.mem_cache.hicache_storage import PoolHitPolicy, PoolName, PoolTransfer
from sglang.srt.mem_cache.memory_pool_host import LogicalHostPool

from tests.sglang.store.conftest import Stores
from tests.sglang.store.faults import FakeClock, Faults
from tests.sglang.store.pools import PAGE, contents, hashes, mha_pool, rows, storage_config, wipe
from umbp_core.tiers import Tier
from umbp_sglang.keys import block_keys
from umbp_sglang.store import UMBPStore

ALL, TAIL = PoolHitPolicy.ALL_PAGES, PoolHitPolicy.TRAILING_PAGES


def side(keys: list[str], *pages: int, name: PoolName = PoolName.SWA, policy: PoolHitPolicy = TAIL) -> PoolTransfer:
    """What the controller hands over for a side pool."""
    return PoolTransfer(name, rows(*pages) if pages else None, keys=keys, hit_policy=policy)


def indexer(keys: list[str], *pages: int) -> PoolTransfer:
    """The same for a pool without which a KV page is worth nothing."""
    return PoolTransfer(PoolName.INDEXER, rows(*pages), keys=keys, indices_from_pool=PoolName.KV)


@pytest.fixture
def kv() -> Any:
    return mha_pool()


@pytest.fixture
def swa() -> Any:
    return mha_pool(heads=1)


@pytest.fixture
def store(stores: Stores, kv: Any, swa: Any) -> UMBPStore:
    return stores(storage_config(), kv, {PoolName.SWA: swa, PoolName.INDEXER: mha_pool(heads=4)})


def test_a_side_page_appears_with_its_kv_page(store: UMBPStore, swa: Any) -> None:
    keys, want = hashes(3), contents(swa, [2])
    assert store.batch_set_v2([side(keys[2:], 2)]) == {PoolName.SWA: [True]}
    assert store.batch_get_v2([side(keys[2:], 8)]) == {PoolName.SWA: [False]}, "its KV is not there"
    assert store.batch_set_v1(keys, rows(0, 1, 2)) == [True] * 3
    assert store.batch_get_v2([side(keys[2:], 8)]) == {PoolName.SWA: [True]}
    assert contents(swa, [8]) == want


def test_a_side_page_waits_for_the_last_of_its_kv_pages(store: UMBPStore) -> None:
    """A window of two pages whose KV comes in two calls."""
    keys = hashes(2)
    store.batch_set_v2([side(keys, 0, 1)])
    store.batch_set_v1(keys[:1], rows(0))
    assert store.batch_get_v2([side(keys, 5, 6)])[PoolName.SWA] == [False, False]
    store.batch_set_v1(keys[1:], rows(1))
    assert store.batch_get_v2([side(keys, 5, 6)])[PoolName.SWA] == [True, True]


def test_a_side_page_whose_kv_page_is_there_appears_at_once(store: UMBPStore) -> None:
    keys = hashes(1)
    store.batch_set_v1(keys, rows(0))
    store.batch_set_v2([side(keys, 0)])
    assert store.batch_get_v2([side(keys, 5)])[PoolName.SWA] == [True]


def test_a_side_page_whose_kv_page_never_comes_is_given_up(store: UMBPStore) -> None:
    first, second = hashes(2), hashes(1)
    store.batch_set_v2([side(first, 0, 1)])
    store.batch_set_v1(first[:1], rows(0))
    store.batch_set_v2([side(second, 2)])
    store.batch_set_v1(first[1:] + second, rows(1, 2))
    assert store.batch_get_v2([side(first, 5, 6)])[PoolName.SWA] == [False, False]
    assert store.batch_get_v2([side(second, 7)])[PoolName.SWA] == [True]


def test_clear_gives_up_what_waits(store: UMBPStore) -> None:
    keys = hashes(1)
    store.batch_set_v2([side(keys, 0)])
    store.clear()
    store.batch_set_v1(keys, rows(0))
    assert store.batch_get_v2([side(keys, 5)])[PoolName.SWA] == [False]


@pytest.mark.parametrize("logical", [False, True])
def test_side_pages_whose_kv_is_turned_away_are_given_up(stores: Stores, logical: bool) -> None:
    """One side pool found room, another one's time was over until no call was made any more, not for KV either."""
    faults, clock, later = Faults(), FakeClock(), hashes(1)
    anchor = LogicalHostPool(24 * PAGE, PAGE) if logical else mha_pool()
    sides = {PoolName.SWA: mha_pool(), PoolName.INDEXER: mha_pool()}
    store = stores(storage_config(), anchor, sides, make_pool=faults.make, clock=clock)
    free = [pool.stats(Tier.DRAM).free_pages for pool in faults.pools]
    for _ in range(2):
        keys = hashes(3)
        assert store.batch_set_v2([side(keys, 0, 1, 2)]) == {PoolName.SWA: [True] * 3}
        faults.error = OSError("no")
        for _ in range(3):
            assert store.batch_set_v2([indexer(keys, 0, 1, 2)]) == {PoolName.INDEXER: [False] * 3}
        faults.error = None
        assert store.batch_set_v1(keys, rows(0, 1, 2)) == [False] * 3
        clock.now += 60
    assert store.batch_set_v2([side(later, 0), indexer(later, 0)]) == {PoolName.SWA: [True], PoolName.INDEXER: [True]}
    assert store.batch_set_v1(later, rows(0)) == [True]
    left = [pool.stats(Tier.DRAM).free_pages for pool in faults.pools]
    assert left == [pages - 1 for pages in free], "nothing but the last page of each pool is kept"


def test_kv_is_not_stored_without_the_part_that_it_needs(stores: Stores) -> None:
    """An indexer page that found no room: its KV page would never be restored, nor those behind it."""
    faults, keys = Faults(), hashes(3)
    refused = block_keys(keys)[1]
    store = stores(storage_config(), mha_pool(), {PoolName.INDEXER: mha_pool(heads=4)}, make_pool=faults.make)
    faults.full = lambda key: key == refused
    assert store.batch_set_v2([indexer(keys, 0, 1, 2)]) == {PoolName.INDEXER: [True, False, True]}
    faults.full = lambda key: False
    assert store.batch_set_v1(keys, rows(0, 1, 2)) == [True, False, False]
    asked = [PoolTransfer(PoolName.INDEXER, keys=keys)]
    assert store.batch_exists_v2(keys, asked).kv_hit_pages == 0, "published with all its pages or not at all"
    assert store.batch_set_v2([indexer(keys, 0, 1, 2)]) == {PoolName.INDEXER: [True] * 3}
    assert store.batch_set_v1(keys, rows(0, 1, 2)) == [True] * 3
    assert store.batch_exists_v2(keys, asked).kv_hit_pages == 3


def test_a_pool_with_a_tail_allows_only_some_prefixes(store: UMBPStore) -> None:
    keys = hashes(8)
    store.batch_set_v1(keys, rows(*range(8)))
    for end in (3, 4, 6):
        store.batch_set_v2([side(keys[end - 1 : end], end)])
    found = store.batch_exists_v2(keys, [side(keys[:1])])
    assert found.restorable_prefix_pages == [3, 4, 6]
    assert found.kv_hit_pages == 6
    assert found.extra_pool_hit_pages == {"kv": 8, "swa": 6}
    assert store.batch_exists_v2(keys, [side(keys[:2])]).restorable_prefix_pages == [4]


def test_a_pool_that_needs_all_pages_shortens_the_prefix(store: UMBPStore) -> None:
    keys = hashes(5)
    store.batch_set_v1(keys, rows(*range(5)))
    store.batch_set_v2([indexer(keys[:3], 0, 1, 2)])
    found = store.batch_exists_v2(keys, [PoolTransfer(PoolName.INDEXER, keys=keys)])
    assert (found.kv_hit_pages, found.restorable_prefix_pages) == (3, [1, 2, 3])
    assert found.extra_pool_hit_pages == {"kv": 5, "indexer": 3}


def test_a_question_without_pools_counts_those_that_are_read_whole(store: UMBPStore) -> None:
    """A decoding engine promises what it is told to the prefilling one, and a request whose promise breaks fails."""
    keys = hashes(5)
    store.batch_set_v1(keys, rows(*range(5)))
    assert store.batch_exists(keys) == 0
    store.batch_set_v2([indexer(keys[:3], 0, 1, 2)])
    assert store.batch_exists(keys) == 3, "windows are not asked for by everybody"


def test_block_groups_report_and_do_not_shorten(store: UMBPStore) -> None:
    keys, groups = hashes(8), hashes(4)
    store.batch_set_v1(keys + groups, rows(*range(12)))
    store.batch_set_v2([side(groups[:3], 0, 1, 2)])
    asked = PoolTransfer(PoolName.SWA, keys=groups, hit_policy=PoolHitPolicy.BLOCK_GROUPS, block_pages=4, group_pages=2)
    found = store.batch_exists_v2(keys, [asked])
    assert found.kv_hit_pages == 8
    assert found.extra_pool_hit_pages == {"kv": 8, "swa": 4}


def test_a_pool_that_nobody_registered_has_nothing(store: UMBPStore) -> None:
    keys = hashes(2)
    store.batch_set_v1(keys, rows(0, 1))
    unknown = PoolTransfer(PoolName.DRAFT, rows(0, 1), keys=keys)
    assert store.batch_get_v2([unknown]) == {PoolName.DRAFT: [False, False]}
    assert store.batch_set_v2([unknown]) == {PoolName.DRAFT: [False, False]}
    assert store.batch_exists_v2(keys, [unknown]).kv_hit_pages == 0


def test_a_pool_registered_late_is_stored_too(store: UMBPStore) -> None:
    """A draft model's pool comes when everything runs."""
    draft, keys = mha_pool(heads=1), hashes(1)
    want = contents(draft, [3])
    store.register_mem_host_pool_v2(draft, PoolName.DRAFT)
    store.batch_set_v1(keys, rows(3))
    store.batch_set_v2([PoolTransfer(PoolName.DRAFT, rows(3), keys=keys, indices_from_pool=PoolName.KV)])
    wipe(draft)
    assert store.batch_get_v2([PoolTransfer(PoolName.DRAFT, rows(1), keys=keys)]) == {PoolName.DRAFT: [True]}
    assert contents(draft, [1]) == want


def test_a_late_pool_is_opened_when_it_is_registered(stores: Stores) -> None:
    """No call of the storage threads, which have a deadline, waits until a pool is open."""
    faults = Faults()
    store = stores(storage_config(), mha_pool(), make_pool=faults.make)
    made = len(faults.pools)
    store.register_mem_host_pool_v2(mha_pool(heads=1), PoolName.DRAFT)
    opened = faults.pools[made:]
    assert len(opened) == 2, "KV anew, smaller, and the draft model's"
    store.batch_set_v1(hashes(1), rows(0))
    assert faults.pools[made:] == opened


def test_all_pools_together_stay_within_the_configured_space(stores: Stores, tmp_path: Path) -> None:
    """A pool that comes late has the others opened anew, smaller; what they had on SSD is still there."""
    faults, kv, keys = Faults(), mha_pool(), hashes(2)
    tiers = {"dram_capacity": "1MiB", "ssd_dir": str(tmp_path), "ssd_capacity": "32MiB"}
    store = stores(storage_config(extra=tiers), kv, {PoolName.SWA: mha_pool(heads=1)}, make_pool=faults.make)
    want = contents(kv, [0, 1])
    store.batch_set_v1(keys, rows(0, 1))
    store.register_mem_host_pool_v2(mha_pool(heads=1), PoolName.DRAFT)
    assert store.batch_exists_v2(keys).kv_hit_pages == 2
    assert store.batch_get_v1(keys, rows(5, 6)) == [True, True]
    assert contents(kv, [5, 6]) == want
    alive = faults.pools[-3:]
    assert len(faults.pools) == 5, "two at first, then three"
    for tier, capacity in ((Tier.DRAM, 1 << 20), (Tier.SSD, 32 << 20)):
        sizes = [pool.stats(tier).total_pages * pool.page_bytes for pool in alive]
        assert all(sizes)
        assert 0.9 * capacity * (tier is Tier.DRAM) < sum(sizes) <= capacity
    assert sum(file.stat().st_size for file in tmp_path.rglob("*") if file.is_file()) <= 32 << 20


def test_an_anchor_without_bytes_leaves_everything_to_side_pools(stores: Stores) -> None:
    """The KV pool of such a model only counts pages: it is always there, and its side pools decide."""
    anchor, c4 = LogicalHostPool(24 * PAGE, PAGE), mha_pool(heads=1)
    store = stores(storage_config(mla=True), anchor, {PoolName.DEEPSEEK_V4_C4: c4})
    keys, want = hashes(3), contents(c4, [0, 1])
    assert store.batch_exists(keys) == 3
    transfer = PoolTransfer(PoolName.DEEPSEEK_V4_C4, rows(0, 1), keys=keys[:2], indices_from_pool=PoolName.KV)
    assert store.batch_set_v2([transfer]) == {PoolName.DEEPSEEK_V4_C4: [True, True]}
    asked = [PoolTransfer(PoolName.DEEPSEEK_V4_C4, keys=keys)]
    assert store.batch_exists_v2(keys, asked).kv_hit_pages == 0, "not before the anchor's pages are set"
    assert store.batch_set_v1(keys[:2], rows(0, 1)) == [True, True]
    assert store.batch_get_v1(keys[:2], rows(0, 1)) == [True, True]
    assert store.batch_exists_v2(keys, asked).kv_hit_pages == 2
    wipe(c4)
    again = PoolTransfer(PoolName.DEEPSEEK_V4_C4, rows(7, 8), keys=keys[:2])
    assert store.batch_get_v2([again]) == {PoolName.DEEPSEEK_V4_C4: [True, True]}
    assert contents(c4, [7, 8]) == want
