"""The leader's store side: which blocks of a step go to the pool."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import msgspec

from umbp_connectors.leader.demotions import DemotionQueue
from umbp_connectors.leader.ledger import OpLedger, Verdict
from umbp_core.ops import BlockCopy, Direction, LeaderTransferRequest, OpStatus, Requirement, RequirementKind
from umbp_core.tiers import Tier
from umbp_vllm.directories import Written
from umbp_vllm.events import EventLog
from umbp_vllm.groups import KvGroup
from umbp_vllm.hbm import NULL_BLOCK, BlockTables, HeldBlocks
from umbp_vllm.offload import NO_GATES, Gates
from umbp_vllm.requests import NEVER, RequestState
from umbp_vllm.stats import UmbpStats

BLOCKS_PER_OP = 64
"""Small enough that a load never waits long behind a store, large enough that an op costs nothing."""


@dataclass(frozen=True, slots=True)
class StorePolicy:
    """What the configuration says about stores."""

    timeout_s: float
    max_pending_blocks: int
    decode_blocks: bool
    by_layer: bool = False
    """Whether a step's stores begin with its first layer."""


_FullBlocks: TypeAlias = "tuple[RequestState, KvGroup, int, Sequence[bytes]]"
"""Blocks of one request and group that got full: the index of the first, and the keys of all."""


class _NewBlock(msgspec.Struct, frozen=True):
    """A full block that the pool does not have."""

    state: RequestState
    group: KvGroup
    index: int
    key: bytes
    hbm_block: int


class _Batch(msgspec.Struct):
    """What one op stores, how deep each block lies in its chain, and for whom, until the op has ended."""

    blocks: list[BlockCopy] = []
    depths: list[int] = []
    states: list[RequestState] = []
    priorities: list[int] = []
    """Of each block, where somebody asks for them."""
    void: bool = False


class StorePlanner:
    """Plans stores and takes their ends.  Scheduler thread only; never waits.

    The blocks that requests fill in one step are stored together: they wait for the same step, and one op of many
    blocks costs scheduler and workers what one of a single block does.
    """

    def __init__(
        self,
        directory: Written,
        groups: Sequence[KvGroup],
        object_bytes: Sequence[int],
        policy: StorePolicy,
        held: HeldBlocks,
        tables: BlockTables,
        ledger: OpLedger,
        demotions: DemotionQueue | None,
        events: EventLog,
        stats: UmbpStats,
        new_op_id: Callable[[], str],
        gates: Gates = NO_GATES,
    ) -> None:
        self._directory = directory
        self._groups = groups
        self._object_bytes = object_bytes
        self._policy = policy
        self._held = held
        self._tables = tables
        self._ledger = ledger
        self._demotions = demotions
        self._events = events
        self._stats = stats
        self._new_op_id = new_op_id
        self._gate = gates.stores
        self._demotion_gate = gates.demotions
        self._priorities = gates.priorities
        self._full: list[_FullBlocks] = []
        self._unsent: str | None = None
        self._in_flight: dict[str, _Batch] = {}

    def collect(self, state: RequestState, computed: int) -> None:
        """Decide about the blocks that are full once ``computed`` tokens are; :meth:`flush` sends them.

        Every block is decided once, and ``state.next_full`` says when there is more to decide.  What is in the pool or
        on its way there is not copied again; what finds no room is dropped and counted.
        """
        if not self._held.bound:
            return
        request = state.request
        limit = min(computed, request.num_tokens)
        if not self._policy.decode_blocks:
            limit = min(limit, request.num_prompt_tokens)
        next_full = NEVER
        for group in self._groups:
            first = state.evaluated[group.index]
            full = (limit - group.volatile_tail) // group.block_tokens
            if full > first:
                keys = state.keys.of(group)[first:full]
                self._full.append((state, group, first, keys))
                first += len(keys)
                state.evaluated[group.index] = first
            next_full = min(next_full, (first + 1) * group.block_tokens + group.volatile_tail)
        state.next_full = next_full

    def flush(self, iteration: int, ops: list[LeaderTransferRequest], *, ahead: bool = False) -> None:
        """Send what was collected: add its ops, which wait until step ``iteration`` has ended, to ``ops``.

        With ``ahead`` the step is still to come: where stores go by layer, they then wait for its first layer only.
        From here on their HBM blocks are held.
        """
        if not self._full:
            return
        full, self._full = self._full, []
        new = self._new_blocks(full)
        if not new:
            return
        room = max(0, self._policy.max_pending_blocks - self._ledger.blocks_in_flight(Direction.STORE))
        if len(new) > room:
            self._stats.add("vllm:umbp_dropped_stores", len(new) - room, "backlog")
            del new[room:]
        requirement = Requirement(RequirementKind.ITERATION_COMPLETE, iteration)
        if ahead and self._policy.by_layer:
            requirement = Requirement(RequirementKind.LAYER_COMPLETE, iteration, layer_index=0)
        for start in range(0, len(new), BLOCKS_PER_OP):
            self._send(new[start : start + BLOCKS_PER_OP], requirement, ops)

    def _new_blocks(self, full: Sequence[_FullBlocks]) -> list[_NewBlock]:
        """Those that are to be stored, with where they are in HBM."""
        new: list[_NewBlock] = []
        decided = self._left_out(full)
        if all(decided):
            return new
        end = 0
        for state, group, first, keys in full:
            left_out = decided[end : end + len(keys)]
            end += len(keys)
            if all(left_out):  # such as the prefix that a request has just loaded
                continue
            table = iter(self._tables.blocks(state.request.request_id, group.index, first, first + len(keys)))
            for index, key in enumerate(keys, first):
                hbm_block = next(table, NULL_BLOCK)
                if not left_out[index - first] and hbm_block != NULL_BLOCK:
                    new.append(_NewBlock(state, group, index, key, hbm_block))
        return new

    def _left_out(self, full: Sequence[_FullBlocks]) -> list[bool]:
        """For each block whether it is not to be stored: a tier has it, or the gate refuses it."""
        if self._gate is None:
            return self._directory.contains_many([key for _, _, _, keys in full for key in keys])
        return [out for blocks in full for out in self._gate.left_out(*blocks)]

    def _send(self, new: Sequence[_NewBlock], requirement: Requirement, ops: list[LeaderTransferRequest]) -> None:
        op_id = self._unsent = self._new_op_id()
        batch = self._in_flight[op_id] = _Batch()
        wanted = [(block.key, self._object_bytes[block.group.index], block.index) for block in new]
        places = self._directory.reserve_many(op_id, wanted, Tier.DRAM)
        last = None
        for block, pages in zip(new, places, strict=True):
            if pages is None:
                self._refused(block.key)
                continue
            state = block.state
            if state is not last:
                state.slot.begin_store(op_id)
                batch.states.append(state)
                last = state
            if self._events.enabled:
                self._events.remember(state.request, block.group, block.index, block.key)
            batch.blocks.append(BlockCopy(block.key, block.group.index, block.hbm_block, pages[0]))
            batch.depths.append(block.index)
        if self._priorities is not None:
            stored = [block for block, pages in zip(new, places, strict=True) if pages is not None]
            batch.priorities = [self._priorities.of(each.state, each.group, [each.index])[0] for each in stored]
        if batch.blocks:
            self._held.hold(op_id, [block.hbm_block for block in batch.blocks])
            op = LeaderTransferRequest(
                op_id=op_id,
                request_id=batch.states[0].request.request_id if len(batch.states) == 1 else "",
                direction=Direction.STORE,
                blocks=tuple(batch.blocks),
                requirement=requirement,
                timeout_s=self._policy.timeout_s,
            )
            self._ledger.open(op)
            ops.append(op)
        else:
            del self._in_flight[op_id]
        self._unsent = None

    def _refused(self, key: bytes) -> None:
        """Another request's op brings the block already, or there is no page for it."""
        if not self._directory.is_present_or_pending(key, Tier.DRAM):
            self._stats.add("vllm:umbp_dropped_stores", 1, "no_room")

    def give_up_unsent(self) -> list[RequestState]:
        """Forget what was collected and never sent, because something in between went wrong; whose it was.

        Its HBM blocks need not be held, so from the next step on they may be somebody else's.
        """
        self._full.clear()
        op_id, self._unsent = self._unsent, None
        batch = self._in_flight.pop(op_id, None) if op_id is not None else None
        if op_id is None or batch is None:
            return []
        self._directory.abort_owner(op_id)
        self._held.release(op_id)
        for block in batch.blocks:
            self._events.forget(block.key)
        for state in batch.states:
            state.slot.op_ended(op_id, OpStatus.CANCELLED)
        return batch.states

    def ended(self, verdict: Verdict) -> Iterable[RequestState]:
        """Take the end of a store: publishes what every rank holds; returns the requests it was for.

        What the op still owns afterwards (pages not published, HBM blocks) is for the caller to release.
        """
        op_id, blocks = verdict.op.op_id, verdict.op.blocks
        batch = self._in_flight.pop(op_id, None)
        if batch is None:
            return ()
        written = {block.key: checksum for block, checksum in zip(blocks, verdict.checksums(), strict=True)}
        for index in range(len(blocks)) if batch.void else verdict.failed:
            del written[blocks[index].key]
            self._events.forget(blocks[index].key)
        self._directory.commit_many(op_id, written, Tier.DRAM)
        if self._priorities is not None:
            keys = [block.key for block in blocks]
            self._directory.prioritise(dict(zip(keys, batch.priorities, strict=True)), Tier.DRAM)
        if self._demotions is not None:
            admitted: Container[bytes] = written
            if self._demotion_gate is not None:
                admitted = self._demotion_gate.admitted([block.key for block in blocks], batch.priorities)
            for block, depth in zip(blocks, batch.depths, strict=True):
                if block.key in admitted:
                    self._demotions.offer(block.key, block.group, depth)
        for reason in verdict.reasons:
            self._stats.add("vllm:umbp_failed_blocks", len(verdict.failed), "store", reason)
        for state in batch.states:
            state.slot.op_ended(op_id, verdict.status)
        return batch.states

    def void_in_flight(self) -> None:
        """What is on its way was computed before a cache reset and must not be published."""
        self._full.clear()
        for batch in self._in_flight.values():
            batch.void = True
