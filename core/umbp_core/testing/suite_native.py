"""What our own master has to answer beyond UMBP's calls: numbered batches, prefixes, lists, explanations."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from umbp_core.errors import AlreadyRegistered
from umbp_core.index_gate import Acknowledgement, Action, ActionKind, Batch, Verdict
from umbp_core.index_match import TierRun
from umbp_core.master.model import Heartbeat, NodeStatus
from umbp_core.master.transport import MasterTransport, NativeTransport, is_native
from umbp_core.testing.suite_master import DRAM, HBM, SSD, MasterSuite, Scene, T

LIFE = 1000


class NativeScene(Scene):
    """A scene with the calls that only our own master has."""

    def __init__(self, transport: NativeTransport) -> None:
        super().__init__(transport)
        self.native = transport

    def report(self, names: str, tier: int = HBM) -> Action:
        """An action of a batch."""
        return Action(ActionKind.REPORT, tier, self.keys(names))

    def revoke(self, names: str, tier: int = HBM) -> Action:
        """An action of a batch."""
        return Action(ActionKind.REVOKE, tier, self.keys(names))

    def apply(
        self, node: str, seq: int, *actions: Action, life: int = LIFE, full_sync: bool = False
    ) -> Acknowledgement:
        """Send a batch."""
        return self.native.apply_batch(node, Batch(life, seq, actions, full_sync), T)


class NativeMasterSuite(MasterSuite):
    """For the native protocol; ``transport`` is a ``NativeTransport``."""

    @pytest.fixture
    def scene(self, transport: MasterTransport) -> Iterator[NativeScene]:
        """A scene of its own for each test."""
        assert is_native(transport)
        scene = NativeScene(transport)
        yield scene
        scene.close()

    def test_batches_are_applied_in_order_and_once(self, scene: NativeScene) -> None:
        """Several actions at once; a replay is acknowledged."""
        node = scene.register("n", LIFE)
        assert scene.apply(node, 1, scene.report("a b"), full_sync=True) == _applied(1)
        actions = (scene.revoke("a"), scene.report("a", DRAM), Action(ActionKind.CLEAR, SSD))
        assert scene.apply(node, 2, *actions) == _applied(2)
        assert scene.apply(node, 2, *actions) == Acknowledgement(Verdict.REPLAY, LIFE, 2, False)
        assert scene.match("a b") == {node: {HBM: scene.keys("b"), DRAM: scene.keys("a")}}
        assert scene.apply(node, 3, Action(ActionKind.CLEAR, HBM)) == _applied(3)
        assert scene.match("a b") == {node: {DRAM: scene.keys("a")}}

    def test_a_gap_changes_nothing_and_asks_for_a_full_sync(self, scene: NativeScene) -> None:
        """Which replaces everything, whatever its number, and goes on from there."""
        node = scene.register("n", LIFE)
        scene.apply(node, 1, scene.report("a"), full_sync=True)
        assert scene.apply(node, 3, scene.report("b")) == Acknowledgement(Verdict.GAP, LIFE, 1, True)
        assert scene.match("a b") == {node: {HBM: scene.keys("a")}}
        assert scene.apply(node, 9, scene.report("c"), full_sync=True) == _applied(9)
        assert scene.apply(node, 10, scene.report("d")) == _applied(10)
        assert scene.match("a b c d") == {node: {HBM: scene.keys("c d")}}

    def test_a_batch_of_a_node_that_is_not_registered_asks_it_to(self, scene: NativeScene) -> None:
        """So does a keepalive."""
        node = scene.name("ghost")
        expected = Acknowledgement(Verdict.UNREGISTERED, LIFE, 0, True)
        assert scene.apply(node, 1, scene.report("a"), full_sync=True) == expected
        assert scene.native.probe(node, LIFE, 0, T) == expected
        assert scene.match("a") == {}

    def test_a_keepalive_says_whether_all_is_known(self, scene: NativeScene) -> None:
        """And never changes anything."""
        node = scene.register("n", LIFE)
        scene.apply(node, 1, scene.report("a"), full_sync=True)
        assert scene.native.probe(node, LIFE, 1, T) == Acknowledgement(Verdict.REPLAY, LIFE, 1, False)
        behind = scene.native.probe(node, LIFE, 5, T)
        assert (behind.verdict, behind.request_full_sync) == (Verdict.GAP, True)
        early = scene.native.probe(node, LIFE - 1, 1, T)
        assert (early.verdict, early.incarnation) == (Verdict.STALE, LIFE)
        assert scene.match("a") == {node: {HBM: scene.keys("a")}}

    def test_a_later_life_replaces_an_earlier_one_that_lives(self, scene: NativeScene) -> None:
        """All that it said is void, what it still says is refused; the same life may repeat itself."""
        node = scene.register("n", LIFE)
        scene.apply(node, 1, scene.report("a"), full_sync=True)
        scene.beat(node, scene.bundle(1, ("k", DRAM, 1)))
        scene.register("n", LIFE)
        assert scene.match("a") == {node: {HBM: scene.keys("a")}}
        scene.register("n", LIFE + 1)
        assert scene.match("a") == {}
        assert scene.transport.lookup(scene.keys("k"), T) == [False]
        with pytest.raises(AlreadyRegistered):
            scene.register("n", LIFE)
        stale = scene.apply(node, 2, scene.report("b"))
        assert (stale.verdict, stale.incarnation) == (Verdict.STALE, LIFE + 1)
        old = scene.transport.heartbeat(Heartbeat(node, incarnation=LIFE), T)
        assert old.status is NodeStatus.UNKNOWN
        assert scene.apply(node, 1, scene.report("b"), life=LIFE + 1, full_sync=True).verdict is Verdict.APPLY
        assert scene.match("a b") == {node: {HBM: scene.keys("b")}}

    def test_prefixes_come_longest_first_with_their_runs(self, scene: NativeScene) -> None:
        """Each block from the fastest tier, or from the cheapest."""
        long, short = scene.register("long", LIFE), scene.register("short", LIFE)
        scene.transport.report(long, scene.keys("a b"), HBM, T)
        scene.transport.report(long, scene.keys("b c"), DRAM, T)
        scene.transport.report(short, scene.keys("a c"), SSD, T)
        query = scene.keys("a b c d")
        found = scene.native.match_prefix(query, None, T)
        assert [(match.node, match.length, match.runs) for match in found] == [
            (long, 3, [TierRun(HBM, 2), TierRun(DRAM, 1)]),
            (short, 1, [TierRun(SSD, 1)]),
        ]
        (cheap,) = scene.native.match_prefix(query, {HBM: 2.0, DRAM: 0.5}, T)
        assert (cheap.node, cheap.runs, cheap.cost) == (long, [TierRun(HBM, 1), TierRun(DRAM, 2)], 3.0)
        assert scene.native.match_prefix(scene.keys("zz a"), None, T) == []

    def test_nodes_are_listed(self, scene: NativeScene) -> None:
        """With what they said of themselves, and how much they hold."""
        node = scene.register("n", LIFE)
        scene.transport.report(node, scene.keys("a b"), HBM, T)
        scene.beat(node, scene.bundle(1, ("k", DRAM, 5)))
        (info,) = [info for info in scene.native.list_nodes(T) if info.node_id == node]
        assert (info.status, info.peer_address, info.node_address) == (NodeStatus.ALIVE, f"{node}:2", f"{node}:1")
        assert (info.tags, info.incarnation) == (("role=test",), LIFE)
        assert (info.external_counts, info.block_counts) == ({HBM: 2}, {DRAM: 1})
        assert 0 <= info.last_heartbeat_age < T

    def test_the_hashes_of_a_node_are_listed_page_by_page(self, scene: NativeScene) -> None:
        """Until the cursor is 0 again."""
        node = scene.register("n", LIFE)
        many = [scene.key(str(number)) for number in range(2500)]
        scene.transport.report(node, many, SSD, T)
        listed: list[bytes] = []
        cursor = 0
        while True:
            page = scene.native.list_blocks(node, SSD, cursor, 1000, T)
            assert len(page.hashes) <= 1000
            listed += page.hashes
            cursor = page.cursor
            if not cursor:
                break
        assert sorted(listed) == sorted(many)
        assert scene.native.list_blocks(node, HBM, 0, 10, T).hashes == []

    def test_it_is_explained_why_a_hash_is_where_it_is(self, scene: NativeScene) -> None:
        """Or why not."""
        node = scene.register("n", LIFE)
        scene.transport.report(node, scene.keys("a"), HBM, T)
        scene.transport.report(node, scene.keys("a"), DRAM, T)
        scene.transport.revoke(node, scene.keys("a"), HBM, T)
        told = scene.native.explain(node, scene.key("a"), T)
        assert (told.node_id, told.status, told.tiers) == (node, NodeStatus.ALIVE, (DRAM,))
        assert [(change.tier, change.kind) for change in told.changes] == [(HBM, "revoked"), (DRAM, "reported")]
        assert told.text
        assert scene.native.explain(node, scene.key("zz"), T).changes == ()
        assert scene.native.explain(scene.name("ghost"), scene.key("a"), T).status is NodeStatus.UNKNOWN


def _applied(seq: int) -> Acknowledgement:
    return Acknowledgement(Verdict.APPLY, LIFE, seq, request_full_sync=False)
