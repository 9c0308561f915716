"""SGLang's store over the host's daemon: pages outlive the engine, ranks share them, a daemon that goes costs hits."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from sglang.srt.mem_cache.hicache_storage import PoolName, PoolTransfer

from tests.connectors.daemon.conftest import Daemon
from tests.connectors.daemon.processes import Process, Stopped, daemon
from tests.connectors.waiting import until
from tests.sglang.store.conftest import Stores, degraded
from tests.sglang.store.faults import FakeClock
from tests.sglang.store.pools import (
    KINDS,
    PATIENCE_MS,
    contents,
    hashes,
    mha_pool,
    mla_pool,
    pool_of,
    rows,
    storage_config,
    wipe,
)
from umbp_core.tiers import Tier
from umbp_sglang.store import UMBPStore

Start = Callable[..., Daemon]
SIDES = (PoolName.SWA, PoolName.INDEXER, PoolName.DRAFT)
HANG_MS = 2000
"""What a call may take while the daemon hangs."""
MARGIN_S = 6.0
"""What it may take longer on a slow machine; to wait for what each of the four pools says would take much longer."""


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts a daemon in this process; a second one takes the place of the first, which must be closed."""
    with contextlib.ExitStack() as closing:

        def start(**options: object) -> Daemon:
            daemon = Daemon(tmp_path / "run" / "daemon.sock", **{"dram_capacity": 64 << 20, **options})
            closing.callback(daemon.close)
            return daemon

        yield start


@pytest.fixture
def hanging(tmp_path: Path) -> Iterator[Process]:
    """A daemon in a process of its own, for tests that stop it."""
    process = daemon(tmp_path / "run" / "daemon.sock", "--dram-capacity", "64MiB")
    yield process
    process.kill()


@pytest.fixture
def config(tmp_path: Path) -> Callable[..., Any]:
    """SGLang's word to a backend that shall use the daemon."""

    def config(**options: Any) -> Any:
        extra = {
            "mode": "daemon",
            "daemon_socket": str(tmp_path / "run" / "daemon.sock"),
            "call_timeout_ms": PATIENCE_MS,
        }
        return storage_config(extra=extra | options.pop("extra", {}), **options)

    return config


@pytest.mark.parametrize("kind", KINDS)
def test_pages_outlive_the_engine_in_dram(stores: Stores, start: Start, config: Callable[..., Any], kind: str) -> None:
    daemon = start()
    pool = pool_of(kind)
    store = stores(config(mla=kind.startswith("mla")), pool)
    keys, want = hashes(6), contents(pool, [5, 2, 9, 10, 11, 12])
    assert store.batch_set_v1(keys, rows(5, 2, 9, 10, 11, 12)) == [True] * 6
    store.close()
    wipe(pool)
    again = stores(config(mla=kind.startswith("mla")), pool)
    assert again.batch_exists(keys + hashes(1)) == 6
    assert again.batch_get_v1(keys, rows(1, 7, 3, 13, 14, 15)) == [True] * 6
    assert contents(pool, [1, 7, 3, 13, 14, 15]) == want
    assert contents(pool, [0, 2, 5]) == [bytes(len(want[0]))] * 3, "no other page was touched"
    (kept,) = daemon.keeper.pools()
    assert kept.pool.stats(Tier.SSD) is None


def test_ranks_and_models_are_apart(stores: Stores, start: Start, config: Callable[..., Any]) -> None:
    daemon = start()
    pool, keys = mha_pool(), hashes(1)
    first = stores(config(tp=(0, 2)), pool)
    assert first.batch_set_v1(keys, rows(0)) == [True]
    for other in (config(tp=(1, 2)), config(tp=(0, 1)), config(tp=(0, 2), model="another")):
        assert stores(other, mha_pool()).batch_exists(keys) == 0
    assert stores(config(tp=(0, 2)), mha_pool()).batch_exists(keys) == 1
    assert len(daemon.keeper.pools()) == 4


def test_what_one_rank_has_lost_leaves_the_others(stores: Stores, start: Start, config: Callable[..., Any]) -> None:
    daemon = start()
    ranks = [stores(config(tp=(rank, 2)), mha_pool()) for rank in range(2)]
    keys = hashes(4)
    for store in ranks:
        assert store.batch_set_v1(keys, rows(0, 1, 2, 3)) == [True] * 4
    first, second = (kept.pool for kept in daemon.keeper.pools())
    going = second.holdings()[Tier.DRAM][1]
    assert second.evict([going]) == 1
    until(lambda: going not in first.holdings()[Tier.DRAM])
    assert [store.batch_exists(keys) for store in ranks] == [1, 1], "no rank has more of the prefix than the other"
    for store in ranks:
        want = contents(store.mem_pool_host, [0, 2, 3])
        wipe(store.mem_pool_host)
        assert store.batch_get_v1([keys[0], *keys[2:]], rows(4, 5, 6)) == [True] * 3
        assert contents(store.mem_pool_host, [4, 5, 6]) == want


def test_ranks_with_the_same_kv_share_one_pool(stores: Stores, start: Start, config: Callable[..., Any]) -> None:
    daemon = start()
    pool = mla_pool()
    writer = stores(config(mla=True, tp=(0, 4)), pool)
    readers = [stores(config(mla=True, tp=(rank, 4)), mla_pool()) for rank in (1, 3)]
    keys, want = hashes(3), contents(pool, [0, 1, 2])
    assert writer.batch_set_v1(keys, rows(0, 1, 2)) == [True] * 3
    for reader in readers:
        assert reader.batch_exists(keys + hashes(1)) == 3
        assert reader.batch_set_v1(keys, rows(0, 1, 2)) == [True] * 3
        wipe(reader.mem_pool_host)
        assert reader.batch_get_v1(keys, rows(4, 5, 6)) == [True] * 3
        assert contents(reader.mem_pool_host, [4, 5, 6]) == want
    assert len(daemon.keeper.pools()) == 1


def test_side_pools_come_with_their_kv(stores: Stores, start: Start, config: Callable[..., Any]) -> None:
    daemon = start()
    pool, side = mha_pool(), mha_pool(heads=1)
    store = stores(config(), pool, {PoolName.SWA: side})
    keys, want = hashes(2), contents(side, [3, 4])
    transfer = PoolTransfer(PoolName.SWA, rows(3, 4), keys=keys)
    assert store.batch_set_v2([transfer]) == {PoolName.SWA: [True, True]}
    assert store.batch_exists(keys) == 0
    assert sum(kept.pool.stats(Tier.DRAM).objects for kept in daemon.keeper.pools()) == 0, "it waits for its KV"
    assert store.batch_set_v1(keys, rows(3, 4)) == [True, True]
    wipe(side)
    got = store.batch_get_v2([PoolTransfer(PoolName.SWA, rows(8, 9), keys=keys)])
    assert got == {PoolName.SWA: [True, True]}
    assert contents(side, [8, 9]) == want


def test_a_restart_of_the_daemon_costs_hits_and_ssd_brings_them_back(
    stores: Stores, start: Start, config: Callable[..., Any], tmp_path: Path
) -> None:
    ssd = {"ssd_dir": tmp_path / "ssd", "ssd_capacity": 32 << 20}
    first = start(**ssd)
    pool = mha_pool()
    store = stores(config(), pool)
    keys, want = hashes(5), contents(pool, range(5))
    assert store.batch_set_v1(keys, rows(*range(5))) == [True] * 5
    first.close()
    assert store.batch_exists(keys) == 0
    assert store.batch_get_v1(keys, rows(*range(5))) == [False] * 5
    assert store.batch_set_v1(keys, rows(*range(5))) == [False] * 5
    start(**ssd)
    until(lambda: store.batch_exists(keys) == 5)
    wipe(pool)
    until(lambda: store.batch_get_v1(keys, rows(*range(6, 11))) == [True] * 5)
    assert contents(pool, range(6, 11)) == want
    assert contents(pool, range(5)) == [bytes(len(want[0]))] * 5


def test_a_store_without_a_daemon_works_without_hits(
    stores: Stores, config: Callable[..., Any], start: Start, caplog: pytest.LogCaptureFixture
) -> None:
    pool, keys = mha_pool(), hashes(2)
    store = stores(config(), pool)
    assert store.batch_exists(keys) == 0
    assert store.batch_set_v1(keys, rows(0, 1)) == [False, False]
    assert store.batch_get_v1(keys, rows(0, 1)) == [False, False]
    target = pool.get_dummy_flat_data_page()
    assert store.get(keys[0], target) is None
    assert isinstance(target, torch.Tensor)
    assert sum("the daemon does not answer" in record.message for record in caplog.records) == 1
    start()
    until(lambda: store.batch_set_v1(keys, rows(0, 1)) == [True, True])
    assert store.batch_exists(keys) == 2


def there(keys: list[str]) -> list[PoolTransfer]:
    """Two pages of each side pool."""
    return [PoolTransfer(name, rows(0, 1), keys=keys) for name in SIDES]


CALLS: dict[str, Callable[[UMBPStore, list[str]], object]] = {
    "batch_get_v1": lambda store, keys: store.batch_get_v1(keys, rows(0, 1)),
    "batch_set_v1": lambda store, keys: store.batch_set_v1(hashes(2), rows(0, 1)),
    "batch_exists": lambda store, keys: store.batch_exists(keys),
    "batch_get_v2": lambda store, keys: store.batch_get_v2(there(keys)),
    "batch_set_v2": lambda store, keys: store.batch_set_v2(there(hashes(2))),
    "batch_set_v2, all": lambda store, keys: store.batch_set_v2([*there(keys), PoolTransfer("kv", rows(0, 1), keys)]),
    "batch_exists_v2": lambda store, keys: store.batch_exists_v2(keys, there(keys)),
    "get": lambda store, keys: store.get(keys[0], store.mem_pool_host.get_dummy_flat_data_page()),
    "set": lambda store, keys: store.set(hashes(1)[0], store.mem_pool_host.get_dummy_flat_data_page()),
    "exists": lambda store, keys: store.exists(keys[0]),
}


@pytest.mark.parametrize("call", CALLS)
def test_a_call_ends_in_its_time_when_the_daemon_hangs(
    stores: Stores, hanging: Process, config: Callable[..., Any], clock: FakeClock, call: str
) -> None:
    """However many pools there are, and although they are to be asked how full they are."""
    brief = config(extra={"call_timeout_ms": HANG_MS})
    store = stores(brief, mha_pool(), {name: mha_pool(heads=1) for name in SIDES}, clock=clock)
    keys = hashes(2)

    def stored() -> bool:  # on a busy machine two seconds may not be enough
        store.batch_set_v2(there(keys))
        return store.batch_set_v1(keys, rows(0, 1)) == [True, True] and store.batch_exists(keys) == 2

    until(stored)
    before = degraded(store).get("unanswered", 0)
    clock.now += 10  # the pools are looked at again
    with Stopped(hanging):
        begun = time.monotonic()
        CALLS[call](store, keys)
        took = time.monotonic() - begun
    assert took < HANG_MS / 1000 + MARGIN_S
    assert degraded(store)["unanswered"] > before


def test_what_a_daemon_does_not_answer_is_counted(stores: Stores, config: Callable[..., Any]) -> None:
    store, keys = stores(config(), mha_pool()), hashes(2)
    before = degraded(store).get("unanswered", 0)

    def counted() -> bool:
        assert store.batch_exists(keys) == 0
        return degraded(store).get("unanswered", 0) > before

    until(counted)
