"""One simulated rank: real KV buffers, its own worker connector, and vLLM's own order of calls on it."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from vllm.config import VllmConfig
from vllm.distributed.kv_transfer import kv_transfer_state
from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
from vllm.distributed.kv_transfer.kv_connector.utils import copy_kv_blocks
from vllm.distributed.kv_transfer.kv_connector.v1 import KVConnectorBase_V1, KVConnectorRole
from vllm.forward_context import set_forward_context
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheLayout, MLAAttentionSpec
from vllm.v1.outputs import KVConnectorOutput
from vllm.v1.worker.gpu.kv_connector import ActiveKVConnector
from vllm.v1.worker.kv_connector_model_runner_mixin import KVConnectorModelRunnerMixin
from vllm.v1.worker.utils import allocate_kv_cache

from tests.vllm.harness.model import States, kv_bytes, seed_of

POISON = 0xA5
"""What a block holds between its allocation and the first write of its new owner."""


@dataclass(frozen=True)
class Layer:
    """One layer's KV on one rank, as bytes ``[block, head, offset, content]`` over the rank's allocation."""

    name: str
    group: int
    seed: int
    block_size: int
    cells: npt.NDArray[np.uint8]

    def write(self, blocks: npt.NDArray[np.int64], offsets: npt.NDArray[np.int64], states: States) -> None:
        """Write the KV of positions that lie at ``(block, offset)``."""
        _, heads, _, content = self.cells.shape
        values = kv_bytes(states, self.seed, heads * content).reshape(len(states), heads, content)
        self.cells[blocks, :, offsets, :] = values

    def mismatches(
        self, blocks: npt.NDArray[np.int64], offsets: npt.NDArray[np.int64], states: States
    ) -> npt.NDArray[np.int64]:
        """Indexes of the positions whose bytes are not the model's."""
        _, heads, _, content = self.cells.shape
        wanted = kv_bytes(states, self.seed, heads * content).reshape(len(states), heads, content)
        return np.flatnonzero((self.cells[blocks, :, offsets, :] != wanted).any(axis=(1, 2)))


def _byte_view(view: torch.Tensor) -> npt.NDArray[np.uint8]:
    return view.view(torch.uint8).numpy()


def make_layers(config: KVCacheConfig, tp_rank: int) -> tuple[dict[str, torch.Tensor], list[Layer]]:
    """Allocate one rank's KV cache with vLLM's own allocator; its views by layer name, and as :class:`Layer`."""
    layout = KVCacheLayout[config.kv_cache_layout or "LBHNC"]
    views = allocate_kv_cache(config, torch.device("cpu"), layout)
    layers = []
    for index, group in enumerate(config.kv_cache_groups):
        spec = group.kv_cache_spec
        rank = 0 if isinstance(spec, MLAAttentionSpec) else tp_rank
        for name in group.layer_names:
            seed = seed_of(f"{name} group {index} tp {rank}")
            layers.append(Layer(name, index, seed, spec.block_size, _byte_view(views[name])))
    return views, layers


def object_of(layers: Sequence[Layer], group: int, states: States) -> npt.NDArray[np.uint8]:
    """The bytes of a rank's object of a block of ``group`` with these states; writes over block 1 of ``layers``."""
    own = [layer for layer in layers if layer.group == group]
    offsets = np.arange(len(states))
    for layer in own:
        layer.write(np.full_like(offsets, 1), offsets, states)
    return np.concatenate([np.empty(0, np.uint8), *(layer.cells[1].reshape(-1) for layer in own)])


class SimulatedRank:
    """One rank of the engine.  ``clears_early``: the V2 runner overwrites a step's blocks before all else.

    Which worker-side methods are called, and in which order, is vLLM's own code: the V1 runner's mixin or
    the V2 runner's ``ActiveKVConnector``.  What crosses a process border in a real engine is pickled here.
    """

    clears_early = False

    def __init__(
        self, config: VllmConfig, kv_config: KVCacheConfig, rank: int, v2_runner: bool, deferred_save: bool = False
    ) -> None:
        tp_size = config.parallel_config.tensor_parallel_size
        self.rank = rank
        self.coordinates = (rank // tp_size, rank % tp_size)
        self.config = config
        self.kv_config = kv_config
        self.v2_runner = v2_runner
        self.deferred_save = deferred_save
        self.connector: KVConnectorBase_V1 = KVConnectorFactory.create_connector(
            config=config, role=KVConnectorRole.WORKER, kv_cache_config=kv_config
        )
        self.connector.get_mem_pool_context()
        self.views, self.layers = make_layers(kv_config, rank % tp_size)
        with self._as_transfer_group():
            if v2_runner:
                self._active = ActiveKVConnector(config, self.views)
            else:
                self.connector.register_kv_caches(self.views)
                self.connector.set_host_xfer_buffer_ops(copy_kv_blocks)
        self.handshake: Any = pickle.loads(pickle.dumps(self.connector.get_handshake_metadata()))

    @contextmanager
    def _as_transfer_group(self) -> Iterator[None]:
        """Make this rank's connector the process's one, as it is in a real worker process."""
        previous = kv_transfer_state._KV_CONNECTOR_AGENT
        kv_transfer_state._KV_CONNECTOR_AGENT = self.connector
        try:
            yield
        finally:
            kv_transfer_state._KV_CONNECTOR_AGENT = previous

    def execute(
        self, output: SchedulerOutput, before_writes: Callable[[SimulatedRank], None], forward: Callable[[], None]
    ) -> KVConnectorOutput:
        """Run one step on this rank.

        ``before_writes`` is called when the engine may overwrite reallocated blocks, that is after
        ``handle_preemptions``; ``forward`` reads and writes the KV of the scheduled tokens.
        """
        run = self._execute_v2 if self.v2_runner else self._execute_v1
        with self._as_transfer_group():
            result = run(output, before_writes, forward)
        return pickle.loads(pickle.dumps(result))

    def _forward_context(self, output: SchedulerOutput) -> AbstractContextManager[None]:
        """As a runner sets it: with attention metadata exactly in steps that compute something."""
        metadata = {layer.name: output for layer in self.layers} if output.total_num_scheduled_tokens else None
        return set_forward_context(metadata, self.config)

    def _execute_v1(
        self, output: SchedulerOutput, before_writes: Callable[[SimulatedRank], None], forward: Callable[[], None]
    ) -> KVConnectorOutput:
        self.connector.handle_preemptions(output.kv_connector_metadata)
        before_writes(self)
        mixin = KVConnectorModelRunnerMixin
        # With a draft model the save is finished only after the draft's own forward pass.
        deferred = self.deferred_save and output.total_num_scheduled_tokens > 0
        with (
            self._forward_context(output),
            mixin._get_kv_connector_output(output, defer_finalize=deferred) as result,
        ):
            forward()
        if deferred:
            mixin.finalize_kv_connector()
        return result

    def _execute_v2(
        self, output: SchedulerOutput, before_writes: Callable[[SimulatedRank], None], forward: Callable[[], None]
    ) -> KVConnectorOutput:
        # The V2 runner overwrites nothing between handle_preemptions and the forward pass, and pre_forward
        # contains the former; so poison from a wrapper around it.  With KV of several dtypes it clears before that.
        if self.clears_early:
            before_writes(self)
        original = self.connector.handle_preemptions

        def handle_preemptions(metadata: Any) -> None:
            original(metadata)
            if not self.clears_early:
                before_writes(self)

        self.connector.handle_preemptions = handle_preemptions  # type: ignore[method-assign]
        try:
            if not output.total_num_scheduled_tokens:
                return self._active.no_forward(output).kv_connector_output or KVConnectorOutput()
            with self._forward_context(output):
                names = list(output.num_scheduled_tokens)
                batch = SimpleNamespace(idx_mapping=None, req_ids=names, num_tokens=output.total_num_scheduled_tokens)
                self._active.pre_forward(output, batch)
                forward()
        finally:
            del self.connector.handle_preemptions
        self._active.finish_forward()
        # Sampling, outside the forward context.
        return self._active.post_forward(output.finished_req_ids)

    def layers_of(self, group: int) -> list[Layer]:
        """This rank's layers of one KV group."""
        return [layer for layer in self.layers if layer.group == group]

    def poison(self, blocks: Sequence[int]) -> None:
        """Overwrite whole blocks, as a new owner would."""
        for layer in self.layers:
            layer.cells[list(blocks)] = POISON

    def close(self) -> None:
        """Shut the worker connector down."""
        self.connector.shutdown()
