"""The leader's open pool: a directory and the planners that use it, and what is done with each op that ends."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from umbp_connectors.leader.demotions import DemotionQueue
from umbp_connectors.leader.ledger import OpLedger, Verdict
from umbp_connectors.leader.ssd import SsdCatalogue
from umbp_connectors.plugins import PluginHost
from umbp_core.directory import EventKind
from umbp_core.ops import Direction, LeaderTransferRequest
from umbp_core.tiers import Tier
from umbp_core.watermarks import Trimmer
from umbp_vllm.directories import BlockDirectory
from umbp_vllm.events import EventLog
from umbp_vllm.hbm import HeldBlocks
from umbp_vllm.host_pool import HostPool
from umbp_vllm.loads import LoadPlanner
from umbp_vllm.metadata import WorkerReport
from umbp_vllm.reporting import PoolTeller
from umbp_vllm.requests import RequestState
from umbp_vllm.stats import UmbpStats, counter
from umbp_vllm.stores import StorePlanner

_STORED_IN = {tier: counter("vllm:umbp_stored_blocks", tier.name.lower()) for tier in Tier}
_EVICTED_FROM = {tier: counter("vllm:umbp_evicted_blocks", tier.name.lower()) for tier in Tier}
_TRIMMED = {tier: counter("vllm:umbp_trimmed_blocks", tier.name.lower()) for tier in Tier}
_PAGES_PER_STEP = 32
"""What is freed of a tier that is too full, in each step of the engine: it costs about a tenth of a millisecond."""


@dataclass(slots=True)
class LeaderPool:
    """The parts of an open pool.  Scheduler thread only."""

    directory: BlockDirectory
    catalogue: SsdCatalogue | None
    ledger: OpLedger
    loads: LoadPlanner
    stores: StorePlanner
    demotions: DemotionQueue | None
    events: EventLog
    held: HeldBlocks
    stats: UmbpStats
    plugins: PluginHost
    teller: PoolTeller | None
    """What tells a master, where there is one."""
    host: HostPool | None = None
    """The directory, where the daemon has the pool."""
    trimmer: Trimmer | None = None
    """What keeps room in the tiers, where watermarks ask for it."""
    _trimming: bool = field(init=False, default=False)
    """Whether there is more to free, and some of it can go."""
    ended: Mapping[Direction, Callable[[Verdict], Iterable[RequestState]]] = field(init=False)
    """What takes the end of an op on all ranks, by direction; returns the requests it was for."""

    def __post_init__(self) -> None:
        self.ended = {
            Direction.LOAD: self.loads.ended,
            Direction.STORE: self.stores.ended,
            Direction.DEMOTE: self._demotion_ended,
        }

    @property
    def has_work(self) -> bool:
        """Whether an op is in flight, or given up and still at work on its memory; a demotion waits; room is made.

        A demotion that is overdue is no reason to go on: a disk that hangs would keep an idle engine busy.
        """
        ledger, demotions = self.ledger, self.demotions
        if ledger.quarantined or self._trimming:
            return True
        if demotions is None:
            return len(ledger) > 0
        return len(ledger) > demotions.overdue or demotions.has_work

    @property
    def frees_blocks(self) -> bool:
        """Whether HBM blocks are held that come free when their op ends.

        What is held for an op that was given up comes free when the rank that is at work on it says so: perhaps never.
        """
        return any(self.ledger.will_end(op_id) for op_id in self.held)

    def objects(self, tier: Tier) -> int:
        """Published objects in ``tier``; 0 when there is no such tier."""
        return self.directory.stats(tier).objects if tier is Tier.DRAM or self.catalogue is not None else 0

    def plan_demotions(self) -> list[LeaderTransferRequest]:
        """The demotions to send with this step."""
        return self.demotions.plan() if self.demotions is not None else []

    def keep_room(self) -> None:
        """Free some pages of each tier that is fuller than it may be."""
        trimmer = self.trimmer
        self._trimming = False
        if trimmer is None or not trimmer.is_due:
            return
        before = dict(trimmer.trimmed)
        self._trimming = trimmer.step(_PAGES_PER_STEP) > 0 and trimmer.is_due
        for tier, count in trimmer.trimmed.items():
            if count > before[tier]:
                self.stats.count(_TRIMMED[tier], count - before[tier])

    def _demotion_ended(self, verdict: Verdict) -> Iterable[RequestState]:
        """Take the end of a demotion."""
        if self.demotions is not None:
            self.demotions.ended(verdict.op, verdict.failed)
        for reason in verdict.reasons:
            self.stats.add("vllm:umbp_failed_blocks", len(verdict.failed), "demote", reason)
        return ()

    def release(self, op_id: str) -> None:
        """``op_id`` ended on all ranks and none touches its memory: give back all it owns."""
        self.directory.abort_owner(op_id)
        self.directory.unpin(op_id)
        self.held.release(op_id)

    def take(self, report: WorkerReport) -> Iterable[RequestState]:
        """Take what the workers say happened; returns the requests whose ops ended."""
        ledger = self.ledger
        ledger.heard(report.ranks)
        if self.host is not None:
            self.host.follow(report)
        if report.missed:
            ledger.ask_all()
        states: list[RequestState] = []
        for rank, results in report.results.items():
            for result in results:
                verdict = ledger.add(rank, result)
                if verdict is not None:
                    states += self._end(verdict)
        for rank, op_ids in report.released.items():
            for op_id in op_ids:
                if ledger.release(rank, op_id):
                    self.release(op_id)
        self.settle()
        return states

    def _end(self, verdict: Verdict) -> Iterable[RequestState]:
        op = verdict.op
        from_ssd = self.loads.part_from_ssd(op) if op.direction is Direction.LOAD else 0.0
        self.stats.op_ended(op.direction, verdict.status, verdict.moved_bytes, verdict.seconds, from_ssd)
        states = self.ended[op.direction](verdict)
        if not verdict.quarantined:
            self.release(op.op_id)
        return states

    def give_up_silent(self) -> tuple[list[int], Iterable[RequestState]]:
        """The ranks that answer no more, if any, and the requests whose ops end because of it.

        Nothing is kept on SSD any more then: a part of every object would be missing.
        """
        lost, verdicts = self.ledger.give_up_silent()
        if lost:
            self.demotions = None
        return lost, [state for verdict in verdicts for state in self._end(verdict)]

    def settle(self) -> None:
        """Tell the catalogue, the event stream, the plug-ins and the master what changed in the directory."""
        changes = self.directory.drain_changes()
        for change in changes:
            keys, tier = change.keys, change.tier
            added = change.kind is EventKind.ADDED
            self.stats.count((_STORED_IN if added else _EVICTED_FROM)[tier], len(keys))
            if self.events.enabled:
                self.events.changed(keys, tier, added=added)
            self.plugins.blocks_changed(keys if added else (), () if added else keys, tier)
        if self.teller is not None:
            self.teller.changed(changes)
        if self.catalogue is not None:
            self.catalogue.follow(changes)

    def reset(self) -> None:
        """Unpublish everything; ops in flight end without publishing."""
        self.stores.void_in_flight()
        self.loads.void_in_flight()
        if self.demotions is not None:
            self.demotions.void()
        for tier in (Tier.DRAM, Tier.SSD) if self.catalogue is not None else (Tier.DRAM,):
            self.directory.clear(tier)
        self.settle()

    def close(self) -> None:
        """Flush and close the catalogue; idempotent, bounded in time."""
        self.settle()
        if self.host is not None:
            self.host.close()
        if self.catalogue is not None:
            self.catalogue.close()
