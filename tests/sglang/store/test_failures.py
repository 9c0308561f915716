"""What goes wrong behind the store costs pages: never an exception, never a wait, never a wrong byte."""

from __future__ import annotations

import logging
import threading
from typing import Any

import pytest
from sglang.srt.mem_cache.hicache_storage import PoolHitPolicy, PoolName, PoolTransfer

from tests.connectors.later import pass_time
from tests.connectors.waiting import PATIENCE
from tests.sglang.store.conftest import Stores, degraded
from tests.sglang.store.faults import FakeClock, Faults
from tests.sglang.store.pools import PATIENCE_MS, contents, hashes, mha_pool, rows, storage_config
from umbp_core.errors import ConfigError, TransferError
from umbp_sglang import pools
from umbp_sglang.store import UMBPStore

CALLS_TO_SHUT = 3


@pytest.fixture
def store(stores: Stores, faults: Faults, clock: FakeClock) -> UMBPStore:
    return stores(storage_config(), mha_pool(), make_pool=faults.make, clock=clock)


@pytest.mark.parametrize("error", [TransferError("the disk is gone"), OSError("no such device"), RuntimeError("a bug")])
def test_an_exception_is_a_miss(
    store: UMBPStore, faults: Faults, error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    keys = hashes(2)
    faults.error = error
    with caplog.at_level(logging.ERROR):
        assert store.batch_set_v1(keys, rows(0, 1)) == [False, False]
        assert store.batch_set_v1(keys, rows(0, 1)) == [False, False]
        assert store.batch_get_v1(keys, rows(0, 1)) == [False, False]
    assert len(caplog.records) == 2, "each kind of call says it once"
    assert degraded(store) == {"put_error": 2, "get_error": 1}
    faults.error = None
    assert store.batch_set_v1(keys, rows(0, 1)) == [True, True]
    assert store.batch_get_v1(keys, rows(0, 1)) == [True, True]


def test_calls_that_run_out_of_time_shut_the_door(store: UMBPStore, faults: Faults, clock: FakeClock) -> None:
    """After a few no call waits any more, and lookups find nothing; then one call tries whether it is over."""
    keys = hashes(2)
    store.batch_set_v1(keys, rows(0, 1))
    faults.late = True
    for _ in range(CALLS_TO_SHUT):
        assert store.batch_exists(keys) == 2
        assert store.batch_get_v1(keys, rows(2, 3)) == [False, False]
    calls = faults.calls
    assert store.batch_get_v1(keys, rows(2, 3)) == [False, False]
    assert faults.calls == calls, "answered without asking"
    assert store.batch_exists(keys) == 0
    assert store.batch_exists_v2(keys).kv_hit_pages == 0
    faults.late = False
    assert store.batch_set_v1(hashes(1), rows(0)) == [True], "another door"
    clock.now += 60
    assert store.batch_exists(keys) == 2
    assert store.batch_get_v1(keys, rows(2, 3)) == [True, True]
    assert degraded(store) == {"get_timeout": CALLS_TO_SHUT, "get_shut": 3}, "lookups too"


def test_a_question_has_one_deadline_for_all_its_parts(stores: Stores, faults: Faults) -> None:
    """Whoever asks a daemon or a sibling gets what is left of the time, in every part of the chain and every pool."""
    sides = {PoolName.INDEXER: mha_pool(heads=1), PoolName.SWA: mha_pool(heads=1)}
    store = stores(storage_config(), mha_pool(pages=24), sides, make_pool=faults.make)
    keys = hashes(200)
    for start in range(0, len(keys), 20):
        part = keys[start : start + 20]
        transfers = [PoolTransfer(name, rows(*range(20)), keys=part) for name in sides]
        assert store.batch_set_v2(transfers) == {name: [True] * 20 for name in sides}
        assert store.batch_set_v1(part, rows(*range(20))) == [True] * 20
    faults.patience.clear()
    asked = [
        PoolTransfer(PoolName.INDEXER, keys=keys),
        PoolTransfer(PoolName.SWA, keys=keys[-2:], hit_policy=PoolHitPolicy.TRAILING_PAGES),
    ]
    assert store.batch_exists_v2(keys, asked).kv_hit_pages == 200
    given = [each for each in faults.patience if each is not None]
    assert len(given) == len(faults.patience) >= 4, "the chain in parts, and both pools"
    assert PATIENCE_MS / 1000 >= given[0] > given[-1] > 0
    assert given == sorted(given, reverse=True)


def test_a_put_of_several_pools_has_one_deadline(
    stores: Stores, faults: Faults, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, keys = (
        stores(storage_config(), mha_pool(), {PoolName.SWA: mha_pool(heads=1)}, make_pool=faults.make),
        hashes(1),
    )

    def slow(key: bytes) -> bool:
        pass_time(monkeypatch, 10.0, pools)
        return False

    faults.full = slow
    transfers = [PoolTransfer(name, rows(0), keys=keys) for name in (PoolName.SWA, PoolName.KV)]
    assert store.batch_set_v2(transfers) == {PoolName.SWA: [True], PoolName.KV: [True]}
    side, kv = (given for given in faults.given if given is not None)
    assert kv <= side - 10


def test_a_full_pool_costs_the_pages_that_found_no_room(store: UMBPStore, faults: Faults) -> None:
    keys = hashes(3)
    faults.full = lambda key: key == bytes.fromhex(keys[1])
    assert store.batch_set_v1(keys, rows(0, 1, 2)) == [True, False, True]
    assert store.batch_exists(keys) == 1


def test_side_pools_that_fail_do_not_stop_kv(stores: Stores, faults: Faults) -> None:
    store = stores(storage_config(), mha_pool(), {PoolName.SWA: mha_pool(heads=1)}, make_pool=faults.make)
    keys = hashes(1)
    faults.error = OSError("no")
    assert store.batch_set_v2([PoolTransfer(PoolName.SWA, rows(0), keys=keys)]) == {PoolName.SWA: [False]}
    faults.error = None
    assert store.batch_set_v1(keys, rows(0)) == [True]
    assert store.batch_exists(keys) == 1
    assert store.batch_get_v2([PoolTransfer(PoolName.SWA, rows(1), keys=keys)]) == {PoolName.SWA: [False]}


@pytest.mark.parametrize("bad", [None, "none", [None]])
def test_arguments_that_make_no_sense_are_misses(stores: Stores, bad: Any) -> None:
    keys, store = hashes(1), stores(storage_config(), mha_pool(), {PoolName.SWA: mha_pool(heads=1)})
    assert store.batch_set_v1(keys, bad) == [False]
    assert store.batch_get_v1(keys, bad) == [False]
    for name in (PoolName.SWA, PoolName.DRAFT):
        assert store.batch_set_v2([PoolTransfer(name, bad, keys=keys)]) == {name: [False]}
        assert store.batch_get_v2([PoolTransfer(name, bad, keys=keys)]) == {name: [False]}
    assert store.batch_exists(bad or "") == 0


def test_a_dram_tier_that_holds_no_page_is_refused_at_the_start() -> None:
    with pytest.raises(ConfigError, match="set a larger dram_capacity"):
        UMBPStore(storage_config(extra={"dram_capacity": 1000}), mha_pool())


def test_the_dynamic_form_registers_its_pool_later() -> None:
    """Its second argument is a dict; a pool that cannot be used is refused when it comes."""
    store = UMBPStore(storage_config(extra={"dram_capacity": 1000}), {})
    assert store.batch_exists(hashes(1)) == 0
    with pytest.raises(ConfigError, match="dram_capacity"):
        store.register_mem_pool_host(mha_pool())
    store.close()


def test_a_pool_that_cannot_be_opened_has_misses(stores: Stores, caplog: pytest.LogCaptureFixture) -> None:
    """Far more memory than there is: SGLang has started its threads by then, so it goes on without storage."""
    store = stores(storage_config(extra={"dram_capacity": "9000TiB"}), mha_pool())
    assert "is not stored" in caplog.text
    assert store.batch_set_v1(hashes(1), rows(0)) == [False]


def test_all_threads_of_sglang_at_once(stores: Stores) -> None:
    """One asks, one reads, one writes, and the scheduler clears and collects; each page read is right."""
    pool = mha_pool(pages=24)
    store = stores(storage_config(metrics=True), pool)
    keys, want = hashes(8), contents(pool, range(8))
    wrong: list[int] = []
    rounds = 60

    def write() -> None:
        for _ in range(rounds):
            store.batch_set_v1(keys, rows(*range(8)))

    def read() -> None:
        for _ in range(rounds):
            for place, there in enumerate(store.batch_get_v1(keys, rows(*range(8, 16)))):
                if there and contents(pool, [8 + place])[0] != want[place]:
                    wrong.append(place)

    def ask() -> None:
        for _ in range(rounds):
            wrong.extend(count for count in [store.batch_exists(keys)] if not 0 <= count <= 8)

    threads = [threading.Thread(target=work) for work in (write, read, ask)]
    for thread in threads:
        thread.start()
    for _ in range(rounds):
        store.clear()
        store.get_stats()
    for thread in threads:
        thread.join(PATIENCE)
    assert not any(thread.is_alive() for thread in threads)
    assert wrong == []
    store.batch_set_v1(keys, rows(*range(8)))
    assert store.batch_exists(keys) == 8
