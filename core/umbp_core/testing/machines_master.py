"""The hypothesis machine of the master's state: nodes, both indexes, routes and evictions beside a plain model.

Large changes stay under way over many steps, between which anything else may happen.
"""

from __future__ import annotations

import random

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from umbp_core.errors import AlreadyRegistered
from umbp_core.index_gate import Acknowledgement, Action, ActionKind, Batch, Verdict
from umbp_core.journal import Bundle, Delta
from umbp_core.master.changes import Slices, Steps, finish
from umbp_core.master.model import (
    Heartbeat,
    HeartbeatReply,
    MasterSettings,
    NodeStatus,
    Registration,
    TierCapacity,
)
from umbp_core.master.state import MasterState
from umbp_core.placements import preference
from umbp_core.testing.models_index import HitModel
from umbp_core.testing.models_master import MasterModel, Pending

NODES = ("n1", "n2", "n3")
TIERS = (1, 2, 3, 0)
KEYS = tuple(b"%d" % number for number in range(12))
SLICES = Slices(hashes=2, deltas=2, query=8)
SETTINGS = MasterSettings(
    heartbeat_ttl=2.0,
    max_missed_heartbeats=3,
    lease_duration=3.0,
    eviction_interval=1.0,
    eviction_high_watermark=0.5,
    eviction_low_watermark=0.25,
    hit_ttl=20.0,
)

nodes = st.sampled_from(NODES)
tiers = st.sampled_from(TIERS)
keys = st.sampled_from(KEYS)
key_lists = st.lists(keys, max_size=14)
some_keys = st.lists(keys, min_size=1, max_size=7)
incarnations = st.integers(0, 3)
rooms = st.lists(st.builds(TierCapacity, st.sampled_from((1, 2, 3)), st.just(20), st.integers(0, 20)), max_size=3)
capacities = rooms.map(lambda told: tuple({capacity.tier: capacity for capacity in told}.values()))
deltas = st.builds(Delta, keys, st.sampled_from((1, 2, 3)), st.none() | st.integers(0, 9))
delta_lists = st.lists(deltas, max_size=5)
actions = st.builds(Action, st.sampled_from(ActionKind), tiers, some_keys).map(
    lambda action: Action(action.kind, action.tier) if action.kind is ActionKind.CLEAR else action
)


def excess(capacity: TierCapacity) -> int:
    """Bytes above the low watermark, once the high one is reached."""
    used = capacity.total - capacity.available
    return used - 5 if used >= 10 else 0


class MasterMachine(RuleBasedStateMachine):
    """``MasterState`` under everything that nodes and routers do, and the passing of time."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 1000.0
        self.life = 1
        self.state = MasterState(SETTINGS, random.Random(3), self.life, SLICES)
        self.prepared = self.state.prepare(list)
        self.model = MasterModel(6.0, SETTINGS.lease_duration, HitModel(SETTINGS.hit_ttl), SLICES.hashes)
        self.running: list[tuple[Steps[object], Pending, Batch | None]] = []
        self.planned = self.now - 10

    # Nodes.

    @rule(
        node=nodes,
        incarnation=incarnations,
        address=st.sampled_from(("", "here:1", "there:1")),
        host=st.sampled_from(("host", "")),
        room=capacities,
    )
    def register(self, node: str, incarnation: int, address: str, host: str, room: tuple[TierCapacity, ...]) -> None:
        """A new life, the same again, or refused."""
        told = Registration(node, host, address, b"", room, (), incarnation)
        if self.model.registers(told, self.now) is None:
            try:
                self.state.register(told, self.now)
            except AlreadyRegistered:
                return
            raise AssertionError(f"{told} took the place of a living node")
        assert self.state.register(told, self.now).ack_seq == self.model.blocks.acked[node]

    @rule(node=nodes)
    def unregister(self, node: str) -> None:
        """Gone at once."""
        assert self.state.unregister(node, self.now) is self.model.unregister(node)

    @rule(seconds=st.sampled_from((0.5, 1.0, 2.5, 7.0)))
    def wait(self, seconds: float) -> None:
        """Time passes; nobody looks."""
        self.now += seconds

    @rule()
    def tick(self) -> None:
        """Silent nodes expire, full tiers are to be emptied."""
        effects = self.state.tick(self.now)
        assert set(effects.expired) == self.model.expire(self.now)
        assert effects.purged == ()
        due = self.now >= self.planned + SETTINGS.eviction_interval
        expected = self.model.victims(self.now, excess) if due else []
        self.planned = self.now if due else self.planned
        assert [(order.node_id, list(order.keys)) for order in effects.evictions] == expected

    @precondition(lambda self: not self.running)
    @rule()
    def restart(self) -> None:
        """A new master that knows the nodes of the last one, and nothing else."""
        records = [record for node in self.model.rows if (record := self.state.record(node)) is not None]
        self.life += 1
        self.state = MasterState(SETTINGS, random.Random(3), self.life, SLICES)
        self.prepared = self.state.prepare(list)
        self.state.restore(records, self.now)
        self.planned = self.now - 10
        self.model.restart(self.now)

    @rule(seconds=st.integers(1, 5))
    def forgive(self, seconds: int) -> None:
        """The master was away."""
        self.now += seconds
        self.state.forgive(float(seconds))
        for row in self.model.rows.values():
            row.seen += seconds if row.status is NodeStatus.ALIVE else 0

    # Heartbeats.

    @rule(
        node=nodes,
        first=st.integers(0, 2),
        parts=st.lists(delta_lists, max_size=3),
        room=st.none() | capacities,
        incarnation=st.none() | incarnations,
    )
    def heartbeat(
        self,
        node: str,
        first: int,
        parts: list[list[Delta]],
        room: tuple[TierCapacity, ...] | None,
        incarnation: int | None,
    ) -> None:
        """Replays, what comes next, or a gap."""
        row = self.model.rows.get(node)
        own = 0 if row is None else row.incarnation
        claimed = own if incarnation is None else incarnation
        start = self.model.blocks.acked.get(node, 0) + first
        sent = [Bundle(start + number, tuple(part)) for number, part in enumerate(parts)]
        reply = self.state.heartbeat(Heartbeat(node, sent, capacities=room, incarnation=claimed), self.now)
        if row is None or claimed not in (0, own):
            assert reply == HeartbeatReply(NodeStatus.UNKNOWN)
            return
        self._hear(node)
        told = [(bundle.seq, bundle.deltas) for bundle in sent]
        acked, asked = self.model.blocks.heartbeat(node, told, self.now)
        assert reply == HeartbeatReply(NodeStatus.ALIVE, acked, asked)
        if room is not None and not (sent and asked):
            row.capacities = room

    @rule(node=nodes, parts=st.lists(delta_lists, max_size=2), baseline=st.integers(0, 5))
    def full_sync(self, node: str, parts: list[list[Delta]], baseline: int) -> None:
        """Everything anew."""
        sent = [Bundle(number, tuple(part)) for number, part in enumerate(parts)]
        reply = self.state.heartbeat(Heartbeat(node, sent, full_sync=True, baseline=baseline), self.now)
        if node not in self.model.rows:
            assert reply == HeartbeatReply(NodeStatus.UNKNOWN)
            return
        self._hear(node)
        self.model.blocks.full_sync(node, [(delta, self.now) for part in parts for delta in part], baseline)
        assert reply == HeartbeatReply(NodeStatus.ALIVE, baseline, request_full_sync=False)

    def _hear(self, node: str) -> None:
        row = self.model.rows[node]
        row.seen, row.status, row.heard = max(row.seen, self.now), NodeStatus.ALIVE, True

    # Changes of external blocks; one of a node at a time.

    def _idle(self, node: str) -> bool:
        return all(change.node != node for _, change, _ in self.running)

    @rule(node=nodes, hashes=some_keys, tier=tiers, revoke=st.booleans(), steps=st.booleans())
    def change(self, node: str, hashes: list[bytes], tier: int, revoke: bool, steps: bool) -> None:
        """A report or a revoke, at one go or begun."""
        if not self._idle(node):
            return
        row = self.model.rows.get(node)
        accepted = row is not None and (revoke or row.status is NodeStatus.ALIVE)
        call = self.state.revoke_steps if revoke else self.state.report_steps
        running = call(node, hashes, tier, self.now)
        kind = ActionKind.REVOKE if revoke else ActionKind.REPORT
        change = self.model.begin(node, [Action(kind, tier, hashes)] if accepted else [])
        if steps and accepted:
            self.running.append((running, change, None))
            return
        assert finish(running) is accepted
        self._finish(change)

    @rule(node=nodes, ahead=st.integers(0, 2), told=st.lists(actions, max_size=3), full=st.booleans(), data=st.data())
    def batch(self, node: str, ahead: int, told: list[Action], full: bool, data: st.DataObject) -> None:
        """Replays, what comes next, gaps; of this life or another; at one go or begun."""
        if not self._idle(node):
            return
        row = self.model.rows.get(node)
        own = 0 if row is None else row.incarnation
        incarnation = data.draw(st.sampled_from((own, own, own - 1, own + 1)))
        sent = Batch(incarnation, ahead + (0 if row is None else row.acked), told, full)
        answer = self.model.judge(node, sent, self.now)
        running = self.state.apply_batch_steps(node, sent, self.now)
        if answer[0] is not Verdict.APPLY:
            assert finish(running) == Acknowledgement(*answer)
            return
        change = self.model.begin(node, told)
        if full:
            self.model.external.clear(node)
        ended = self._advance(running, change, sent)
        whole = data.draw(st.booleans())
        while whole and not ended:
            ended = self._advance(running, change, sent)

    @precondition(lambda self: self.running)
    @rule(data=st.data(), whole=st.booleans())
    def go_on(self, data: st.DataObject, whole: bool) -> None:
        """One slice of a change that is under way, or the rest."""
        running, change, sent = data.draw(st.sampled_from(self.running))
        while not self._advance(running, change, sent) and whole:
            pass

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def give_up(self, data: st.DataObject) -> None:
        """The rest of a change never comes."""
        entry = data.draw(st.sampled_from(self.running))
        entry[0].close()
        self.running.remove(entry)
        self.model.pending.remove(entry[1])

    def _advance(self, running: Steps[object], change: Pending, sent: Batch | None) -> bool:
        """One slice; whether the change came to its end."""
        entry = (running, change, sent)
        before = len(change.actions)
        ended, answer = self._next(running)
        if ended:
            self._finish(change)
            if entry in self.running:
                self.running.remove(entry)
            assert answer == (True if sent is None else self._ended(change, sent))
            return True
        self.model.step(change)
        assert before
        if entry not in self.running:
            self.running.append(entry)
        return False

    @staticmethod
    def _next(running: Steps[object]) -> tuple[bool, object]:
        try:
            next(running)
        except StopIteration as stop:
            return True, stop.value
        return False, None

    def _finish(self, change: Pending) -> None:
        while change.actions:
            self.model.step(change)
        if change in self.model.pending:
            self.model.pending.remove(change)

    def _ended(self, change: Pending, sent: Batch) -> Acknowledgement:
        """The answer to a batch at its end."""
        row = self.model.rows.get(change.node)
        if row is None or row is not change.row:
            return Acknowledgement(Verdict.UNREGISTERED, sent.incarnation, 0, request_full_sync=True)
        if change.dropped:
            return Acknowledgement(Verdict.GAP, sent.incarnation, row.acked, request_full_sync=True)
        row.acked, row.owes = sent.seq, False
        return Acknowledgement(Verdict.APPLY, sent.incarnation, sent.seq, request_full_sync=False)

    @rule(node=nodes, tier=st.none() | tiers)
    def clear(self, node: str, tier: int | None) -> None:
        """At once, also for what is under way."""
        gone = self.state.clear_node(node, self.now) if tier is None else self.state.clear_tier(node, tier, self.now)
        assert gone == self.model.clear(node, tier)

    @rule(limit=st.integers(1, 5))
    def sweep(self, limit: int) -> None:
        """Changes no answer."""
        self.state.sweep(limit)

    # Questions.

    @rule(query=key_lists, count=st.booleans(), steps=st.booleans())
    def match(self, query: list[bytes], count: bool, steps: bool) -> None:
        """By hash and by position; hits are counted once per hash."""
        expected = self.model.match(query, self.now)
        found = (
            finish(self.state.match_steps(query, count, self.now))
            if steps
            else self.state.match(query, count, self.now)
        )
        assert {match.node: list(match.tiers.items()) for match in found} == expected
        if count:
            held = [key for key in query if any(key == entry[2] for entry in self.model.external.held)]
            self.model.hits.record(held, self.now)
        if steps:
            places = finish(self.state.match_positions_steps(query, False, self.now))
        else:
            places = self.state.match_positions(query, False, self.now)
            assert self.prepared.match(query, False, self.now)[0] == places
        by_position = {
            match.node: [
                (tier, [key for place, key in enumerate(query) if bitmap[place // 8] >> place % 8 & 1])
                for tier, bitmap in match.tiers.items()
            ]
            for match in places
        }
        assert by_position == expected

    @rule(query=key_lists)
    def match_prefix(self, query: list[bytes]) -> None:
        """The longest prefix of each node."""
        found = self.state.match_prefix(query, None, self.now)
        expected = self.model.external.prefix(query, None)
        assert {match.node: (match.length, match.runs) for match in found} == {
            node: (length, runs) for node, (length, runs, _) in expected.items() if self.model.audible(node, self.now)
        }

    @rule(node=nodes, wanted=key_lists, exclude=st.sets(nodes))
    def route_get(self, node: str, wanted: list[bytes], exclude: set[str]) -> None:
        """The fastest copy, the own one if it is among them."""
        silent = {name for name in self.model.rows if not self.model.audible(name, self.now)}
        routes = self.state.route_get(node, wanted, exclude, self.now)
        for key, route in zip(wanted, routes, strict=True):
            copies = self.model.blocks.route(key, self.now, self.model.lease, exclude | silent)
            best = min((preference(copy.tier) for copy in copies), default=None)
            fastest = {(copy.node, copy.tier, copy.size) for copy in copies if preference(copy.tier) == best}
            own = {copy for copy in fastest if copy[0] == node}
            if route is None:
                assert not copies
            else:
                assert (route.node_id, route.tier, route.size) in (own or fastest)
                assert route.peer_address == self.model.rows[route.node_id].peer_address

    @rule(node=nodes, wanted=st.lists(st.tuples(keys, st.integers(0, 15)), max_size=5), exclude=st.sets(nodes))
    def route_put(self, node: str, wanted: list[tuple[bytes, int]], exclude: set[str]) -> None:
        """Most room, HBM first, and no room twice."""
        sizes = [size for _, size in wanted]
        routes = self.state.route_put(node, [key for key, _ in wanted], sizes, exclude, self.now)
        expected = self.model.puts(node, [key for key, _ in wanted], sizes, exclude, self.now)
        assert [(route.outcome, route.node_id, route.tier) for route in routes] == expected

    @invariant()
    def knowledge_agrees(self) -> None:
        """Rows, counts, copies, hits."""
        listed = {info.node_id: info for info in self.state.list_nodes(self.now)}
        assert list(listed) == list(self.model.rows)
        for node, row in self.model.rows.items():
            info = listed[node]
            assert (info.status, info.incarnation, info.capacities) == (row.status, row.incarnation, row.capacities)
            assert info.last_heartbeat_age == self.now - row.seen
            alive = row.status is NodeStatus.ALIVE
            assert self.state.peer_address(node) == (row.peer_address if alive else "")
            assert self.state.is_alive(node) is alive
            held = {tier: len(self.model.external.hashes(node, tier)) for tier in self.model.external.tiers(node)}
            assert info.external_counts == held
            assert info.block_counts == {tier: use.blocks for tier, use in self.model.blocks.use(node).items()}
        assert self.state.lookup(KEYS) == [bool(self.model.blocks.locations(key)) for key in KEYS]
        known = self.model.hits.hits
        assert dict(self.state.hit_counts(KEYS)) == {key: known[key][0] for key in KEYS if key in known}
