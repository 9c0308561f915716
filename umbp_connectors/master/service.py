"""The master's state on an asyncio loop: both doors call this, and nothing else changes the state.

Everything runs on one loop, so what does not wait is atomic.  Large requests are worked on in steps of a few
milliseconds, between which the loop serves others; changes of one node take effect in the order in which they were
called for, whatever their size, and are done to their end when their caller is cancelled.  No method blocks: what is
slow (keeping the table of nodes, asking peers to evict) is somebody else's thread or task.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Collection, Mapping, Sequence
from typing import TypeVar

from umbp_connectors.master.housekeeping import Housekeeping
from umbp_connectors.master.lanes import Lanes, breathe, run_steps
from umbp_connectors.master.ports import ClientStore, EvictionSender, MasterObserver
from umbp_core.index import NodeMatch, PositionMatch, PrefixMatch, Snapshot
from umbp_core.index_feed import FeedPage
from umbp_core.index_gate import Acknowledgement, Batch
from umbp_core.master.changes import finish
from umbp_core.master.model import (
    BlockPage,
    GetRoute,
    HashExplanation,
    Heartbeat,
    HeartbeatReply,
    NodeInfo,
    NodeStatus,
    PutOutcome,
    PutRoute,
    Registration,
    RegistrationAck,
)
from umbp_core.master.prepared import PreparedMatches
from umbp_core.master.samples import MetricSample
from umbp_core.master.state import MasterState
from umbp_core.ports import Clock

A = TypeVar("A")

__all__ = ["ClientStore", "EvictionSender", "MasterObserver", "MasterService", "breathe"]


class MasterService:
    """The calls of a master.  The loop's thread only.

    ``evictions`` asks peers to evict; without it nobody does.  Start with :meth:`restore`, and run
    :meth:`run_housekeeping` as long as the service is used.
    """

    def __init__(
        self,
        state: MasterState,
        *,
        clock: Clock,
        store: ClientStore,
        observer: MasterObserver,
        evictions: EvictionSender | None = None,
    ) -> None:
        self.state = state
        """To be read; changed by this class only."""
        self._clock = clock
        self._store = store
        self._observer = observer
        self._evictions = evictions
        self._lanes = Lanes()
        self._waiters: set[asyncio.Future[None]] = set()
        self._housekeeping = Housekeeping(state, clock, store, observer, evictions, self._tell)

    # Nodes.

    def restore(self) -> int:
        """Know the nodes again that an earlier master knew; returns how many.  Blocks, so before anything else."""
        records = self._store.load()
        self._housekeeping.remember(records)
        return len(records)

    def register(self, registration: Registration) -> RegistrationAck:
        """See ``MasterState.register``."""
        ack = self.state.register(registration, self._clock())
        self._keep(registration.node_id)
        self._appeared(registration.node_id, was_alive=False)
        self._cleared()
        return ack

    def unregister(self, node_id: str) -> None:
        """Forget a node and all that it said; nothing happens when it is not known."""
        if self.state.unregister(node_id, self._clock()):
            self._store.delete(node_id)
            self._observer.node_gone(node_id)
            self._cleared()

    async def heartbeat(self, heartbeat: Heartbeat) -> HeartbeatReply:
        """See ``MasterState.heartbeat``."""
        node_id = heartbeat.node_id
        was_alive = self.state.is_alive(node_id)
        events = sum(len(bundle.deltas) for bundle in heartbeat.bundles)
        steps = self.state.heartbeat_steps(heartbeat, self._clock())
        reply = await self._lanes.run(node_id, steps, events > self.state.slices.deltas)
        if reply.status is not NodeStatus.UNKNOWN:
            self._observer.heartbeat(node_id, events, reply.request_full_sync)
            self._appeared(node_id, was_alive)
        if heartbeat.full_sync:
            self._housekeeping.wake()
        return reply

    def peer_address(self, node_id: str) -> str:
        """Where to reach a node; empty unless it is alive."""
        return self.state.peer_address(node_id)

    def node(self, node_id: str) -> NodeInfo | None:
        """What is known of one node."""
        return self.state.node(node_id, self._clock())

    def list_nodes(self) -> list[NodeInfo]:
        """All nodes, those that expired included."""
        return self.state.list_nodes(self._clock())

    def report_metrics(self, node_id: str, samples: Sequence[MetricSample]) -> None:
        """A node hands over metrics of its own."""
        record = self.state.record(node_id)
        self._observer.metrics_reported(node_id, () if record is None else record.tags, samples)

    # Blocks that nodes own.

    def route_put(
        self, node_id: str, keys: Sequence[bytes], sizes: Sequence[int], exclude: Collection[str], batch: bool = True
    ) -> list[PutRoute]:
        """See ``MasterState.route_put``; ``batch`` says how the caller is counted.  At one go."""
        routes = self.state.route_put(node_id, keys, sizes, exclude, self._clock())
        routed = sum(route.outcome is PutOutcome.ROUTED for route in routes)
        self._routed("batch_route_put" if batch else "route_put", node_id, routed)
        return routes

    def route_get(
        self, node_id: str, keys: Sequence[bytes], exclude: Collection[str], batch: bool = True
    ) -> list[GetRoute | None]:
        """See ``MasterState.route_get``; ``batch`` says how the caller is counted."""
        routes = self.state.route_get(node_id, keys, exclude, self._clock())
        self._routed("batch_route_get" if batch else "route_get", node_id, len(routes) - routes.count(None))
        return routes

    async def batch_route_put(
        self, node_id: str, keys: Sequence[bytes], sizes: Sequence[int], exclude: Collection[str]
    ) -> list[PutRoute]:
        """:meth:`route_put` of any size, in steps.  The room is that at the first of them."""
        routes = await run_steps(self.state.route_put_steps(node_id, keys, sizes, exclude, self._clock()))
        self._routed("batch_route_put", node_id, sum(route.outcome is PutOutcome.ROUTED for route in routes))
        return routes

    async def batch_route_get(
        self, node_id: str, keys: Sequence[bytes], exclude: Collection[str]
    ) -> list[GetRoute | None]:
        """:meth:`route_get` of any size, in steps."""
        routes = await run_steps(self.state.route_get_steps(node_id, keys, exclude, self._clock()))
        self._routed("batch_route_get", node_id, len(routes) - routes.count(None))
        return routes

    async def batch_lookup(self, keys: Sequence[bytes], node_id: str = "") -> list[bool]:
        """:meth:`lookup` of any size, in steps."""
        found = await run_steps(self.state.lookup_steps(keys))
        self._routed("lookup", node_id, len(keys))
        return found

    def lookup(self, keys: Sequence[bytes], node_id: str = "") -> list[bool]:
        """See ``MasterState.lookup``; ``node_id`` is who asks."""
        found = self.state.lookup(keys)
        self._routed("lookup", node_id, len(keys))
        return found

    # External blocks.

    async def report(self, node_id: str, hashes: Sequence[bytes], tier: int) -> bool:
        """See ``MasterState.report``."""
        steps = self.state.report_steps(node_id, hashes, tier, self._clock())
        accepted = await self._lanes.run(node_id, steps, len(hashes) > self.state.slices.hashes)
        self._observer.reported(node_id, tier, len(hashes), accepted)
        self._tell()
        return accepted

    async def revoke(self, node_id: str, hashes: Sequence[bytes], tier: int) -> None:
        """See ``MasterState.revoke``."""
        steps = self.state.revoke_steps(node_id, hashes, tier, self._clock())
        await self._lanes.run(node_id, steps, len(hashes) > self.state.slices.hashes)
        self._observer.revoked(node_id, tier, len(hashes))
        self._tell()

    def clear_tier(self, node_id: str, tier: int) -> None:
        """See ``MasterState.clear_tier``.  At once, and what was called for before is cleared too."""
        self.state.clear_tier(node_id, tier, self._clock())
        self._observer.revoked(node_id, tier, None)
        self._cleared()

    def clear_node(self, node_id: str) -> None:
        """See ``MasterState.clear_node``.  At once, and what was called for before is cleared too."""
        self.state.clear_node(node_id, self._clock())
        self._observer.revoked(node_id, None, None)
        self._cleared()

    async def apply_batch(self, node_id: str, batch: Batch) -> Acknowledgement:
        """See ``MasterState.apply_batch``."""
        was_alive = self.state.is_alive(node_id)
        steps = self.state.apply_batch_steps(node_id, batch, self._clock())
        large = sum(len(action.hashes) or 1 for action in batch.actions) > self.state.slices.hashes
        answer = await self._lanes.run(node_id, steps, large)
        self._appeared(node_id, was_alive)
        self._cleared()
        return answer

    def probe(self, node_id: str, incarnation: int, acked: int) -> Acknowledgement:
        """See ``MasterState.probe``."""
        was_alive = self.state.is_alive(node_id)
        answer = self.state.probe(node_id, incarnation, acked, self._clock())
        self._appeared(node_id, was_alive)
        return answer

    async def match(self, hashes: Sequence[bytes], count_as_hit: bool) -> list[NodeMatch]:
        """See ``MasterState.match``."""
        if len(hashes) <= self.state.slices.query:
            return self.match_now(hashes, count_as_hit)
        matches = await run_steps(self.state.match_steps(hashes, count_as_hit, self._clock()))
        self._observer.matched(len(hashes), sum(match.matched for match in matches))
        return matches

    def match_now(self, hashes: Sequence[bytes], count_as_hit: bool) -> list[NodeMatch]:
        """The same at one go, for at most ``state.slices.query`` hashes."""
        matches = self.state.match(hashes, count_as_hit, self._clock())
        self._observer.matched(len(hashes), sum(match.matched for match in matches))
        return matches

    async def match_positions(self, hashes: Sequence[bytes], count_as_hit: bool) -> list[PositionMatch]:
        """See ``MasterState.match_positions``."""
        steps = self.state.match_positions_steps(hashes, count_as_hit, self._clock())
        matches = await run_steps(steps)
        self._observer.matched(len(hashes), sum(map(PositionMatch.matched, matches)))
        return matches

    def match_prepared(self, hashes: Sequence[bytes], count_as_hit: bool, prepared: PreparedMatches[A]) -> A:
        """The same at one go, for at most ``state.slices.query`` hashes, as an answer of ``state.prepare``."""
        answer, matched = prepared.match(hashes, count_as_hit, self._clock())
        self._observer.matched(len(hashes), matched)
        return answer

    async def match_prefix(self, hashes: Sequence[bytes], weights: Mapping[int, float] | None) -> list[PrefixMatch]:
        """See ``MasterState.match_prefix``."""
        steps = self.state.match_prefix_steps(hashes, weights, self._clock())
        return finish(steps) if len(hashes) <= self.state.slices.query else await run_steps(steps)

    def hit_counts(self, hashes: Sequence[bytes]) -> list[tuple[bytes, int]]:
        """See ``MasterState.hit_counts``."""
        return self.state.hit_counts(hashes)

    def list_blocks(self, node_id: str, tier: int, cursor: int, limit: int) -> BlockPage:
        """See ``MasterState.list_blocks``."""
        return self.state.list_blocks(node_id, tier, cursor, limit)

    def explain(self, node_id: str, key: bytes) -> HashExplanation:
        """See ``MasterState.explain``."""
        return self.state.explain(node_id, key, self._clock())

    # Following.

    def snapshot(self) -> Snapshot:
        """See ``MasterState.snapshot``."""
        return self.state.snapshot()

    def since(self, incarnation: int, cursor: int, limit: int) -> FeedPage:
        """See ``MasterState.since``."""
        return self.state.since(incarnation, cursor, limit)

    async def subscribe(self, incarnation: int, cursor: int, limit: int = 256) -> AsyncIterator[FeedPage]:
        """Pages of changes after ``cursor``, each as soon as there is one; ends after one that says ``lost``."""
        while True:
            page = self.since(incarnation, cursor, limit)
            if page.changes or page.lost:
                yield page
                cursor = page.cursor
                if page.lost:
                    return
            else:
                await self.changed()

    async def changed(self) -> None:
        """Wait for the next change of the external index."""
        waiter = asyncio.get_running_loop().create_future()
        self._waiters.add(waiter)
        try:
            await waiter
        finally:
            self._waiters.discard(waiter)

    async def run_housekeeping(self) -> None:
        """Expiry, evictions, and freeing memory between other work; until it is cancelled."""
        await self._housekeeping.run()

    def _keep(self, node_id: str) -> None:
        """Remember a node beyond this life of the master."""
        record = self.state.record(node_id)
        if record is not None:
            self._store.save(record)

    def _appeared(self, node_id: str, was_alive: bool) -> None:
        """Tell of a node that is alive now and was not."""
        info = None if was_alive else self.state.node(node_id, self._clock())
        if info is not None and info.status is NodeStatus.ALIVE:
            self._observer.node_changed(info)

    def _routed(self, call: str, node_id: str, entries: int) -> None:
        if entries and node_id:
            self._observer.routed(call, node_id, entries)

    def _cleared(self) -> None:
        """The external index changed, and there may be memory to free."""
        if self.state.sweep(0):
            self._housekeeping.wake()
        self._tell()

    def _tell(self) -> None:
        """The external index changed."""
        for waiter in self._waiters:
            if not waiter.done():
                waiter.set_result(None)
        self._waiters.clear()
