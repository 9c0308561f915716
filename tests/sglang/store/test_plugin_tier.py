"""The tier below DRAM of SGLang's store may be a plug-in's."""

from __future__ import annotations

from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

from tests.sglang.store.conftest import Stores
from tests.sglang.store.pools import contents, hashes, mha_pool, rows, storage_config, wipe
from umbp_connectors import plugins


@pytest.fixture
def object_store(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The example's tier, installed, over a folder."""
    entry = EntryPoint("fsspec", "examples.fsspec_tier.umbp_fsspec", "umbp")
    monkeypatch.setattr(plugins, "entry_points", lambda group: [entry] if group == plugins.ENTRY_POINT_GROUP else [])
    monkeypatch.setenv("FSSPEC_TIER_URL", f"file://{tmp_path}/store")
    return tmp_path / "store"


def test_pages_survive_a_restart_in_an_object_store(stores: Stores, tmp_path: Path, object_store: Path) -> None:
    config = storage_config(extra={"ssd_dir": str(tmp_path / "host"), "ssd_capacity": "32MiB"})
    pool = mha_pool()
    keys, want = hashes(4), contents(pool, range(4))
    first = stores(config, pool)
    assert first.batch_set_v1(keys, rows(0, 1, 2, 3)) == [True] * 4
    first.close()
    assert len([path for path in object_store.rglob("slot-*") if path.is_file()]) == 4
    assert not list(tmp_path.rglob("slab-*.bin"))
    wipe(pool)
    again = stores(config, pool)
    assert again.batch_get_v1(keys, rows(4, 5, 6, 7)) == [True] * 4
    assert contents(pool, range(4, 8)) == want
