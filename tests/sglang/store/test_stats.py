"""Every metric is counted, documented, and true."""

from __future__ import annotations

from pathlib import Path

from sglang.srt.observability.metrics_collector import StorageMetrics

from tests.sglang.store.conftest import Stores
from tests.sglang.store.faults import FakeClock
from tests.sglang.store.pools import hashes, mha_pool, page_bytes, rows, storage_config
from umbp_sglang.metrics import METRICS
from umbp_sglang.store import UMBPStore

PAGE = Path(__file__).resolve().parents[3] / "docs" / "metrics.md"


def values(store: UMBPStore) -> dict[str, float]:
    """Samples by name and label values."""
    return {
        "/".join([sample.name, *sample.labels.values()]): sample.value
        for family in store.metrics.collect()
        for sample in family.samples
        if not sample.name.endswith(("_created", "_bucket"))
    }


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
    counted = {name.removeprefix("umbp_sglang_"): value for name, value in values(store).items()}
    of_reports = [value for name, value in counted.items() if name.startswith("report_")]
    assert of_reports == [0.0] * len(of_reports), "there is no master"
    moved = {name: value for name, value in counted.items() if "seconds" not in name and not name.startswith("report_")}
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
    assert values(first)["umbp_sglang_refused_pages_total/kv/frequency"] == 3
    first.close()
    assert stores(config, mha_pool()).batch_exists(keys) == 2


def test_a_store_that_is_closed_has_no_tiers(stores: Stores) -> None:
    """A detached storage: what a process's gauges show outlives it, also where the next one has no such tier."""
    store = stores(storage_config(), mha_pool(), clock=FakeClock())
    store.batch_set_v1(hashes(1), rows(0))
    tiers = {name: value for name, value in values(store).items() if "_tier_" in name}
    assert len(tiers) == 2
    assert all(tiers.values())
    store.close()
    assert {name: values(store)[name] for name in tiers} == dict.fromkeys(tiers, 0)


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
