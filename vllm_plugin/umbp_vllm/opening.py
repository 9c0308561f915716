"""What a leader's pool is opened with: what was known before the workers spoke, what they said, and the leader's own.

Where the directory is makes two ways to open one: :mod:`umbp_vllm.local_opening` and :mod:`umbp_vllm.host_opening`.
The parts that are the same in both are put together here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

from umbp_connectors.config import UmbpConfig
from umbp_connectors.leader.demotions import DemotionQueue
from umbp_connectors.leader.ledger import OpLedger
from umbp_connectors.leader.op_ids import OpIds
from umbp_connectors.leader.ssd import SsdCatalogue
from umbp_connectors.plugins import PluginHost
from umbp_core.errors import ConfigError
from umbp_core.ports import Clock
from umbp_core.watermarks import Trimmer
from umbp_vllm.directories import BlockDirectory, Read, Written
from umbp_vllm.enquiries import Enquirer
from umbp_vllm.events import EventLog
from umbp_vllm.groups import KvGroup
from umbp_vllm.hbm import BlockTables, HeldBlocks
from umbp_vllm.host_pool import HostPool
from umbp_vllm.loads import LoadPlanner, LoadPolicy
from umbp_vllm.matching import Matcher
from umbp_vllm.metadata import PROTOCOL_VERSION, RankHello
from umbp_vllm.offload import make_gates
from umbp_vllm.pool import LeaderPool
from umbp_vllm.reporting import PoolTeller, Reporting
from umbp_vllm.stats import UmbpStats
from umbp_vllm.stores import StorePlanner, StorePolicy


@dataclass(frozen=True, slots=True)
class LeaderSetup:
    """What is known before the workers speak.

    ``identity`` is the digest of the namespace; ``folder`` the name of this engine's folder below
    ``config.ssd_dir``.  ``share_loads`` needs vLLM's own prefix cache.  ``persistent`` is False where block
    hashes would mean something else after a restart.  ``may_load`` and ``may_store`` follow vLLM's ``kv_role``.
    ``tokens_per_step`` is the most tokens that a decoding request takes per step.  ``layerwise`` says that hits in DRAM
    are loaded by the step that schedules their request; ``stores_by_layer`` that stores begin with their step's first
    layer.  ``open_pool`` is :func:`~umbp_vllm.local_opening.open_local_pool`, or what does the same elsewhere.
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
    open_pool: OpenPool
    may_load: bool = True
    may_store: bool = True
    tokens_per_step: int = 1
    layerwise: bool = False
    stores_by_layer: bool = False

    @property
    def lookup_timeout_s(self) -> float:
        """How long a request may wait for an answer."""
        return self.config.lookup_timeout_ms / 1000


@dataclass(frozen=True, slots=True)
class Opening:
    """A leader whose workers have all said hello.  ``hellos`` are in world-rank order."""

    setup: LeaderSetup
    hellos: Sequence[RankHello]
    clock: Clock
    held: HeldBlocks
    tables: BlockTables
    stats: UmbpStats
    op_ids: OpIds = field(default_factory=OpIds)

    def check(self) -> None:
        """Raises ``ConfigError`` when the workers cannot work together or have no memory to offer."""
        for hello in self.hellos:
            if hello.version != PROTOCOL_VERSION:
                raise ConfigError(
                    f"worker {hello.world_rank} speaks umbp protocol {hello.version}, the scheduler "
                    f"{PROTOCOL_VERSION}; install the same umbp-connectors everywhere"
                )
            if hello.identity != self.setup.identity:
                raise ConfigError(
                    f"worker {hello.world_rank} serves another model or configuration than the scheduler; "
                    "start all ranks with the same arguments and environment"
                )
            if hello.dram_pages < 1:
                raise ConfigError(
                    f"worker {hello.world_rank} has no DRAM pages: {hello.problem or 'dram_capacity is small'}"
                )

    @property
    def object_bytes(self) -> tuple[int, ...]:
        """Bytes of the largest object of each group."""
        return tuple(max(sizes) for sizes in zip(*(hello.object_bytes for hello in self.hellos), strict=True))

    @property
    def load_policy(self) -> LoadPolicy:
        """What the configuration says about loads."""
        setup, config = self.setup, self.setup.config
        return LoadPolicy(
            timeout_s=config.load_timeout_s,
            share_timeout_s=config.share_load_timeout_ms / 1000,
            least_tokens=config.min_load_blocks * min(group.block_tokens for group in setup.groups),
            share=setup.share_loads,
            layerwise=setup.layerwise,
            lookup_timeout_s=setup.lookup_timeout_s,
        )

    @property
    def store_policy(self) -> StorePolicy:
        """What the configuration says about stores."""
        config = self.setup.config
        return StorePolicy(
            timeout_s=config.store_timeout_s,
            max_pending_blocks=config.max_pending_stores,
            decode_blocks=config.store_decode_blocks,
            by_layer=self.setup.stores_by_layer,
        )

    def matcher(self, directory: Read) -> Matcher:
        """What finds matches in ``directory``."""
        return Matcher(directory, self.setup.groups, self.setup.alignment, self.object_bytes, self.op_ids)

    def pool(
        self,
        directory: BlockDirectory,
        written: Written,
        matcher: Matcher,
        *,
        kv_events: bool = False,
        catalogue: SsdCatalogue | None = None,
        demotions: DemotionQueue | None = None,
        teller: PoolTeller | None = None,
        enquirer: Enquirer | None = None,
        host: HostPool | None = None,
        trimmer: Trimmer | None = None,
    ) -> LeaderPool:
        """The pool whose loads ask ``directory`` and whose stores ask ``written``.

        Raises ``ConfigError`` for an offload policy that nobody offers.
        """
        setup, stats = self.setup, self.stats
        events = EventLog(setup.groups, enabled=kv_events)
        ledger = OpLedger([hello.writer_rank for hello in self.hellos], self.clock)
        gates = make_gates(setup.plugins, written, setup.groups, demotions, self.clock, stats)
        used = None if gates.demotions is None else gates.demotions.used
        loads = LoadPlanner(directory, matcher, setup.groups, self.load_policy, events, stats, used, enquirer)
        stores = StorePlanner(
            written,
            setup.groups,
            self.object_bytes,
            self.store_policy,
            self.held,
            self.tables,
            ledger,
            demotions,
            events,
            stats,
            self.op_ids,
            gates,
        )
        return LeaderPool(
            directory,
            catalogue,
            ledger,
            loads,
            stores,
            demotions,
            events,
            self.held,
            stats,
            setup.plugins,
            teller,
            host,
            trimmer,
        )


OpenPool: TypeAlias = Callable[[Opening, Reporting | None], LeaderPool]
"""Opens the pool, and has the master told of it where there is one.  Raises ``ConfigError`` when it cannot be."""
