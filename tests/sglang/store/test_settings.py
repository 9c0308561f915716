"""The extra config: SGLang's own keys are left alone, ours are checked, and a mistake stops the start with one line."""

from __future__ import annotations

from pathlib import Path

import pytest
from sglang.srt.mem_cache.hybrid_cache.hybrid_cache_controller import HybridCacheController

from tests.sglang.store.pools import storage_config
from umbp_core.errors import ConfigError
from umbp_core.eviction import LruPolicy, PrefixAwareLruPolicy
from umbp_sglang.settings import ENGINE_KEYS, read_settings
from umbp_sglang.store import UMBPStore

DYNAMIC = {
    "backend_name": "umbp",
    "module_path": "umbp_sglang.store",
    "class_name": "UMBPStore",
    "interface_v1": 1,
    "allocator": "shm",
}


def test_keys_of_sglang_are_left_alone() -> None:
    extra = {**dict.fromkeys(ENGINE_KEYS, 1), **DYNAMIC, "dram_capacity": "3GiB"}
    assert read_settings(storage_config(extra=extra), {}).config.dram_capacity == 3 << 30


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"dram_capcity": 1}, "unknown key 'dram_capcity' in engine extra-config; did you mean 'dram_capacity'"),
        ({"prefetch_treshold": 1}, "did you mean 'prefetch_threshold'"),
        ({"call_timeout_ms": 0}, "call_timeout_ms = 0"),
        ({"ssd_enabled": True}, "ssd_dir is not set"),
        ({"mode": "cloud"}, "the modes are 'local', 'daemon' and"),
    ],
)
def test_a_mistake_is_one_line(extra: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        read_settings(storage_config(extra=extra), {})
    assert message in str(refused.value)
    assert len(str(refused.value).splitlines()) == 2


def test_a_mode_without_pools_of_our_own_is_refused() -> None:
    with pytest.raises(
        ConfigError, match="mode 'distributed' has no pool of this kind; set mode to one of local, daemon"
    ):
        UMBPStore(storage_config(extra={"mode": "distributed"}))


def test_a_policy_that_nobody_offers_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"'lruu'.*built in: lru, prefix_aware_lru"):
        read_settings(storage_config(extra={"eviction_policy": "lruu"}), {})


def test_the_configured_policy_is_made() -> None:
    assert type(read_settings(storage_config(extra={"eviction_policy": "lru"}), {}).make_eviction()) is LruPolicy
    assert type(read_settings(storage_config(), {}).make_eviction()) is PrefixAwareLruPolicy


def test_the_environment_and_a_file_count_too(tmp_path: Path) -> None:
    file = tmp_path / "umbp.toml"
    file.write_text('lookup_timeout_ms = 700\nnamespace = "file"\n', encoding="utf-8")
    env = {"UMBP_CONFIG": str(file), "UMBP_NAMESPACE": "environment"}
    config = read_settings(storage_config(), env).config
    assert (config.lookup_timeout_ms, config.namespace) == (700, "environment")


FORMS = {
    "json": '{"dram_capacity": "3GiB", "prefetch_threshold": 64}',
    "toml": 'dram_capacity = "3GiB"\nprefetch_threshold = 64\n',
    "yaml": "dram_capacity: 3GiB\nprefetch_threshold: 64\n",
}


@pytest.mark.parametrize("form", ["text", *FORMS])
def test_the_extra_config_is_a_text_or_a_file(tmp_path: Path, form: str) -> None:
    """As SGLang reads what stands behind ``--hicache-storage-backend-extra-config``."""
    given = FORMS["json"]
    if form != "text":
        file = tmp_path / f"extra.{form}"
        file.write_text(FORMS[form], encoding="utf-8")
        given = f"@{file}"
    extra, threshold, *_ = HybridCacheController.parse_storage_backend_extra_config(given)
    config = storage_config()
    config.extra_config = extra
    assert read_settings(config, {}).config.dram_capacity == 3 << 30
    assert threshold == 64


def test_no_extra_config_is_fine() -> None:
    config = storage_config()
    config.extra_config = None
    assert read_settings(config, {}).config.namespace == ""


def test_heads_are_never_cut_where_all_ranks_have_them() -> None:
    assert read_settings(storage_config(mla=True, tp=(0, 2), lcm=8), {}).rank.head_parts == 0
    assert read_settings(storage_config(tp=(0, 2), lcm=8), {}).rank.head_parts == 8
