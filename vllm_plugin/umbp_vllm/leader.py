"""The scheduler-process half of the connector.

Every method is called by vLLM's scheduler on its own thread and returns without waiting for anything:
lookups are dictionary reads, transfers are decided here and done by the workers.  What a step costs is in
proportion to the requests that come, go or cross a block boundary.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import Any

from umbp_core.errors import StateError, UmbpError
from umbp_core.ops import LeaderTransferRequest, NewWorkerSlot, OpStatus
from umbp_core.ports import Clock
from umbp_core.slots import SlotTable
from umbp_vllm.adapters import Adapters
from umbp_vllm.agenda import Agenda
from umbp_vllm.compat import ended_by_itself, is_running
from umbp_vllm.dump import leader_state
from umbp_vllm.groups import KvGroup
from umbp_vllm.hbm import BlockTables, HeldBlocks
from umbp_vllm.metadata import RankHello, StepMetadata, WorkerReport
from umbp_vllm.opening import LeaderSetup, Opening
from umbp_vllm.pool import LeaderPool
from umbp_vllm.reporting import Reporting
from umbp_vllm.requests import AT_ONCE, NEVER, RequestState
from umbp_vllm.stats import UmbpStats

logger = logging.getLogger("vllm.umbp.leader")


class Leader:
    """Decides what is loaded, stored and demoted, for all ranks of one engine."""

    def __init__(self, setup: LeaderSetup, clock: Clock, reporting: Reporting | None = None) -> None:
        self._setup = setup
        self._reporting = reporting
        self._clock = clock
        self._groups: Sequence[KvGroup] = setup.groups
        self._slots = SlotTable()
        self._requests: dict[str, RequestState] = {}
        self._adapters = Adapters()
        self._agenda = Agenda(setup.tokens_per_step)
        self._lives = 0
        self._hellos: dict[int, RankHello] = {}
        self._pool: LeaderPool | None = None
        self._refused_pool = False
        self._named_missing = False
        self._iteration = 0
        self._unsent = StepMetadata(0)
        self._unsure: list[Sequence[int]] = []
        self.stats = UmbpStats()
        self.held = HeldBlocks()
        self.tables = BlockTables()

    def greet(self, hellos: Iterable[RankHello]) -> None:
        """Take what workers said about themselves; the pool opens when all ranks did."""
        for hello in hellos:
            self._hellos[hello.world_rank] = hello
        if self._pool is None and not self._refused_pool and len(self._hellos) == self._setup.ranks:
            ordered = [self._hellos[rank] for rank in range(self._setup.ranks)]
            opening = Opening(self._setup, ordered, self._clock, self.held, self.tables, self.stats)
            try:
                self._pool = self._setup.open_pool(opening, self._reporting)
            except UmbpError as error:
                self._refused_pool = True
                self.degraded("pool", str(error))

    @property
    def pool(self) -> LeaderPool | None:
        """The pool, once every worker has said hello."""
        return self._pool

    def degraded(self, reason: str, text: str) -> None:
        """Count and log that a part of the service is given up."""
        self.stats.add("vllm:umbp_degraded", 1, reason)
        logger.warning("umbp works in a reduced way (%s): %s", reason, text)

    def shutdown(self) -> None:
        """Write what is known to the catalogue and close it; bounded in time."""
        if self._pool is not None:
            self._pool.close()

    def on_new_request(self, request: Any) -> None:
        """A request arrived; where the daemon has the pool, it is asked from here on.

        Raises ``StateError`` for one without tokens: no block is behind it, and nothing of it can be kept.
        """
        request_id = request.request_id
        if request.num_tokens < 1:
            raise StateError(f"request {request_id} has no tokens; vLLM has to refuse it")
        # Numbered, because an earlier request of this id may be over while its last stores are not.
        self._lives += 1
        slot = self._slots.create(f"{request_id}#{self._lives}")
        self._requests[request_id] = state = RequestState.of(request, slot, self._groups, self._adapters)
        if self._pool is not None and self._setup.may_load:
            self._pool.loads.arrived(state)

    def match(self, request: Any, computed: int) -> tuple[int | None, bool]:
        """Answer ``get_num_new_matched_tokens``: tokens beyond ``computed``, and whether they load asynchronously."""
        state = self._requests.get(request.request_id)
        if state is None or not self._setup.may_load or request.skip_reading_prefix_cache:
            return 0, False
        if self._pool is not None and self._pool.loads.fills_prefix(state, computed):
            self.stats.add("vllm:umbp_lookup_waits", 1, "shared_load")
            return None, False
        now = self._clock()
        if self._pool is None:
            return self._without_pool(state, now), False
        if request.request_id in self._agenda:
            if is_running(request):
                return 0, False
            self._preempted((request.request_id,))
        state.local_tokens = computed
        tokens = self._pool.loads.match(state, computed, now)
        return tokens, bool(tokens) and not state.at_once

    def _without_pool(self, state: RequestState, now: float) -> int | None:
        """Not yet, until the workers' hello came or the time for lookups is over; then a miss."""
        if self._refused_pool:
            return 0
        if state.asked_since is None:
            state.asked_since = now
        if now - state.asked_since < self._setup.lookup_timeout_s:
            self.stats.add("vllm:umbp_lookup_waits", 1, "start")
            return None
        if not self._named_missing:
            self._named_missing = True
            missing = [str(rank) for rank in range(self._setup.ranks) if rank not in self._hellos]
            self.degraded("hello", f"no word yet from the workers of ranks {', '.join(missing)}; no pool without them")
        return 0

    def allocated(self, request: Any, blocks: Any, external_tokens: int) -> None:
        """Take ``update_state_after_alloc``: HBM blocks exist now; start the load if one was promised."""
        state = self._requests.get(request.request_id)
        if self.tables.follows_outputs:
            self.tables.set(request.request_id, blocks.get_block_ids())
        if state is None or self._pool is None:
            if external_tokens:
                raise StateError(f"request {request.request_id}: vLLM loads {external_tokens} tokens never promised")
            return
        if external_tokens == 0:
            self._pool.loads.give_up(state)
            return
        if state.at_once:
            self._load_at_once(self._pool, state, external_tokens, blocks.get_block_ids())
        else:
            op = self._pool.loads.load(state, external_tokens, blocks.get_block_ids())
            self._send(op)
            self._unsent.new_slots.append(NewWorkerSlot(op.request_id, (op.op_id,)))

    def _load_at_once(
        self, pool: LeaderPool, state: RequestState, tokens: int, tables: Sequence[Sequence[int]]
    ) -> None:
        """Load within the step that is being planned; nothing it computes for the request counts before its end.

        The blocks are held: a copy that hangs may outlive the request, and must not find another one's KV there.
        """
        state.unsure_in = self._iteration + 1
        self._unsure += tables
        op = pool.loads.load(state, tokens, tables)
        pool.ledger.open(op)
        self.held.hold(op.op_id, [block.hbm_block for block in op.blocks])
        self._unsent.layerwise.append(op)

    def refuse_load(self, request: Any, tables: Sequence[Sequence[int]]) -> None:
        """The engine waits for a load that cannot be planned: have the workers report it as failed."""
        state = self._requests.get(request.request_id)
        local = state.local_tokens if state is not None else 0
        if state is not None:
            state.may_load = False
        first = self._groups[0]
        blocks = tuple(tables[first.index][local // first.block_tokens :]) if tables else ()
        if state is not None and state.at_once:
            self._unsent.void_blocks += blocks
        else:
            self._unsent.refused_loads.append((request.request_id, blocks))

    def hit_tokens(self, request: Any) -> Mapping[str, int]:
        """Tokens of the request's latest load by tier (``dram``, ``ssd``)."""
        state = self._requests.get(request.request_id)
        return state.hit_tokens if state is not None else {}

    def begin_step(self) -> None:
        """A new engine step; exactly once per ``build_connector_meta``."""
        self._iteration += 1
        self._adapters.take()
        if self._pool is not None:
            self._pool.loads.step_planned()
        else:
            self._unsent.who = not self._refused_pool

    def plan_step(self, output: Any) -> None:
        """Decide the stores and demotions of this step from vLLM's scheduler output."""
        pool = self._pool
        if pool is not None:
            self._retire_finished(pool.stores.give_up_unsent())
        if output.preempted_req_ids:
            self._preempted(output.preempted_req_ids)
        if self.tables.follows_outputs:
            self._follow_tables(output)
        if not self._refused_pool:
            self._look(output)
        if pool is None:
            return
        if pool.ledger.step():
            self._ask(pool)
        pool.loads.expire(self._clock())
        pool.stores.flush(self._iteration, self._unsent.ops, ahead=True)
        for op in pool.plan_demotions():
            self._send(op)
        pool.keep_room()
        pool.settle()

    def _ask(self, pool: LeaderPool) -> None:
        """Ask the ranks about ops that ended nobody knows how; without a rank that is lost the pool is of no use."""
        self._unsent.overdue += pool.ledger.overdue()
        lost, states = pool.give_up_silent()
        for rank in lost:
            self._setup = dataclasses.replace(self._setup, may_load=False, may_store=False)
            self.degraded("rank_lost", f"rank {rank} does not answer; nothing is loaded or stored any more")
        self._retire_finished(states)

    def _look(self, output: Any) -> None:
        """Look at the requests of this step that are new in it or have their next event."""
        scheduled = output.num_scheduled_tokens
        joined, due, left = self._agenda.step(self._iteration, output)
        for request_id in left:
            self._skipped(request_id)
        for request_id in joined:
            state = self._requests.get(request_id)
            if state is None:
                self.stats.add("vllm:umbp_degraded", 1, "unknown_request")
                continue
            self._look_at(state, state.request.num_computed_tokens + scheduled[request_id])
        for request_id in due:
            state = self._requests.get(request_id)
            if state is None or request_id not in scheduled:
                continue
            computed = state.request.num_computed_tokens + scheduled[request_id]
            if computed > state.quiet_until:
                self._look_at(state, computed)
            else:
                self._agenda.meet(request_id, state.quiet_until - computed)
        self._agenda.seen()

    def drain(self) -> StepMetadata:
        """This step's instructions; each op is in exactly one of them."""
        drained, self._unsent = self._unsent, StepMetadata(0)
        drained.iteration = self._iteration
        if self._pool is not None and self._pool.host is not None:
            self._pool.host.stamp(drained)
        return drained

    def _send(self, op: LeaderTransferRequest) -> None:
        if self._pool is not None:
            self._pool.ledger.open(op)
            self._unsent.ops.append(op)

    def _follow_tables(self, output: Any) -> None:
        for new in output.scheduled_new_reqs:
            self.tables.set(new.req_id, new.block_ids)
        cached = output.scheduled_cached_reqs
        for request_id, blocks in zip(cached.req_ids, cached.new_block_ids, strict=True):
            if request_id in cached.resumed_req_ids:
                self.tables.set(request_id, blocks or ())
            else:
                self.tables.extend(request_id, blocks)

    def _skipped(self, request_id: str) -> None:
        state = self._requests.get(request_id)
        if state is not None and state.slot.may_store:
            state.slot.skipped()
            state.quiet_until = AT_ONCE

    def _preempted(self, request_ids: Iterable[str]) -> None:
        for request_id in request_ids:
            self._agenda.leave(request_id)
            state = self._requests.get(request_id)
            if state is not None:
                state.preempted()
                if self._pool is not None:
                    self._pool.loads.forget(state)

    def _look_at(self, state: RequestState, computed: int) -> None:
        """Advance the request's slot, store the blocks that ``computed`` tokens fill, and set its next appointment."""
        request = state.request
        if state.unsure_in == self._iteration:
            self._agenda.meet(request.request_id, 0)
            return
        try:
            state.slot.scheduled(decoding=computed > request.num_prompt_tokens)
            if computed >= state.next_full:
                self._store(state, computed)
        except UmbpError as error:
            state.quiet_until = NEVER
            self.degraded("request", f"request {request.request_id} is not stored any more: {error}")
            return
        self._agenda.meet(request.request_id, state.looked_at(computed))

    def _store(self, state: RequestState, computed: int) -> None:
        if self._pool is not None and self._setup.may_store and state.slot.may_store:
            self._pool.stores.collect(state, computed)

    def step_ended(self, bad_blocks: AbstractSet[int]) -> None:
        """The workers' output of a step is there; ``bad_blocks`` hold nothing.

        vLLM lists the blocks of a layer-wise load, and those computed from them, before they are filled.  It fills
        the bad ones again, unless their request is aborted or preempted before that; so nobody may find them meanwhile.
        """
        tables, self._unsure = self._unsure, []
        for table in tables if bad_blocks else ():
            first = next((index for index, block in enumerate(table) if block in bad_blocks), len(table))
            self.held.unlist(table[first:])

    def take_report(self, report: WorkerReport) -> None:
        """Take what the workers say happened."""
        if report.hellos:
            self.greet(report.hellos.values())
        if self._pool is None:
            return
        if report.missed:
            self.degraded("lost_step", f"ranks did not get what steps told them: {report.missed}")
        self._retire_finished(self._pool.take(report))

    def _retire_finished(self, states: Iterable[RequestState]) -> None:
        for state in states:
            if state.slot.is_finished:
                self._retire(state)

    def finished(self, request: Any) -> None:
        """The engine is done with the request (or aborts it).  Its blocks that are full and not stored yet go now.

        Blocks under a store are held by reference, so vLLM may free the request at once.
        """
        self._agenda.leave(request.request_id)
        state = self._requests.get(request.request_id)
        if state is None:
            return
        if self._pool is not None:
            self._pool.loads.give_up(state)
            self._pool.loads.forget(state)
            if state.loading is not None and state.at_once and ended_by_itself(request):
                # vLLM hands out no token of a step in which a load failed, so this one did not, on any rank.
                state.slot.op_ended(state.loading, OpStatus.DONE)
                state.slot.scheduled(decoding=False)
            elif state.loading is not None:
                self._unsent.cancels.append(state.loading)
            if request.num_computed_tokens >= state.next_full:
                self._store(state, request.num_computed_tokens)
            self._pool.stores.flush(self._iteration, self._unsent.ops)
        state.slot.finish()
        if state.slot.is_finished:
            self._retire(state)

    def _retire(self, state: RequestState) -> None:
        """Forget a request that is over and whose last op has ended."""
        self._slots.remove(state.slot.request_id)
        request_id = state.request.request_id
        if self._requests.get(request_id) is state:
            del self._requests[request_id]
            self.tables.forget(request_id)

    def take_events(self) -> Iterable[Any]:
        """KV events since the last call."""
        return self._pool.events.take() if self._pool is not None else ()

    @property
    def has_work(self) -> bool:
        """Whether the engine must keep stepping so that something of ours can end."""
        unsent = self._unsent
        return bool(unsent.ops or unsent.cancels or unsent.refused_loads) or (
            self._pool is not None and self._pool.has_work
        )

    @property
    def live_requests(self) -> int:
        """Requests that are not over, or whose ops are not."""
        return len(self._slots)

    def let_go_of_blocks(self) -> None:
        """Hold no HBM block any more; stores that are under way end before the next step writes."""
        self._unsent.fences += self.held.let_go()

    def reset_cache(self) -> bool:
        """Empty the pool; what is on its way is not published.  True: nothing old can be matched any more."""
        if self._pool is None:
            return True
        for state in self._requests.values():
            self._pool.loads.unstage(state)
        self._pool.reset()
        return True

    def dump_state(self) -> dict[str, object]:
        """What every request, op and tier is doing, as plain data; only reads."""
        return leader_state(self._iteration, self._slots, self._requests, self._pool, self._clock())
