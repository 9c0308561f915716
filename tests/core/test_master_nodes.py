"""Nodes and their lives, as the original's checklist asks, without the original's defects."""

from __future__ import annotations

import pytest

from tests.core.master_kit import (
    DRAM,
    EXPIRY,
    HBM,
    START,
    A,
    B,
    add,
    alive,
    asked,
    beat,
    full_sync,
    master,
    matched,
    register,
    registration,
    status,
)
from umbp_core.errors import AlreadyRegistered, InvalidRequest
from umbp_core.index_gate import Action, ActionKind, Batch
from umbp_core.master.model import (
    ClientRecord,
    GetRoute,
    MasterSettings,
    NodeInfo,
    NodeStatus,
    Registration,
    RegistrationAck,
    TierCapacity,
)

ROOM = TierCapacity(DRAM, 100, 60)
UNKNOWN_REPLY = (NodeStatus.UNKNOWN, 0, False)


def record(node: str = "n1", incarnation: int = 0) -> ClientRecord:
    return ClientRecord(node, f"{node}.host", f"{node}.host:1", b"engine", ("rack=3",), incarnation, (ROOM,))


# Registration.


def test_a_new_node_is_alive_and_listed() -> None:
    state = master()
    told = Registration("n1", "host", "host:1", b"engine", (ROOM,), ("rack=3",))
    assert state.register(told, START) == RegistrationAck(heartbeat_interval_ms=5000, ack_seq=0)
    info = NodeInfo("n1", NodeStatus.ALIVE, "host", "host:1", ("rack=3",), 0, (ROOM,), 2.0)
    assert state.node("n1", START + 2) == info
    assert state.list_nodes(START + 2) == [info]
    assert (state.node("n2", START), state.record("n2")) == (None, None)
    assert state.is_alive("n1")
    assert not state.is_alive("n2")


def test_the_heartbeat_interval_is_a_part_of_the_time_to_live() -> None:
    state = master(MasterSettings(heartbeat_ttl=1.0, heartbeat_interval_divisor=4))
    assert state.register(registration("n1"), START).heartbeat_interval_ms == 250


def test_an_empty_id_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="node_id must not be empty"):
        master().register(registration(""), START)


def test_a_living_node_is_not_replaced() -> None:
    state = register(master(), "n1")
    with pytest.raises(AlreadyRegistered, match="node is already alive and cannot be re-registered: n1"):
        state.register(registration("n1", peer="other:1"), START + EXPIRY)
    assert state.peer_address("n1") == "n1.host:1"


def test_a_silent_node_is_replaced_even_before_it_is_seen_to_expire() -> None:
    state = register(master(), "n1")
    beat(state, "n1", (1, [add(A)]))
    state.report("n1", [A], HBM, START)
    state.register(registration("n1", peer="other:1"), START + EXPIRY + 0.1)
    assert status(state, "n1") is NodeStatus.ALIVE
    assert state.peer_address("n1") == "other:1"
    assert state.lookup([A]) == [False]
    assert matched(state, [A], at=START + EXPIRY + 1) == {}
    assert beat(state, "n1", (1, [add(B)]), at=START + EXPIRY + 1) == alive(1)


def test_an_expired_node_is_replaced() -> None:
    state = register(master(), "n1")
    state.tick(START + EXPIRY + 1)
    state.register(registration("n1"), START + EXPIRY + 2)
    assert status(state, "n1") is NodeStatus.ALIVE


def test_a_node_that_comes_back_without_an_address_keeps_its_own() -> None:
    state = master()
    state.register(Registration("n1", "host", "host:1", b"engine"), START)
    state.tick(START + EXPIRY + 1)
    state.register(Registration("n1", "host"), START + EXPIRY + 2)
    assert state.record("n1") == ClientRecord("n1", "host", "host:1", b"engine", (), 0, ())
    state.tick(START + 3 * EXPIRY)
    state.register(Registration("n1", ""), START + 3 * EXPIRY)
    assert state.record("n1") == ClientRecord("n1", "host", "host:1", b"engine", (), 0, ())


def test_a_node_that_moved_does_not_keep_its_address() -> None:
    state = master()
    state.register(Registration("n1", "host", "host:1", b"engine"), START)
    state.tick(START + EXPIRY + 1)
    state.register(Registration("n1", "elsewhere"), START + EXPIRY + 2)
    assert state.record("n1") == ClientRecord("n1", "elsewhere", "", b"", (), 0, ())


def test_a_node_without_an_address_has_none() -> None:
    state = master()
    state.register(registration("n1", peer=""), START)
    assert state.peer_address("n1") == ""


# Incarnations.


def test_a_larger_incarnation_takes_a_living_nodes_place() -> None:
    state = register(master(), "n1", incarnation=5)
    state.report("n1", [A], HBM, START)
    beat(state, "n1", (1, [add(B)]))
    state.register(registration("n1", peer="other:1", incarnation=6), START + 1)
    assert state.peer_address("n1") == "other:1"
    assert matched(state, [A]) == {}
    assert state.lookup([B]) == [False]


@pytest.mark.parametrize("incarnation", [0, 4])
def test_no_other_incarnation_does(incarnation: int) -> None:
    state = register(master(), "n1", incarnation=5)
    with pytest.raises(AlreadyRegistered):
        state.register(registration("n1", incarnation=incarnation), START + 1)


def test_a_registration_that_is_repeated_changes_nothing_that_was_told() -> None:
    state = register(master(), "n1", incarnation=5)
    state.report("n1", [A], HBM, START)
    beat(state, "n1", (1, [add(B)]), at=START + 20)
    assert state.register(registration("n1", peer="new:1", incarnation=5), START + 40).ack_seq == 1
    assert state.peer_address("n1") == "new:1"
    assert matched(state, [A]) == {"n1": [(HBM, [A])]}
    assert state.lookup([B]) == [True]
    assert state.tick(START + 40 + EXPIRY).expired == ()


def test_an_expired_nodes_next_life_may_have_a_smaller_incarnation() -> None:
    state = register(master(), "n1", incarnation=5)
    state.tick(START + EXPIRY + 1)
    register(state, "n1", at=START + EXPIRY + 1, incarnation=3)
    late = Batch(5, 1, [Action(ActionKind.REPORT, HBM, [A])])
    assert state.apply_batch("n1", late, START + EXPIRY + 1).request_full_sync
    assert matched(state, [A], at=START + EXPIRY + 1) == {}


@pytest.mark.parametrize("incarnation", [4, 6])
def test_a_heartbeat_of_another_incarnation_has_to_register(incarnation: int) -> None:
    state = register(master(), "n1", incarnation=5)
    reply = beat(state, "n1", (1, [add(A)]), incarnation=incarnation)
    assert (reply.status, reply.acked_seq, reply.request_full_sync) == UNKNOWN_REPLY
    assert state.lookup([A]) == [False]
    assert beat(state, "n1", (1, [add(A)]), incarnation=5) == alive(1)


# Ends.


def test_unregistering_takes_everything_along() -> None:
    state = register(master(), "n1", "n2")
    for node in ("n1", "n2"):
        beat(state, node, (1, [add(A)]))
        state.report(node, [A], HBM, START)
    assert state.unregister("n1", START)
    assert state.node("n1", START) is None
    assert matched(state, [A]) == {"n2": [(HBM, [A])]}
    assert state.blocks.nodes() == ["n2"]
    assert beat(state, "n1").status is NodeStatus.UNKNOWN
    assert not state.unregister("n1", START)
    assert (state.is_alive("n1"), state.peer_address("n1")) == (False, "")
    beat(state, "n2", at=START + EXPIRY)
    assert state.tick(START + EXPIRY + 1).expired == ()


def test_silent_nodes_expire_once_and_alone() -> None:
    state = register(master(), "n1", "n2")
    for node in ("n1", "n2"):
        state.report(node, [A], HBM, START)
        beat(state, node, (1, [add(A)]))
    beat(state, "n2", at=START + 10)
    assert state.tick(START + EXPIRY).expired == ()
    assert state.tick(START + EXPIRY + 0.1).expired == ("n1",)
    assert state.tick(START + EXPIRY + 0.2).expired == ()
    assert (status(state, "n1"), status(state, "n2")) == (NodeStatus.EXPIRED, NodeStatus.ALIVE)
    assert (state.peer_address("n1"), state.peer_address("n2")) == ("", "n2.host:1")
    assert (state.is_alive("n1"), state.is_alive("n2")) == (False, True)
    assert state.record("n1") is not None
    assert matched(state, [A], at=START + 31) == {"n2": [(HBM, [A])]}
    assert state.blocks.nodes() == ["n2"]


def test_the_order_of_heartbeats_is_the_order_of_expiry() -> None:
    state = register(master(), "n1", "n2", "n3")
    beat(state, "n3", at=START + 1)
    beat(state, "n1", at=START + 2)
    assert state.tick(START + EXPIRY + 1.5).expired == ("n2", "n3")


def test_what_is_about_to_expire_is_not_answered() -> None:
    state = register(master(), "n1", "n2", capacities=[TierCapacity(DRAM, 100, 90)])
    for node in ("n1", "n2"):
        state.report(node, [A], HBM, START)
        beat(state, node, (1, [add(A)]))
    beat(state, "n2", at=START + 10, capacities=[TierCapacity(DRAM, 100, 50)])
    late = START + EXPIRY + 1
    assert [match.node for match in state.match([A], False, late)] == ["n2"]
    assert [match.node for match in state.match_positions([A], False, late)] == ["n2"]
    assert [match.node for match in state.match_prefix([A], None, late)] == ["n2"]
    assert state.route_get("n1", [A], (), late) == [GetRoute("n2", DRAM, 10, "n2.host:1")]
    assert state.route_put("n2", [B], [1], (), late)[0].node_id == "n2"


def test_a_node_that_comes_back_is_asked_for_everything_until_it_told_it() -> None:
    state = register(master(), "n1")
    beat(state, "n1", (1, [add(A)]))
    state.tick(START + EXPIRY + 1)
    later = START + EXPIRY + 2
    assert beat(state, "n1", at=later) == asked(1)
    assert status(state, "n1") is NodeStatus.ALIVE
    assert beat(state, "n1", (2, [add(B)]), at=later) == asked(1)
    assert state.lookup([A, B]) == [False, False]
    assert full_sync(state, "n1", 2, add(A), add(B), at=later) == alive(2)
    assert beat(state, "n1", (3, [add(A, HBM)]), at=later) == alive(3)
    assert state.lookup([A, B]) == [True, True]
    assert state.tick(later + EXPIRY).expired == ()


def test_expired_nodes_are_forgotten_after_a_day() -> None:
    state = register(master(MasterSettings(expired_retention=1000.0)), "n1", "n2")
    beat(state, "n2", at=START + 500)
    assert state.tick(START + 900).purged == ()
    assert state.tick(START + 1000).purged == ()
    assert state.tick(START + 1000.1).purged == ("n1",)
    assert [info.node_id for info in state.list_nodes(START + 1000.1)] == ["n2"]
    assert beat(state, "n1", at=START + 1001).status is NodeStatus.UNKNOWN
    assert state.tick(START + 1500.1).purged == ("n2",)


def test_a_node_that_came_back_keeps_no_other_from_being_forgotten() -> None:
    state = register(master(MasterSettings(expired_retention=1000.0)), "n1", "n2")
    state.tick(START + EXPIRY + 1)
    beat(state, "n1", at=START + EXPIRY + 2)
    beat(state, "n1", at=START + 1000)
    assert state.tick(START + 1000.1).purged == ("n2",)
    assert state.is_alive("n1")


def test_a_master_that_stood_still_blames_no_node() -> None:
    state = register(master(), "n1")
    state.forgive(100.0)
    assert state.tick(START + 100 + EXPIRY).expired == ()
    assert state.tick(START + 101 + EXPIRY).expired == ("n1",)


# A master that begins again.


def test_nodes_of_an_earlier_master_are_alive_and_owe_everything() -> None:
    state = master()
    state.restore([record()], START)
    assert state.record("n1") == record()
    assert status(state, "n1") is NodeStatus.ALIVE
    assert state.peer_address("n1") == "n1.host:1"
    assert beat(state, "n1", at=START + 1) == asked(0)
    assert beat(state, "n1", (1, [add(A)]), at=START + 1) == asked(0)
    assert full_sync(state, "n1", 41, add(A), at=START + 1) == alive(41)
    assert state.route_get("n2", [A], (), START + 1) == [GetRoute("n1", DRAM, 10, "n1.host:1")]


def test_their_batches_owe_everything_too() -> None:
    state = master()
    state.restore([record(incarnation=5)], START)
    assert state.probe("n1", 5, 0, START).request_full_sync
    earlier = Batch(4, 9, [Action(ActionKind.REPORT, HBM, [A])], full_sync=True)
    assert state.apply_batch("n1", earlier, START).incarnation == 5
    later = Batch(5, 4, [Action(ActionKind.REPORT, HBM, [A])])
    assert state.apply_batch("n1", later, START).request_full_sync
    assert matched(state, [A]) == {}
    everything = Batch(5, 5, [Action(ActionKind.REPORT, HBM, [A])], full_sync=True)
    assert state.apply_batch("n1", everything, START).acked == 5
    assert matched(state, [A]) == {"n1": [(HBM, [A])]}


def test_a_node_that_registers_again_without_an_address_stays_routable() -> None:
    state = master()
    state.restore([record()], START)
    state.register(Registration("n1", "n1.host", capacities=(ROOM,)), START + 1)
    assert state.peer_address("n1") == "n1.host:1"
    assert beat(state, "n1", (1, [add(A)]), at=START + 1) == alive(1)
    with pytest.raises(AlreadyRegistered):
        state.register(registration("n1"), START + 2)


def test_a_node_that_is_not_heard_expires_like_others() -> None:
    state = master()
    state.restore([record()], START)
    assert state.tick(START + EXPIRY).expired == ()
    assert state.tick(START + EXPIRY + 1).expired == ("n1",)


def test_puts_go_only_to_nodes_that_were_heard() -> None:
    state = master()
    state.restore([record()], START)
    assert state.route_put("n2", [A], [1], (), START)[0].node_id == ""
    beat(state, "n1", at=START + 1)
    assert state.route_put("n2", [A], [1], (), START + 1)[0].node_id == "n1"


def test_a_restored_record_does_not_replace_a_node_that_is_here() -> None:
    state = register(master(), "n1")
    assert state.restore([ClientRecord("n1", "old", "old:1", b"", (), 0, ())], START) == []
    assert state.peer_address("n1") == "n1.host:1"


def test_a_restored_record_tells_what_a_node_that_is_here_did_not() -> None:
    state = master()
    state.register(Registration("n1", "n1.host", capacities=(ROOM,), incarnation=7), START)
    state.register(Registration("n2", "elsewhere"), START)
    assert state.restore([record("n1"), record("n2"), record("n3")], START) == ["n1"]
    assert (state.peer_address("n1"), state.record("n1").incarnation) == ("n1.host:1", 7)  # type: ignore[union-attr]
    assert state.peer_address("n2") == "", "it is at another address now"
    assert state.peer_address("n3") == "n3.host:1"
    assert state.restore([record("n1")], START) == []
