"""The life of a node over UMBP's wire: as observed of the original, except where ``improved`` says otherwise.

``improved`` marks what the original gets wrong and a compatible master may do better: its clients understand the
answer.
"""

from typing import Any

import grpc
import pytest

from tests.master.grpc.harness import DRAM, HBM, SSD, Memory, RunningMaster, Stub, matches, message

INVALID = grpc.StatusCode.INVALID_ARGUMENT
UNKNOWN, ALIVE = 0, 1
ADD, REMOVE = 0, 1


def event(kind: int, key: str, tier: int = DRAM, size: int = 10) -> Any:
    return message("KvEvent")(kind=kind, key=key, tier=tier, size=size)


def bundle(seq: int, *events: Any) -> Any:
    return message("EventBundle")(seq=seq, events=events)


def add(seq: int, *keys: str) -> Any:
    return bundle(seq, *(event(ADD, key) for key in keys))


def room(tier: int, total: int, available: int | None = None) -> Any:
    left = total if available is None else available
    return message("TierCapacity")(tier=tier, total_capacity_bytes=total, available_capacity_bytes=left)


def beat(call: Stub, node: str, *bundles: Any, **fields: Any) -> tuple[int, int, bool]:
    answer = call("Heartbeat", node_id=node, bundles=bundles, **fields)
    return answer.status, answer.acked_seq, answer.request_full_sync


def held(call: Stub, *keys: str) -> list[str]:
    found = call("BatchLookup", keys=keys).found
    return [key for key, there in zip(keys, found, strict=True) if there]


def size_of(call: Stub, key: str) -> int:
    answer = call("RouteGet", key=key)
    return answer.size if answer.found else -1


def puts(call: Stub, key: str, size: int = 1) -> str:
    """Which node a block would go to."""
    return str(call("RoutePut", key=key, node_id="someone", block_size=size).node_id)


@pytest.fixture
def n1(call: Stub) -> None:
    call("RegisterClient", node_id="n1", peer_address="10.0.0.1:17000")


# --- Registration.


def test_observed_registration(call: Stub) -> None:
    answer = call("RegisterClient", node_id="n1", peer_address="10.0.0.1:17000")
    assert (answer.heartbeat_interval_ms, answer.ack_seq) == (5000, 0)
    code, details = call.error("RegisterClient", node_id="n1")
    assert code is grpc.StatusCode.ALREADY_EXISTS
    assert details.startswith("node is already alive and cannot be re-registered")


def test_a_node_registers_again_after_it_expired(master: RunningMaster, call: Stub) -> None:
    call("RegisterClient", node_id="n1", peer_address="old:1")
    master.pass_time(29.0)
    assert call.error("RegisterClient", node_id="n1")[0] is grpc.StatusCode.ALREADY_EXISTS
    master.pass_time(2.0)
    call("RegisterClient", node_id="n1", peer_address="new:1")
    call("ReportExternalKvBlocks", node_id="n1", hashes=["a"], tier=HBM)
    (found,) = call("MatchExternalKv", hashes=["a"]).matches
    assert found.peer_address == "new:1"


def test_improved_a_stale_node_that_registers_again_leaves_nothing_of_the_dead_one(
    master: RunningMaster, call: Stub
) -> None:
    """The original keeps the dead process's blocks, now under the new address."""
    call("RegisterClient", node_id="n1", peer_address="old:1")
    beat(call, "n1", add(1, "k1"))
    call("ReportExternalKvBlocks", node_id="n1", hashes=["a"], tier=HBM)
    master.clock.now += 31.0  # silent for too long, and not looked at yet
    call("RegisterClient", node_id="n1", peer_address="new:1")
    assert held(call, "k1") == []
    assert matches(call("MatchExternalKv", hashes=["a"])) == {}


def test_improved_an_empty_node_id_is_refused(call: Stub) -> None:
    """The original makes it a node that is routed to."""
    code, details = call.error("RegisterClient", node_id="")
    assert code is INVALID
    assert details.startswith("node_id must not be empty")


@pytest.mark.usefixtures("n1")
def test_unregistering_drops_everything(call: Stub) -> None:
    beat(call, "n1", add(1, "k1"))
    call("ReportExternalKvBlocks", node_id="n1", hashes=["a"], tier=HBM)
    for _ in range(2):
        call("UnregisterClient", node_id="n1")
        assert held(call, "k1") == []
        assert matches(call("MatchExternalKv", hashes=["a"])) == {}
    assert beat(call, "n1") == (UNKNOWN, 0, False)
    call("RegisterClient", node_id="n1")


# --- Heartbeats.


@pytest.mark.usefixtures("n1")
def test_observed_heartbeats(call: Stub) -> None:
    assert beat(call, "nobody") == (UNKNOWN, 0, False)
    assert beat(call, "n1") == (ALIVE, 0, False)
    assert beat(call, "n1", add(1, "k1")) == (ALIVE, 1, False)
    assert beat(call, "n1", add(3, "k3")) == (ALIVE, 1, True)
    assert held(call, "k1", "k3") == ["k1"]
    assert beat(call, "n1", add(2, "k2"), bundle(3, event(REMOVE, "k1")), add(5, "k5")) == (ALIVE, 3, True)
    assert held(call, "k1", "k2", "k5") == ["k2"]


@pytest.mark.usefixtures("n1")
def test_observed_full_sync(call: Stub) -> None:
    beat(call, "n1", add(1, "k1"))
    whole = bundle(50, event(ADD, "k7"), event(REMOVE, "k2"))
    assert beat(call, "n1", whole, is_full_sync=True, delta_seq_baseline=50) == (ALIVE, 50, False)
    assert held(call, "k1", "k2", "k7") == ["k7"]
    assert beat(call, "n1", add(51, "k8")) == (ALIVE, 51, False)
    assert beat(call, "n1", is_full_sync=True, delta_seq_baseline=60) == (ALIVE, 60, False)
    assert held(call, "k7", "k8") == []


@pytest.mark.usefixtures("n1")
def test_improved_a_replay_is_acknowledged(call: Stub) -> None:
    """The original takes it for a gap and asks for a full sync."""
    beat(call, "n1", add(1, "k1"), bundle(2, event(REMOVE, "k1")))
    assert beat(call, "n1", add(1, "k1")) == (ALIVE, 2, False)
    assert held(call, "k1") == []
    assert beat(call, "n1", add(2, "k2"), add(3, "k3")) == (ALIVE, 3, False)
    assert held(call, "k2", "k3") == ["k3"]


@pytest.mark.usefixtures("n1")
def test_improved_adding_again_updates_the_size(call: Stub) -> None:
    """The original keeps the old one."""
    beat(call, "n1", bundle(1, event(ADD, "k", size=10)))
    beat(call, "n1", bundle(2, event(ADD, "k", size=999)))
    assert size_of(call, "k") == 999


@pytest.mark.usefixtures("n1")
def test_improved_unknown_event_kinds_are_refused_and_nothing_is_applied(call: Stub) -> None:
    """The original takes every other kind for ADD."""
    code, details = call.error("Heartbeat", node_id="n1", bundles=[add(1, "k1"), bundle(2, event(2, "k2"))])
    assert code is INVALID
    assert "kind 2" in details
    assert "k2" in details
    assert held(call, "k1", "k2") == []
    assert beat(call, "n1", add(1, "k1")) == (ALIVE, 1, False)


def test_improved_capacities_of_a_keepalive_count(call: Stub) -> None:
    """The original ignores them."""
    call("RegisterClient", node_id="n1", peer_address="a:1", tier_capacities=[room(DRAM, 100)])
    assert puts(call, "k", 50) == "n1"
    beat(call, "n1", tier_capacities=[room(DRAM, 100, 10)])
    assert puts(call, "k", 50) == ""
    beat(call, "n1", tier_capacities=[room(DRAM, 100, 60)])
    assert puts(call, "k", 50) == "n1"


def test_improved_a_heartbeat_without_capacities_keeps_the_last(call: Stub) -> None:
    """The original forgets them, and routes nothing to the node any more."""
    call("RegisterClient", node_id="n1", peer_address="a:1", tier_capacities=[room(DRAM, 100)])
    beat(call, "n1", add(1, "k1"))
    assert puts(call, "k", 50) == "n1"
    beat(call, "n1", is_full_sync=True, delta_seq_baseline=9)
    assert puts(call, "k", 50) == "n1"


# --- Expiry.


def test_expiry_and_improved_resume(master: RunningMaster, call: Stub) -> None:
    """The original takes a node that comes back as if nothing had happened: what it said is lost for good."""
    call("RegisterClient", node_id="n1", peer_address="a:1")
    beat(call, "n1", add(1, "ek1"))
    call("ReportExternalKvBlocks", node_id="n1", hashes=["x"], tier=HBM)
    master.pass_time(29.0)
    assert held(call, "ek1") == ["ek1"]
    beat(call, "n1")
    master.pass_time(31.0)
    assert held(call, "ek1") == []
    assert matches(call("MatchExternalKv", hashes=["x"])) == {}
    call("ReportExternalKvBlocks", node_id="n1", hashes=["x"], tier=HBM)
    assert matches(call("MatchExternalKv", hashes=["x"])) == {}, "a report is no sign of life"
    status, _, request = beat(call, "n1")
    assert (status, request) == (ALIVE, True), "even a keepalive is told that everything is wanted again"
    status, _, request = beat(call, "n1", add(2, "ek2"))
    assert (status, request) == (ALIVE, True)
    assert held(call, "ek1", "ek2") == []
    whole = add(3, "ek1", "ek2")
    assert beat(call, "n1", whole, is_full_sync=True, delta_seq_baseline=3) == (ALIVE, 3, False)
    assert held(call, "ek1", "ek2") == ["ek1", "ek2"]


def test_improved_a_restarted_master_routes_to_those_that_survived() -> None:
    """The original asks them to register, which its clients do without an address: nobody reaches them again."""
    store = Memory()
    with RunningMaster(store=store) as first:
        call = first.stub()
        call("RegisterClient", node_id="n1", peer_address="10.0.0.9:1", tier_capacities=[room(DRAM, 100)])
        beat(call, "n1", add(1, "k1"))
    with RunningMaster(store=store) as second:
        call = second.stub()
        status, _, request = beat(call, "n1", add(2, "k2"))
        assert (status, request) == (ALIVE, True)
        assert beat(call, "n1", add(2, "k1", "k2"), is_full_sync=True, delta_seq_baseline=2) == (ALIVE, 2, False)
        answer = call("RouteGet", key="k1", node_id="someone")
        assert (answer.found, answer.node_id, answer.peer_address) == (True, "n1", "10.0.0.9:1")


@pytest.mark.usefixtures("n1")
def test_a_large_full_sync_goes_in_pieces(call: Stub) -> None:
    """One bundle of everything, as the original's client sends it."""
    keys = [f"{number:040x}" for number in range(30_000)]
    answer = beat(call, "n1", add(1, *keys), is_full_sync=True, delta_seq_baseline=1)
    assert answer == (ALIVE, 1, False)
    assert held(call, *keys) == keys
    code, details = call.error(
        "Heartbeat", node_id="n1", bundles=[bundle(2, *(event(REMOVE, key) for key in keys), event(9, "odd"))]
    )
    assert (code, "odd" in details) == (INVALID, True)
    assert held(call, *keys) == keys


def test_tiers_are_an_open_enumeration(call: Stub) -> None:
    call("RegisterClient", node_id="n1", peer_address="a:1", tier_capacities=[room(9, 100), room(DRAM, 100)])
    counts = [message("TierKvCount")(tier=9, count=1)]
    assert beat(call, "n1", bundle(1, event(ADD, "k", tier=9)), tier_kv_counts=counts) == (ALIVE, 1, False)
    answer = call("RouteGet", key="k")
    assert (answer.found, answer.tier) == (True, 9)
    assert puts(call, "other") == "n1"


def test_unknown_fields_are_passed_over(call: Stub) -> None:
    """A client of a later version says more than we know."""
    request = message("RegisterClientRequest")(node_id="n1").SerializeToString()
    later = request + b"\x72\x02hi" + b"\xf8\x07\x01" + b"\xfd\x07\0\0\0\0" + b"\xa3\x08\x08\x01\xa4\x08"
    assert call.send("RegisterClient", later).heartbeat_interval_ms == 5000
    assert beat(call, "n1") == (ALIVE, 0, False)


@pytest.mark.usefixtures("n1")
def test_ssd_blocks_are_found(call: Stub) -> None:
    beat(call, "n1", bundle(1, event(ADD, "k", tier=SSD, size=3)))
    answer = call("RouteGet", key="k")
    assert (answer.node_id, answer.tier, answer.size, answer.peer_address) == ("n1", SSD, 3, "10.0.0.1:17000")
