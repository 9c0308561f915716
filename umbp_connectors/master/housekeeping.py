"""What a master does between calls: nodes expire, peers are asked to evict, memory is freed."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable
from itertools import groupby
from operator import attrgetter

from umbp_connectors.master.lanes import breathe
from umbp_connectors.master.ports import ClientStore, EvictionSender, MasterObserver
from umbp_core.master.model import ClientRecord, EvictionOrder
from umbp_core.master.state import MasterState
from umbp_core.ports import Clock

logger = logging.getLogger(__name__)

TICK_SECONDS = 1.0
"""How often the passing of time is looked at, unless the settings want it more often."""
AWAY_SECONDS = 1.0
"""A loop that is later than this was stopped, and heard nobody meanwhile."""
SWEEP_SLICE = 2048
"""Entries that are freed at one go: a millisecond."""
HITS_SLICE = 8192
"""Hit counters that are looked at at one go: a millisecond."""
MAX_SENDS = 64
"""Peers that are asked to evict at the same time."""


class Housekeeping:
    """The upkeep of ``state``.  ``tell`` is called when the external index changed.  The loop's thread only."""

    def __init__(
        self,
        state: MasterState,
        clock: Clock,
        store: ClientStore,
        observer: MasterObserver,
        evictions: EvictionSender | None,
        tell: Callable[[], None],
    ) -> None:
        self._state = state
        self._clock = clock
        self._store = store
        self._observer = observer
        self._evictions = evictions
        self._tell = tell
        settings = state.settings
        self._period = min(TICK_SECONDS, settings.reaper_interval, settings.eviction_interval)
        self._seen = 0.0
        self._wake = asyncio.Event()
        self._sends: dict[str, asyncio.Task[None]] = {}
        self._slots = asyncio.Semaphore(MAX_SENDS)

    def wake(self) -> None:
        """There is memory to free: begin at once."""
        self._wake.set()

    def remember(self, records: list[ClientRecord]) -> None:
        """Know the nodes again that an earlier master knew."""
        now = self._clock()
        for node_id in self._state.restore(records, now):
            record = self._state.record(node_id)
            if record is not None:
                self._store.save(record)
        for info in self._state.list_nodes(now):
            self._observer.node_changed(info)

    async def run(self) -> None:
        """Go on until cancelled."""
        self._seen = self._clock()
        next_collection = self._seen + self._state.settings.hit_gc_interval
        try:
            while True:
                await self._rest()
                now = self._look()
                self._tick(now)
                while self._state.sweep(SWEEP_SLICE):
                    await breathe()
                    self._look()
                if now >= next_collection:
                    next_collection = now + self._state.settings.hit_gc_interval
                    await self._collect_hits(now)
        finally:
            sends = list(self._sends.values())
            for send in sends:
                send.cancel()
            await asyncio.gather(*sends, return_exceptions=True)

    async def _rest(self) -> None:
        """Wait until there is something to do."""
        timer = asyncio.get_running_loop().call_later(self._period, self._wake.set)
        await self._wake.wait()
        timer.cancel()
        self._wake.clear()

    def _look(self) -> float:
        """The time.  No node pays for it when the whole loop stood still since the last look."""
        now = self._clock()
        away, self._seen = now - self._seen, now
        if away > self._period + AWAY_SECONDS:
            logger.warning("the master stood still for %.1f s; its nodes get as much longer", away)
            self._state.forgive(away)
        return now

    def _tick(self, now: float) -> None:
        self._store.catch_up(self.remember)
        effects = self._state.tick(now)
        for node_id in effects.expired:
            logger.warning("node %s expired: it was silent for too long", node_id)
            self._observer.node_gone(node_id)
        for node_id in effects.purged:
            self._store.delete(node_id)
        if effects.expired:
            self._tell()
        if self._evictions is not None:
            self._send(self._evictions, effects.evictions)

    def _send(self, evictions: EvictionSender, orders: Iterable[EvictionOrder]) -> None:
        """Ask peers in tasks of their own; one that did not answer the last time yet is left alone."""
        for node_id, group in groupby(orders, key=attrgetter("node_id")):
            if node_id not in self._sends:
                task = asyncio.get_running_loop().create_task(self._ask(evictions, node_id, list(group)))
                self._sends[node_id] = task

    async def _ask(self, evictions: EvictionSender, node_id: str, orders: list[EvictionOrder]) -> None:
        try:
            async with self._slots:
                for order in orders:
                    await evictions.send(order)
        finally:
            del self._sends[node_id]

    async def _collect_hits(self, now: float) -> None:
        for _ in range(0, len(self._state.index.hits), HITS_SLICE):
            self._state.collect_hits(HITS_SLICE, now)
            await breathe()
            self._look()
