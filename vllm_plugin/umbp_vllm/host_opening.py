"""Opens the leader's pool where the host's daemon has it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

from umbp_vllm.enquiries import Enquirer
from umbp_vllm.host_line import HostLine, RankStripes
from umbp_vllm.host_pool import HostPool, StoreView
from umbp_vllm.host_setup import HostDoor
from umbp_vllm.metadata import RankHello
from umbp_vllm.opening import Opening
from umbp_vllm.pool import LeaderPool
from umbp_vllm.reporting import Reporting

logger = logging.getLogger("vllm.umbp.host")


def open_host_pool(
    make_door: Callable[[Sequence[RankHello]], HostDoor], opening: Opening, reporting: Reporting | None
) -> LeaderPool:
    """The pool in the host's daemon.  A master hears of all that is in it, KV events of nothing.

    Raises ``ConfigError`` when the workers cannot work together.
    """
    opening.check()
    setup, hellos, clock, stats = opening.setup, opening.hellos, opening.clock, opening.stats
    writers = sorted({hello.writer_rank for hello in hellos})
    stripes = RankStripes(tuple(writers.index(hello.writer_rank) for hello in hellos), tuple(writers))
    door = make_door(hellos)
    line = HostLine(door.talker, [hello.arena for hello in hellos], clock, stats)
    follower = None if reporting is None else door.follow(reporting.follow_host(door.capacities))
    host = HostPool(line, stripes, setup.config.max_pending_stores, follower)
    matcher = opening.matcher(host)
    least_tokens = opening.load_policy.least_tokens
    enquirer = Enquirer(host, matcher, setup.groups, least_tokens, setup.lookup_timeout_s, clock, stats)
    pool = opening.pool(host, StoreView(host), matcher, enquirer=enquirer, host=host)
    host.open()
    logger.info("umbp: the pool of %d rank(s) is in the daemon of this host", len(hellos))
    return pool
