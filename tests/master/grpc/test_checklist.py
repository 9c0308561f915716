"""The original's test of its metadata store, case by case, over a socket; what is about external blocks is beside this.

What the original calls candidates is seen in the orders to evict, which are planned when time passes.
"""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from tests.master.grpc.harness import DRAM, HBM, SSD, RunningMaster, Stub, matches, message
from umbp_core.master.model import MasterSettings

ALIVE = 1
ADD, REMOVE = 0, 1
JOIN = 60.0
LEASE, ROUND = 60.0, 5.0


def room(tier: int, total: int, available: int) -> Any:
    return message("TierCapacity")(tier=tier, total_capacity_bytes=total, available_capacity_bytes=available)


def bundle(seq: int, *keys: str, tier: int = DRAM, size: int = 10, kind: int = ADD) -> Any:
    events = [message("KvEvent")(kind=kind, key=key, tier=tier, size=size) for key in keys]
    return message("EventBundle")(seq=seq, events=events)


def beat(call: Stub, node: str, *bundles: Any, **fields: Any) -> tuple[int, int, bool]:
    answer = call("Heartbeat", node_id=node, bundles=bundles, **fields)
    return answer.status, answer.acked_seq, answer.request_full_sync


def register(call: Stub, node: str, *capacities: Any) -> None:
    call("RegisterClient", node_id=node, peer_address=f"{node}.host:1", tier_capacities=capacities)


def held(call: Stub, *keys: str) -> list[str]:
    found = call("BatchLookup", keys=keys).found
    return [key for key, there in zip(keys, found, strict=True) if there]


def put(call: Stub, size: int, *exclude: str) -> str:
    """Which node a new block would go to."""
    return str(call("RoutePut", key="new", node_id="someone", block_size=size, exclude_nodes=exclude).node_id)


def evicted(master: RunningMaster, seconds: float) -> dict[str, list[str]]:
    """What nodes are asked to evict when ``seconds`` have passed."""
    master.clock.now += seconds
    effects = master.tell(lambda: master.state.tick(master.clock.now))
    return {order.node_id: [key.decode() for key in order.keys] for order in effects.evictions}


def at_once(*works: Callable[[], object]) -> None:
    """Run ``works`` in threads of their own; what one of them raises is raised here."""
    with ThreadPoolExecutor(len(works)) as pool:
        for future in [pool.submit(work) for work in works]:
            future.result(JOIN)


# --- Heartbeats and expiry.


def test_a_gap_is_a_sign_of_life_and_changes_neither_room_nor_number(master: RunningMaster, call: Stub) -> None:
    """SeqGapKeepsLivenessNotCapsOrSeq, HeartbeatCasSequence, HeartbeatDeltaAddRemove."""
    register(call, "n1", room(DRAM, 100, 10))
    assert beat(call, "n1", bundle(1, "a")) == (ALIVE, 1, False)
    assert beat(call, "n1", bundle(2, "b")) == (ALIVE, 2, False)
    master.pass_time(25.0)
    assert beat(call, "n1", bundle(4, "d"), tier_capacities=[room(DRAM, 100, 90)]) == (ALIVE, 2, True)
    assert put(call, 50) == ""
    master.pass_time(25.0)
    assert held(call, "a", "b", "d") == ["a", "b"]
    assert beat(call, "n1", bundle(3, "a", kind=REMOVE)) == (ALIVE, 3, False)
    assert held(call, "a", "b") == ["b"]


def test_expiry_takes_one_node_and_keeps_its_address(master: RunningMaster, call: Stub) -> None:
    """ExpireStaleFlipsKeepsRowAndCascades, ...IsIdempotent, ExpiredRowExcludedFromAliveAccounting, GetAlivePeerView."""
    for node in ("n1", "n2"):
        register(call, node, room(DRAM, 100, 100))
        beat(call, node, bundle(1, f"of {node}"))
        call("ReportExternalKvBlocks", node_id=node, hashes=["x"], tier=HBM)
    master.pass_time(20.0)
    beat(call, "n2")
    for _ in range(2):
        master.pass_time(11.0)
        beat(call, "n2")
        assert held(call, "of n1", "of n2") == ["of n2"]
        assert matches(call("MatchExternalKv", hashes=["x"])) == {"n2": {HBM: ["x"]}}
        assert (put(call, 1), put(call, 1, "n2")) == ("n2", "")
    assert beat(call, "n1", bundle(7, "of n1"), is_full_sync=True, delta_seq_baseline=7) == (ALIVE, 7, False)
    answer = call("RouteGet", key="of n1")
    assert (answer.node_id, answer.peer_address) == ("n1", "n1.host:1")
    assert put(call, 1, "n2") == "n1"


# --- Leases and evictions.


@pytest.fixture
def full() -> Iterator[RunningMaster]:
    """A master whose leases are long, and a node whose DRAM and HBM are full: one of the blocks in each has to go."""
    with RunningMaster(MasterSettings(lease_duration=LEASE, eviction_low_watermark=0.9)) as master:
        call = master.stub()
        register(call, "n1", room(DRAM, 30, 0), room(HBM, 30, 0))
        for seq, key in enumerate(("old", "mid", "new"), start=1):
            beat(call, "n1", bundle(seq, key))
            master.clock.now += 1.0
        yield master


def test_the_least_recently_used_blocks_go_and_no_more_than_it_takes(full: RunningMaster) -> None:
    """EvictionLruOrderAndCap, EvictionOnlyRequestedBuckets: HBM is full too, but none of its blocks is known."""
    assert evicted(full, ROUND) == {"n1": ["old"]}
    full.stub()("Heartbeat", node_id="n1", tier_capacities=[room(DRAM, 30, 0), room(HBM, 30, 30), room(SSD, 30, 0)])
    beat(full.stub(), "n1", bundle(4, "on SSD", tier=SSD))
    assert evicted(full, ROUND) == {"n1": ["old"]}


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("BatchLookup", {"keys": ["old"]}),
        ("RouteGet", {"key": "old", "exclude_nodes": ["n1"]}),
        ("BatchRouteGet", {"keys": ["old"], "exclude_nodes": ["n1"]}),
        ("RoutePut", {"key": "old", "block_size": 1}),
    ],
)
def test_who_only_looks_or_excludes_every_copy_leases_nothing(
    full: RunningMaster, name: str, fields: dict[str, Any]
) -> None:
    """LookupBlockHasNoLease..., RouteGetExcludeNodesNoLeaseWhenFullyExcluded, BatchExistsBlockNoSideEffects."""
    full.stub()(name, **fields)
    assert evicted(full, ROUND) == {"n1": ["old"]}


@pytest.mark.parametrize(
    ("name", "fields"), [("RouteGet", {"key": "old"}), ("BatchRouteGet", {"keys": ["old", "nobody has this", "old"]})]
)
def test_a_route_leases_a_block_and_counts_as_use(full: RunningMaster, name: str, fields: dict[str, Any]) -> None:
    """LookupBlockForRouteGetGrantsLeaseAndAccess, EvictionSkipsLeased: afterwards it is the last one used."""
    call = full.stub()
    call(name, **fields)
    assert evicted(full, ROUND) == {"n1": ["mid"]}
    call("BatchRouteGet", keys=["mid", "new"])
    assert evicted(full, ROUND) == {}
    for _ in range(10):
        full.pass_time(6.0)
        beat(call, "n1")
    assert evicted(full, ROUND) == {"n1": ["old"]}, "the leases have ended, and it was used before the others"


def test_blocks_of_one_moment_are_all_candidates(master: RunningMaster, call: Stub) -> None:
    """EvictionTieTimestampsAllSurvive."""
    register(call, "n1", room(DRAM, 500, 0))
    keys = [f"k{number}" for number in range(50)]
    beat(call, "n1", bundle(1, *keys))
    assert sorted(evicted(master, ROUND)["n1"]) == sorted(keys[:15])


# --- Hit counters.


def test_counters_that_nobody_hits_are_collected(master: RunningMaster, call: Stub) -> None:
    """GarbageCollectHitsByLastSeen, GetExternalKvHitCountsDedupesAndSkipsMissing."""
    register(call, "n1")
    call("ReportExternalKvBlocks", node_id="n1", hashes=["h1", "h2"], tier=HBM)
    call("MatchExternalKv", hashes=["h1", "h2"], count_as_hit=True)
    master.clock.now += 20.0
    call("MatchExternalKv", hashes=["h1"], count_as_hit=True)
    master.clock.now += 7190.0
    assert master.tell(lambda: master.state.collect_hits(1000, master.clock.now)) == 1
    entries = call("GetExternalKvHitCounts", hashes=["missing", "h1", "h2", "h1"]).entries
    assert [(entry.hash, entry.hit_count_total) for entry in entries] == [("h1", 2)]


# --- Several clients at once.


def test_of_two_heartbeats_with_one_number_one_is_applied(master: RunningMaster, call: Stub) -> None:
    """ConcurrentHeartbeatCasExactlyOneApplied; the original takes the second for a gap, here it is a replay."""
    register(call, "n1")
    calls = {size: master.stub() for size in (100, 200)}
    together = threading.Barrier(2)

    def send(size: int) -> None:
        for seq in range(1, 21):
            together.wait(JOIN)
            assert beat(calls[size], "n1", bundle(seq, f"a{seq}", f"b{seq}", size=size)) == (ALIVE, seq, False)

    at_once(lambda: send(100), lambda: send(200))
    for seq in range(1, 21):
        assert set(call("BatchRouteGet", keys=[f"a{seq}", f"b{seq}"]).size) in ({100}, {200})


def test_no_hit_of_many_clients_is_lost(master: RunningMaster, call: Stub) -> None:
    """MixedWorkloadIsRaceFree."""
    register(call, "n1")
    register(call, "n2")
    call("ReportExternalKvBlocks", node_id="n1", hashes=["hot"], tier=HBM)

    def match() -> None:
        mine = master.stub()
        for _ in range(125):
            assert "n1" in matches(mine("MatchExternalKv", hashes=["hot"], count_as_hit=True))

    def write() -> None:
        mine = master.stub()
        for number in range(60):
            mine("ReportExternalKvBlocks", node_id="n2", hashes=[f"h{number}", "hot"], tier=DRAM)
            mine("RevokeAllExternalKvBlocksForNode", node_id="n2")

    at_once(match, match, match, match, write)
    (entry,) = call("GetExternalKvHitCounts", hashes=["hot"]).entries
    assert entry.hit_count_total == 500


def test_readers_see_a_full_sync_as_a_whole(master: RunningMaster, call: Stub) -> None:
    """ConcurrentFullSyncRouteGetNeverTears: everything has one size, whichever; the syncs are larger than a step."""
    keys = [f"k{number}" for number in range(10_000)]
    register(call, "n1")
    beat(call, "n1", bundle(1, *keys, size=100), is_full_sync=True, delta_seq_baseline=1)
    done = threading.Event()
    seen: set[tuple[int, ...]] = set()

    def read() -> None:
        mine = master.stub()
        going = True
        while going:
            going = not done.is_set()
            seen.add(tuple(sorted(set(mine("BatchRouteGet", keys=keys[::1000]).size))))

    def write() -> None:
        mine = master.stub()
        try:
            for seq in range(2, 18):
                whole = bundle(seq, *keys, size=200 if seq % 2 == 0 else 100)
                assert beat(mine, "n1", whole, is_full_sync=True, delta_seq_baseline=seq) == (ALIVE, seq, False)
        finally:
            done.set()

    at_once(read, read, read, write)
    assert (100,) in seen
    assert seen <= {(100,), (200,)}


def test_nobody_is_sent_to_a_node_that_went(master: RunningMaster, call: Stub) -> None:
    """ConcurrentUnregisterRouteGetNeverResolvesDeadPeer, UnregisterClientCascades."""
    done = threading.Event()
    addresses: set[str] = set()

    def come_and_go() -> None:
        mine = master.stub()
        try:
            for _ in range(60):
                register(mine, "n1")
                assert beat(mine, "n1", bundle(1, "k")) == (ALIVE, 1, False)
                mine("UnregisterClient", node_id="n1")
        finally:
            done.set()

    def read() -> None:
        mine = master.stub()
        while not done.is_set():
            answer = mine("RouteGet", key="k")
            addresses.update([answer.peer_address] if answer.found else [])

    at_once(read, read, come_and_go)
    assert addresses <= {"n1.host:1"}
    assert not call("RouteGet", key="k").found
