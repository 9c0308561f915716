"""What one rank of SGLang tells the master: its caches by their events, and L3 by what its pool says."""

from __future__ import annotations

import atexit
import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from umbp_connectors.config_model import UmbpConfig
from umbp_connectors.reporting.feed import Feed
from umbp_connectors.reporting.opening import open_reporter
from umbp_connectors.reporting.reporter import Reporter
from umbp_connectors.reporting.stats import ReportMeter
from umbp_core.master.model import TierCapacity
from umbp_core.tiers import Tier
from umbp_sglang import compat
from umbp_sglang.chains import SglangChains
from umbp_sglang.node_facts import node_facts, publishes_events
from umbp_sglang.page_ids import Description, PageIds
from umbp_sglang.placements import Placements
from umbp_sglang.pool_teller import PoolTeller
from umbp_sglang.stored_pages import StoredPages

logger = logging.getLogger(__name__)

CACHES = "l1+l2"
"""The source of what SGLang's events say."""
POOL = "pool"
"""The source of what L3 says."""
_EXIT_TIMEOUT = 1.0


class NodeReporting:
    """Everything that one rank tells, over ``reporter``.  Any thread.

    Whoever has something to tell holds on to it under a name (:meth:`hold`); with the last one it ends, and the node
    is unregistered.
    """

    def __init__(self, reporter: Reporter, chains: SglangChains) -> None:
        self.reporter = reporter
        self.meter = ReportMeter(reporter.stats)
        self._chains = chains
        self._placements = Placements()
        self.pages = StoredPages(PageIds(chains))
        self.pool = PoolTeller(self.pages)
        self._caches: Feed[str] = reporter.feed(CACHES, self._placements.decode, self._placements.fold)
        self.pool.use(reporter.feed(POOL, self.pool.decode, self.pool.whole))
        self._lock = threading.Lock()
        self._holders: set[str] = set()
        self._ended = False

    @property
    def ended(self) -> bool:
        """Whether it was closed: nothing is told any more."""
        return self._ended

    def hold(self, name: str) -> None:
        """Start, if it has not begun, and go on until ``name`` releases it."""
        with self._lock:
            self._holders.add(name)
        atexit.register(self._exit)
        self.reporter.start()

    def release(self, name: str) -> None:
        """``name`` has nothing to tell any more."""
        with self._lock:
            self._holders.discard(name)
            last = not self._holders
        if last:
            self.close()

    def close(self, timeout: float | None = None) -> None:
        """Unregister the node, if the master answers; idempotent.  Takes three seconds at most."""
        with self._lock:
            if self._ended:
                return
            self._ended = True
        atexit.unregister(self._exit)
        if timeout is None:
            self.reporter.close()
        else:
            self.reporter.close(timeout)

    def tell_events(self, events: Sequence[Any]) -> None:
        """SGLang's tree says ``events``.  The scheduler's thread only; appends."""
        if not self._ended:
            self._caches.tell(self._placements.note(events), "")

    def read_names(self, names: Any, dynamo: bool) -> None:
        """How the event stream names adapters, for pages of L3.  Before the first request."""
        self._chains.use(names, dynamo, publishes_events())

    def describe(self, description: Description) -> None:
        """Pages with a namespace are on their way to L3, or were asked for there.  Any thread; appends."""
        if not self._ended:
            self.pool.described(description)

    def watch(self, tiers: Callable[[], Mapping[str, tuple[int, int]]]) -> None:
        """Tell the master how full L3 is: ``tiers`` gives bytes used and bytes that there are, by the tier's name."""

        def capacities() -> list[TierCapacity]:
            return [TierCapacity(Tier[name.upper()], total, total - used) for name, (used, total) in tiers().items()]

        self.reporter.watch_capacities(capacities)

    def _exit(self) -> None:
        self.close(_EXIT_TIMEOUT)


def open_reporting(config: UmbpConfig, model: str, page_tokens: int) -> NodeReporting | None:
    """What reports for this rank, not started; ``None`` when no master is configured or reporting is off.

    Raises ``ConfigError`` when the master's token cannot be read.  Where SGLang is not as expected, one sentence says
    so and nothing is reported.
    """
    if not config.report or not config.master_address:
        return None
    try:
        chains = SglangChains(publishes=publishes_events())
    except LookupError as error:
        logger.warning("umbp: %s, so that nothing is reported to the master", error)
        return None
    reporter = open_reporter(config, node_facts(model, page_tokens))
    return None if reporter is None else NodeReporting(reporter, chains)


def kept_reporting(owner: Any) -> NodeReporting | None:
    """What reports for the caches that ``owner``, an object of SGLang's, belongs to, if anything does still."""
    found = compat.kept(owner)
    return found if isinstance(found, NodeReporting) and not found.ended else None


def keep_reporting(owner: Any, reporting: NodeReporting) -> None:
    """Leave it with ``owner``, for the next storage that is attached to the same caches."""
    compat.keep(owner, reporting)
