"""A pool that is derived from the main one page by page: both come back, or neither counts."""

from __future__ import annotations

from typing import Any

from sglang.srt.mem_cache.hicache_storage import PoolName, PoolTransfer

from tests.sglang.kit.conftest import World
from tests.sglang.kit.proxies import Proxy, Results
from tests.sglang.kit.rig import UMBP, Backend, Setup
from tests.sglang.kit.shapes import LARGE_PAGES, prompt_of

PAGES = 6


def setup_of(backend: Backend) -> Setup:
    """A latent cache with an indexer, in the one layout whose copies exist on plain memory."""
    return Setup(backend, LARGE_PAGES, "page_first_direct", mla=True, indexer=True)


def test_both_pools_come_back(world: World, backend: Backend) -> None:
    engine = world.engine(setup_of(backend))
    prompt = prompt_of(LARGE_PAGES, PAGES)
    engine.compute(prompt)
    engine.offload(prompt)
    engine.flush()
    assert engine.prefetch(prompt) == len(prompt)
    assert engine.ledger is not None
    assert {pool for _, pool, _ in engine.ledger.given} == {"kv", "indexer"}
    assert engine.onboard(prompt) == len(prompt)
    assert engine.check_device(prompt) == 4 * (len(prompt) + PAGES)


class LosesIndexerPages(Proxy):
    """The pages of the indexer from the third on are gone when they are read, though they existed a moment before."""

    def batch_get_v2(self, transfers: list[PoolTransfer], extra_info: Any = None) -> Results:
        results = super().batch_get_v2(transfers, extra_info)
        return {name: [*ok[:2], *(False for _ in ok[2:])] for name, ok in results.items()}


def test_pages_lost_between_lookup_and_read_cost_both_pools(world: World, backend: Backend) -> None:
    engine = world.engine(setup_of(backend), wrap=LosesIndexerPages)
    prompt = prompt_of(LARGE_PAGES, PAGES)
    engine.compute(prompt)
    engine.offload(prompt)
    engine.flush()
    assert engine.prefetch(prompt) == 2 * LARGE_PAGES.page_size
    assert engine.onboard(prompt) == 2 * LARGE_PAGES.page_size
    assert engine.check_device(prompt) > 0


class RefusesTheAnchor(Proxy):
    """The side pool is written, the main pool is not: as when the store fills up in between."""

    refuse = True

    def batch_set_v1(self, keys: list[str], host_indices: Any, extra_info: Any = None) -> list[bool]:
        return [False] * len(keys) if self.refuse else super().batch_set_v1(keys, host_indices, extra_info)

    def batch_set(self, keys: list[str], values: Any = None, *more: Any) -> bool:
        return False if self.refuse else super().batch_set(keys, values, *more)


def test_a_side_pool_cannot_be_read_before_its_anchor(world: World) -> None:
    """Together or not at all: nothing of it is there, not even for who asks for the side pool alone."""
    engine = world.engine(setup_of(UMBP), wrap=RefusesTheAnchor)
    prompt = prompt_of(LARGE_PAGES, PAGES)
    engine.compute(prompt)
    engine.offload(prompt)
    leaf = engine.match(prompt).last_device_node
    hashes = engine.kit._all_page_hashes(engine.cache, leaf)
    pages = engine.cache.host_pool_group.anchor_entry.host_pool.alloc(len(prompt))
    wanted = PoolTransfer(PoolName.INDEXER, host_indices=pages, keys=hashes)
    assert engine.backend.batch_get_v2([wanted]) == {PoolName.INDEXER: [False] * PAGES}


def test_a_side_pool_without_its_anchor_is_no_hit(world: World, backend: Backend) -> None:
    proxies: list[RefusesTheAnchor] = []

    def wrap(inner: object) -> RefusesTheAnchor:
        proxies.append(RefusesTheAnchor(inner))
        return proxies[-1]

    engine = world.engine(setup_of(backend), wrap=wrap)
    prompt = prompt_of(LARGE_PAGES, PAGES)
    engine.compute(prompt)
    engine.offload(prompt)
    engine.flush()
    assert engine.prefetch(prompt) == 0
    proxies[0].refuse = False
    engine.compute(prompt)
    engine.offload(prompt)
    engine.flush()
    assert engine.prefetch(prompt) == len(prompt)
    assert engine.onboard(prompt) == len(prompt)
    assert engine.check_device(prompt) == 4 * (len(prompt) + PAGES)
