"""Clear: SGLang says that the storage is empty, so nothing may be found until it is, whatever is away meanwhile."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from sglang.srt.mem_cache.hicache_storage import PoolName, PoolTransfer

from tests.connectors.daemon.conftest import Daemon
from tests.connectors.waiting import until
from tests.sglang.store.conftest import Stores
from tests.sglang.store.faults import FakeClock, Faults
from tests.sglang.store.pools import contents, hashes, mha_pool, rows, storage_config
from umbp_sglang.store import UMBPStore

SIDE = PoolName.SWA


@pytest.fixture
def store(stores: Stores, faults: Faults, clock: FakeClock) -> UMBPStore:
    return stores(storage_config(), mha_pool(), {SIDE: mha_pool(heads=1)}, make_pool=faults.make, clock=clock)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[[], Daemon]]:
    """Starts a daemon whose pages outlive it; the one before is closed."""
    running: list[Daemon] = []

    def start() -> Daemon:
        tiers = {"dram_capacity": 64 << 20, "ssd_dir": tmp_path / "ssd", "ssd_capacity": 32 << 20}
        running.append(Daemon(tmp_path / "run" / "daemon.sock", **tiers))
        return running[-1]

    yield start
    for daemon in running:
        daemon.close()


def degraded(store: UMBPStore, reason: str) -> float:
    found = store.metrics.get_sample_value("umbp_sglang_degraded_total", {"reason": reason})
    return found or 0


def test_nothing_is_found_or_stored_until_it_is_empty(
    store: UMBPStore, faults: Faults, clock: FakeClock, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "umbp_sglang")
    pool, keys, page = store.mem_pool_host, hashes(2), mha_pool().get_dummy_flat_data_page()
    assert store.batch_set_v1(keys, rows(0, 1)) == [True, True]
    faults.keeps = True
    store.clear()
    before = contents(pool, range(24))
    asked = [PoolTransfer(SIDE, rows(5, 6), keys=keys)]
    assert store.batch_exists(keys) == 0
    assert not store.exists(keys[0])
    assert store.batch_exists_v2(keys, asked).kv_hit_pages == 0
    assert store.batch_get_v1(keys, rows(7, 8)) == [False, False]
    assert store.batch_get_v2(asked) == {SIDE: [False, False]}
    assert store.get(keys[0], page) is None
    assert store.batch_set_v1(keys, rows(0, 1)) == [False, False]
    assert store.batch_set_v2(asked) == {SIDE: [False, False]}
    assert not store.set(keys[0], page)
    assert contents(pool, range(24)) == before
    assert faults.clears == 1, "it was tried a moment ago"
    clock.now += 60
    store.clear()
    assert faults.clears == 2
    assert degraded(store, "clear_error") == 2
    assert degraded(store, "clear_due") == 9
    faults.keeps = False
    clock.now += 60
    assert store.batch_exists(keys) == 0
    assert faults.clears == 2 + 2, "both pools"
    assert store.batch_set_v1(keys, rows(0, 1)) == [True, True]
    assert store.batch_exists(keys) == 2
    assert [record.levelname for record in caplog.records if "cleared" in record.message] == ["WARNING", "INFO"]


def test_a_store_that_ends_before_says_so(store: UMBPStore, faults: Faults, caplog: pytest.LogCaptureFixture) -> None:
    faults.keeps = True
    store.clear()
    store.close()
    yet, never = (record.getMessage() for record in caplog.records if record.levelno == logging.WARNING)
    assert "cannot be cleared yet" in yet
    assert "will be found again" in never


def test_pages_that_nobody_has_used_yet_go_too(stores: Stores, tmp_path: Path) -> None:
    """SGLang may clear before it has told that all pools are registered."""
    config = storage_config(extra={"ssd_dir": str(tmp_path), "ssd_capacity": "16MiB"})
    first, keys = stores(config, mha_pool()), hashes(2)
    assert first.batch_set_v1(keys, rows(0, 1)) == [True, True]
    first.close()
    again = UMBPStore(config, mha_pool())
    again.clear()
    assert again.batch_exists(keys) == 0
    again.close()
    assert stores(config, mha_pool()).batch_exists(keys) == 0


def test_a_daemon_that_was_away_is_cleared_when_it_is_back(
    stores: Stores, start: Callable[[], Daemon], tmp_path: Path
) -> None:
    """Its SSD tier brings the old pages back, which other engines see until then."""
    place: dict[str, Any] = {"mode": "daemon", "daemon_socket": str(tmp_path / "run" / "daemon.sock")}
    daemon = start()
    store, other = (stores(storage_config(extra=place), mha_pool()) for _ in range(2))
    old, new = hashes(5), hashes(1)
    assert store.batch_set_v1(old, rows(*range(5))) == [True] * 5
    daemon.close()
    store.clear()
    assert degraded(store, "clear_error") == 1
    start()
    until(lambda: other.batch_exists(old) == 5)
    seen: list[int] = []

    def stored() -> bool:
        seen.append(store.batch_exists(old) + sum(store.batch_get_v1(old, rows(*range(5)))))
        return store.batch_set_v1(new, rows(9)) == [True]

    until(stored)
    assert set(seen) == {0}
    assert (other.batch_exists(old), other.batch_exists(new)) == (0, 1)
