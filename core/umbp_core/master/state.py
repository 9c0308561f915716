"""The state of a master: what it knows, and what it answers.

An advisor: it owns no bytes, and everything it knows was told by nodes and will be told again.  It keeps the table of
nodes, the index of external blocks, the index of blocks that nodes own, and chooses routes and victims.

Every method takes the time, monotonic seconds, as its last argument where it matters.  Requests that may be large come
in *steps* too: a generator that works on a slice of the request at a time, between which the owner may let others in,
and returns the answer.  A method without steps works at one go.  Steps of one node are to be run one after the other,
in the order in which they were asked for; whatever clears, expires or replaces the node in between voids the rest of
them, as if they had come before it.  Steps that are given up halfway are not acknowledged and do no harm.

No I/O, no threads, no clock.  One thread at a time.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import TypeVar

from umbp_core.block_index import BlockIndex
from umbp_core.errors import InvalidRequest
from umbp_core.hits import HitCounters
from umbp_core.index import ExternalKvIndex, NodeMatch, PositionMatch, PrefixMatch, Snapshot
from umbp_core.index_feed import ChangeFeed, FeedPage
from umbp_core.index_gate import Acknowledgement, Batch, BatchApplier
from umbp_core.master.changes import SLICES, Changes, Slices, Steps, check_tiers, finish
from umbp_core.master.clients import Client, ClientTable
from umbp_core.master.explain import explain
from umbp_core.master.model import (
    BlockPage,
    ClientRecord,
    GetRoute,
    HashExplanation,
    Heartbeat,
    HeartbeatReply,
    MasterSettings,
    NodeInfo,
    NodeStatus,
    PutRoute,
    Registration,
    RegistrationAck,
    TickEffects,
)
from umbp_core.master.prepared import PreparedMatches
from umbp_core.master.queries import Queries
from umbp_core.master.routes import Routes
from umbp_core.master.victims import EvictionPlanner

A = TypeVar("A")
M = TypeVar("M", NodeMatch, PositionMatch, PrefixMatch)

PAGE_HASHES = 4096
"""Hashes that a page names at most."""


class MasterState:
    """What one life of a master knows.

    ``incarnation`` numbers the lives of the master, for those who follow its changes: give a later life a larger one.
    """

    def __init__(
        self, settings: MasterSettings, rng: random.Random, incarnation: int = 1, slices: Slices = SLICES
    ) -> None:
        self.settings = settings
        self.slices = slices
        self.feed = ChangeFeed(incarnation)
        self.index = ExternalKvIndex(self.feed, HitCounters(settings.hit_ttl))
        """To be read; changed by this class only."""
        self.blocks = BlockIndex()
        """To be read; changed by this class only."""
        self._clients = ClientTable(settings)
        self._external = BatchApplier(self.index)
        self._changes = Changes(self._clients, self._external, self.blocks, slices)
        self._queries = Queries(self.index, slices.query)
        self._routes = Routes(settings, self._clients, self.blocks, rng, slices.keys)
        self._planner = EvictionPlanner(settings, self.blocks)
        self._next_round = float("-inf")

    # Nodes.

    def register(self, registration: Registration, now: float) -> RegistrationAck:
        """A node introduces itself.  A new life of it voids what an earlier one said.

        Raises ``AlreadyRegistered`` when a living node has the id, unless it is the same node that repeats itself (the
        same incarnation, not 0) or the newcomer has a larger incarnation; ``InvalidRequest`` for an empty id.
        """
        client, new_life = self._clients.register(registration, now)
        if new_life:
            self._begin_life(client, now)
        interval = int(self.settings.heartbeat_ttl * 1000 / self.settings.heartbeat_interval_divisor)
        return RegistrationAck(interval, self.blocks.apply(client.node_id, (), now).acked)

    def unregister(self, node_id: str, now: float) -> bool:
        """Forget a node and all that it said; whether it was known."""
        known = self._clients.remove(node_id) is not None
        self._drop(node_id, now, "unregistered")
        return known

    def restore(self, records: Iterable[ClientRecord], now: float) -> list[str]:
        """Nodes that an earlier life of the master knew: they are alive, and owe a full sync of everything.

        Those that are known already only get the addresses that they did not tell; returns which of them did.
        """
        records = list(records)
        for record in (each for each in records if self._clients.get(each.node_id) is None):
            client = self._clients.restore(record, now)
            self._begin_life(client, now)
            self._expire(client, now)
        return [record.node_id for record in records if self._clients.complete(record)]

    def record(self, node_id: str) -> ClientRecord | None:
        """What has to survive a restart of the master, of one node."""
        client = self._clients.get(node_id)
        return None if client is None else client.record()

    def peer_address(self, node_id: str) -> str:
        """Where to reach a node; empty unless it is alive."""
        return self._clients.peer_address(node_id)

    def is_alive(self, node_id: str) -> bool:
        """Whether the node is known and has not expired."""
        return self._clients.is_alive(node_id)

    def node(self, node_id: str, now: float) -> NodeInfo | None:
        """What is known of one node."""
        client = self._clients.get(node_id)
        return None if client is None else self._info(client, now)

    def list_nodes(self, now: float) -> list[NodeInfo]:
        """All nodes, those that expired included, in the order in which they came."""
        return [self._info(client, now) for client in self._clients]

    def heartbeat(self, heartbeat: Heartbeat, now: float) -> HeartbeatReply:
        """A sign of life with what changed; ``UNKNOWN`` asks the node to register."""
        return finish(self.heartbeat_steps(heartbeat, now))

    def heartbeat_steps(self, heartbeat: Heartbeat, now: float) -> Steps[HeartbeatReply]:
        """The same in steps."""
        return self._changes.heartbeat(heartbeat, now)

    # Blocks that nodes own.

    def route_put(
        self, node_id: str, keys: Sequence[bytes], sizes: Sequence[int], exclude: Collection[str], now: float
    ) -> list[PutRoute]:
        """Where ``node_id`` should put blocks; one batch sees the room that its earlier blocks take.

        Nodes that were not heard since the master began, and others that nobody can reach, are given none.
        """
        return finish(self.route_put_steps(node_id, keys, sizes, exclude, now))

    def route_put_steps(
        self, node_id: str, keys: Sequence[bytes], sizes: Sequence[int], exclude: Collection[str], now: float
    ) -> Steps[list[PutRoute]]:
        """The same in steps."""
        if len(keys) != len(sizes):
            raise InvalidRequest(
                f"keys and block_sizes must have the same length; {len(keys)} keys and {len(sizes)} sizes were given"
            )
        self._check("keys", len(keys))
        return self._routes.puts(node_id, keys, sizes, exclude, now)

    def route_get(
        self, node_id: str, keys: Sequence[bytes], exclude: Collection[str], now: float
    ) -> list[GetRoute | None]:
        """Where ``node_id`` should get blocks from; what is found is leased and counts as used."""
        return finish(self.route_get_steps(node_id, keys, exclude, now))

    def route_get_steps(
        self, node_id: str, keys: Sequence[bytes], exclude: Collection[str], now: float
    ) -> Steps[list[GetRoute | None]]:
        """The same in steps."""
        self._check("keys", len(keys))
        return self._routes.gets(node_id, keys, exclude, now)

    def lookup(self, keys: Sequence[bytes]) -> list[bool]:
        """For each key whether any node has it; without side effects."""
        return finish(self.lookup_steps(keys))

    def lookup_steps(self, keys: Sequence[bytes]) -> Steps[list[bool]]:
        """The same in steps."""
        self._check("keys", len(keys))
        return self._routes.lookups(keys)

    # External blocks.

    def report(self, node_id: str, hashes: Sequence[bytes], tier: int, now: float) -> bool:
        """``node_id`` holds ``hashes`` on ``tier``, whatever else it holds.

        ``False``, with nothing stored, when the node is not alive.
        """
        return finish(self.report_steps(node_id, hashes, tier, now))

    def report_steps(self, node_id: str, hashes: Sequence[bytes], tier: int, now: float) -> Steps[bool]:
        """The same in steps."""
        self._check_change(node_id, hashes)
        check_tiers(node_id, [*self.index.counts(node_id), tier])
        return self._changes.report(node_id, hashes, tier, now)

    def revoke(self, node_id: str, hashes: Sequence[bytes], tier: int, now: float) -> bool:
        """``node_id`` does not hold ``hashes`` on ``tier`` any more; whether the node is known."""
        return finish(self.revoke_steps(node_id, hashes, tier, now))

    def revoke_steps(self, node_id: str, hashes: Sequence[bytes], tier: int, now: float) -> Steps[bool]:
        """The same in steps."""
        self._check_change(node_id, hashes)
        return self._changes.revoke(node_id, hashes, tier, now)

    def clear_tier(self, node_id: str, tier: int, now: float) -> int:
        """``node_id`` holds nothing on ``tier`` any more; returns how many entries are gone.  Constant time."""
        self._check_node(node_id)
        client = self._clients.get(node_id)
        if client is not None:
            client.clear(tier)
        return self.index.clear_tier(node_id, tier, now)

    def clear_node(self, node_id: str, now: float) -> int:
        """``node_id`` holds no external blocks any more; returns how many entries are gone.  Constant time."""
        self._check_node(node_id)
        client = self._clients.get(node_id)
        if client is not None:
            client.clear()
        return self.index.clear_node(node_id, now)

    def apply_batch(self, node_id: str, batch: Batch, now: float) -> Acknowledgement:
        """Several changes at once, numbered; a sign of life too.

        A node that is not registered, or not with this incarnation yet, is told so (``Verdict.UNREGISTERED``).
        """
        return finish(self.apply_batch_steps(node_id, batch, now))

    def apply_batch_steps(self, node_id: str, batch: Batch, now: float) -> Steps[Acknowledgement]:
        """The same in steps."""
        self._check("hashes", sum(len(action.hashes) for action in batch.actions))
        check_tiers(node_id, [*self.index.counts(node_id), *(action.tier for action in batch.actions)])
        return self._changes.batch(node_id, batch, now)

    def probe(self, node_id: str, incarnation: int, acked: int, now: float) -> Acknowledgement:
        """The answer to a node that believes that its batches up to ``acked`` are known; a sign of life too."""
        return self._changes.probe(node_id, incarnation, acked, now)

    def match(self, hashes: Sequence[bytes], count_as_hit: bool, now: float) -> list[NodeMatch]:
        """Who holds which of ``hashes``, see ``ExternalKvIndex.match``; without nodes that are about to expire."""
        self._check("hashes", len(hashes))
        return self._audible(self.index.match(hashes, count_as_hit, now), now)

    def match_steps(self, hashes: Sequence[bytes], count_as_hit: bool, now: float) -> Steps[list[NodeMatch]]:
        """The same in steps."""
        self._check("hashes", len(hashes))
        return self._heard_of(self._queries.match(hashes, count_as_hit, now), now)

    def match_positions(self, hashes: Sequence[bytes], count_as_hit: bool, now: float) -> list[PositionMatch]:
        """Who holds which positions of ``hashes``, as bitmaps; everything else is as in :meth:`match`."""
        self._check("hashes", len(hashes))
        return self._audible(self.index.match_positions(hashes, count_as_hit, now), now)

    def prepare(self, make: Callable[[Sequence[PositionMatch]], A]) -> PreparedMatches[A]:
        """:meth:`match_positions` with answers as ``make`` makes them, which are kept for queries that are alike."""
        return PreparedMatches(self.index, self._clients, self._check, make)

    def match_positions_steps(
        self, hashes: Sequence[bytes], count_as_hit: bool, now: float
    ) -> Steps[list[PositionMatch]]:
        """The same in steps."""
        self._check("hashes", len(hashes))
        return self._heard_of(self._queries.match_positions(hashes, count_as_hit, now), now)

    def match_prefix(
        self, hashes: Sequence[bytes], weights: Mapping[int, float] | None, now: float
    ) -> list[PrefixMatch]:
        """The longest usable prefix per node: see ``ExternalKvIndex.match_prefix``."""
        return finish(self.match_prefix_steps(hashes, weights, now))

    def match_prefix_steps(
        self, hashes: Sequence[bytes], weights: Mapping[int, float] | None, now: float
    ) -> Steps[list[PrefixMatch]]:
        """The same in steps."""
        self._check("hashes", len(hashes))
        return self._heard_of(self._queries.match_prefix(hashes, weights), now)

    def hit_counts(self, hashes: Sequence[bytes]) -> list[tuple[bytes, int]]:
        """How often each of ``hashes`` was asked for and found; without those that never were, and duplicates."""
        if len(hashes) > self.settings.hit_query_max:
            raise InvalidRequest(f"hashes size exceeds UMBP_HIT_QUERY_MAX_BATCH={self.settings.hit_query_max}")
        return list(self.index.hits.counts(hashes).items())

    def list_blocks(self, node_id: str, tier: int, cursor: int, limit: int) -> BlockPage:
        """Some of the hashes that ``node_id`` holds on ``tier``; cursor 0 begins, and ends.

        What is there at the first page and still at the last comes at least once.  A page has up to ``limit`` hashes
        (at most ``PAGE_HASHES``), possibly none though others follow.
        """
        self._check_node(node_id)
        if cursor < 0 or limit < 1:
            raise InvalidRequest(
                f"cursor {cursor} and limit {limit} make no page; begin with cursor 0 and limit 1 or more"
            )
        return BlockPage(*self.index.page(node_id, tier, cursor, min(limit, PAGE_HASHES)))

    def since(self, incarnation: int, cursor: int, limit: int) -> FeedPage:
        """Changes of the external index after ``cursor``: see ``ChangeFeed.since``."""
        return self.feed.since(incarnation, cursor, limit)

    def snapshot(self) -> Snapshot:
        """The external index at this moment, to be read in slices and followed from its cursor."""
        return self.index.snapshot()

    def explain(self, node_id: str, key: bytes, now: float) -> HashExplanation:
        """Why ``key`` can, or cannot, be used on ``node_id``.  Looks through the whole feed: a question for people."""
        client = self._clients.get(node_id)
        status = NodeStatus.UNKNOWN if client is None else client.status
        return explain(node_id, status, self.index.explain(node_id, key), now)

    # The passing of time.

    def tick(self, now: float) -> TickEffects:
        """Let silent nodes expire, and plan evictions when it is time.  To be called every second or so.

        A round of evictions may take several calls; what is planned by one takes some milliseconds.
        """
        expired = self._clients.expire(now)
        for client in expired:
            self._expire(client, now)
        if not self._planner.pending and now >= self._next_round:
            self._next_round = now + self.settings.eviction_interval
            self._planner.begin(client for client in self._clients if client.status is NodeStatus.ALIVE)
        return TickEffects(
            tuple(client.node_id for client in expired),
            tuple(self._planner.plan(now)),
            tuple(self._clients.purge(now)),
        )

    def sweep(self, limit: int) -> int:
        """Free memory of up to ``limit`` entries that were cleared; returns how many are left, 0 when none.

        With limit 0 it only says how many there are.
        """
        return self.index.sweep(limit) + self.blocks.sweep(limit)

    def collect_hits(self, limit: int, now: float) -> int:
        """Look at up to ``limit`` hit counters, and forget those that nobody hit for long; returns how many."""
        return self.index.hits.collect(now, limit)

    def forgive(self, seconds: float) -> None:
        """The master was stopped for ``seconds``: no node is to blame that it was not heard meanwhile."""
        self._clients.forgive(seconds)

    def _begin_life(self, client: Client, now: float) -> None:
        self._external.register(client.node_id, client.incarnation, now)
        self.blocks.register(client.node_id)

    def _expire(self, client: Client, now: float) -> None:
        """Drop what a node said; the next that it says has to be everything."""
        self._external.expire(client.node_id, now)
        self.blocks.expire(client.node_id)

    def _drop(self, node_id: str, now: float, reason: str) -> None:
        self._external.forget(node_id, now, reason)
        self.blocks.forget(node_id)

    def _info(self, client: Client, now: float) -> NodeInfo:
        return NodeInfo(
            client.node_id,
            client.status,
            client.node_address,
            client.peer_address,
            client.tags,
            client.incarnation,
            client.capacities,
            now - client.seen,
            self.index.counts(client.node_id),
            {tier: use.blocks for tier, use in self.blocks.use(client.node_id).items()},
            dict(client.counts),
        )

    def _audible(self, matches: list[M], now: float) -> list[M]:
        """Without the nodes that are about to expire."""
        silent = self._clients.silent(now)
        return [match for match in matches if match.node not in silent] if silent else matches

    def _heard_of(self, steps: Steps[list[M]], now: float) -> Steps[list[M]]:
        matches = yield from steps
        return self._audible(matches, now)

    def _check(self, what: str, count: int) -> None:
        if count > self.settings.query_max:
            raise InvalidRequest(f"{count} {what} in one request, at most {self.settings.query_max}; split it")

    def _check_node(self, node_id: str) -> None:
        if not node_id:
            raise InvalidRequest("node_id must not be empty")

    def _check_change(self, node_id: str, hashes: Sequence[bytes]) -> None:
        self._check_node(node_id)
        if not hashes:
            raise InvalidRequest("hashes must not be empty")
        self._check("hashes", len(hashes))
