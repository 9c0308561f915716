"""``mori.umbp`` by another name: what SGLang's in-tree backend calls, with its signatures and answers."""

from __future__ import annotations

import ctypes
import importlib
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from tests.connectors.waiting import until
from tests.master.app.master_process import MasterProcess
from umbp_connectors.compat import mori
from umbp_core.errors import ConfigError, UmbpError

SIZE = 8192
KEYS = [f"{number:064x}_0_k" for number in range(12)]
Maker = Callable[..., mori.UMBPClient]
SAME_NAMES = {
    "UMBP_DRAM_CAPACITY": "1GiB",
    "UMBP_DRAM_USE_HUGEPAGES": "1",
    "UMBP_DRAM_NUMA_NODE": "0",
    "UMBP_DRAM_PREFAULT": "0",
    "UMBP_SSD_ENABLED": "0",
    "UMBP_SSD_DIR": "/nvme",
    "UMBP_SSD_CAPACITY": "1GiB",
    "UMBP_EVICTION_POLICY": "prefix_aware_lru",
}


@pytest.fixture
def config(tmp_path: Path) -> mori.UMBPConfig:
    config = mori.UMBPConfig.from_environment({})
    config.dram.capacity_bytes = 16 * SIZE
    config.dram.prefault = False
    config.ssd.storage_dir = str(tmp_path / "ssd")
    config.ssd.capacity_bytes = 4 << 20
    config.ssd.durability.mode = mori.UMBPDurabilityMode.Relaxed
    return config


@pytest.fixture
def make(config: mori.UMBPConfig) -> Iterator[Maker]:
    made: list[mori.UMBPClient] = []

    def make(use: mori.UMBPConfig = config) -> mori.UMBPClient:
        made.append(mori.UMBPClient(use))
        return made[-1]

    yield make
    for client in made:
        client.close()


class Memory:
    """Objects by address; ``apart`` bytes from each other."""

    def __init__(self, count: int, size: int = SIZE, apart: int = 0) -> None:
        self.array = np.zeros((count, size + apart), dtype=np.uint8)
        self.ptrs = [self.array.ctypes.data + row * (size + apart) for row in range(count)]
        self.sizes = [size] * count

    def fill(self) -> Memory:
        self.array[...] = np.random.default_rng(5).integers(0, 256, self.array.shape, dtype=np.uint8)
        return self


def test_the_names_that_the_backend_uses_are_there() -> None:
    used = (
        "UMBPClient UMBPConfig UMBPRole UMBPIoBackend UMBPDurabilityMode UMBPDistributedConfig UMBPTierType "
        "UMBPStandaloneProcessConfig UMBPDeploymentMode UMBPHostMemAllocator UMBPHostBufferBacking"
    )
    assert set(used.split()) <= set(mori.__all__)
    calls = (
        "batch_put_from_ptr batch_put_from_ptr_with_depth batch_get_into_ptr batch_exists_consecutive batch_exists "
        "put_from_ptr get_into_ptr exists clear flush register_memory deregister_memory is_distributed "
        "get_deployment_mode get_backend_mode supports_ranged_io batch_get_ranges_into_ptr batch_put_ranges_from_ptr "
        "report_external_kv_blocks revoke_external_kv_blocks "
        "revoke_all_external_kv_blocks_at_tier match_external_kv get_external_kv_hit_counts close"
    )
    assert all(callable(vars(mori.UMBPClient).get(name)) for name in calls.split())


def test_the_numbers_are_those_of_the_original() -> None:
    assert [int(mode) for mode in mori.UMBPDeploymentMode] == [0, 1, 2]
    assert [int(tier) for tier in mori.UMBPTierType] == [0, 1, 2, 3]
    config = mori.UMBPConfig()
    assert (config.dram.capacity_bytes, config.ssd.capacity_bytes) == (4 << 30, 32 << 30)
    assert config.ssd.durability.mode is mori.UMBPDurabilityMode.Strict
    assert mori.UMBPStandaloneProcessConfig().startup_timeout_ms == 30_000


@pytest.mark.parametrize("apart", [0, 64], ids=["together", "apart"])
def test_put_and_get_by_address(make: Maker, apart: int) -> None:
    client = make()
    source, target = Memory(6, apart=apart).fill(), Memory(6, apart=apart)
    assert client.batch_exists_consecutive(KEYS) == 0
    assert client.batch_get_into_ptr(KEYS[:6], target.ptrs, target.sizes) == [False] * 6, "nothing was put yet"
    assert client.batch_put_from_ptr_with_depth(KEYS[:6], source.ptrs, source.sizes, [0, 1, 2, 3, -1, 5]) == [True] * 6
    assert client.batch_put_from_ptr(KEYS[:6], target.ptrs, target.sizes) == [True] * 6, "the first writer wins"
    assert client.batch_exists_consecutive(KEYS) == 6
    order = [3, 1, 0, 5, 4, 2]
    keys, places = [KEYS[index] for index in order], [target.ptrs[index] for index in order]
    assert client.batch_get_into_ptr(keys, places, target.sizes) == [True] * 6
    assert np.array_equal(source.array[:, :SIZE], target.array[:, :SIZE])
    assert not target.array[:, SIZE:].any()
    assert client.get_into_ptr(KEYS[0], target.ptrs[0], 100) is False, "the size has to match"
    assert client.put_from_ptr(KEYS[7], source.ptrs[0], SIZE) is True
    assert client.exists(KEYS[7])
    assert client.batch_exists(KEYS[5:9]) == [True, False, True, False]


def test_sizes_may_differ_within_the_first_puts_largest(make: Maker) -> None:
    client = make()
    source, target = Memory(3).fill(), Memory(3)
    sizes = [SIZE, 100, 5000]
    assert client.batch_put_from_ptr(KEYS[:3], source.ptrs, sizes) == [True] * 3
    assert client.batch_get_into_ptr(KEYS[:3], target.ptrs, sizes) == [True] * 3
    large = Memory(1, 2 * SIZE).fill()
    assert client.put_from_ptr(KEYS[4], large.ptrs[0], 2 * SIZE) is False
    for row, size in enumerate(sizes):
        assert np.array_equal(source.array[row, :size], target.array[row, :size])


def test_what_is_on_ssd_is_there_after_a_restart_before_any_put(make: Maker, config: mori.UMBPConfig) -> None:
    config.namespace = "a model"
    client = make()
    source, target = Memory(12).fill(), Memory(12)
    assert client.batch_put_from_ptr(KEYS, source.ptrs, source.sizes) == [True] * 12
    assert client.flush()
    client.close()
    client.close()
    assert client.put_from_ptr(KEYS[0], source.ptrs[0], SIZE) is False, "it is closed"
    again = make()
    assert again.batch_exists_consecutive(KEYS) == 12
    assert again.batch_get_into_ptr(KEYS, target.ptrs, target.sizes) == [True] * 12
    assert np.array_equal(source.array, target.array)
    assert again.clear()
    assert not again.exists(KEYS[0])


@pytest.mark.parametrize("names", [("", ""), ("one", "two"), ("one", ""), ("", "one")])
def test_another_models_objects_are_not_read(
    make: Maker, config: mori.UMBPConfig, names: tuple[str, str], tmp_path: Path
) -> None:
    """Keys are of tokens alone: whose they are, only the namespace says."""
    memory = Memory(12).fill()
    for name in names:
        config.namespace = name
        client = make()
        assert client.batch_exists(KEYS) == [False] * 12
        assert client.batch_put_from_ptr(KEYS[:1], memory.ptrs[:1], memory.sizes[:1]) == [True]
        assert client.batch_exists(KEYS) == [True, *[False] * 11]
        assert client.batch_put_from_ptr(KEYS, memory.ptrs, memory.sizes) == [True] * 12
        assert client.flush()
        client.close()
    slots = [path.stat().st_size for path in (tmp_path / "ssd").rglob("slab-*")]
    assert min(slots) >= 12 * SIZE, "the second one has an SSD tier too"


@pytest.mark.parametrize("name", ["", "a model"])
def test_larger_objects_than_an_earlier_life_had_find_room(make: Maker, config: mori.UMBPConfig, name: str) -> None:
    config.namespace = name
    small, large = Memory(2).fill(), Memory(2, 4 * SIZE).fill()
    client = make()
    assert client.batch_put_from_ptr(KEYS[:2], small.ptrs, small.sizes) == [True] * 2
    assert client.flush()
    client.close()
    again, target = make(), Memory(2, 4 * SIZE)
    assert again.batch_exists(KEYS[:2]) == [bool(name)] * 2
    assert again.batch_put_from_ptr(KEYS[2:4], large.ptrs, large.sizes) == [True] * 2
    assert again.batch_get_into_ptr(KEYS[2:4], target.ptrs, target.sizes) == [True] * 2
    assert np.array_equal(target.array, large.array)
    assert again.flush()


def test_a_client_that_cannot_be_made_tells_no_master(make: Maker, config: mori.UMBPConfig) -> None:
    config.distributed, config.object_bytes = mori.UMBPDistributedConfig(), SIZE
    config.distributed.master_config.master_address = "umbp://127.0.0.1:9"
    config.dram.capacity_bytes = 100
    with pytest.raises(UmbpError):
        make()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("umbp-master")]


def test_without_ssd_nothing_is_left(make: Maker, config: mori.UMBPConfig, tmp_path: Path) -> None:
    config.ssd.enabled = False
    client = make()
    assert client.put_from_ptr(KEYS[0], Memory(1).ptrs[0], SIZE)
    assert client.flush()
    assert not (tmp_path / "ssd").exists()


def test_k_and_v_of_all_ranks_leave_together(make: Maker, config: mori.UMBPConfig) -> None:
    config.dram.capacity_bytes, config.ssd.enabled = 13 * SIZE, False
    client, memory = make(), Memory(4).fill()
    pages = [[f"{number:064x}_{rank}_{part}" for rank in (0, 1) for part in "kv"] for number in range(5)]
    for number, keys in enumerate(pages):
        assert client.batch_put_from_ptr_with_depth(keys, memory.ptrs, memory.sizes, [number] * 4) == [True] * 4
        # One part of the first page is used in between: by itself, it alone would stay.
        client.get_into_ptr(pages[0][0], memory.ptrs[0], SIZE)
    there = [client.batch_exists(keys) for keys in pages]
    assert all(len(set(found)) == 1 for found in there)
    assert sum(all(found) for found in there) == 3


def test_modes(make: Maker) -> None:
    client = make()
    assert client.get_deployment_mode() is mori.UMBPDeploymentMode.Local
    assert (client.get_backend_mode(), client.is_distributed(), client.supports_ranged_io()) == ("local", False, False)
    nothing: list[list[int]] = [[], []]
    assert client.batch_get_ranges_into_ptr(KEYS[:2], nothing, nothing, nothing) == [False] * 2
    assert client.batch_put_ranges_from_ptr(KEYS[:2], [SIZE] * 2, nothing, nothing, nothing) == [False] * 2
    assert client.register_memory(4096, SIZE)
    assert not client.register_memory(0, SIZE)
    client.deregister_memory(4096)
    assert client.clear()
    assert client.flush()


@pytest.mark.parametrize(
    "spoil",
    [
        lambda config: setattr(config.dram, "capacity_bytes", 0),
        lambda config: setattr(config.ssd, "capacity_bytes", 0),
        lambda config: setattr(config.eviction, "policy", "nonsense"),
        lambda config: (
            setattr(config, "distributed", mori.UMBPDistributedConfig()),
            setattr(config, "standalone_process", mori.UMBPStandaloneProcessConfig()),
        ),
        lambda config: setattr(config, "standalone_process", mori.UMBPStandaloneProcessConfig()),
    ],
    ids=["dram", "ssd", "policy", "both", "daemon without a namespace"],
)
def test_a_configuration_that_cannot_be_used_is_said(
    make: Maker, config: mori.UMBPConfig, spoil: Callable[[mori.UMBPConfig], object]
) -> None:
    spoil(config)
    with pytest.raises(ConfigError):
        make().put_from_ptr(KEYS[0], Memory(1).ptrs[0], SIZE)


def test_lists_that_do_not_match(make: Maker) -> None:
    client = make()
    for call in (client.batch_put_from_ptr, client.batch_get_into_ptr):
        with pytest.raises(ValueError, match="do not match"):
            call(["a", "b"], [4096], [SIZE, SIZE])
    for _ in range(2):
        assert client.batch_put_from_ptr([], [], []) == client.batch_get_into_ptr([], [], []) == []
        assert client.put_from_ptr(KEYS[0], Memory(1).ptrs[0], SIZE), "and once it is open"


def test_the_environment_is_read_by_both_names() -> None:
    env = {
        "UMBP_DRAM_CAPACITY_BYTES": "1048576",
        "UMBP_SSD_STORAGE_DIR": "/first",
        "UMBP_SSD_DIR": "/second",
        "UMBP_SSD_ENABLED": "0",
        "UMBP_EVICTION_POLICY": "prefix_aware_lru",
        "UMBP_SSD_DURABILITY_MODE": "relaxed",
        "UMBP_SSD_CAPACITY": "2GiB",
        "UMBP_DRAM_USE_HUGEPAGES": "true",
        "UMBP_NAMESPACE": "whose",
        "UMBP_DRAM_NUMA_NODE": "1",
        "UMBP_DRAM_PREFAULT": "0",
    }
    config = mori.UMBPConfig.from_environment(env)
    assert (config.dram.capacity_bytes, config.ssd.capacity_bytes) == (1 << 20, 2 << 30)
    assert (config.ssd.storage_dir, config.ssd.enabled) == ("/second", False)
    assert config.eviction.policy == "prefix_aware_lru"
    assert config.ssd.durability.mode is mori.UMBPDurabilityMode.Relaxed
    assert config.dram.use_hugepages
    assert config.namespace == "whose"
    assert (config.dram.numa_node, config.dram.prefault) == (1, False)
    wrong = {
        "UMBP_SSD_ENABLED": "perhaps",
        "UMBP_SSD_CAPACITY": "much",
        "UMBP_DRAM_NUMA_NODE": "the first",
        "UMBP_DRAM_PREFAULT": "later",
    }
    for name, value in wrong.items():
        with pytest.raises(ConfigError, match=name):
            mori.UMBPConfig.from_environment({name: value})


@pytest.mark.parametrize("name", sorted(SAME_NAMES))
def test_what_the_original_reads_from_the_environment_is_read_here_too(name: str) -> None:
    """Names that are a key of ours, too: an engine with the `mori` names may have them in its environment."""
    default, chosen = mori.UMBPConfig.from_environment({}), mori.UMBPConfig.from_environment({name: SAME_NAMES[name]})
    assert chosen != default


def test_watermarks_count_when_somebody_chose_them(make: Maker, config: mori.UMBPConfig) -> None:
    """The original's defaults read as they do there; in its local mode they evict nothing, and so here."""
    assert (config.dram.high_watermark, config.ssd.low_watermark) == (0.9, 0.7)
    config.namespace = "a model"
    memory = Memory(12).fill()
    client = make()
    assert client.batch_put_from_ptr(KEYS, memory.ptrs, memory.sizes) == [True] * 12
    assert client.flush()
    client.close()
    chosen = mori.UMBPConfig.from_environment({"UMBP_DRAM_HIGH_WM": "0.5", "UMBP_SSD_LOW_WM": "0.2"})
    assert (chosen.dram.high_watermark, chosen.dram.low_watermark, chosen.ssd.low_watermark) == (0.5, 0.7, 0.2)
    config.ssd.high_watermark, config.ssd.low_watermark = 0.02, 0.01
    again = make()
    again.batch_put_from_ptr(KEYS, memory.ptrs, memory.sizes)
    until(lambda: sum(again.batch_exists(KEYS)) < 12)


def test_external_kv_reaches_a_real_master(make: Maker, config: mori.UMBPConfig, tmp_path: Path) -> None:
    """Before any object was put, as the backend's subscriber does it."""
    with MasterProcess(tmp_path) as master:
        config.distributed = mori.UMBPDistributedConfig()
        config.distributed.master_config.master_address = f"umbp://{master.doors['native']}"
        config.distributed.master_config.node_id = "node"
        config.distributed.master_config.tags = ["role=test"]
        client = make()
        assert client.report_external_kv_blocks(["1", "2"], mori.UMBPTierType.HBM)
        assert client.report_external_kv_blocks(["2"], mori.UMBPTierType.DRAM)
        assert client.flush()
        (match,) = client.match_external_kv(["1", "2", "3"], count_as_hit=True)
        assert match.hashes_by_tier == {mori.UMBPTierType.HBM: ["1", "2"], mori.UMBPTierType.DRAM: ["2"]}
        assert (match.node_id, match.matched_hash_count()) == ("node", 2)
        counts = client.get_external_kv_hit_counts(["1", "3"])
        assert [(each.hash, each.hit_count_total) for each in counts] == [("1", 1)]
        assert client.revoke_external_kv_blocks(["1"], mori.UMBPTierType.HBM)
        assert client.revoke_all_external_kv_blocks_at_tier(mori.UMBPTierType.DRAM)
        assert client.flush()
        (match,) = client.match_external_kv(["1", "2"])
        assert match.hashes_by_tier == {mori.UMBPTierType.HBM: ["2"]}
        assert client.clear()
        assert client.flush()
        assert client.match_external_kv(["1", "2"]) == []


@pytest.mark.parametrize("backing", list(mori.UMBPHostBufferBacking), ids=lambda each: each.name)
def test_host_memory(backing: mori.UMBPHostBufferBacking) -> None:
    allocator = mori.UMBPHostMemAllocator()
    handle = allocator.alloc(10_000, backing, 2 << 20, -1, False)
    assert handle
    assert handle.mapped_size >= 10_000
    assert handle.ptr % handle.actual_alignment == 0
    demoted = {1: mori.UMBPHostBufferBacking.Anonymous, 3: mori.UMBPHostBufferBacking.AnonymousShm}
    assert handle.actual_backing in (backing, demoted.get(backing))
    ctypes.memset(handle.ptr, 7, 10_000)
    assert ctypes.string_at(handle.ptr, 10_000) == b"\x07" * 10_000
    allocator.free(handle)
    allocator.free(handle)
    assert not handle
    assert not allocator.alloc(1 << 60)


@pytest.fixture
def no_mori(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("mori", "mori.umbp"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
        del sys.modules[name]


def test_install_serves_the_originals_import(no_mori: None) -> None:
    assert mori.install() is mori
    assert mori.install() is mori, "it may be said again"
    assert importlib.import_module("mori.umbp") is mori
    for name in ("mori", "mori.umbp"):
        del sys.modules[name]


def test_install_does_not_hide_the_real_one(no_mori: None) -> None:
    sys.modules["mori"] = ModuleType("mori")
    with pytest.raises(ConfigError, match="mori is installed"):
        mori.install()
