"""The leader's store side: which blocks of a step go to the pool."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from umbp_connectors.leader.demotions import DemotionQueue
from umbp_connectors.leader.ledger import OpLedger, Verdict
from umbp_core.directory import Directory
from umbp_core.ops import BlockCopy, Direction, LeaderTransferRequest, Requirement, RequirementKind
from umbp_core.tiers import Tier
from umbp_vllm.events import EventLog
from umbp_vllm.groups import KvGroup
from umbp_vllm.hbm import NULL_BLOCK, HeldBlocks
from umbp_vllm.requests import RequestState
from umbp_vllm.stats import UmbpStats

BLOCKS_PER_OP = 64
"""Small enough that a load never waits long behind a store, large enough that an op costs nothing."""


@dataclass(frozen=True, slots=True)
class StorePolicy:
    """What the configuration says about stores."""

    timeout_s: float
    max_pending_blocks: int
    decode_blocks: bool


class StorePlanner:
    """Plans stores and takes their ends.  Scheduler thread only; never waits."""

    def __init__(
        self,
        directory: Directory,
        groups: Sequence[KvGroup],
        object_bytes: Sequence[int],
        policy: StorePolicy,
        held: HeldBlocks,
        ledger: OpLedger,
        demotions: DemotionQueue | None,
        events: EventLog,
        stats: UmbpStats,
        *,
        new_op_id: Callable[[], str] = lambda: uuid.uuid4().hex,
    ) -> None:
        self._directory = directory
        self._groups = groups
        self._object_bytes = object_bytes
        self._policy = policy
        self._held = held
        self._ledger = ledger
        self._demotions = demotions
        self._events = events
        self._stats = stats
        self._new_op_id = new_op_id
        self._void: set[str] = set()
        self._depths: dict[str, tuple[int, ...]] = {}

    def plan(
        self, state: RequestState, computed: int, iteration: int, tables: Sequence[Sequence[int]]
    ) -> list[LeaderTransferRequest]:
        """The stores for blocks that are full once ``computed`` tokens are, in step ``iteration``.

        Every block is decided once.  What is in the pool or on its way there is not copied again; what finds
        no room is dropped and counted.
        """
        if not self._held.bound or not tables:
            return []
        wanted = self._newly_full(state, computed)
        ops: list[LeaderTransferRequest] = []
        for start in range(0, len(wanted), BLOCKS_PER_OP):
            op = self._op(state, wanted[start : start + BLOCKS_PER_OP], iteration, tables)
            if op is not None:
                ops.append(op)
        return ops

    def _newly_full(self, state: RequestState, computed: int) -> list[tuple[KvGroup, int]]:
        limit = computed if self._policy.decode_blocks else min(computed, state.request.num_prompt_tokens)
        wanted = []
        for group in self._groups:
            known = len(state.keys.of(group))
            tokens = min(limit, state.request.num_tokens) - group.volatile_tail
            full = min(tokens // group.block_tokens, known)
            wanted += [(group, block) for block in range(state.evaluated[group.index], full)]
            state.evaluated[group.index] = max(full, state.evaluated[group.index])
        return wanted

    def _op(
        self,
        state: RequestState,
        wanted: Sequence[tuple[KvGroup, int]],
        iteration: int,
        tables: Sequence[Sequence[int]],
    ) -> LeaderTransferRequest | None:
        op_id = self._new_op_id()
        blocks: list[BlockCopy] = []
        depths: list[int] = []
        for group, block in wanted:
            copy = self._block(op_id, state, group, block, tables[group.index], len(blocks))
            if copy is not None:
                blocks.append(copy)
                depths.append(block)
        if not blocks:
            return None
        self._held.hold(op_id, [block.hbm_block for block in blocks])
        self._depths[op_id] = tuple(depths)
        state.slot.begin_store(op_id)
        return LeaderTransferRequest(
            op_id=op_id,
            request_id=state.request.request_id,
            direction=Direction.STORE,
            blocks=tuple(blocks),
            requirement=Requirement(RequirementKind.ITERATION_COMPLETE, iteration),
            timeout_s=self._policy.timeout_s,
        )

    def _block(
        self, op_id: str, state: RequestState, group: KvGroup, block: int, table: Sequence[int], planned: int
    ) -> BlockCopy | None:
        key = state.keys.of(group)[block]
        if block >= len(table) or table[block] == NULL_BLOCK:
            return None
        if self._directory.tiers_of(key) or self._directory.is_present_or_pending(key, Tier.DRAM):
            return None
        if self._ledger.blocks_in_flight(Direction.STORE) + planned >= self._policy.max_pending_blocks:
            self._stats.add("vllm:umbp_dropped_stores", 1, "backlog")
            return None
        pages = self._directory.reserve(op_id, key, Tier.DRAM, self._object_bytes[group.index], block)
        if pages is None:
            self._stats.add("vllm:umbp_dropped_stores", 1, "no_room")
            return None
        self._events.remember(state.request, group, block, key)
        return BlockCopy(key=key, group=group.index, hbm_block=table[block], dram_page=pages[0])

    def ended(self, verdict: Verdict, state: RequestState | None) -> None:
        """Take the end of a store: publishes what every rank holds.

        What the op still owns afterwards (pages not published, HBM blocks) is for the caller to release.
        """
        op = verdict.op
        depths = self._depths.pop(op.op_id, ())
        void = op.op_id in self._void
        self._void.discard(op.op_id)
        for index, block in enumerate(op.blocks):
            if void or index in verdict.failed:
                self._events.forget(block.key)
                continue
            self._directory.commit(op.op_id, block.key, Tier.DRAM, verdict.checksums(index))
            if self._demotions is not None:
                self._demotions.offer(block.key, block.group, depths[index])
        for reason in verdict.reasons:
            self._stats.add("vllm:umbp_failed_blocks", len(verdict.failed), "store", reason)
        if state is not None:
            state.slot.op_ended(op.op_id, verdict.status)

    def void_in_flight(self) -> None:
        """What is on its way was computed before a cache reset and must not be published."""
        self._void.update(self._depths)
