"""What layer-wise loads build on in the installed vLLM."""

from __future__ import annotations

import ast
import dataclasses
import inspect
from pathlib import Path

import pytest
import vllm
from vllm.config import CUDAGraphMode, ParallelConfig, SchedulerConfig, VllmConfig
from vllm.forward_context import ForwardContext
from vllm.model_executor.layers.attention import kv_transfer_utils
from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import RequestStatus
from vllm.v1.worker.kv_connector_model_runner_mixin import KVConnectorModelRunnerMixin

from umbp_vllm import compat
from umbp_vllm.connector import UmbpConnector

LAYERS = Path(vllm.__file__).parent / "model_executor" / "layers" / "attention"


@pytest.mark.parametrize(
    ("file", "operator", "layer"),
    [
        ("attention.py", "unified_attention_with_output", "Attention"),
        ("mla_attention.py", "unified_mla_attention_with_output", "MLAAttention"),
    ],
)
def test_attention_asks_for_its_layer(file: str, operator: str, layer: str) -> None:
    tree = ast.parse((LAYERS / file).read_text(encoding="utf-8"))
    functions = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}
    decorators = {node.id for node in functions[operator].decorator_list if isinstance(node, ast.Name)}
    assert "maybe_transfer_kv_layer" in decorators
    assert layer in {node.name for node in tree.body if isinstance(node, ast.ClassDef)}


def test_a_replayed_graph_is_recognised() -> None:
    fields = {field.name for field in dataclasses.fields(ForwardContext)}
    assert {"attn_metadata", "cudagraph_runtime_mode"} <= fields
    assert CUDAGraphMode.FULL.name == "FULL"


def test_requests_that_ended_by_themselves_are_recognised() -> None:
    names = {status.name for status in RequestStatus}
    assert names >= compat.ENDS_BY_ITSELF
    others = {"FINISHED_ABORTED", "FINISHED_ERROR", "FINISHED_IGNORED"}
    assert {name for name in names if name.startswith("FINISHED_")} == compat.ENDS_BY_ITSELF | others


def test_engines_that_cannot_take_tokens_back_are_recognised() -> None:
    assert "async_scheduling" in {field.name for field in dataclasses.fields(SchedulerConfig)}
    assert isinstance(VllmConfig.use_v2_model_runner, property)
    assert "speculative_config" in {field.name for field in dataclasses.fields(VllmConfig)}


def test_blocks_can_be_taken_off_the_hash_list() -> None:
    assert list(inspect.signature(BlockPool.evict_blocks).parameters) == ["self", "block_ids"]


def test_the_output_of_a_step_is_told_after_its_failures_are_handled() -> None:
    """Only then is it known what vLLM computes again, and the next step is not scheduled yet."""
    source = inspect.getsource(Scheduler.update_from_output)
    handled = source.index("self._handle_invalid_blocks(")
    assert handled < source.index("self._update_from_kv_xfer_finished(kv_connector_output)")


def test_graphs_leave_attention_out_where_layers_are_awaited() -> None:
    assert UmbpConnector.requires_piecewise_for_cudagraph({"load_mode": "layerwise"})
    assert UmbpConnector.requires_piecewise_for_cudagraph({"store_granularity": "layer"})
    assert not UmbpConnector.requires_piecewise_for_cudagraph({})
    assert not UmbpConnector.requires_piecewise_for_cudagraph({"load_mode": "nonsense"})


def test_a_layer_is_saved_after_it_was_computed_and_the_step_is_told_before() -> None:
    """What stores by layer build on: the metadata is bound, then each layer's KV is written, then the hook comes."""
    hook = inspect.getsource(kv_transfer_utils.maybe_transfer_kv_layer)
    assert hook.index("wait_for_layer_load(") < hook.index("result = func(") < hook.index("save_kv_layer(")
    step = inspect.getsource(KVConnectorModelRunnerMixin._get_kv_connector_output)
    assert step.index("bind_connector_metadata(") < step.index("yield output") < step.index("wait_for_save()")


def test_microbatches_are_recognised() -> None:
    assert {"enable_dbo", "ubatch_size"} <= {field.name for field in dataclasses.fields(ParallelConfig)}
