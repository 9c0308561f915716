"""The leader's store side: which blocks of a step go to the pool."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from umbp_connectors.leader.demotions import DemotionQueue
from umbp_connectors.leader.ledger import OpLedger, Verdict
from umbp_core.directory import Directory
from umbp_core.ops import BlockCopy, Direction, LeaderTransferRequest, OpStatus, Requirement, RequirementKind
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


@dataclass(slots=True)
class _Batch:
    """The blocks of one op, of one or more requests, while it is put together and until it has ended."""

    op_id: str
    blocks: list[BlockCopy] = field(default_factory=list)
    depths: list[int] = field(default_factory=list)
    states: list[RequestState] = field(default_factory=list)
    void: bool = False


class StorePlanner:
    """Plans stores and takes their ends.  Scheduler thread only; never waits.

    The blocks that requests fill in one step are stored together: they wait for the same step, and one op of many
    blocks costs scheduler and workers what one of a single block does.
    """

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
        new_op_id: Callable[[], str],
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
        self._open: list[_Batch] = []
        self._in_flight: dict[str, _Batch] = {}

    def collect(self, state: RequestState, computed: int, tables: Sequence[Sequence[int]]) -> None:
        """Decide about the blocks that are full once ``computed`` tokens are; :meth:`flush` sends them.

        Every block is decided once.  What is in the pool or on its way there is not copied again; what finds
        no room is dropped and counted.
        """
        if not self._held.bound or not tables:
            return
        prompt_only = not self._policy.decode_blocks
        known_tokens = state.request.num_tokens
        limit = min(computed, state.request.num_prompt_tokens) if prompt_only else computed
        for group in self._groups:
            keys = state.keys.of(group)
            tokens = min(limit, known_tokens) - group.volatile_tail
            full = min(tokens // group.block_tokens, len(keys))
            first = state.evaluated[group.index]
            if full <= first:
                continue
            state.evaluated[group.index] = full
            table = tables[group.index]
            for block in range(first, min(full, len(table))):
                if table[block] != NULL_BLOCK:
                    self._collect_block(state, group, block, keys[block], table[block])

    def _collect_block(self, state: RequestState, group: KvGroup, block: int, key: bytes, hbm_block: int) -> None:
        directory = self._directory
        if directory.tiers_of(key) or directory.is_present_or_pending(key, Tier.DRAM):
            return
        batch = self._batch()
        if self._ledger.blocks_in_flight(Direction.STORE) + len(batch.blocks) >= self._policy.max_pending_blocks:
            self._stats.add("vllm:umbp_dropped_stores", 1, "backlog")
            return
        pages = directory.reserve(batch.op_id, key, Tier.DRAM, self._object_bytes[group.index], block)
        if pages is None:
            self._stats.add("vllm:umbp_dropped_stores", 1, "no_room")
            return
        if not batch.states or batch.states[-1] is not state:
            state.slot.begin_store(batch.op_id)
            batch.states.append(state)
        self._events.remember(state.request, group, block, key)
        batch.blocks.append(BlockCopy(key, group.index, hbm_block, pages[0]))
        batch.depths.append(block)

    def _batch(self) -> _Batch:
        """The batch that is being filled; a new one when there is none or it is full."""
        if not self._open or len(self._open[-1].blocks) >= BLOCKS_PER_OP:
            self._open.append(_Batch(self._new_op_id()))
        return self._open[-1]

    def flush(self, iteration: int) -> list[LeaderTransferRequest]:
        """The ops for what was collected; they wait until step ``iteration`` has ended.

        From here on their HBM blocks are held.
        """
        if not self._open:
            return []
        batches, self._open = self._open, []
        requirement = Requirement(RequirementKind.ITERATION_COMPLETE, iteration)
        return [self._op(batch, requirement) for batch in batches if batch.blocks]

    def give_up_unsent(self) -> list[RequestState]:
        """Forget what was collected and never flushed, because something in between went wrong; whose it was.

        Its HBM blocks are not held, so from the next step on they may be somebody else's.
        """
        batches, self._open = self._open, []
        for batch in batches:
            self._directory.abort_owner(batch.op_id)
            for block in batch.blocks:
                self._events.forget(block.key)
            for state in batch.states:
                state.slot.op_ended(batch.op_id, OpStatus.CANCELLED)
        return [state for batch in batches for state in batch.states]

    def _op(self, batch: _Batch, requirement: Requirement) -> LeaderTransferRequest:
        self._held.hold(batch.op_id, [block.hbm_block for block in batch.blocks])
        self._in_flight[batch.op_id] = batch
        return LeaderTransferRequest(
            op_id=batch.op_id,
            request_id=batch.states[0].request.request_id if len(batch.states) == 1 else "",
            direction=Direction.STORE,
            blocks=tuple(batch.blocks),
            requirement=requirement,
            timeout_s=self._policy.timeout_s,
        )

    def ended(self, verdict: Verdict) -> Iterable[RequestState]:
        """Take the end of a store: publishes what every rank holds; returns the requests it was for.

        What the op still owns afterwards (pages not published, HBM blocks) is for the caller to release.
        """
        op = verdict.op
        batch = self._in_flight.pop(op.op_id, None)
        if batch is None:
            return ()
        for index, block in enumerate(op.blocks):
            if batch.void or index in verdict.failed:
                self._events.forget(block.key)
                continue
            self._directory.commit(op.op_id, block.key, Tier.DRAM, verdict.checksums(index))
            if self._demotions is not None:
                self._demotions.offer(block.key, block.group, batch.depths[index])
        for reason in verdict.reasons:
            self._stats.add("vllm:umbp_failed_blocks", len(verdict.failed), "store", reason)
        for state in batch.states:
            state.slot.op_ended(op.op_id, verdict.status)
        return batch.states

    def void_in_flight(self) -> None:
        """What is on its way was computed before a cache reset and must not be published."""
        for batch in (*self._open, *self._in_flight.values()):
            batch.void = True
