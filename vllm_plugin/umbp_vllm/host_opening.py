"""Opens the leader's pool where the host's daemon has it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

from umbp_connectors.leader.ledger import OpLedger
from umbp_connectors.leader.op_ids import OpIds
from umbp_core.ports import Clock
from umbp_vllm.directories import Written
from umbp_vllm.enquiries import Enquirer
from umbp_vllm.events import EventLog
from umbp_vllm.hbm import BlockTables, HeldBlocks
from umbp_vllm.host_line import HostLine, Stripes
from umbp_vllm.host_pool import HostPool, StoreView
from umbp_vllm.host_talk import Talker
from umbp_vllm.loads import LoadPlanner
from umbp_vllm.matching import Matcher
from umbp_vllm.metadata import RankHello
from umbp_vllm.offload import make_gates
from umbp_vllm.pool import LeaderPool, LeaderSetup, check_ranks, load_policy, store_policy
from umbp_vllm.reporting import Reporting
from umbp_vllm.stats import UmbpStats
from umbp_vllm.stores import StorePlanner

logger = logging.getLogger("vllm.umbp.host")


def open_host_pool(
    make_talker: Callable[[Sequence[RankHello]], Talker],
    setup: LeaderSetup,
    hellos: Sequence[RankHello],
    clock: Clock,
    held: HeldBlocks,
    tables: BlockTables,
    stats: UmbpStats,
    reporting: Reporting | None,
) -> LeaderPool:
    """The pool in the host's daemon.  KV events and a master hear nothing of it: what it evicts is not told.

    Raises ``ConfigError`` when the workers cannot work together.
    """
    check_ranks(setup, hellos)
    if reporting is not None:
        logger.warning("umbp: blocks in the daemon are not told to the master yet; those in HBM are")
    writers = sorted({hello.writer_rank for hello in hellos})
    stripes = Stripes(tuple(writers.index(hello.writer_rank) for hello in hellos), tuple(writers))
    most = setup.config.max_pending_stores
    host = HostPool(HostLine(make_talker(hellos), [hello.arena for hello in hellos], clock, stats), stripes, most)
    object_bytes = hellos[0].object_bytes
    op_ids = OpIds()
    ledger = OpLedger([hello.writer_rank for hello in hellos], clock)
    events = EventLog(setup.groups, enabled=False)
    policy = load_policy(setup)
    matcher = Matcher(host, setup.groups, setup.alignment, object_bytes, op_ids)
    least = policy.min_blocks * min(group.block_tokens for group in setup.groups)
    enquirer = Enquirer(host, matcher, setup.groups, least, setup.lookup_timeout_s, clock, stats)
    loads = LoadPlanner(host, matcher, setup.groups, policy, events, stats, enquirer=enquirer)
    view: Written = StoreView(host)
    stores = StorePlanner(
        view,
        setup.groups,
        object_bytes,
        store_policy(setup),
        held,
        tables,
        ledger,
        None,
        events,
        stats,
        op_ids,
        make_gates(setup.plugins, view, setup.groups, None, clock, stats),
    )
    host.open()
    logger.info("umbp: the pool of %d rank(s) is in the daemon of this host", len(hellos))
    return LeaderPool(host, None, ledger, loads, stores, None, events, held, stats, setup.plugins, None, host)
