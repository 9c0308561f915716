"""Who follows a pool knows at any moment what can be read from which tier."""

from __future__ import annotations

import os
import random
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.connectors.pool_follower import Follower
from umbp_connectors.pool.local import LocalPool, LocalPoolConfig, PutStatus
from umbp_core.errors import StateError
from umbp_core.ids import Identity, RankScope
from umbp_core.tiers import Tier

SIZE = 8192
DRAM_PAGES = 6
SLOTS = 9

Maker = Callable[[], tuple[LocalPool, Follower]]


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Maker]:
    made: list[tuple[LocalPool, Follower]] = []

    def make() -> tuple[LocalPool, Follower]:
        config = LocalPoolConfig(
            SIZE,
            DRAM_PAGES * SIZE,
            tmp_path / "ssd",
            (1 << 20) + SLOTS * (SIZE + 768),
            prefault=False,
            patience_s=0,
        )
        pool, follower = LocalPool(Identity("model", b"\x11" * 32, RankScope()), config), Follower()
        pool.observe(follower)
        pool.open()
        made.append((pool, follower))
        return pool, follower

    yield make
    for pool, follower in made:
        pool.close()
        assert follower.faults == []


def keys(first: int, count: int) -> list[bytes]:
    return [b"key %d" % number for number in range(first, first + count)]


def put(pool: LocalPool, names: list[bytes]) -> list[PutStatus]:
    return pool.put(names, [name.ljust(SIZE) for name in names])


def test_what_is_stored_is_told_on_the_tier_that_it_reached(make: Maker) -> None:
    pool, follower = make()
    put(pool, keys(0, 4))
    assert follower.held[Tier.DRAM] == set(keys(0, 4))
    assert pool.flush(60)
    assert follower.held[Tier.SSD] == set(keys(0, 4))
    assert {tier: set(held) for tier, held in pool.holdings().items()} == follower.held


def test_what_is_staged_is_told_when_it_is_published(make: Maker) -> None:
    pool, follower = make()
    staged = pool.stage(keys(0, 2), [bytes(SIZE)] * 2)
    assert follower.held[Tier.DRAM] == set()
    staged.publish()
    assert follower.held[Tier.DRAM] == set(keys(0, 2))


def test_a_tier_that_evicts_says_so_and_the_other_one_does_not(make: Maker) -> None:
    pool, follower = make()
    put(pool, keys(0, DRAM_PAGES))
    assert pool.flush(60)
    put(pool, keys(100, SLOTS - DRAM_PAGES))
    assert len(follower.held[Tier.DRAM]) == DRAM_PAGES, "some of the first ones had to go"
    assert follower.held[Tier.DRAM] >= set(keys(100, SLOTS - DRAM_PAGES))
    assert follower.held[Tier.SSD] >= set(keys(0, DRAM_PAGES))
    assert pool.flush(60)
    put(pool, keys(200, DRAM_PAGES))
    assert pool.flush(60)
    assert len(follower.held[Tier.SSD]) == SLOTS, "there, too"
    assert follower.held[Tier.SSD] >= set(keys(200, DRAM_PAGES))


def test_what_is_read_from_ssd_comes_back_to_dram_in_the_place_of_others(make: Maker) -> None:
    pool, follower = make()
    put(pool, keys(0, 3))
    assert pool.flush(60)
    put(pool, keys(100, DRAM_PAGES))
    assert pool.flush(60), "what is being written to SSD keeps its page"
    assert follower.held[Tier.DRAM].isdisjoint(keys(0, 3))
    buffers = [bytearray(SIZE) for _ in range(3)]
    assert all(status.hit for status in pool.get(keys(0, 3), buffers))
    assert follower.held[Tier.DRAM] >= set(keys(0, 3))
    assert len(follower.held[Tier.DRAM]) == DRAM_PAGES


def test_a_restarted_pool_tells_what_an_earlier_life_left(make: Maker) -> None:
    pool, _ = make()
    put(pool, keys(0, 5))
    assert pool.flush(60)
    pool.close()
    _, follower = make()
    assert follower.held == {Tier.DRAM: set(), Tier.SSD: set(keys(0, 5))}
    assert follower.calls == 1, "told at one go"


def test_a_cleared_pool_holds_nothing(make: Maker) -> None:
    pool, follower = make()
    put(pool, keys(0, 4))
    assert pool.flush(60)
    pool.clear()
    assert follower.held == {Tier.DRAM: set(), Tier.SSD: set()}


def test_bad_bytes_are_told_gone(make: Maker) -> None:
    pool, follower = make()
    put(pool, keys(0, 2))
    assert pool.flush(60)
    os.pwrite(pool.arena_offer().fd, b"\xff" * SIZE, 0)
    assert pool.check(keys(0, 2)) == 1
    assert len(follower.held[Tier.DRAM]) == 1


def test_an_observer_is_called_when_it_asks_to_be(make: Maker) -> None:
    pool, follower = make()
    put(pool, keys(0, 2))
    assert pool.flush(60)
    before = follower.calls
    pool.call_observer()
    assert (follower.calls, follower.faults) == (before + 1, [])


def test_an_observer_comes_before_the_pool_is_open(make: Maker) -> None:
    pool, _ = make()
    with pytest.raises(StateError, match="before"):
        pool.observe(Follower())


def test_threads_that_put_get_and_clear_at_the_same_time(make: Maker) -> None:
    """The follower compares after every change, under the pool's lock: that no call was missed or out of order."""
    pool, follower = make()

    def work(seed: int) -> None:
        chance = random.Random(seed)
        for _ in range(60):
            names = keys(chance.randrange(20), chance.randrange(1, 5))
            if chance.random() < 0.5:
                put(pool, names)
            elif chance.random() < 0.95:
                pool.get(names, [bytearray(SIZE) for _ in names])
            else:
                pool.clear()

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert pool.flush(60)
    assert follower.faults == []
    assert follower.calls > 60
