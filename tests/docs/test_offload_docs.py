"""The pages about offload policies and about Dynamo's names say what is there."""

from __future__ import annotations

import re
from pathlib import Path
from types import ModuleType

import pytest

from umbp_connectors.config import KEYS, UmbpConfig, resolve
from umbp_connectors.doctor.dynamo import MEANINGS, environment
from umbp_connectors.doctor.findings import Status
from umbp_connectors.hookspecs import OffloadSpec
from umbp_connectors.plugins import create_manager
from umbp_core.offload import DEFAULT_PRIORITY, OffloadRun
from umbp_core.tiers import Tier

DOCS = Path(__file__).resolve().parents[2] / "docs"
OFFLOAD = (DOCS / "offload.md").read_text(encoding="utf-8")
FROM_DYNAMO = (DOCS / "from-dynamo.md").read_text(encoding="utf-8")
METRICS = (DOCS / "metrics.md").read_text(encoding="utf-8")

VARIABLES = """
    CPU_CACHE_GB CPU_CACHE_OVERRIDE_NUM_BLOCKS DISK_CACHE_GB DISK_CACHE_OVERRIDE_NUM_BLOCKS DISK_CACHE_DIR
    DISK_ALLOCATOR_TYPE DISK_DISABLE_O_DIRECT DISK_ZEROFILL_FALLBACK DISABLE_DISK_OFFLOAD_FILTER
    HOST_OFFLOAD_PREFIX_MIN_PRIORITY MAX_CONCURRENT_TRANSFERS MAX_TRANSFER_BATCH_SIZE TRANSFER_BATCH_SIZE
    DISABLE_WRITE_COMBINED ENABLE_NUMA LEADER_WORKER_INIT_TIMEOUT_SECS LEADER_ZMQ_HOST LEADER_ZMQ_PUB_PORT
    LEADER_ZMQ_ACK_PORT TRTLLM_ZMQ_PORT KV_EVENTS_ENABLE_CONSOLIDATOR KV_EVENTS_CONSOLIDATOR_MODE METRICS METRICS_PORT
    CACHE_STATS_MAX_REQUESTS CACHE_STATS_LOG_INTERVAL_SECS ENABLE_RECORD NCCL_MLA_MODE NCCL_MAX_CTAS
"""
COUNTERS = """
    offload_blocks_d2h offload_blocks_h2d offload_blocks_d2d offload_blocks_d2o onboard_blocks_h2d onboard_blocks_d2d
    onboard_blocks_o2d onboard_blocks_d2h matched_tokens object_read_failures object_write_failures
    offload_bytes_object onboard_bytes_object host_cache_hit_rate disk_cache_hit_rate object_cache_hit_rate
"""


@pytest.mark.statement("connector", 93)
def test_every_variable_of_kvbm_has_a_meaning_or_a_reason() -> None:
    assert set(MEANINGS) == {f"DYN_KVBM_{name}" for name in VARIABLES.split()} | {"DYN_RUNTIME_ENABLED_KVBM"}
    assert all(meaning.setting or meaning.reason for meaning in MEANINGS.values())


@pytest.mark.statement("connector", 93)
@pytest.mark.parametrize("name", [name for name, meaning in MEANINGS.items() if meaning.setting])
def test_what_it_is_translated_to_is_a_configuration(name: str, tmp_path: Path) -> None:
    value = {"DYN_KVBM_DISK_CACHE_DIR": str(tmp_path), "DYN_KVBM_KV_EVENTS_ENABLE_CONSOLIDATOR": "true"}.get(name, "7")
    for setting in (MEANINGS[name].setting, MEANINGS[name].otherwise):
        env = dict(part.split("=") for part in setting.format(value).split())
        config = resolve({}, env).config
        assert set(config.model_fields_set) == {key.removeprefix("UMBP_").lower() for key in env}


@pytest.mark.statement("connector", 93)
def test_the_units_are_theirs() -> None:
    (found,) = environment({"DYN_KVBM_CPU_CACHE_GB": "100", "DYN_KVBM_METRICS": " ", "UMBP_LOG_LEVEL": "info"})
    assert found.status is Status.NOTE
    setting = found.advice.removeprefix("set ")
    assert resolve({}, dict([setting.split("=")])).config.dram_capacity == 100 * 10**9


@pytest.mark.parametrize(
    ("name", "value", "advice"),
    [
        ("DYN_KVBM_DISABLE_DISK_OFFLOAD_FILTER", "true", "set UMBP_SSD_OFFLOAD_POLICY=presence;"),
        ("DYN_KVBM_DISABLE_DISK_OFFLOAD_FILTER", "0", "set UMBP_SSD_OFFLOAD_POLICY=presence,frequency;"),
        ("DYN_KVBM_METRICS", "1", "always on"),
        ("DYN_KVBM_NIXL_BACKEND_UCX", "true", "nothing here"),
    ],
)
def test_the_doctor_says_what_to_set(name: str, value: str, advice: str) -> None:
    (found,) = environment({name: value})
    assert found.topic == name
    assert advice in found.advice


@pytest.mark.statement("connector", 92)
def test_every_metric_of_kvbm_has_its_row_and_ours_exist() -> None:
    rows = dict(re.findall(r"^\| `kvbm_(\w+)` \| (.*) \|$", FROM_DYNAMO, re.MULTILINE))
    assert set(rows) == set(COUNTERS.split())
    named = re.findall(r"(vllm:\w+?)(?:_total)?\b(?=[`{\[])", " ".join([*rows.values(), OFFLOAD]))
    assert len(named) > 10
    assert [name for name in named if f"`{name}`" not in METRICS] == []


def test_the_policies_and_keys_of_the_page_exist() -> None:
    host = create_manager(UmbpConfig(), entries=[])
    spec = OffloadSpec(Tier.HBM, Tier.DRAM, lambda keys: [False] * len(keys))
    names = re.findall(r"^\| `(\w+)` \| (?:always|no tier|it )", OFFLOAD, re.MULTILINE)
    assert names == ["all", "presence", "frequency", "priority"]
    assert all(host.make_offload_policy(name, spec) for name in names)
    keys = set(re.findall(r"`((?:dram_|ssd_)?offload_\w+)`", OFFLOAD))
    assert keys == {key for key in KEYS if "offload" in key}
    assert f"The default is {DEFAULT_PRIORITY}" in OFFLOAD


def test_the_example_is_a_plugin() -> None:
    (source,) = re.findall(r"```python\n(.*?)```", OFFLOAD, re.DOTALL)
    plugin = ModuleType("example")
    exec(compile(source, "docs/offload.md", "exec"), plugin.__dict__)
    host = create_manager(UmbpConfig(dram_offload_policy="presence,short"), entries=[])
    host.register(plugin, "example")
    host.check_offload_policies()
    gate = host.make_offload_gate(
        OffloadSpec(Tier.HBM, Tier.DRAM, lambda keys: [False] * len(keys)), lambda: 0.0, lambda name, blocks: None
    )
    assert gate is not None
    assert list(gate.admit([b"a"])) == [True]
    assert not any(gate.admit([b"%d" % number for number in range(100)]))
    assert OffloadRun([b"a"]).priorities == ()
