"""Hypothesis machines of the external KV index, the block index and the journal, each beside its plain model.

``JournalMachine`` drives both halves of law L11, a journal and a gate, over a channel that loses, repeats and reorders.
"""

from __future__ import annotations

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from umbp_core.block_index import BlockIndex, FullSync, HeartbeatAck, Location, Victim
from umbp_core.hits import HitCounters
from umbp_core.index import ExternalKvIndex, Snapshot
from umbp_core.index_feed import ChangeFeed, ChangeKind
from umbp_core.index_gate import Acknowledgement
from umbp_core.joined import JoinedHashes
from umbp_core.journal import Bundle, Delta, Journal
from umbp_core.placements import preference
from umbp_core.testing.machines_channel import ChannelMachine
from umbp_core.testing.models_index import BlockModel, Entries, HitModel, IndexModel, TellingNode, follow

NODES = ("n1", "n2", "n3")
TIERS = (1, 2, 3, 0, 7)
KEYS = tuple(b"%d" % number for number in range(9))
TTL = 10.0
LEASE = 4.0

nodes = st.sampled_from(NODES)
tiers = st.sampled_from(TIERS)
keys = st.sampled_from(KEYS)
key_lists = st.lists(keys, max_size=12)
weights = st.none() | st.dictionaries(tiers, st.integers(0, 4).map(float))
small = st.integers(1, 5)


class IndexMachine(RuleBasedStateMachine):
    """``ExternalKvIndex`` with a feed that forgets early, a reader that follows it, and sweeps at any moment."""

    def __init__(self) -> None:
        super().__init__()
        self.feed = ChangeFeed(incarnation=5, max_changes=3, max_hashes=20)
        self.index = ExternalKvIndex(self.feed, HitCounters(TTL))
        self.model = IndexModel()
        self.hits = HitModel(TTL)
        self.now = 0.0
        self.followed: Entries = set()
        self.cursor = 0
        self.reading: Snapshot | None = None

    @rule(node=nodes, hashes=key_lists, tier=tiers)
    def report(self, node: str, hashes: list[bytes], tier: int) -> None:
        """Adds what is new."""
        assert self.index.report(node, hashes, tier, self.now) == self.model.report(node, hashes, tier)

    @rule(node=nodes, hashes=key_lists, tier=tiers)
    def revoke(self, node: str, hashes: list[bytes], tier: int) -> None:
        """Takes away what is there."""
        assert self.index.revoke(node, hashes, tier, self.now) == self.model.revoke(node, hashes, tier)

    @rule(node=nodes, tier=tiers)
    def clear_tier(self, node: str, tier: int) -> None:
        """Takes a tier away, at once."""
        assert self.index.clear_tier(node, tier, self.now) == self.model.clear(node, tier)

    @rule(node=nodes)
    def clear_node(self, node: str) -> None:
        """Takes a node away, at once."""
        assert self.index.clear_node(node, self.now, "expired") == self.model.clear(node)

    @rule(limit=small)
    def sweep(self, limit: int) -> None:
        """Changes no answer."""
        before = self.index.stats().backlog
        assert self.index.sweep(limit) == max(0, before - limit) == self.index.stats().backlog

    @rule(query=key_lists, count=st.booleans(), wait=st.integers(0, 4), joined=st.booleans())
    def match(self, query: list[bytes], count: bool, wait: int, joined: bool) -> None:
        """The model's answer, in the model's order; hits are counted once per hash."""
        self.now += wait
        asked = JoinedHashes(b"\0".join(query), b"\0", len(query)) if joined and query else query
        answer = self.index.match(asked, count, self.now)
        expected = self.model.match(query)
        assert [(match.node, list(match.tiers.items())) for match in answer] == expected
        for match, (_, found) in zip(answer, expected, strict=True):
            assert match.distinct() == len({key for _, hashes in found for key in hashes})
        if count:
            self.hits.record([key for _, found in expected for _, hashes in found for key in hashes], self.now)

    @rule(query=key_lists, chosen=weights)
    def match_prefix(self, query: list[bytes], chosen: dict[int, float] | None) -> None:
        """The model's lengths, runs and costs, longest first."""
        answer = self.index.match_prefix(query, chosen)
        expected = self.model.prefix(query, chosen)
        assert {match.node: (match.length, match.runs, match.cost) for match in answer} == expected
        assert [match.length for match in answer] == sorted((match.length for match in answer), reverse=True)

    @rule(limit=st.none() | small)
    def collect_hits(self, limit: int | None) -> None:
        """A whole pass, or as many small ones as it takes."""
        known = len(self.index.hits)
        gone = self.index.hits.collect(self.now, limit)
        if limit is not None:
            gone += sum(self.index.hits.collect(self.now, limit) for _ in range(2 * known))
        assert gone == self.hits.collect(self.now)

    @precondition(lambda self: self.reading is None)
    @rule(limit=small)
    def follow_feed(self, limit: int) -> None:
        """A reader takes a page; if it is too late, it begins again."""
        page = self.feed.since(5, self.cursor, limit)
        if page.lost:
            self.begin_snapshot(limit)
            return
        for change in page.changes:
            self.followed = follow(self.followed, change)
        self.cursor = page.cursor
        if self.cursor == self.feed.cursor:
            assert self.followed == self.model.held

    @rule(size=small)
    def begin_snapshot(self, size: int) -> None:
        """The reader begins again with a snapshot, which it reads in slices while the index goes on."""
        self.reading = self.index.snapshot(size)
        self.cursor = self.reading.cursor
        self.followed = set()

    @precondition(lambda self: self.reading is not None)
    @rule(slices=small)
    def read_snapshot(self, slices: int) -> None:
        """Some slices; only when all are read the reader goes on with the changes."""
        assert self.reading is not None
        for _ in range(slices):
            part = next(self.reading.slices, None)
            if part is None:
                self.reading = None
                return
            read = {(part.node, part.tier, key) for key in part.hashes}
            assert read <= self.model.held
            self.followed |= read

    @rule(node=nodes, key=keys)
    def explain(self, node: str, key: bytes) -> None:
        """Where it is, and a last change per tier that says the same."""
        explanation = self.index.explain(node, key)
        assert explanation.tiers == [tier for tier in self.model.tiers(node) if (node, tier, key) in self.model.held]
        for change in explanation.changes:
            assert (change.kind is ChangeKind.REPORTED) is (change.tier in explanation.tiers)

    @invariant()
    def counts_agree(self) -> None:
        """Counts per node and tier, and in total; nothing stays in memory that a sweep has not still to free."""
        model = self.model
        assert self.index.nodes() == model.order
        for node in NODES:
            held = {tier: model.hashes(node, tier) for tier in model.tiers(node)}
            assert list(self.index.counts(node).items()) == [(tier, len(hashes)) for tier, hashes in held.items()]
            assert self.index.count_distinct(node) == len(set().union(*held.values()))
            for tier in TIERS:
                listed = [key for part in self.index.blocks(node, tier, 2) for key in part]
                assert sorted(listed) == sorted(held.get(tier, ()))
        stats = self.index.stats()
        hashes = {key for _, _, key in model.held}
        assert (stats.nodes, stats.entries) == (len(model.order), len(model.held))
        assert stats.keys == len(hashes) or (stats.backlog and stats.keys > len(hashes))
        cells = len({entry[:2] for entry in model.held})
        assert stats.cells == cells or (stats.backlog and stats.cells > cells)
        assert self.index.hits.counts(KEYS) == {key: self.hits.hits[key][0] for key in KEYS if key in self.hits.hits}


deltas = st.builds(Delta, keys, st.sampled_from(TIERS[:3]), st.none() | st.integers(0, 9))
delta_lists = st.lists(deltas, max_size=8)


class BlockIndexMachine(RuleBasedStateMachine):
    """``BlockIndex`` under heartbeats in and out of order, with full syncs that are staged over many steps."""

    def __init__(self) -> None:
        super().__init__()
        self.index = BlockIndex()
        self.model = BlockModel()
        self.now = 0.0
        self.syncs: list[tuple[FullSync, list[tuple[Delta, float]]]] = []

    def _void(self, node: str) -> None:
        self.syncs = [(sync, staged) for sync, staged in self.syncs if sync.node != node]

    @rule(node=nodes)
    def register(self, node: str) -> None:
        """A new life."""
        assert self.index.register(node) == self.model.clear(node)
        self.model.acked[node] = 0
        self.model.lost.discard(node)
        self._void(node)

    @rule(node=nodes, forget=st.booleans())
    def drop(self, node: str, forget: bool) -> None:
        """Expired, or gone for good."""
        gone = self.index.forget(node) if forget else self.index.expire(node)
        assert gone == self.model.clear(node)
        if forget:
            self.model.acked.pop(node, None)
            self.model.lost.discard(node)
        elif node in self.model.acked:
            self.model.lost.add(node)
        self._void(node)

    @rule(node=nodes, first=st.integers(0, 2), parts=st.lists(delta_lists, max_size=3), skip=st.booleans())
    def heartbeat(self, node: str, first: int, parts: list[list[Delta]], skip: bool) -> None:
        """Replays, the next bundles, or a gap before the first or the last of them."""
        self.now += 0.5
        start = self.model.acked.get(node, 0) + first
        bundles = [(start + number, part) for number, part in enumerate(parts)]
        if bundles and skip:
            bundles[-1] = (bundles[-1][0] + 1, bundles[-1][1])
        expected = self.model.heartbeat(node, bundles, self.now)
        sent = [Bundle(seq, tuple(part)) for seq, part in bundles]
        assert self.index.apply(node, sent, self.now) == HeartbeatAck(*expected)

    @rule(node=nodes)
    def begin_full_sync(self, node: str) -> None:
        """The earlier one of this node is void."""
        void = [sync for sync, _ in self.syncs if sync.node == node]
        self._void(node)
        self.syncs.append((self.index.begin_full_sync(node), []))
        for sync in void:
            self.index.stage(sync, [Delta(KEYS[0], TIERS[0], 1)], self.now)
            assert self.index.commit(sync, 99) is None

    @precondition(lambda self: self.syncs)
    @rule(data=st.data(), part=delta_lists)
    def stage(self, data: st.DataObject, part: list[Delta]) -> None:
        """Nothing of it is seen."""
        sync, staged = data.draw(st.sampled_from(self.syncs))
        self.index.stage(sync, part, self.now)
        staged += [(delta, self.now) for delta in part]

    @precondition(lambda self: self.syncs)
    @rule(data=st.data(), baseline=st.integers(0, 5))
    def commit(self, data: st.DataObject, baseline: int) -> None:
        """All of it is seen."""
        sync, staged = data.draw(st.sampled_from(self.syncs))
        assert self.index.commit(sync, baseline) == HeartbeatAck(baseline, request_full_sync=False)
        self.model.full_sync(sync.node, staged, baseline)
        self._void(sync.node)
        assert self.index.commit(sync, baseline) is None

    @rule(wanted=key_lists, exclude=st.sets(nodes), wait=st.integers(0, 3), lease=st.integers(0, 6))
    def route(self, wanted: list[bytes], exclude: set[str], wait: int, lease: int) -> None:
        """The copies that may be used, fastest first; what is found is leased."""
        self.now += wait
        answer = self.index.route(wanted, self.now, float(lease), exclude)
        assert len(answer) == len(wanted)
        for key, found in zip(wanted, answer, strict=True):
            assert set(found) == self.model.route(key, self.now, float(lease), exclude)
            self._check_order(found)

    @rule(limit=small)
    def sweep(self, limit: int) -> None:
        """Changes no answer."""
        self.index.sweep(limit)

    @rule()
    def sweep_all(self) -> None:
        """Comes to an end."""
        while self.index.sweep(1):
            pass

    @staticmethod
    def _check_order(found: list[Location]) -> None:
        assert [place.tier for place in found] == sorted((place.tier for place in found), key=preference)

    @invariant()
    def content_agrees(self) -> None:
        """Copies, sizes, order of use, leases."""
        model, index = self.model, self.index
        assert index.exists(KEYS) == [bool(model.locations(key)) for key in KEYS]
        for key in KEYS:
            found = index.locations(key)
            assert set(found) == model.locations(key)
            assert len(found) == len(set(found))
            self._check_order(found)
            assert index.is_leased(key, self.now) is (model.leases.get(key, -1.0) > self.now)
        copies = sum(map(len, model.cells.values()))
        keys = sum(index.exists(KEYS))
        stats = index.stats()
        assert (stats.nodes, stats.entries) == (len(index.nodes()), copies)
        if not (stats.backlog or self.syncs):
            assert (stats.cells, stats.keys) == (len(model.cells), keys)
        assert sorted(index.nodes()) == sorted({node for node, _ in model.cells})
        for node in NODES:
            assert index.use(node) == model.use(node)
            for tier in TIERS:
                cell = model.cells.get((node, tier), [])
                listed = [block for part in index.blocks(node, tier, 2) for block in part]
                assert listed == [(copy.key, copy.size) for copy in cell]
                assert list(index.victims(node, tier, self.now)) == [
                    Victim(copy.key, copy.size, copy.used) for copy in cell if not index.is_leased(copy.key, self.now)
                ]


class JournalMachine(ChannelMachine):
    """A node's journal, a channel that cannot be trusted, and a receiver; all three may fail at any moment."""

    max_deltas = 12
    bundle_deltas = 3

    def __init__(self) -> None:
        super().__init__()
        self.latest = self.earliest = 1000
        self._new_node(self.latest)

    def _new_node(self, incarnation: int) -> None:
        self.node = TellingNode(Journal(incarnation, self.max_deltas, self.bundle_deltas))

    @rule(part=delta_lists)
    def record(self, part: list[Delta]) -> None:
        """The node's tiers change."""
        self.node.change(part)
        assert len(self.node.journal) <= self.max_deltas

    @rule(retry=st.booleans())
    def send(self, retry: bool) -> None:
        """Onto the channel, from where it may never arrive."""
        batches = self.node.compose(retry)
        assert all(batch.full_sync or 0 < len(batch.actions) <= self.bundle_deltas for batch in batches)
        self.transmit(*batches)

    @precondition(lambda self: self.answers)
    @rule(data=st.data(), keep=st.booleans())
    def answer(self, data: st.DataObject, keep: bool) -> None:
        """Any answer, late or several times."""
        answer = data.draw(st.sampled_from(self.answers))
        if not keep:
            self.answers.remove(answer)
        self._take(answer)

    def _take(self, answer: Acknowledgement) -> None:
        self.node.journal.receive(answer.incarnation, answer.acked, answer.request_full_sync)

    @rule(later=st.booleans())
    def restart_node(self, later: bool) -> None:
        """A new life in which the tiers are empty.

        If its clock is wrong, nothing of the last life may be on its way any more: the two could take the same number.
        """
        if later:
            self.latest += 100
        else:
            self.earliest -= 100
            self.messages, self.answers = [], []
        self._new_node(self.latest if later else self.earliest)

    @rule(how=st.sampled_from(("restart", "expire", "forget")))
    def lose_state(self, how: str) -> None:
        """The receiver forgets."""
        if how == "restart":
            self.new_receiver()
        elif how == "expire":
            self.applier.expire("node")
        else:
            self.applier.forget("node")

    @rule()
    def settle(self) -> None:
        """With a channel that works for a while, the receiver knows the truth soon, whatever happened before."""
        journal = self.node.journal
        rounds = 0
        told = False
        while not told:
            rounds += 1
            assert rounds <= 10
            for batch in self.node.compose(retry=True):
                self._take(self.applier.apply("node", batch))
            self._take(self.applier.probe("node", journal.incarnation, journal.acked_seq))
            told = journal.acked_seq == journal.last_seq and not len(journal) and not journal.full_sync_due
        known = {
            (key, tier)
            for tier in self.index.counts("node")
            for part in self.index.blocks("node", tier)
            for key in part
        }
        assert known == set(self.node.truth)
        assert not journal.full_sync_pending
