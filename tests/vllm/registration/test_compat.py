"""The version switches, for every supported version whatever is installed."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import pytest

from umbp_vllm import compat


@pytest.mark.parametrize("version", ["0.28.0", "0.29.1", "0.32.0+cpu", "0.33.0rc1", "0.33.7.dev3+gabc"])
def test_versions_inside_the_range_need_no_word(version: str) -> None:
    assert compat.version_notice(version) is None


@pytest.mark.parametrize(
    ("version", "word"), [("0.27.9", "older"), ("0.34.0", "newer"), ("1.0.0", "newer"), ("dev", "states no release")]
)
def test_versions_outside_get_one_sentence_that_names_the_range(version: str, word: str) -> None:
    notice = compat.version_notice(version)
    assert notice is not None
    assert version in notice
    assert word in notice
    assert "0.28 to 0.33" in notice
    assert "\n" not in notice
    assert notice.endswith(".")


def test_the_installed_version_is_known() -> None:
    assert compat.release_of(compat.vllm_version()) is not None


@pytest.mark.parametrize(
    ("version", "release"), [("0.31.2", (0, 31)), ("0.0.0", None), ("dev", None), ("0.1.dev1+g", None)]
)
def test_releases(version: str, release: tuple[int, int] | None) -> None:
    assert compat.release_of(version) == release


@pytest.mark.parametrize(
    ("version", "fixed", "tagged"),
    [
        ("0.28.0", False, False),
        ("0.29.0", True, False),
        ("0.30.0", True, False),
        ("0.31.0", True, True),
        ("dev", True, True),
    ],
)
def test_facts_about_hashes(version: str, fixed: bool, tagged: bool) -> None:
    assert compat.has_fixed_none_hash(version) is fixed
    assert compat.has_tagged_hash_keys(version) is tagged


def test_the_stand_in_for_results_has_the_shape_of_vllms() -> None:
    def shape(kind: type) -> list[tuple[str, object]]:
        return [(field.name, field.default_factory) for field in dataclasses.fields(kind)]

    assert shape(compat._TransferResults) == shape(compat.KVConnectorTransferResults)


def test_geometry_forms() -> None:
    strides = SimpleNamespace(size=1, layers=["a"], layer_stride=1, block_stride=1, offset=0)
    shared = SimpleNamespace(size=1, shared_by=["a"], block_stride=0, offset=0)
    unknown = SimpleNamespace(size=1, places=[])

    def source(tensor: SimpleNamespace) -> compat.GeometrySource:
        return compat.geometry_source(SimpleNamespace(kv_cache_tensors=[tensor]))

    assert source(strides) is compat.GeometrySource.STRIDES
    assert source(shared) is compat.GeometrySource.SHARED_BY
    with pytest.raises(TypeError, match=r"places.*supported range"):
        source(unknown)


def test_the_installed_vllm_tells_strides() -> None:
    from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheTensor

    tensor = KVCacheTensor(size=64, layers=["a", "b"], layer_stride=32, block_stride=8)
    config = KVCacheConfig(num_blocks=4, kv_cache_tensors=[tensor], kv_cache_groups=[])
    assert compat.geometry_source(config) is compat.GeometrySource.STRIDES
    assert compat.kv_tp_replicas(config) == 1
    assert compat.kv_cache_layout(config) is None
    assert compat.transfer_group_ids(config) == ()


def test_what_older_versions_do_not_say_has_its_old_meaning() -> None:
    old = SimpleNamespace(kv_cache_tensors=[], kv_cache_groups=[object(), object()])
    assert compat.kv_tp_replicas(old) == 1
    assert compat.kv_cache_layout(old) is None
    assert compat.transfer_group_ids(old) == (0, 1)


def test_tokens_per_hash_are_those_that_vllm_noted_or_decides() -> None:
    group = SimpleNamespace(kv_cache_spec=SimpleNamespace(block_size=16, dcp_sharded=True))
    config = SimpleNamespace(
        cache_config=SimpleNamespace(block_size=16, prefix_match_unit=None, enable_prefix_caching=True),
        parallel_config=SimpleNamespace(decode_context_parallel_size=2),
        kv_transfer_config=object(),
    )
    noted = SimpleNamespace(hash_block_size=8, kv_cache_groups=[group])
    silent = SimpleNamespace(kv_cache_groups=[group])
    assert compat.hash_tokens(config, noted) == 8
    assert compat.hash_tokens(config, silent) == 32
