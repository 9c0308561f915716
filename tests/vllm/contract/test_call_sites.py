"""The places in the installed vLLM that call us or that we use, looked up in its source and its classes."""

from __future__ import annotations

import ast
import dataclasses
import inspect
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import vllm

from tests.vllm.contract.releases import ADDED, installed_release
from umbp_vllm import compat
from umbp_vllm.connector import UmbpConnector

PACKAGE = Path(vllm.__file__).parent
LOOK = "vLLM {version} calls connectors differently in {file}: {what}. Read the place, then correct the table here."

CALLERS: dict[str, tuple[set[str], set[str]]] = {
    "v1/core/sched/scheduler.py": (
        {"self.connector", "connector"},
        {
            "bind_kv_cache_manager",
            "build_connector_meta",
            "get_external_cache_hit_sources",
            "get_kv_connector_stats",
            "get_loaded_kv_cache_group_ids",
            "get_num_new_matched_tokens",
            "has_pending_block_frees",
            "has_pending_push_work",
            "on_new_request",
            "register_finished_partial_tail",
            "request_finished",
            "request_finished_all_groups",
            "reset_cache",
            "shutdown",
            "take_events",
            "update_connector_output",
            "update_state_after_alloc",
        },
    ),
    "v1/worker/kv_connector_model_runner_mixin.py": (
        {"kv_connector"},
        {
            "bind_connector_metadata",
            "build_connector_worker_meta",
            "clear_connector_metadata",
            "get_block_ids_with_load_errors",
            "get_kv_connector_kv_cache_events",
            "get_kv_connector_stats",
            "get_transfer_results",
            "start_load_kv",
            "wait_for_save",
        },
    ),
    "v1/worker/gpu/kv_connector.py": (
        {"self.kv_connector"},
        {
            "bind_connector_metadata",
            "build_connector_worker_meta",
            "clear_connector_metadata",
            "finish_forward",
            "get_block_ids_with_load_errors",
            "get_kv_connector_kv_cache_events",
            "get_kv_connector_stats",
            "get_transfer_results",
            "handle_preemptions",
            "register_kv_caches",
            "reset_capture_state",
            "set_host_xfer_buffer_ops",
            "start_load_kv",
            "wait_for_save",
        },
    ),
    "v1/worker/gpu_model_runner.py": ({"get_kv_transfer_group()"}, {"handle_preemptions"}),
    "v1/worker/gpu_worker.py": (
        {"get_kv_transfer_group()"},
        {"get_mem_pool_context", "restore_kv_caches", "unregister_kv_caches"},
    ),
}
"""File -> (what the connector is called there, the methods called); as of 0.33."""
ONCE: dict[str, dict[str, tuple[int, int]]] = {
    "v1/core/sched/scheduler.py": {"bind_gpu_block_pool": (0, 30)},
    "v1/worker/kv_connector_model_runner_mixin.py": {"get_finished": (0, 30)},
    "v1/worker/gpu/kv_connector.py": {"get_finished": (0, 30)},
}
"""File -> what was called there besides, and the first version that does not."""


def expected_calls(file: str, release: tuple[int, int]) -> set[str]:
    """The methods that vLLM of this version calls in ``file``."""
    still = {name for name, until in ONCE.get(file, {}).items() if release < until}
    return still | {name for name in CALLERS[file][1] if ADDED.get(name, (0, 0)) <= release}


def calls(file: str, names: set[str]) -> list[ast.Call]:
    tree = ast.parse((PACKAGE / file).read_text())
    found = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)]
    return [call for call in found if ast.unparse(call.func.value) in names]  # type: ignore[attr-defined]


@pytest.mark.parametrize("file", CALLERS)
def test_vllm_calls_the_methods_we_know(file: str) -> None:
    names, expected = CALLERS[file][0], expected_calls(file, installed_release())
    members = set(dir(compat.KVConnectorBase_V1)) | set(dir(compat.SupportsHMA))
    found = {call.func.attr for call in calls(file, names)} & members  # type: ignore[attr-defined]
    version = compat.vllm_version()
    assert found == expected, LOOK.format(version=version, file=file, what=sorted(found ^ expected))


@pytest.mark.parametrize("file", CALLERS)
def test_every_call_fits_our_methods(file: str) -> None:
    names, expected = CALLERS[file][0], expected_calls(file, installed_release())
    bound = 0
    for call in calls(file, names):
        name = call.func.attr  # type: ignore[attr-defined]
        if name not in expected or any(isinstance(argument, ast.Starred) for argument in call.args):
            continue
        keywords = {keyword.arg: None for keyword in call.keywords if keyword.arg is not None}
        inspect.signature(getattr(UmbpConnector, name)).bind(None, *call.args, **keywords)
        bound += 1
    assert bound >= len(expected)


def test_the_factory_is_as_register_needs_it() -> None:
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

    register = inspect.signature(KVConnectorFactory.register_connector)
    assert list(register.parameters) == ["name", "module_path", "class_name"]
    assert isinstance(KVConnectorFactory._registry, dict)
    assert list(inspect.signature(KVConnectorFactory.create_connector).parameters) == [
        "config",
        "role",
        "kv_cache_config",
    ]


def test_the_transfer_config_has_the_fields_we_use() -> None:
    from vllm.config import KVTransferConfig

    fields = {field.name: field for field in dataclasses.fields(KVTransferConfig)}
    assert fields.keys() >= {"kv_connector", "kv_role", "kv_connector_extra_config", "engine_id"}
    assert set(get_args(get_type_hints(KVTransferConfig)["kv_load_failure_policy"])) == {"recompute", "fail"}
    config = KVTransferConfig(kv_connector="umbp", kv_role="kv_both")
    assert config.is_kv_producer
    assert config.is_kv_consumer
    assert config.kv_connector_extra_config == {}


def test_the_scheduler_reads_the_failure_policy_after_it_made_the_connector() -> None:
    # Our connector's constructor sets the policy on the object that the scheduler reads it from.
    source = (PACKAGE / "v1/core/sched/scheduler.py").read_text()
    created = source.index("KVConnectorFactory.create_connector(")
    assert created < source.index(".kv_load_failure_policy")


FIELDS: dict[str, set[str]] = {
    "vllm.v1.outputs.KVConnectorOutput": {
        "finished_sending",
        "finished_recving",
        "failed_recving",
        "invalid_block_ids",
        "kv_connector_worker_meta",
    },
    "vllm.v1.core.sched.output.SchedulerOutput": {
        "scheduled_new_reqs",
        "scheduled_cached_reqs",
        "num_scheduled_tokens",
        "preempted_req_ids",
        "finished_req_ids",
    },
    "vllm.v1.core.sched.output.NewRequestData": {"req_id", "block_ids", "num_computed_tokens"},
    "vllm.v1.core.sched.output.CachedRequestData": {
        "req_ids",
        "resumed_req_ids",
        "new_block_ids",
        "num_computed_tokens",
    },
    "vllm.v1.kv_cache_interface.KVCacheConfig": {"num_blocks", "kv_cache_tensors", "kv_cache_groups"},
    "vllm.v1.kv_cache_interface.KVCacheGroupSpec": {"layer_names", "kv_cache_spec", "is_eagle_group"},
    "vllm.config.ParallelConfig": {"tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size", "rank"},
    "vllm.config.CacheConfig": {"enable_prefix_caching", "prefix_caching_hash_algo", "block_size", "cache_dtype"},
}

NEWER_FIELDS = {"failed_recving": (0, 30)}


def resolved(path: str) -> Any:
    module, _, name = path.rpartition(".")
    return getattr(__import__(module, fromlist=[name]), name)


@pytest.mark.parametrize("path", FIELDS)
def test_the_data_we_read_has_its_fields(path: str) -> None:
    wanted = {name for name in FIELDS[path] if NEWER_FIELDS.get(name, (0, 0)) <= installed_release()}
    assert {field.name for field in dataclasses.fields(resolved(path))} >= wanted


METHODS: dict[str, list[str]] = {
    "vllm.v1.core.block_pool.BlockPool.touch": ["self", "blocks"],
    "vllm.v1.core.block_pool.BlockPool.free_blocks": ["self", "ordered_blocks"],
    "vllm.v1.core.block_pool.BlockPool.reset_prefix_cache": ["self"],
    "vllm.v1.core.kv_cache_manager.KVCacheManager.get_blocks": ["self", "request_id"],
}


@pytest.mark.parametrize("path", METHODS)
def test_the_methods_we_call_take_what_we_give(path: str) -> None:
    owner, _, name = path.rpartition(".")
    parameters = inspect.signature(getattr(resolved(owner), name)).parameters
    mandatory = [key for key, value in parameters.items() if value.default is value.empty]
    assert mandatory[: len(METHODS[path])] == METHODS[path]
    assert len(mandatory) <= len(METHODS[path])


def test_a_request_tells_what_we_ask_it() -> None:
    from vllm.sampling_params import SamplingParams
    from vllm.v1.request import Request

    request = Request(
        request_id="r", prompt_token_ids=[1, 2, 3], sampling_params=SamplingParams(max_tokens=1), pooling_params=None
    )
    assert (request.request_id, request.num_tokens, request.num_prompt_tokens) == ("r", 3, 3)
    assert request.num_computed_tokens == 0
    assert list(request.block_hashes) == []
    assert request.skip_reading_prefix_cache is False


def test_hit_sources_are_those_we_report() -> None:
    if compat.CacheHitSource is None:
        assert (compat.release_of(compat.vllm_version()) or (0, 0)) < (0, 32)
    else:
        assert {"HOST", "DISK"} <= set(compat.CacheHitSource.__members__)
