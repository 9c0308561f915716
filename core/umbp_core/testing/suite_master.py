"""What every master has to answer, as test classes to subclass: one for any wire, one for our native protocol.

A test of yours gives the fixture ``transport``: a connected ``MasterTransport`` to a master that runs.  The master need
not be fresh, and others may use it too as long as none of their nodes has room for blocks: the suite makes up names of
its own and cleans up behind it::

    class TestMyDoor(MasterSuite):
        @pytest.fixture
        def transport(self) -> Iterator[MasterTransport]:
            with closing(my_transport()) as transport:
                yield transport

The suite holds what UMBP's own tests and its observed answers say, without what is known as a defect there: a replay is
acknowledged and not taken for a gap, a second ADD updates the size, a keepalive's capacities count, and nodes without a
name are refused.
"""

from __future__ import annotations

import threading
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import replace

import pytest

from umbp_core.errors import AlreadyRegistered, InvalidRequest
from umbp_core.journal import Bundle, Delta
from umbp_core.master.model import (
    ExternalMatch,
    GetRoute,
    Heartbeat,
    HeartbeatReply,
    NodeStatus,
    PutOutcome,
    PutRoute,
    Registration,
    TierCapacity,
)
from umbp_core.master.samples import CounterDelta, GaugeValue, HistogramDelta, MetricSample
from umbp_core.master.transport import MasterTransport

UNKNOWN, HBM, DRAM, SSD = 0, 1, 2, 3
GIB = 1 << 30
T = 20.0
"""Seconds that any call here may take; it takes far less."""


class Scene:
    """Nodes and hashes whose names nobody else uses, at the master behind ``transport``."""

    def __init__(self, transport: MasterTransport) -> None:
        self.transport = transport
        self.prefix = uuid.uuid4().hex[:12]
        self._nodes: list[str] = []

    def key(self, name: str) -> bytes:
        """A hash or key of this scene."""
        return f"{self.prefix}-{name}".encode()

    def keys(self, names: str) -> list[bytes]:
        """One for each word of ``names``."""
        return [self.key(name) for name in names.split()]

    def name(self, node: str) -> str:
        """A node id of this scene, that of a node to be forgotten at the end."""
        self._nodes.append(f"{self.prefix}-{node}")
        return self._nodes[-1]

    def registration(self, node: str, incarnation: int = 0) -> Registration:
        """A node with room for blocks in DRAM, and an address that says whose it is."""
        name = self.name(node)
        room = (TierCapacity(DRAM, 8 * GIB, 4 * GIB),)
        return Registration(name, f"{name}:1", f"{name}:2", b"desc", room, ("role=test",), incarnation)

    def register(self, node: str, incarnation: int = 0) -> str:
        """Register a node; its id."""
        registration = self.registration(node, incarnation)
        self.transport.register(registration, T)
        return registration.node_id

    def match(self, names: str, count_as_hit: bool = False) -> dict[str, dict[int, list[bytes]]]:
        """What the nodes of this scene hold."""
        found = self.transport.match(self.keys(names), count_as_hit, T)
        return {match.node_id: match.tiers for match in found if match.node_id in self._nodes}

    def bundle(self, seq: int, *changes: tuple[str, int, int | None]) -> Bundle:
        """Changes of own blocks: names, tiers, sizes (``None`` for a removal)."""
        return Bundle(seq, tuple(Delta(self.key(name), tier, size) for name, tier, size in changes))

    def beat(self, node: str, *bundles: Bundle, full_sync: bool = False, baseline: int = 0) -> HeartbeatReply:
        """A heartbeat that says nothing of capacities."""
        return self.transport.heartbeat(Heartbeat(node, bundles, full_sync, baseline), T)

    def close(self) -> None:
        """Forget all nodes of this scene."""
        for node in dict.fromkeys(self._nodes):
            self.transport.unregister(node, T)


class MasterSuite:
    """For any wire."""

    @pytest.fixture
    def transport(self) -> MasterTransport:
        """The master under test; to be overridden."""
        raise AssertionError(f"{type(self).__name__} has to give the fixture `transport`")

    @pytest.fixture
    def scene(self, transport: MasterTransport) -> Iterator[Scene]:
        """A scene of its own for each test."""
        scene = Scene(transport)
        yield scene
        scene.close()

    # Nodes.

    def test_a_registration_says_how_often_to_come_back(self, scene: Scene) -> None:
        """And that nothing of the node is known yet."""
        ack = scene.transport.register(scene.registration("n"), T)
        assert ack.heartbeat_interval_ms > 0
        assert ack.ack_seq == 0

    def test_a_living_node_is_not_registered_again(self, scene: Scene) -> None:
        """The message is the one that UMBP's clients know."""
        registration = scene.registration("n")
        scene.transport.register(registration, T)
        with pytest.raises(AlreadyRegistered, match="already alive and cannot be re-registered"):
            scene.transport.register(registration, T)

    def test_a_node_without_a_name_is_refused(self, scene: Scene) -> None:
        """It could be routed to, and by nobody else be told apart."""
        with pytest.raises(InvalidRequest, match="node_id"):
            scene.transport.register(Registration(""), T)
        with pytest.raises(InvalidRequest, match="node_id must not be empty"):
            scene.transport.report("", scene.keys("a"), HBM, T)

    def test_unregistering_takes_everything_along(self, scene: Scene) -> None:
        """Twice does no harm, and the name is free again."""
        node = scene.register("n")
        scene.transport.report(node, scene.keys("a"), HBM, T)
        scene.beat(node, scene.bundle(1, ("k", DRAM, 5)))
        scene.transport.unregister(node, T)
        scene.transport.unregister(node, T)
        assert scene.match("a") == {}
        assert scene.transport.lookup(scene.keys("k"), T) == [False]
        assert scene.beat(node).status is NodeStatus.UNKNOWN
        scene.register("n")

    # Heartbeats.

    def test_a_heartbeat_of_an_unknown_node_asks_it_to_register(self, scene: Scene) -> None:
        """Without an error."""
        assert scene.beat(scene.name("ghost")) == HeartbeatReply(NodeStatus.UNKNOWN, 0, False)

    def test_bundles_are_applied_in_order_and_once(self, scene: Scene) -> None:
        """A keepalive says how far they are; a replay is acknowledged."""
        node = scene.register("n")
        assert scene.beat(node) == HeartbeatReply(NodeStatus.ALIVE, 0, False)
        first = scene.bundle(1, ("a", DRAM, 5), ("b", SSD, 6))
        assert scene.beat(node, first) == HeartbeatReply(NodeStatus.ALIVE, 1, False)
        assert scene.beat(node, scene.bundle(2, ("a", DRAM, None))) == HeartbeatReply(NodeStatus.ALIVE, 2, False)
        assert scene.beat(node, first) == HeartbeatReply(NodeStatus.ALIVE, 2, False)
        assert scene.transport.lookup(scene.keys("a b"), T) == [False, True]

    def test_a_gap_stops_and_asks_for_a_full_sync(self, scene: Scene) -> None:
        """What came before it stays applied."""
        node = scene.register("n")
        bundles = [scene.bundle(seq, (f"k{seq}", DRAM, 5)) for seq in (1, 2, 4)]
        assert scene.beat(node, *bundles) == HeartbeatReply(NodeStatus.ALIVE, 2, True)
        assert scene.transport.lookup(scene.keys("k1 k2 k4"), T) == [True, True, False]

    def test_a_full_sync_replaces_everything(self, scene: Scene) -> None:
        """Removals in it mean nothing; the next bundle follows its baseline."""
        node = scene.register("n")
        scene.beat(node, scene.bundle(1, ("old", DRAM, 5)))
        content = scene.bundle(1, ("new", DRAM, 5), ("old", DRAM, None))
        assert scene.beat(node, content, full_sync=True, baseline=50) == HeartbeatReply(NodeStatus.ALIVE, 50, False)
        assert scene.transport.lookup(scene.keys("old new"), T) == [False, True]
        assert scene.beat(node, scene.bundle(51, ("more", DRAM, 5))).acked_seq == 51
        assert scene.beat(node, full_sync=True, baseline=60).acked_seq == 60
        assert scene.transport.lookup(scene.keys("new more"), T) == [False, False]

    def test_adding_a_block_again_updates_its_size(self, scene: Scene) -> None:
        """The last word counts."""
        node = scene.register("n")
        scene.beat(node, scene.bundle(1, ("k", DRAM, 10)), scene.bundle(2, ("k", DRAM, 99)))
        assert scene.transport.route_get(node, scene.keys("k"), (), T) == [GetRoute(node, DRAM, 99, f"{node}:2")]

    # Routing.

    def test_puts_go_where_there_is_room(self, scene: Scene) -> None:
        """Not to those that are excluded; capacities of a keepalive count, and one without leaves them alone."""
        node = scene.register("n")
        keys = scene.keys("a b")
        routed = [PutRoute(PutOutcome.ROUTED, node, DRAM, f"{node}:2")] * 2
        assert scene.transport.route_put(node, keys, [GIB, GIB], (), T) == routed
        nowhere = scene.transport.route_put(node, keys, [GIB, GIB], [node], T)
        assert nowhere == [PutRoute(PutOutcome.UNAVAILABLE)] * 2
        full = Heartbeat(node, capacities=(TierCapacity(DRAM, 8 * GIB, 0),))
        scene.transport.heartbeat(full, T)
        assert scene.transport.route_put(node, keys, [GIB, GIB], (), T) == nowhere
        scene.transport.heartbeat(replace(full, capacities=(TierCapacity(DRAM, 8 * GIB, 2 * GIB),)), T)
        scene.beat(node)
        assert scene.transport.route_put(node, keys, [GIB, GIB], (), T) == routed

    def test_what_exists_is_not_put_again(self, scene: Scene) -> None:
        """Wherever it is."""
        node = scene.register("n")
        scene.beat(node, scene.bundle(1, ("k", SSD, 10)))
        (route,) = scene.transport.route_put(node, scene.keys("k"), [10], (), T)
        assert route.outcome is PutOutcome.ALREADY_EXISTS

    def test_gets_come_from_the_fastest_tier_of_a_node_that_is_not_excluded(self, scene: Scene) -> None:
        """One answer per key, in order."""
        fast, slow = scene.register("fast"), scene.register("slow")
        scene.beat(fast, scene.bundle(1, ("k", DRAM, 10)))
        scene.beat(slow, scene.bundle(1, ("k", SSD, 10), ("m", SSD, 20)))
        keys = scene.keys("k none m")
        at_fast, at_slow = GetRoute(fast, DRAM, 10, f"{fast}:2"), GetRoute(slow, SSD, 20, f"{slow}:2")
        assert scene.transport.route_get(slow, keys, (), T) == [at_fast, None, at_slow]
        assert scene.transport.route_get(slow, keys, [fast], T)[0] == GetRoute(slow, SSD, 10, f"{slow}:2")

    def test_nothing_is_asked_and_nothing_answered(self, scene: Scene) -> None:
        """Empty lists are no errors."""
        node = scene.register("n")
        assert scene.transport.route_put(node, [], [], (), T) == []
        assert scene.transport.route_get(node, [], (), T) == []
        assert scene.transport.lookup([], T) == []
        assert scene.transport.match([], True, T) == []
        assert scene.transport.hit_counts([], T) == []

    # External blocks.

    def test_a_match_is_grouped_by_node_and_tier_in_the_order_of_the_query(self, scene: Scene) -> None:
        """Addresses are given; a hash that is asked for twice is answered twice."""
        one, two = scene.register("one"), scene.register("two")
        a, b, c = scene.keys("a b c")
        scene.transport.report(one, [a, b, c], HBM, T)
        scene.transport.report(one, [b, a], DRAM, T)
        scene.transport.report(two, [a], SSD, T)
        assert scene.match("a b c zz") == {one: {HBM: [a, b, c], DRAM: [a, b]}, two: {SSD: [a]}}
        assert scene.match("c a a") == {one: {HBM: [c, a, a], DRAM: [a, a]}, two: {SSD: [a, a]}}
        assert scene.match("zz") == {}
        (found,) = scene.transport.match([b], False, T)
        assert found == ExternalMatch(one, f"{one}:2", {HBM: [b], DRAM: [b]})
        assert found.matched_hash_count() == 1

    def test_reports_are_additive_and_idempotent(self, scene: Scene) -> None:
        """A tier does not replace another."""
        node = scene.register("n")
        for tier in (HBM, HBM, DRAM):
            scene.transport.report(node, scene.keys("a"), tier, T)
        assert scene.match("a") == {node: {HBM: scene.keys("a"), DRAM: scene.keys("a")}}

    def test_a_revoke_takes_one_tier_away(self, scene: Scene) -> None:
        """A hash without tiers is gone; what is not there is no error."""
        node = scene.register("n")
        scene.transport.report(node, scene.keys("a b"), HBM, T)
        scene.transport.report(node, scene.keys("a"), DRAM, T)
        for _ in range(2):
            scene.transport.revoke(node, scene.keys("a zz"), HBM, T)
            assert scene.match("a b") == {node: {HBM: scene.keys("b"), DRAM: scene.keys("a")}}
        scene.transport.revoke(node, scene.keys("a"), DRAM, T)
        scene.transport.revoke(node, scene.keys("b"), SSD, T)
        assert scene.match("a b") == {node: {HBM: scene.keys("b")}}
        scene.transport.revoke(scene.name("ghost"), scene.keys("b"), HBM, T)
        assert scene.match("a b") == {node: {HBM: scene.keys("b")}}

    def test_a_tier_or_a_node_is_cleared_and_the_others_are_left_alone(self, scene: Scene) -> None:
        """The node stays registered, and may report again."""
        one, two = scene.register("one"), scene.register("two")
        for node in (one, two):
            scene.transport.report(node, scene.keys("a b"), HBM, T)
            scene.transport.report(node, scene.keys("b"), DRAM, T)
        scene.transport.clear_tier(one, HBM, T)
        untouched = {HBM: scene.keys("a b"), DRAM: scene.keys("b")}
        assert scene.match("a b") == {one: {DRAM: scene.keys("b")}, two: untouched}
        scene.transport.clear_node(one, T)
        scene.transport.clear_node(scene.name("ghost"), T)
        scene.transport.clear_tier(scene.name("ghost"), HBM, T)
        assert scene.match("a b") == {two: untouched}
        scene.transport.report(one, scene.keys("a"), HBM, T)
        assert scene.match("a")[one] == {HBM: scene.keys("a")}

    def test_a_node_that_does_not_live_reports_in_vain(self, scene: Scene) -> None:
        """Without an error on UMBP's wire; ours says so."""
        stored = scene.transport.report(scene.name("ghost"), scene.keys("a"), HBM, T)
        assert stored is not scene.transport.native
        assert scene.match("a") == {}

    def test_tiers_and_hashes_are_taken_as_they_are(self, scene: Scene) -> None:
        """Tiers that nobody knows, in the order of their numbers; hashes of any length."""
        node = scene.register("n")
        odd = [scene.key("x" * 300), scene.key("ü"), scene.key("a b\tc")]
        for tier in (7, DRAM, UNKNOWN):
            scene.transport.report(node, odd, tier, T)
        (found,) = scene.transport.match(odd, False, T)
        assert list(found.tiers.items()) == [(UNKNOWN, odd), (DRAM, odd), (7, odd)]

    def test_hits_are_counted_once_per_hash_that_is_found(self, scene: Scene) -> None:
        """Wherever it is held, and they outlive it; only a match that counts counts."""
        one, two = scene.register("one"), scene.register("two")
        a, b, z = scene.keys("a b zz")
        for node in (one, two):
            for tier in (HBM, DRAM):
                scene.transport.report(node, [a, b], tier, T)
        scene.match("a b zz")
        assert scene.transport.hit_counts([a, b, z], T) == []
        scene.match("a a b zz", count_as_hit=True)
        scene.match("a", count_as_hit=True)
        scene.transport.clear_node(one, T)
        scene.transport.unregister(two, T)
        assert scene.transport.hit_counts([z, b, a, b], T) == [(b, 1), (a, 2)]

    def test_too_many_counters_in_one_question_are_refused(self, scene: Scene) -> None:
        """With the name of the variable that bounds them."""
        with pytest.raises(InvalidRequest, match="UMBP_HIT_QUERY_MAX_BATCH=4096"):
            scene.transport.hit_counts([scene.key(str(number)) for number in range(4097)], T)
        assert scene.transport.hit_counts([scene.key(str(number)) for number in range(4096)], T) == []

    def test_large_reports_and_matches_are_complete(self, scene: Scene) -> None:
        """More than a master works on at one go."""
        node = scene.register("n")
        many = [scene.key(str(number)) for number in range(20_000)]
        scene.transport.report(node, many, DRAM, T)
        (found,) = scene.transport.match(many, True, T)
        assert found.tiers == {DRAM: many}
        scene.transport.revoke(node, many[:15_000], DRAM, T)
        (found,) = scene.transport.match(many, False, T)
        assert found.tiers == {DRAM: many[15_000:]}

    def test_nobody_sees_half_of_a_small_change(self, scene: Scene) -> None:
        """While one thread reports and clears, another asks."""
        node = scene.register("n")
        keys = scene.keys("a b c d")
        torn: list[Sequence[bytes]] = []
        stop = threading.Event()

        def ask() -> None:
            while not stop.is_set():
                torn.extend(tiers[HBM] for tiers in scene.match("a b c d").values() if len(tiers[HBM]) != len(keys))

        asker = threading.Thread(target=ask, daemon=True)
        asker.start()
        for _ in range(100):
            scene.transport.report(node, keys, HBM, T)
            scene.transport.clear_tier(node, HBM, T)
        stop.set()
        asker.join(T)
        assert (asker.is_alive(), torn) == (False, [])

    def test_metrics_are_taken(self, scene: Scene) -> None:
        """Of every kind, also of a node that is not known."""
        labels = (("k", "v"),)
        samples = [
            MetricSample("m1", CounterDelta(2.0), "help", labels),
            MetricSample("m2", GaugeValue(-1.5), labels=labels),
            MetricSample("m3", HistogramDelta((0.1, 1.0), (1, 2), 3, 4.5)),
        ]
        scene.transport.report_metrics(scene.register("n"), samples, T)
        scene.transport.report_metrics(scene.name("ghost"), samples, T)
