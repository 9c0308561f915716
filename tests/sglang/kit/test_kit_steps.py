"""SGLang's own longer test steps, with their own assertions, over our backend; SGLang's file backend is the control."""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest
import torch
from sglang.srt.mem_cache.base_prefix_cache import CacheRequestHandle
from sglang.srt.mem_cache.hicache_storage import HiCacheStorageExtraInfo, PoolHitPolicy, PoolName, PoolTransfer
from sglang.srt.mem_cache.unified_cache.components.base import ComponentType
from sglang.test.kits.unified_radix_cache import fixtures
from sglang.test.kits.unified_radix_cache.config import CacheConfig
from sglang.test.kits.unified_radix_cache.storage import ExtraPoolFullComponent, aux_storage_key_transfers

from tests.sglang.kit.rig import Backend, Kit, Setup
from tests.sglang.kit.shapes import FULL, SWA

REQUEST = CacheRequestHandle("request", 0)


@pytest.fixture
def kits() -> Iterator[list[Kit]]:
    """Kits of the test, cleaned up when it ends."""
    made: list[Kit] = []
    yield made
    for kit in made:
        kit.doCleanups()


def kit_of(kits: list[Kit], backend: Backend, cfg: CacheConfig, layout: str = "page_first") -> Kit:
    kits.append(Kit(Setup(backend, cfg, layout)))
    return kits[-1]


@pytest.mark.parametrize("layout", ["page_first", "page_first_direct", "layer_first"])
@pytest.mark.parametrize("cfg", [FULL, SWA], ids=["full", "swa"])
def test_produced_by_one_cache_consumed_by_another(
    kits: list[Kit], backend: Backend, tmp_path: Path, cfg: CacheConfig, layout: str
) -> None:
    kit = kit_of(kits, backend, cfg, layout)
    tokens = kit._make_seq(1, 6)
    keys, values = kit._l3_produce(str(tmp_path), tokens, marker=5)
    cache, allocator, reqs = kit._l3_consumer(str(tmp_path))
    kit._consume_prefetch(cache, tokens, REQUEST)
    kit._load_back_through_admission(cache, reqs, tokens)
    kit._finish_pending_loads(cache)
    found = fixtures.match_prefix(cache, tokens)
    assert found.device_prefix_len == len(tokens)
    got = kit._snapshot_full_kv(allocator, cache.path_device_indices(found.last_device_node))
    assert torch.equal(got[0], keys)
    assert torch.equal(got[1], values)


@pytest.mark.parametrize("pages", [4, 9])
@pytest.mark.parametrize("cfg", [FULL, SWA], ids=["full", "swa"])
def test_a_sibling_that_publishes_first_shortens_the_staged_span(
    kits: list[Kit], backend: Backend, tmp_path: Path, cfg: CacheConfig, pages: int
) -> None:
    kit = kit_of(kits, backend, cfg)
    kit._assert_sibling_head_is_trimmed(str(tmp_path), kit._make_seq(1, pages), window_sized=False)


@pytest.mark.parametrize("live_pages", [0, 1])
def test_full_attention_that_is_resident_is_not_fetched_again(
    kits: list[Kit], backend: Backend, tmp_path: Path, live_pages: int
) -> None:
    """Only the window comes from storage: a span of no KV pages with a side pool of its own."""
    kit = kit_of(kits, backend, SWA)
    tokens = kit._buffer_swa_seq()
    kit._produce_buffer_l3(str(tmp_path), tokens, marker=9)
    kit._assert_masked_full_is_reused(str(tmp_path), tokens, live_tail=live_pages * SWA.page_size)


@pytest.mark.parametrize("dropped", [False, True])
def test_ranks_agree_on_the_window(kits: list[Kit], backend: Backend, tmp_path: Path, dropped: bool) -> None:
    """Where another rank has no window, this one does not keep its own."""
    kit = kit_of(kits, backend, SWA)
    tokens = kit._make_seq(1, 5)
    kit._l3_produce(str(tmp_path), tokens)
    cache, _, _ = kit._l3_consumer(str(tmp_path))
    kit._patch_tp_prefetch_sync(cache, drop_swa=dropped)
    kit._consume_prefetch(cache, tokens, REQUEST)
    assert kit._swa_host_on_path(cache, tokens) is not dropped


@pytest.mark.parametrize("cfg", [FULL, SWA], ids=["full", "swa"])
def test_the_storage_counts_what_was_written(
    kits: list[Kit], backend: Backend, tmp_path: Path, cfg: CacheConfig
) -> None:
    kit = kit_of(kits, backend, cfg)
    tokens = kit._make_seq(1, 6)
    cache, allocator, reqs = kit._l3_consumer(str(tmp_path))
    kit._insert(cache, allocator, reqs, tokens)
    leaf = fixtures.match_prefix(cache, tokens).last_device_node
    hashes = kit._all_page_hashes(cache, leaf)
    assert kit._storage_exists_count(cache, hashes) == 0
    kit._backup_node(cache, leaf)
    kit._write_path_to_l3(cache, leaf)
    kit._flush_l3_backups(cache)
    assert kit._storage_exists_count(cache, hashes) == len(hashes) == 6
    assert kit._storage_exists_count(cache, hashes, aux_storage_key_transfers(cache, leaf)) == 6
    assert kit._storage_exists_count(cache, ["ab" * 32, *hashes]) == 0


def test_a_pool_that_comes_later_and_shares_the_main_pools_memory(
    kits: list[Kit], backend: Backend, tmp_path: Path
) -> None:
    """A draft model's pool, registered after the others, in the host pages of the main one but with keys of its own."""
    kit = kit_of(kits, backend, FULL)
    tokens = kit._make_seq(1, 6)
    cache, allocator, reqs = fixtures.build_fixture(
        FULL, component_registry_override={ComponentType.FULL: ExtraPoolFullComponent}
    )
    kit._init_buffer_hicache(cache, str(tmp_path))
    draft = ExtraPoolFullComponent.EXTRA_POOL
    kit._insert(cache, allocator, reqs, tokens)
    leaf = fixtures.match_prefix(cache, tokens).last_device_node
    kit._fill_full_kv(allocator, cache.path_device_indices(leaf), marker=3)
    with mock.patch.object(
        cache.cache_controller, "write_storage", wraps=cache.cache_controller.write_storage
    ) as written:
        kit._buffer_backup_and_wait(cache, leaf)
    hashes = kit._all_page_hashes(cache, leaf)
    kv_writes, draft_writes = kit._writes_by_pool(written, draft)
    assert {key for keys in kv_writes for key in keys} == {key for keys in draft_writes for key in keys} == set(hashes)

    store = cache.cache_controller.storage_backend
    wanted = [PoolTransfer(draft, keys=hashes, hit_policy=PoolHitPolicy.ALL_PAGES)]
    result = store.batch_exists_v2([*hashes, "ab" * 32], wanted, HiCacheStorageExtraInfo())
    assert (result.kv_hit_pages, result.restorable_prefix_pages) == (6, [1, 2, 3, 4, 5, 6])
    assert result.extra_pool_hit_pages == {PoolName.KV: 6, draft: 6}

    pool = cache.host_pool_group.anchor_entry.host_pool
    pages = pool.alloc(len(tokens))
    assert store.batch_get_v2([PoolTransfer(draft, host_indices=pages, keys=hashes)]) == {draft: [True] * 6}
    assert torch.equal(pool.k_buffer[pages, 0].float(), torch.full_like(pool.k_buffer[pages, 0].float(), 3.0))
    assert torch.equal(pool.v_buffer[pages, 0].float(), torch.full_like(pool.v_buffer[pages, 0].float(), 4.0))
    pool.free(pages)
    assert array("q", tokens) == array("q", fixtures.node_token_ids(cache, leaf))
