"""A small, correct connector over a dictionary in each worker: what the harness itself is tested with.

Transfers take a set number of steps instead of time, so that every race is reproducible: a store submitted
in step ``n`` reads its blocks in step ``n + store_steps``, a load writes them in ``n + load_steps``.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from vllm.distributed.kv_transfer.kv_connector.v1 import KVConnectorBase_V1, KVConnectorRole, SupportsHMA
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorMetadata,
    KVConnectorTransferResults,
    KVConnectorWorkerMetadata,
)
from vllm.v1.core.kv_cache_utils import resolve_block_hashes
from vllm.v1.kv_cache_interface import SlidingWindowSpec

Key = tuple[bytes, int]


@dataclass(frozen=True)
class Op:
    """One transfer: the same keys and blocks on every rank."""

    op_id: int
    request_id: str
    load: bool
    copies: tuple[tuple[Key, int], ...]
    """(key, block)."""


@dataclass
class DictMetadata(KVConnectorMetadata):
    """Leader to workers, one step."""

    loads: list[Op]
    stores: list[Op]
    overwritten: set[int]
    """Blocks that have a new owner from this step on."""
    handed_over: set[str]
    """Finished requests whose blocks wait for their stores."""


@dataclass
class DictAcks(KVConnectorWorkerMetadata):
    """Workers to leader."""

    done: Counter[int]
    """Op -> ranks that completed it."""
    bad: set[Key]
    """What could not be loaded."""

    def aggregate(self, other: KVConnectorWorkerMetadata) -> KVConnectorWorkerMetadata:
        assert isinstance(other, DictAcks)
        return DictAcks(self.done + other.done, self.bad | other.bad)


@dataclass
class Tracked:
    """The leader's view of one request."""

    request: Any
    blocks: list[list[int]] = field(default_factory=list)
    local_hit: int = 0
    stored: int = 0
    """Tokens whose blocks are stored or on their way."""
    stores: set[int] = field(default_factory=set)
    load: int | None = None


class DictLeader:
    """The scheduler's half."""

    def __init__(self, kv_config: Any, ranks: int, sync: bool) -> None:
        self.groups = [group.kv_cache_spec for group in kv_config.kv_cache_groups]
        self.block_size = max(spec.block_size for spec in self.groups)
        self.hash_size = kv_config.hash_block_size
        self.ranks = ranks
        self.sync = sync
        self.index: set[Key] = set()
        self.pending: dict[int, Op] = {}
        self.acks: Counter[int] = Counter()
        self.cancelled: set[int] = set()
        self.requests: dict[str, Tracked] = {}
        self.ids = itertools.count(1)
        self.loads: list[Op] = []
        self.stores: list[Op] = []
        self.overwritten: set[int] = set()
        self.handed_over: set[str] = set()

    def key(self, request: Any, group: int, block: int) -> Key:
        hashes = resolve_block_hashes(request.block_hashes, self.hash_size, self.groups[group].block_size)
        return bytes(hashes[block]), group

    def usable(self, request: Any, group: int, blocks: int) -> bool:
        """Whether this group can resume after ``blocks`` blocks."""
        spec = self.groups[group]
        first = 0
        if isinstance(spec, SlidingWindowSpec):
            first = max(0, blocks * spec.block_size - spec.sliding_window + 1) // spec.block_size
        return all(self.key(request, group, block) in self.index for block in range(first, blocks))

    def match(self, request: Any, computed: int) -> tuple[int, bool]:
        tracked = self.requests.setdefault(request.request_id, Tracked(request))
        tracked.local_hit = computed
        limit = request.num_tokens - 1 if self.sync else request.num_tokens
        for blocks in range(limit // self.block_size, computed // self.block_size, -1):
            if all(self.usable(request, group, blocks) for group in range(len(self.groups))):
                return blocks * self.block_size - computed, not self.sync
        return 0, False

    def allocated(self, request: Any, blocks: tuple[list[int], ...], count: int) -> None:
        tracked = self.requests.setdefault(request.request_id, Tracked(request))
        if not count:
            return
        tracked.blocks = [list(group) for group in blocks]
        end = tracked.local_hit + count
        copies = [
            (self.key(request, group, index), table[index])
            for group, table in enumerate(tracked.blocks)
            for index in range(tracked.local_hit // self.block_size, end // self.block_size)
            if table[index]
        ]
        op = Op(next(self.ids), request.request_id, True, tuple(copies))
        self.pending[op.op_id] = op
        self.overwritten.update(block for _, block in copies)
        self.loads.append(op)
        tracked.load = op.op_id
        tracked.stored = end

    def build(self, output: Any) -> DictMetadata:
        for request_id in output.preempted_req_ids or ():
            if request_id in self.requests:
                request = self.requests[request_id].request
                fresh = Tracked(request, local_hit=self.requests[request_id].local_hit)
                fresh.load = self.requests[request_id].load
                self.requests[request_id] = fresh
        for new in output.scheduled_new_reqs:
            self.take_table(self.requests[new.req_id], new.block_ids)
            self.overwritten.update(block for group in new.block_ids for block in group)
        cached = output.scheduled_cached_reqs
        for request_id, added in zip(cached.req_ids, cached.new_block_ids, strict=True):
            tracked = self.requests[request_id]
            if request_id in cached.resumed_req_ids or not tracked.blocks:
                tracked.blocks = [[] for _ in self.groups]
            for table, ids in zip(tracked.blocks, added or (), strict=False):
                table.extend(ids)
                self.overwritten.update(ids)
        for request_id, count in output.num_scheduled_tokens.items():
            self.store_full_blocks(self.requests[request_id], count)
        metadata = DictMetadata(self.loads, self.stores, self.overwritten, self.handed_over)
        self.loads, self.stores, self.overwritten, self.handed_over = [], [], set(), set()
        return metadata

    def take_table(self, tracked: Tracked, table: tuple[list[int], ...]) -> None:
        """The complete block table of a request that is scheduled for the first time, or again."""
        tracked.blocks = [list(group) for group in table]

    def store_full_blocks(self, tracked: Tracked, count: int) -> None:
        request = tracked.request
        # Drafts and tokens of batches in flight are not known yet; only known tokens have a hash.
        known = min(request.num_computed_tokens + count, request.num_tokens) // self.block_size * self.block_size
        copies = []
        for group, table in enumerate(tracked.blocks):
            for index in range(tracked.stored // self.block_size, known // self.block_size):
                key = self.key(request, group, index)
                if table[index] and key not in self.index:
                    copies.append((key, table[index]))
        tracked.stored = max(tracked.stored, known)
        if copies:
            op = Op(next(self.ids), request.request_id, False, tuple(copies))
            self.pending[op.op_id] = op
            tracked.stores.add(op.op_id)
            self.stores.append(op)

    def acknowledged(self, done: Counter[int], bad: set[Key]) -> None:
        self.index -= bad
        self.acks.update(done)
        for op_id in [op_id for op_id in done if self.acks[op_id] >= self.ranks]:
            op = self.pending.pop(op_id)
            del self.acks[op_id]
            tracked = self.requests.get(op.request_id)
            if tracked is not None:
                tracked.stores.discard(op_id)
                tracked.load = None if tracked.load == op_id else tracked.load
            if not op.load and op_id not in self.cancelled:
                self.index.update(key for key, _ in op.copies)
            self.cancelled.discard(op_id)

    def finished(self, request_id: str) -> bool:
        tracked = self.requests.pop(request_id, None)
        if tracked is None or not tracked.stores or tracked.load is not None:
            return False
        self.handed_over.add(request_id)
        return True

    def reset(self) -> bool:
        self.index.clear()
        self.cancelled.update(op_id for op_id, op in self.pending.items() if not op.load)
        return True


class DictWorker:
    """One rank's half."""

    def __init__(self, store_steps: int, load_steps: int, groups: int) -> None:
        self.store_steps, self.load_steps, self.group_count = store_steps, load_steps, groups
        self.objects: dict[Key, list[torch.Tensor]] = {}
        self.layers: list[list[torch.Tensor]] = []
        self.waiting: list[tuple[int, Op]] = []
        self.done: Counter[int] = Counter()
        self.received: set[str] = set()
        self.failed: set[str] = set()
        self.invalid: set[int] = set()
        self.handed_over: set[str] = set()
        self.bad: set[Key] = set()
        self.fails: Callable[[Key], bool] = lambda key: False

    def flush(self, overwritten: set[int]) -> None:
        """Finish the stores that read blocks which get a new owner."""
        for item in list(self.waiting):
            op = item[1]
            if not op.load and overwritten.intersection(block for _, block in op.copies):
                self.waiting.remove(item)
                self.run(op)

    def submit(self, ops: list[Op], steps: int) -> None:
        self.waiting.extend((steps, op) for op in ops)

    def tick(self) -> None:
        due = [op for steps, op in self.waiting if steps <= 0]
        self.waiting = [(steps - 1, op) for steps, op in self.waiting if steps > 0]
        for op in due:
            self.run(op)

    def run(self, op: Op) -> None:
        for key, block in op.copies:
            tensors = self.layers[key[1]]
            if not op.load:
                self.objects[key] = [tensor[block].clone() for tensor in tensors]
            elif self.fails(key):
                self.bad.add(key)
                self.fail(op, block)
            else:
                for tensor, stored in zip(tensors, self.objects[key], strict=True):
                    tensor[block] = stored
        self.done[op.op_id] += 1
        if op.load:
            self.received.add(op.request_id)

    def fail(self, op: Op, block: int) -> None:
        if self.group_count > 1:
            self.failed.add(op.request_id)
        else:
            self.invalid.add(block)

    def results(self, asynchronous: bool) -> KVConnectorTransferResults:
        busy = {op.request_id for _, op in self.waiting if not op.load}
        sent = self.handed_over - busy
        self.handed_over &= busy
        received, self.received = (self.received if asynchronous else set()), set()
        failed, self.failed = self.failed, set()
        return KVConnectorTransferResults(sent, received, failed)


class DictConnector(KVConnectorBase_V1, SupportsHMA):
    """The facade that vLLM sees.  ``extra``: ``sync``, ``store_steps``, ``load_steps``."""

    leader_class = DictLeader
    worker_class = DictWorker

    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        extra = vllm_config.kv_transfer_config.kv_connector_extra_config
        self.sync = bool(extra.get("sync", False))
        parallel = vllm_config.parallel_config
        if role == KVConnectorRole.SCHEDULER:
            ranks = parallel.tensor_parallel_size * parallel.pipeline_parallel_size
            self.leader = self.leader_class(kv_cache_config, ranks, self.sync)
        else:
            load_steps = 0 if self.sync else int(extra.get("load_steps", 1))
            groups = len(kv_cache_config.kv_cache_groups)
            self.worker = self.worker_class(int(extra.get("store_steps", 1)), load_steps, groups)

    @property
    def requires_kv_delivery(self) -> bool:
        return False

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int | None, bool]:
        return self.leader.match(request, num_computed_tokens)

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        self.leader.allocated(request, blocks.get_block_ids(), num_external_tokens)

    def build_connector_meta(self, scheduler_output: Any) -> KVConnectorMetadata:
        return self.leader.build(scheduler_output)

    def update_connector_output(self, connector_output: Any) -> None:
        if connector_output.kv_connector_worker_meta is not None:
            acks = connector_output.kv_connector_worker_meta
            self.leader.acknowledged(acks.done, acks.bad)

    def request_finished_all_groups(self, request: Any, block_ids: tuple[list[int], ...]) -> tuple[bool, None]:
        return self.leader.finished(request.request_id), None

    def has_pending_push_work(self) -> bool:
        return bool(self.leader.pending)

    def reset_cache(self) -> bool | None:
        return self.leader.reset()

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        self.worker.layers = [
            [kv_caches[name] for name in group.layer_names] for group in self._kv_cache_config.kv_cache_groups
        ]

    def handle_preemptions(self, kv_connector_metadata: Any) -> None:
        self.worker.flush(kv_connector_metadata.overwritten)

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        metadata = self._get_connector_metadata()
        assert isinstance(metadata, DictMetadata)
        if self.sync:
            for op in metadata.loads:
                self.worker.run(op)
        else:
            self.worker.submit(metadata.loads, self.worker.load_steps)

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Loads are complete before the forward pass starts, or of no concern to it."""

    def save_kv_layer(self, layer_name: str, kv_layer: Any, attn_metadata: Any, **kwargs: Any) -> None:
        """Whole blocks are stored after the forward pass."""

    def wait_for_save(self) -> None:
        metadata = self._get_connector_metadata()
        assert isinstance(metadata, DictMetadata)
        self.worker.submit(metadata.stores, self.worker.store_steps)
        self.worker.handed_over |= metadata.handed_over
        self.worker.tick()

    def get_transfer_results(self, finished_req_ids: set[str]) -> KVConnectorTransferResults:
        return self.worker.results(not self.sync)

    def get_block_ids_with_load_errors(self) -> set[int]:
        invalid, self.worker.invalid = self.worker.invalid, set()
        return invalid

    def build_connector_worker_meta(self) -> KVConnectorWorkerMetadata | None:
        done, self.worker.done = self.worker.done, Counter()
        bad, self.worker.bad = self.worker.bad, set()
        return DictAcks(done, bad) if done else None
