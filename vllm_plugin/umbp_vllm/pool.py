"""The leader's pool: the directory of one node, its catalogue, and the planners that use them.

Opened when every worker has said hello, because pages, slots and object sizes are the workers' to tell.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from umbp_connectors.config import UmbpConfig
from umbp_connectors.leader.demotions import DemotionQueue
from umbp_connectors.leader.ledger import OpLedger, Verdict
from umbp_connectors.leader.op_ids import OpIds
from umbp_connectors.leader.ssd import SsdCatalogue, open_ssd_catalogue
from umbp_connectors.plugins import PluginHost
from umbp_core.directory import Directory, EventKind, TierSpace
from umbp_core.errors import ConfigError
from umbp_core.ops import Direction, LeaderTransferRequest
from umbp_core.pages import PageAllocator
from umbp_core.ports import Clock
from umbp_core.tiers import Tier
from umbp_vllm.directories import BlockDirectory
from umbp_vllm.events import EventLog
from umbp_vllm.groups import KvGroup
from umbp_vllm.hbm import BlockTables, HeldBlocks
from umbp_vllm.host_pool import HostPool
from umbp_vllm.host_talk import Talker
from umbp_vllm.loads import LoadPlanner, LoadPolicy
from umbp_vllm.matching import Matcher
from umbp_vllm.metadata import PROTOCOL_VERSION, RankHello, WorkerReport
from umbp_vllm.offload import make_gates
from umbp_vllm.reporting import PoolTeller, Reporting
from umbp_vllm.requests import RequestState
from umbp_vllm.stats import UmbpStats, counter
from umbp_vllm.stores import StorePlanner, StorePolicy

logger = logging.getLogger("vllm.umbp.pool")

_STORED_IN = {tier: counter("vllm:umbp_stored_blocks", tier.name.lower()) for tier in Tier}
_EVICTED_FROM = {tier: counter("vllm:umbp_evicted_blocks", tier.name.lower()) for tier in Tier}


@dataclass(frozen=True, slots=True)
class LeaderSetup:
    """What is known before the workers speak.

    ``identity`` is the digest of the namespace; ``folder`` the name of this engine's folder below
    ``config.ssd_dir``.  ``share_loads`` needs vLLM's own prefix cache.  ``persistent`` is False where block
    hashes would mean something else after a restart.  ``may_load`` and ``may_store`` follow vLLM's ``kv_role``.
    ``tokens_per_step`` is the most tokens that a decoding request takes per step.  ``layerwise`` says that hits in DRAM
    are loaded by the step that schedules their request; ``stores_by_layer`` that stores begin with their step's first
    layer.  ``daemon`` makes what talks to the host's daemon, where that has the pool.
    """

    config: UmbpConfig
    plugins: PluginHost
    groups: tuple[KvGroup, ...]
    alignment: int
    ranks: int
    identity: bytes
    folder: str
    share_loads: bool
    persistent: bool
    kv_events: bool
    may_load: bool = True
    may_store: bool = True
    tokens_per_step: int = 1
    layerwise: bool = False
    stores_by_layer: bool = False
    daemon: Callable[[Sequence[RankHello]], Talker] | None = None

    @property
    def lookup_timeout_s(self) -> float:
        """How long a request may wait for an answer."""
        return self.config.lookup_timeout_ms / 1000


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
        """Whether an op is in flight, was given up but is still at work on its memory, or a demotion waits."""
        ledger = self.ledger
        return bool(len(ledger) or ledger.quarantined or (self.demotions is not None and len(self.demotions)))

    def objects(self, tier: Tier) -> int:
        """Published objects in ``tier``; 0 when there is no such tier."""
        return self.directory.stats(tier).objects if tier is Tier.DRAM or self.catalogue is not None else 0

    def plan_demotions(self) -> list[LeaderTransferRequest]:
        """The demotions to send with this step."""
        return self.demotions.plan() if self.demotions is not None else []

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
        self.stats.op_ended(op.direction, verdict.status, verdict.moved_bytes, verdict.seconds)
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


def open_pool(
    setup: LeaderSetup,
    hellos: Sequence[RankHello],
    clock: Clock,
    held: HeldBlocks,
    tables: BlockTables,
    stats: UmbpStats,
    reporting: Reporting | None = None,
) -> LeaderPool:
    """Build the pool from what the workers said, in world-rank order.

    Raises ``ConfigError`` when the workers cannot work together or have no memory to offer.
    """
    check_ranks(setup, hellos)
    pages = min(hello.dram_pages for hello in hellos)
    catalogue = _open_catalogue(setup, hellos)
    directory = _directory(setup, hellos, pages, catalogue)
    restored = catalogue.restore(directory) if catalogue is not None else 0
    ledger = OpLedger([hello.writer_rank for hello in hellos], clock)
    events = EventLog(setup.groups, enabled=setup.kv_events)
    object_bytes = tuple(max(sizes) for sizes in zip(*(hello.object_bytes for hello in hellos), strict=True))
    op_ids = OpIds()
    demotions = _demotions(setup.config, directory, clock, op_ids) if catalogue is not None else None
    gates = make_gates(setup.plugins, directory, setup.groups, demotions, clock, stats)
    loads = LoadPlanner(
        directory,
        Matcher(directory, setup.groups, setup.alignment, object_bytes, op_ids),
        setup.groups,
        load_policy(setup),
        events,
        stats,
        None if gates.demotions is None else gates.demotions.used,
    )
    stores = StorePlanner(
        directory,
        setup.groups,
        object_bytes,
        store_policy(setup),
        held,
        tables,
        ledger,
        demotions,
        events,
        stats,
        op_ids,
        gates,
    )
    _announce(hellos, pages, catalogue, restored)
    sizes = _page_bytes(hellos, catalogue)
    teller = None if reporting is None else reporting.follow_pool(directory, sizes)
    return LeaderPool(
        directory, catalogue, ledger, loads, stores, demotions, events, held, stats, setup.plugins, teller
    )


def _demotions(config: UmbpConfig, directory: Directory, clock: Clock, op_ids: OpIds) -> DemotionQueue:
    return DemotionQueue(
        directory,
        clock,
        limit=config.max_pending_demotions,
        timeout_s=config.store_timeout_s,
        new_op_id=op_ids,
    )


def load_policy(setup: LeaderSetup) -> LoadPolicy:
    """What the configuration says about loads."""
    config = setup.config
    return LoadPolicy(
        timeout_s=config.load_timeout_s,
        share_timeout_s=config.share_load_timeout_ms / 1000,
        min_blocks=config.min_load_blocks,
        share=setup.share_loads,
        layerwise=setup.layerwise,
    )


def store_policy(setup: LeaderSetup) -> StorePolicy:
    """What the configuration says about stores."""
    config = setup.config
    return StorePolicy(
        config.store_timeout_s, config.max_pending_stores, config.store_decode_blocks, setup.stores_by_layer
    )


def check_ranks(setup: LeaderSetup, hellos: Sequence[RankHello]) -> None:
    """Raises ``ConfigError`` when the workers cannot work together or have no memory to offer."""
    for hello in hellos:
        if hello.version != PROTOCOL_VERSION:
            raise ConfigError(
                f"worker {hello.world_rank} speaks umbp protocol {hello.version}, the scheduler {PROTOCOL_VERSION}; "
                "install the same umbp-connectors everywhere"
            )
        if hello.identity != setup.identity:
            raise ConfigError(
                f"worker {hello.world_rank} serves another model or configuration than the scheduler; "
                "start all ranks with the same arguments and environment"
            )
        if hello.dram_pages < 1:
            raise ConfigError(
                f"worker {hello.world_rank} has no DRAM pages: {hello.problem or 'dram_capacity is small'}"
            )


def _open_catalogue(setup: LeaderSetup, hellos: Sequence[RankHello]) -> SsdCatalogue | None:
    """The SSD catalogue, or ``None``, with one sentence in the log, where SSD cannot be used."""
    if setup.config.ssd_dir is None or setup.config.ssd_enabled is False:
        return None
    if not setup.persistent:
        logger.warning("umbp: the SSD tier is off, because block hashes would differ after a restart")
        return None
    without = [hello for hello in hellos if hello.ssd_slots < 1]
    if without:
        logger.warning("umbp: the SSD tier is off: %s", without[0].problem or "ssd_capacity is too small for one block")
        return None
    return open_ssd_catalogue(
        setup.config.ssd_dir,
        setup.folder,
        layouts=tuple(hello.layout for hello in hellos),
        slots=min(hello.ssd_slots for hello in hellos),
        slot_bytes=tuple(hello.slot_bytes for hello in hellos),
        durability=setup.config.ssd_durability,
        prefixes=tuple(hello.prefix for hello in hellos),
        writers=tuple(hello.writer_rank for hello in hellos),
    )


def _directory(
    setup: LeaderSetup, hellos: Sequence[RankHello], pages: int, catalogue: SsdCatalogue | None
) -> Directory:
    page_bytes = max(hello.page_bytes for hello in hellos)
    policy = setup.plugins.make_eviction
    spaces = [
        TierSpace(Tier.DRAM, PageAllocator(page_bytes, [pages * page_bytes]), policy(setup.config.eviction_policy))
    ]
    if catalogue is not None:
        spaces.append(
            TierSpace(
                Tier.SSD,
                PageAllocator(page_bytes, [catalogue.slots * page_bytes]),
                policy(setup.config.eviction_policy),
            )
        )
    return Directory(spaces)


def _page_bytes(hellos: Sequence[RankHello], catalogue: SsdCatalogue | None) -> dict[Tier, int]:
    """Bytes of one page over all ranks that own memory, for each tier that there is."""
    writers = [hello for hello in hellos if hello.writer_rank == hello.world_rank]
    sizes = {Tier.DRAM: sum(hello.page_bytes for hello in writers)}
    return sizes if catalogue is None else {**sizes, Tier.SSD: sum(hello.slot_bytes for hello in writers)}


def _announce(hellos: Sequence[RankHello], pages: int, catalogue: SsdCatalogue | None, restored: int) -> None:
    sizes = _page_bytes(hellos, catalogue)
    dram = pages * sizes[Tier.DRAM]
    ssd = "no SSD tier (set ssd_dir to keep KV over restarts)"
    if catalogue is not None:
        slots = catalogue.slots * sizes[Tier.SSD]
        ssd = f"SSD tier of {slots / 2**30:.2f} GiB with {restored} blocks from before"
    logger.info(
        "umbp: pool open for %d rank(s): DRAM tier of %.2f GiB (%d blocks), %s", len(hellos), dram / 2**30, pages, ssd
    )
