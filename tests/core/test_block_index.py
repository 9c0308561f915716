"""The block index: what the original's checklist asks of it, without the original's defects."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from umbp_core.block_index import BlockIndex, HeartbeatAck, Location, TierUse
from umbp_core.journal import Bundle, Delta
from umbp_core.placements import IndexStats
from umbp_core.tiers import Tier

HBM, DRAM, SSD = Tier.HBM, Tier.DRAM, Tier.SSD
A, B, C = b"a", b"b", b"c"
NOW = 100.0


def add(key: bytes, tier: int = DRAM, size: int = 10) -> Delta:
    return Delta(key, tier, size)


def remove(key: bytes, tier: int = DRAM) -> Delta:
    return Delta(key, tier, None)


def bundle(seq: int, *deltas: Delta) -> Bundle:
    return Bundle(seq, deltas)


def acked(seq: int) -> HeartbeatAck:
    return HeartbeatAck(seq, request_full_sync=False)


def sync_asked(seq: int) -> HeartbeatAck:
    return HeartbeatAck(seq, request_full_sync=True)


def full_sync(index: BlockIndex, node: str, baseline: int, deltas: Sequence[Delta], now: float = NOW) -> None:
    sync = index.begin_full_sync(node)
    index.stage(sync, deltas, now)
    assert index.commit(sync, baseline) == acked(baseline)


@pytest.fixture
def index() -> BlockIndex:
    index = BlockIndex()
    for node in ("n1", "n2"):
        index.register(node)
    return index


# Heartbeats.


def test_a_delta_adds_and_removes(index: BlockIndex) -> None:
    assert index.apply("n1", [bundle(1, add(A), add(B))], NOW) == acked(1)
    assert index.apply("n1", [bundle(2, remove(A), remove(C), remove(A, SSD))], NOW) == acked(2)
    assert index.exists([A, B, C]) == [False, True, False]
    assert index.use("n1") == {DRAM: TierUse(1, 10)}


def test_bundles_are_applied_up_to_the_first_gap(index: BlockIndex) -> None:
    index.apply("n1", [bundle(1)], NOW)
    sent = [bundle(2, add(A)), bundle(3, add(B)), bundle(5, add(C))]
    assert index.apply("n1", sent, NOW) == sync_asked(3)
    assert index.exists([A, B, C]) == [True, True, False]


def test_a_replay_is_acknowledged_and_changes_nothing(index: BlockIndex) -> None:
    index.apply("n1", [bundle(1, add(A)), bundle(2, remove(A))], NOW)
    assert index.apply("n1", [bundle(1, add(A)), bundle(2, remove(A)), bundle(3, add(B))], NOW) == acked(3)
    assert index.exists([A, B]) == [False, True]


def test_a_keepalive_says_where_we_are(index: BlockIndex) -> None:
    index.apply("n1", [bundle(1, add(A))], NOW)
    assert index.apply("n1", [], NOW) == acked(1)


def test_a_node_that_is_not_registered_is_asked_for_a_full_sync(index: BlockIndex) -> None:
    assert index.apply("ghost", [bundle(1, add(A))], NOW) == sync_asked(0)
    assert index.exists([A]) == [False]
    full_sync(index, "ghost", 4, [add(A)])
    assert index.apply("ghost", [bundle(5, add(B))], NOW) == acked(5)


def test_a_duplicate_add_updates_the_size(index: BlockIndex) -> None:
    index.apply("n1", [bundle(1, add(A, size=10)), bundle(2, add(A, size=999))], NOW)
    assert index.locations(A) == [Location("n1", DRAM, 999)]
    assert index.use("n1") == {DRAM: TierUse(1, 999)}


def test_a_full_sync_replaces_everything_of_its_node(index: BlockIndex) -> None:
    index.apply("n1", [bundle(1, add(A), add(B, SSD))], NOW)
    index.apply("n2", [bundle(1, add(A))], NOW)
    full_sync(index, "n1", 7, [add(B), remove(B), add(C, size=0)])
    assert index.locations(A) == [Location("n2", DRAM, 10)]
    assert index.use("n1") == {DRAM: TierUse(2, 10)}
    assert index.apply("n1", [bundle(7, add(A)), bundle(8)], NOW) == acked(8)
    assert index.locations(A) == [Location("n2", DRAM, 10)]


def test_a_full_sync_that_names_a_block_twice_means_the_last(index: BlockIndex) -> None:
    full_sync(index, "n1", 1, [add(A, size=1), add(B), add(A, size=2)])
    assert list(index.blocks("n1", DRAM)) == [[(A, 2), (B, 10)]]


def test_a_full_sync_of_nothing_empties_the_node(index: BlockIndex) -> None:
    index.apply("n1", [bundle(1, add(A))], NOW)
    full_sync(index, "n1", 50, [])
    assert index.nodes() == []
    assert index.apply("n1", [], NOW) == acked(50)


def test_a_full_sync_is_seen_whole_or_not_at_all(index: BlockIndex) -> None:
    index.apply("n1", [bundle(1, add(A, size=100), add(B, size=100))], NOW)
    sync = index.begin_full_sync("n1")
    for key in (A, B, C):
        index.stage(sync, [add(key, size=200)], NOW)
        index.sweep()
        assert [index.locations(known)[0].size for known in (A, B)] == [100, 100]
        assert index.exists([C]) == [False]
    index.commit(sync, 2)
    assert [index.locations(key)[0].size for key in (A, B, C)] == [200] * 3


@pytest.mark.parametrize("voided", ["register", "expire", "forget", "begin_full_sync"])
def test_a_full_sync_that_was_overtaken_is_void(index: BlockIndex, voided: str) -> None:
    sync = index.begin_full_sync("n1")
    index.stage(sync, [add(A)], NOW)
    {
        "register": index.register,
        "expire": index.expire,
        "forget": index.forget,
        "begin_full_sync": index.begin_full_sync,
    }[voided]("n1")
    index.stage(sync, [add(B)], NOW)
    assert index.commit(sync, 9) is None
    assert index.exists([A, B]) == [False, False]
    assert index.sweep() == 0


# Lives of a node.


def test_a_registration_drops_what_the_dead_incarnation_said(index: BlockIndex) -> None:
    index.apply("n1", [bundle(1, add(A)), bundle(2, add(B))], NOW)
    assert index.register("n1") == 2
    assert index.exists([A, B]) == [False, False]
    assert index.apply("n1", [bundle(1, add(C))], NOW) == acked(1)


def test_resume_after_expiry_asks_for_a_full_sync(index: BlockIndex) -> None:
    index.apply("n1", [bundle(1, add(A))], NOW)
    index.apply("n2", [bundle(1, add(B))], NOW)
    assert index.expire("n1") == 1
    assert index.expire("n1") == 0
    assert index.exists([A, B]) == [False, True]
    assert index.apply("n1", [], NOW) == sync_asked(1)
    assert index.apply("n1", [bundle(2, add(C))], NOW) == sync_asked(1)
    full_sync(index, "n1", 2, [add(A), add(C)])
    assert index.apply("n1", [bundle(3, remove(A))], NOW) == acked(3)
    assert index.exists([A, C]) == [False, True]


def test_a_forgotten_node_leaves_nothing(index: BlockIndex) -> None:
    index.apply("n1", [bundle(1, add(A), add(A, SSD))], NOW)
    assert index.forget("n1") == 2
    assert index.forget("n1") == 0
    assert index.locations(A) == []
    assert index.apply("n1", [], NOW) == sync_asked(0)
    assert index.expire("n1") == 0


def test_a_copy_that_is_dropped_leaves_the_others(index: BlockIndex) -> None:
    index.apply("n1", [bundle(1, add(A), add(A, SSD))], NOW)
    index.apply("n2", [bundle(1, add(A), add(B))], NOW)
    index.apply("n1", [bundle(2, remove(A, SSD))], NOW)
    assert index.stats() == IndexStats(nodes=2, cells=2, keys=2, entries=3, backlog=0)
    index.expire("n2")
    assert index.stats() == IndexStats(nodes=1, cells=2, keys=2, entries=1, backlog=2)
    index.sweep()
    assert index.stats() == IndexStats(nodes=1, cells=1, keys=1, entries=1, backlog=0)
    assert index.locations(A) == [Location("n1", DRAM, 10)]


def test_memory_is_freed_in_slices(index: BlockIndex) -> None:
    index.apply("n1", [bundle(1, *(add(b"%d" % number) for number in range(10)))], NOW)
    index.expire("n1")
    assert [index.sweep(4) for _ in range(4)] == [6, 2, 0, 0]


def test_what_is_added_after_a_drop_is_not_swept(index: BlockIndex) -> None:
    index.apply("n1", [bundle(1, add(A), add(B))], NOW)
    index.register("n1")
    index.apply("n1", [bundle(1, add(A, size=3))], NOW)
    while index.sweep(1):
        assert index.locations(A) == [Location("n1", DRAM, 3)]
    assert index.exists([A, B]) == [True, False]


# Looking up and routing.


def test_looking_up_has_no_side_effects(index: BlockIndex) -> None:
    index.apply("n1", [bundle(1, add(A))], NOW)
    index.locations(A)
    index.exists([A])
    assert not index.is_leased(A, NOW)
    assert [victim.used for victim in index.victims("n1", DRAM, NOW + 5)] == [NOW]


def test_locations_come_fastest_first_and_unknown_last(index: BlockIndex) -> None:
    index.apply("n1", [bundle(1, add(A, 0), add(A, SSD), add(A, 7))], NOW)
    index.apply("n2", [bundle(1, add(A, HBM))], NOW)
    assert [(place.node, place.tier) for place in index.locations(A)] == [
        ("n2", HBM),
        ("n1", SSD),
        ("n1", 7),
        ("n1", 0),
    ]


def test_routing_grants_a_lease_and_counts_as_use(index: BlockIndex) -> None:
    index.apply("n1", [bundle(1, add(A), add(B))], NOW)
    assert index.route([A], NOW + 1, 60.0) == [[Location("n1", DRAM, 10)]]
    assert [victim.key for victim in index.victims("n1", DRAM, NOW + 10)] == [B]
    assert list(index.victims("n1", DRAM, NOW + 61)) == [(B, 10, NOW), (A, 10, NOW + 1)]
    assert (index.is_leased(A, NOW + 60), index.is_leased(A, NOW + 61)) == (True, False)


def test_routing_counts_as_use_of_every_copy(index: BlockIndex) -> None:
    index.apply("n1", [bundle(1, add(A), add(B), add(A, SSD), add(B, SSD))], NOW)
    index.apply("n2", [bundle(1, add(A), add(B))], NOW)
    index.route([A], NOW + 1, 0.0, exclude={"n1"})
    for node, tier in (("n1", DRAM), ("n1", SSD), ("n2", DRAM)):
        assert [victim.key for victim in index.victims(node, tier, NOW + 1)] == [B, A]


def test_no_lease_when_every_copy_is_excluded(index: BlockIndex) -> None:
    index.apply("n1", [bundle(1, add(A))], NOW)
    assert index.route([A], NOW, 60.0, exclude=["n1"]) == [[]]
    assert not index.is_leased(A, NOW)


def test_a_batch_is_answered_key_by_key(index: BlockIndex) -> None:
    index.apply("n1", [bundle(1, add(A), add(C))], NOW)
    found = index.route([A, B, C], NOW, 1.0)
    assert [len(places) for places in found] == [1, 0, 1]
    assert index.route([], NOW, 1.0) == []


def test_a_lease_is_never_shortened(index: BlockIndex) -> None:
    index.apply("n1", [bundle(1, add(A))], NOW)
    index.route([A], NOW, 50.0)
    index.route([A], NOW, 5.0)
    assert index.is_leased(A, NOW + 49)


def test_ended_leases_are_forgotten_and_renewed_ones_kept(index: BlockIndex) -> None:
    keys = [b"%d" % number for number in range(50)]
    index.apply("n1", [bundle(1, *map(add, keys))], NOW)
    index.route(keys, NOW, 2.0)
    index.route(keys[:1], NOW + 1, 9.0)
    for _ in range(60):
        index.route(keys[1:2], NOW + 5, 0.0)
    assert index.is_leased(keys[0], NOW + 9)
    assert not any(index.is_leased(key, NOW + 5) for key in keys[1:])
    assert index.route(keys, NOW + 20, 2.0)[0]
    assert all(index.is_leased(key, NOW + 21) for key in keys)


# Eviction.


def test_victims_are_the_least_recently_used_ones_lazily(index: BlockIndex) -> None:
    for seq, key in enumerate((B, A, C), 1):
        index.apply("n1", [bundle(seq, add(key, size=seq))], NOW + seq)
    victims = index.victims("n1", DRAM, NOW + 9)
    assert (next(victims).key, next(victims).key) == (B, A)


def test_a_duplicate_add_is_no_use(index: BlockIndex) -> None:
    index.apply("n1", [bundle(1, add(A), add(B))], NOW)
    index.apply("n1", [bundle(2, add(A, size=3))], NOW + 5)
    assert list(index.victims("n1", DRAM, NOW + 5)) == [(A, 3, NOW), (B, 10, NOW)]


def test_equal_times_are_no_reason_to_lose_a_victim(index: BlockIndex) -> None:
    keys = [b"%d" % number for number in range(50)]
    index.apply("n1", [bundle(1, *map(add, keys))], NOW)
    assert [victim.key for victim in index.victims("n1", DRAM, NOW)] == keys


def test_victims_are_of_one_tier_of_one_node(index: BlockIndex) -> None:
    index.apply("n1", [bundle(1, add(A, HBM), add(B))], NOW)
    index.apply("n2", [bundle(1, add(C, HBM))], NOW)
    assert [victim.key for victim in index.victims("n1", HBM, NOW)] == [A]
    assert list(index.victims("n1", SSD, NOW)) == []


# Enumeration.


def test_blocks_are_listed_in_slices_while_the_index_changes(index: BlockIndex) -> None:
    index.apply("n1", [bundle(1, add(A), add(B, size=1), add(C), add(b"d"))], NOW)
    listing = index.blocks("n1", DRAM, 1)
    assert next(listing) == [(A, 10)]
    index.apply("n1", [bundle(2, add(B, size=2), remove(C))], NOW)
    assert next(listing) == [(B, 2)]
    assert next(listing) == []
    index.expire("n1")
    assert list(listing) == []
    assert list(index.blocks("n1", SSD)) == []
