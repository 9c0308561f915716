"""Every metric is counted, documented, and true."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from pathlib import Path

import pytest
from sglang.srt.observability.metrics_collector import StorageMetrics

from tests.connectors.disk import Disk
from tests.connectors.waiting import until
from tests.sglang.store.conftest import Stores, degraded, documented_reasons
from tests.sglang.store.faults import FakeClock, Faults
from tests.sglang.store.pools import contents, hashes, mha_pool, page_bytes, rows, storage_config
from umbp_sglang.metrics import METRICS
from umbp_sglang.store import UMBPStore

PAGE = Path(__file__).resolve().parents[3] / "docs" / "metrics.md"


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[Disk]:
    """The disk of this process."""
    with Disk(monkeypatch) as disk:
        yield disk


def values(store: UMBPStore) -> dict[str, float]:
    """Samples by name and label values."""
    return {
        "/".join([sample.name, *sample.labels.values()]): sample.value
        for family in store.metrics.collect()
        for sample in family.samples
        if not sample.name.endswith(("_created", "_bucket"))
    }


def tiers_of(store: UMBPStore) -> dict[str, float]:
    """How full the tiers are."""
    return {name: value for name, value in values(store).items() if "_tier_" in name}


def ssd_of(store: UMBPStore, clock: FakeClock) -> dict[str, float]:
    """What happened in the SSD tier; so that it is known, a call has to come a second after the last one."""
    clock.now += 10
    store.batch_exists(hashes(1))
    start = "umbp_sglang_ssd_total/kv/"
    return {name.removeprefix(start): count for name, count in values(store).items() if name.startswith(start)}


def test_what_happened_is_counted(stores: Stores, tmp_path: Path) -> None:
    pool, clock = mha_pool(), FakeClock()
    tiers = {"ssd_dir": str(tmp_path), "ssd_capacity": "16MiB"}
    store = stores(storage_config(extra=tiers), pool, clock=clock)
    keys, nbytes = hashes(4), len(page_bytes(pool, 0))
    store.batch_set_v1(keys[:2], rows(0, 1))
    clock.now += 10
    store.batch_set_v1(keys[:3], rows(0, 1, 2))
    store.batch_get_v1(keys, rows(4, 5, 6, 7))
    store.batch_exists(keys)
    store.batch_exists(hashes(2))
    until(lambda: values(store).get("umbp_sglang_tier_used_bytes/kv/dram") == 3 * 4096)
    until(lambda: "umbp_sglang_ssd_total/kv/fenced" in values(store))
    counted = {name.removeprefix("umbp_sglang_"): value for name, value in values(store).items()}
    of_reports = [value for name, value in counted.items() if name.startswith("report_")]
    assert of_reports == [0.0] * len(of_reports), "there is no master"
    elsewhere = ("report_", "ssd_", "call_seconds")
    moved = {name: value for name, value in counted.items() if not name.startswith(elsewhere)}
    assert moved == {
        "lookups_total": 2,
        "lookup_pages_total": 6,
        "hit_pages_total": 3,
        "pages_total/put/kv/stored": 3,
        "pages_total/put/kv/present": 2,
        "pages_total/put/kv/not_stored": 0,
        "pages_total/get/kv/dram": 3,
        "pages_total/get/kv/ssd": 0,
        "pages_total/get/kv/missing": 1,
        "bytes_total/put/kv": 3 * nbytes,
        "bytes_total/get/kv": 3 * nbytes,
        "tier_used_bytes/kv/dram": 3 * 4096,
        "tier_capacity_bytes/kv/dram": 4 << 20,
        "tier_used_bytes/kv/ssd": counted["tier_used_bytes/kv/ssd"],
        "tier_capacity_bytes/kv/ssd": counted["tier_capacity_bytes/kv/ssd"],
    }
    assert 0 < counted["tier_capacity_bytes/kv/ssd"] <= 16 << 20
    assert counted["call_seconds_count/put/kv"] == 2


def test_pages_that_are_read_again_go_to_ssd_and_those_that_did_not_are_counted(stores: Stores, tmp_path: Path) -> None:
    """``ssd_offload_policy`` in SGLang's extra config."""
    tiers = {"ssd_dir": str(tmp_path), "ssd_capacity": "16MiB", "ssd_offload_policy": "frequency"}
    clock, config, keys = FakeClock(), storage_config(extra=tiers), hashes(3)
    first = stores(config, mha_pool(), clock=clock)
    first.batch_set_v1(keys, rows(0, 1, 2))
    first.batch_get_v1(keys[:2], rows(4, 5))
    clock.now += 10
    first.batch_exists(keys)
    until(lambda: values(first).get("umbp_sglang_refused_pages_total/kv/frequency") == 3)
    first.close()
    assert stores(config, mha_pool()).batch_exists(keys) == 2


def test_a_disk_that_refuses_is_counted(stores: Stores, tmp_path: Path, disk: Disk) -> None:
    tiers = {"ssd_dir": str(tmp_path), "ssd_capacity": "16MiB"}
    config, clock, pool, keys = storage_config(extra=tiers), FakeClock(), mha_pool(), hashes(4)
    nothing = {"demotions_failed": 0, "demotions_dropped": 0, "fenced": 0, "fenced_loads": 0}
    first = stores(config, pool, clock=clock)
    assert first.batch_set_v1(keys[:2], rows(0, 1)) == [True] * 2
    until(lambda: ssd_of(first, clock) == {"restored": 0, "demoted": 2, **nothing})
    disk.fail("write", number=errno.ENOSPC)
    assert first.batch_set_v1(keys[2:], rows(2, 3)) == [True] * 2
    until(lambda: sum(count for event, count in ssd_of(first, clock).items() if event.startswith("demotions_")) == 2)
    assert ssd_of(first, clock)["demotions_failed"] >= 1
    assert first.batch_get_v1(keys, rows(4, 5, 6, 7)) == [True] * 4, "DRAM has them all the same"
    assert contents(pool, range(4, 8)) == contents(pool, range(4))
    first.close()
    disk.work()
    again = stores(config, mha_pool(), clock=clock)
    until(lambda: ssd_of(again, clock) == {"restored": 2, "demoted": 0, **nothing})


def test_a_pool_without_a_disk_has_no_events_of_one(stores: Stores) -> None:
    store, clock = stores(storage_config(), mha_pool()), FakeClock()
    store.batch_set_v1(hashes(1), rows(0))
    until(lambda: len(tiers_of(store)) == 2)
    assert ssd_of(store, clock) == {}


def test_every_documented_reason_is_counted(stores: Stores, tmp_path: Path) -> None:
    """And no other: see ``check_reasons``."""
    errors, shut, clearing = Faults(), Faults(), Faults()
    made = [stores(storage_config(), mha_pool(), make_pool=faults.make) for faults in (errors, shut, clearing)]
    away = {"mode": "daemon", "daemon_socket": str(tmp_path / "run" / "daemon.sock")}
    made.append(stores(storage_config(extra=away), mha_pool()))
    errors.error, shut.late, clearing.keeps = OSError("no such device"), True, True
    odd = mha_pool(heads=1)
    odd.layout = "odd"
    made[0].register_mem_host_pool_v2(odd, "swa")
    made[0].batch_exists([None])  # type: ignore[list-item]
    made[2].clear()
    for store in made:
        for _ in range(4):
            store.batch_set_v1(hashes(1), rows(0))
            store.batch_get_v1(hashes(1), rows(0))
    assert {reason for store in made for reason in degraded(store)} == documented_reasons()


def test_a_store_that_is_closed_has_no_tiers(stores: Stores) -> None:
    """A detached storage: what a process's gauges show outlives it, also where the next one has no such tier."""
    store = stores(storage_config(), mha_pool(), clock=FakeClock())
    store.batch_set_v1(hashes(1), rows(0))
    until(lambda: len(tiers_of(store)) == 2 and all(tiers_of(store).values()))
    store.close()
    assert list(tiers_of(store).values()) == [0, 0]


def test_pages_from_ssd_are_told_apart(stores: Stores, tmp_path: Path) -> None:
    config = storage_config(extra={"ssd_dir": str(tmp_path), "ssd_capacity": "16MiB"})
    keys = hashes(2)
    first = stores(config, mha_pool())
    first.batch_set_v1(keys, rows(0, 1))
    first.close()
    store = stores(config, mha_pool())
    store.batch_get_v1(keys[:1], rows(0))
    store.batch_get_v1(keys[:1], rows(0))
    counted = values(store)
    assert counted["umbp_sglang_pages_total/get/kv/ssd"] == 1
    assert counted["umbp_sglang_pages_total/get/kv/dram"] == 1


def test_sglang_collects_the_calls_since_it_last_asked(stores: Stores) -> None:
    pool = mha_pool()
    store = stores(storage_config(metrics=True), pool)
    keys = hashes(3)
    store.batch_set_v1(keys, rows(0, 1, 2))
    store.batch_get_v1(keys[:2], rows(0, 1))
    found = store.get_stats()
    assert isinstance(found, StorageMetrics)
    assert (found.backup_pgs, found.prefetch_pgs) == ([3], [2])
    assert len(found.backup_bandwidth) == len(found.prefetch_bandwidth) == 1
    assert found.backup_bandwidth[0] > 0
    assert store.get_stats() == StorageMetrics()


def test_what_sglang_collects_is_bounded(stores: Stores) -> None:
    """The scheduler asks in each of its rounds, and may not ask for hours: an answer costs the same then."""
    store = stores(storage_config(metrics=True), mha_pool())
    keys, most = hashes(1), 1024
    store.batch_set_v1(keys, rows(0))
    for _ in range(most + 10):
        store.batch_get_v1(keys, rows(1))
    assert len(store.get_stats().prefetch_pgs) == most
    assert store.get_stats() == StorageMetrics()


def test_without_metrics_there_is_nothing_to_collect(stores: Stores) -> None:
    store = stores(storage_config(), mha_pool())
    store.batch_set_v1(hashes(1), rows(0))
    assert store.get_stats() is None


def test_every_metric_is_documented(stores: Stores) -> None:
    store = stores(storage_config(), mha_pool())
    page = PAGE.read_text(encoding="utf-8")
    for metric in METRICS:
        assert f"| `{metric.name}` | {metric.kind} |" in page
    families = {family.name for family in store.metrics.collect()}
    assert families == {metric.name.removesuffix("_total") for metric in METRICS}
