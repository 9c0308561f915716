"""A node's life at a master, step by step, with a clock that is moved by hand (laws L4, L5 and L11)."""

from __future__ import annotations

import pytest

from tests.master.client.fake_network import GRPC, NATIVE, FakeNetwork, refuse_events
from tests.master.client.reporting_node import SMALL, ReportingNode
from umbp_connectors.client.addresses import MasterAddress, Wire
from umbp_connectors.client.link import Link
from umbp_core.breaker import BreakerState
from umbp_core.errors import InvalidRequest, MasterUnavailable
from umbp_core.index_gate import Acknowledgement, Batch
from umbp_core.journal import Delta
from umbp_core.master.model import HeartbeatReply, NodeStatus, Registration, TierCapacity

A, B, C, D = b"a", b"b", b"c", b"d"
HBM, DRAM, SSD = 1, 2, 3
INTERVAL = 5.0
OTHER = MasterAddress(Wire.NATIVE_TCP, "other", 1)
BOTH = pytest.mark.parametrize("door", [NATIVE, GRPC], ids=["native", "grpc"])


def settled_node(door: MasterAddress = NATIVE) -> ReportingNode:
    """A node that told something, and whose master knows it."""
    node = ReportingNode(FakeNetwork(), addresses=[door])
    node.report([A, B], HBM)
    node.report([A], DRAM)
    node.record([Delta(A, DRAM, 10), Delta(B, SSD, 20)])
    node.run(INTERVAL)
    assert node.told()
    return node


@BOTH
def test_a_node_is_registered_kept_alive_and_told(door: MasterAddress) -> None:
    node = settled_node(door)
    assert len(node.held) == 3
    node.run(100.0)
    info = node.network.state.list_nodes(node.clock.now)[0]
    assert (info.status, info.peer_address, info.node_address) == (NodeStatus.ALIVE, "10.0.0.1:7", "10.0.0.1")
    assert info.last_heartbeat_age <= INTERVAL
    assert (node.counters.registrations, node.counters.full_syncs, node.counters.failures) == (1, 1, 0)
    assert 20 <= node.counters.heartbeats <= 24


@BOTH
def test_what_is_revoked_and_cleared_goes_in_order(door: MasterAddress) -> None:
    node = settled_node(door)
    node.report([C, D], HBM)
    node.revoke([A, C], HBM)
    node.clear(DRAM)
    node.report([D], DRAM)
    node.record([Delta(A, DRAM, None), Delta(C, DRAM, 5)])
    node.run(INTERVAL)
    assert node.held == {(HBM, B), (HBM, D), (DRAM, D)}
    assert node.told()
    assert node.counters.full_syncs == 1


def test_reports_do_not_wait_for_a_heartbeat() -> None:
    node = settled_node()
    node.step()
    before = node.counters.heartbeats
    node.report([C], HBM)
    node.step()
    assert node.told()
    assert node.counters.heartbeats == before


def test_many_own_events_do_not_wait_for_a_heartbeat_either() -> None:
    node = settled_node()
    node.step()
    node.record([Delta(b"%d" % number, DRAM, 1) for number in range(3)])
    node.step()
    assert not node.told()
    node.record([Delta(D, DRAM, 1)])
    for _ in range(3):
        node.step()
    assert node.told()


@BOTH
def test_large_content_goes_in_bounded_messages(door: MasterAddress) -> None:
    node = ReportingNode(FakeNetwork(), addresses=[door])
    node.report([b"%d" % number for number in range(20)], HBM)
    node.record([Delta(b"%d" % number, SSD, number) for number in range(20)])
    node.run(1.0)
    assert node.told()
    assert node.counters.batches >= 5
    assert node.counters.heartbeats >= 5


def test_capacities_go_with_every_heartbeat() -> None:
    node = settled_node()
    node.intake.put(0, node.blocks.set_capacities, (TierCapacity(DRAM, 100, 40),), {DRAM: 7})
    node.run(2 * INTERVAL)
    assert node.network.state.list_nodes(node.clock.now)[0].capacities == (TierCapacity(DRAM, 100, 40),)
    node.network.restart_master(persistent=False)
    node.run(2 * INTERVAL)
    assert node.network.state.list_nodes(node.clock.now)[0].capacities == (TierCapacity(DRAM, 100, 40),)


@BOTH
@pytest.mark.parametrize("persistent", [True, False])
def test_after_a_restart_of_the_master_it_knows_everything_within_two_heartbeats(
    door: MasterAddress, persistent: bool
) -> None:
    node = settled_node(door)
    node.network.restart_master(persistent)
    assert node.network.external("node") == set()
    node.run(2 * INTERVAL)
    assert node.told()
    info = node.network.state.list_nodes(node.clock.now)[0]
    assert (info.status, info.peer_address) == (NodeStatus.ALIVE, "10.0.0.1:7")


def test_a_restart_is_noticed_with_the_next_thing_that_is_told() -> None:
    node = settled_node()
    node.network.restart_master(persistent=True)
    node.report([C], HBM)
    began = node.clock.now
    node.run(0.5)
    assert node.told()
    assert node.clock.now - began < 1.0 < INTERVAL


@BOTH
def test_a_node_that_was_stopped_beyond_its_expiry_tells_everything_anew(door: MasterAddress) -> None:
    node = settled_node(door)
    node.network.pass_time(60.0)
    assert node.network.external("node") == set()
    node.run(INTERVAL)
    assert node.told()


@BOTH
def test_a_partition_heals(door: MasterAddress) -> None:
    node = settled_node(door)
    node.network.partitioned = True
    node.report([C], HBM)
    node.run(120.0)
    node.revoke([A], HBM)
    assert (node.session.registered, node.link.address) == (True, None)
    assert not node.told()
    node.network.partitioned = False
    node.run(2 * INTERVAL)
    assert node.told()


def test_a_master_that_does_not_answer_is_tried_less_and_less_often() -> None:
    node = settled_node()
    node.network.partitioned = True
    node.run(20.0)
    assert node.breaker.state is not BreakerState.CLOSED
    tries = node.network.dials
    node.run(60.0)
    # A try takes a second, the pause between two of them two.
    assert 15 <= node.network.dials - tries <= 21
    node.network.partitioned = False
    node.run(2 * INTERVAL)
    assert (node.breaker.state, node.told()) == (BreakerState.CLOSED, True)


def test_pauses_are_shorter_than_heartbeats() -> None:
    node = settled_node()
    assert node.breaker.backoff.ceiling <= INTERVAL


@BOTH
def test_more_than_may_wait_becomes_a_full_sync(door: MasterAddress) -> None:
    node = settled_node(door)
    node.network.partitioned = True
    node.run(1.0)
    for number in range(100):
        node.report([b"%d" % number], SSD)
    node.record([Delta(b"%d" % number, SSD, 1) for number in range(100)])
    node.network.partitioned = False
    node.run(2 * INTERVAL)
    assert node.told()
    assert (node.counters.overflows, node.counters.full_syncs) == (1, 2)


def test_more_than_may_wait_coalesced_becomes_a_full_sync_too() -> None:
    node = settled_node()
    node.network.partitioned = True
    for number in range(100):
        node.report([b"%d" % number], SSD)
        node.step()
    node.network.partitioned = False
    node.run(2 * INTERVAL)
    assert node.told()
    assert (node.counters.overflows, node.counters.full_syncs) == (0, 2)


def test_a_master_that_knows_a_later_life_is_told_as_a_still_later_one() -> None:
    network = FakeNetwork()
    newer = ReportingNode(network, incarnation=5000)
    newer.report([A], HBM)
    newer.run(1.0)
    node = ReportingNode(network, incarnation=1000)
    node.report([B], HBM)
    node.run(INTERVAL)
    assert (node.told(), node.session.incarnation, node.counters.takeovers) == (True, 5001, 1)


def test_a_restarted_node_replaces_its_earlier_life_at_once() -> None:
    network = FakeNetwork()
    for door, incarnation in ((NATIVE, 1000), (NATIVE, 2000), (GRPC, 1), (GRPC, 1), (NATIVE, 3000)):
        node = ReportingNode(network, addresses=[door], incarnation=incarnation)
        node.report([b"%d" % incarnation], HBM)
        node.run(0.5)
        assert node.told()


def test_two_nodes_of_one_name_do_not_fight_at_full_speed() -> None:
    network = FakeNetwork()
    one, other = ReportingNode(network, incarnation=1), ReportingNode(network, incarnation=2)
    for _ in range(600):
        one.step()
        other.step()
        network.pass_time(0.1)
    assert one.counters.registrations + other.counters.registrations < 80


def test_the_best_address_that_answers_is_used_and_a_better_one_when_it_is_back() -> None:
    network = FakeNetwork(native_door=False)
    node = ReportingNode(network, addresses=[NATIVE, GRPC])
    node.report([A], HBM)
    node.record([Delta(A, DRAM, 1)])
    node.run(INTERVAL)
    assert (node.link.address, node.told()) == (GRPC, True)
    dials = network.dials
    node.run(5 * SMALL.upgrade_interval)
    assert 4 <= network.dials - dials <= 6
    network.native_door = True
    node.report([B], HBM)
    node.run(30.0)
    assert (node.link.address, node.told(), node.counters.failures) == (NATIVE, True, 0)
    assert [transport.closed for transport in network.transports] == [True, False]
    network.native_door = False
    network.restart_master(persistent=False)
    node.run(2 * INTERVAL)
    assert (node.link.address, node.told()) == (GRPC, True)


def test_another_address_may_be_another_master() -> None:
    first, second = FakeNetwork(), FakeNetwork()
    second.clock = first.clock
    node = ReportingNode(first, addresses=[NATIVE, GRPC])
    node.link = Link([NATIVE, OTHER], lambda to, t: (first if to == NATIVE else second).dial(to, t), first.clock, SMALL)
    node.session = node.new_session()
    node.report([A], HBM)
    node.run(1.0)
    first.partitioned = True
    node.run(2 * INTERVAL)
    assert node.link.address == OTHER
    assert second.external("node") == {(HBM, A)}
    assert node.counters.registrations == 2


def test_a_barrier_is_reached_when_everything_before_it_is_known() -> None:
    node = settled_node()
    node.record([Delta(C, DRAM, 1)])
    node.report([C], HBM)
    barrier = node.barrier()
    node.report([D], HBM)
    node.step()
    assert not node.told()
    while not barrier.reached.is_set():
        node.step()
    assert (HBM, C) in node.network.external("node")
    assert (C, DRAM) in node.network.owned("node")
    node.step()
    assert node.told()


def test_a_barrier_that_nobody_waits_for_holds_nothing_up() -> None:
    node = settled_node()
    node.network.partitioned = True
    node.report([C], HBM)
    barrier = node.barrier()
    node.report([D], HBM)
    node.step()
    barrier.abandoned = True
    node.network.partitioned = False
    node.run(INTERVAL)
    assert (node.told(), barrier.reached.is_set()) == (True, False)


def test_what_the_master_refuses_does_not_stop_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    node = settled_node()
    state = node.network.state
    apply_batch = state.apply_batch

    def picky(node_id: str, batch: Batch, now: float) -> Acknowledgement:
        if any(C in action.hashes for action in batch.actions):
            raise InvalidRequest("this hash is not for me")
        return apply_batch(node_id, batch, now)

    monkeypatch.setattr(state, "apply_batch", picky)
    node.report([C, D], HBM)
    node.step()
    node.report([D], SSD)
    node.run(INTERVAL)
    assert (node.counters.refused, node.counters.failures, node.counters.full_syncs) == (2, 0, 1)
    assert node.network.external("node") == {(HBM, A), (HBM, B), (DRAM, A), (SSD, D)}


def test_events_that_the_master_refuses_do_not_stop_the_heartbeats(monkeypatch: pytest.MonkeyPatch) -> None:
    node = settled_node()
    refuse_events(node.network.state, monkeypatch)
    node.record([Delta(C, DRAM, 1)])
    node.run(100.0)
    assert node.network.state.list_nodes(node.clock.now)[0].last_heartbeat_age <= INTERVAL
    assert (node.counters.refused, node.counters.failures) == (1, 0)


def test_leaving_unregisters_only_if_there_is_time() -> None:
    node = settled_node()
    node.session.limit(node.clock.now)
    node.session.leave(unregister=True)
    assert node.network.state.list_nodes(node.clock.now) != []
    node = settled_node()
    node.session.leave(unregister=True)
    assert (node.network.state.list_nodes(node.clock.now), node.link.address) == ([], None)


def test_what_was_said_before_the_registration_is_part_of_it() -> None:
    node = ReportingNode(FakeNetwork())
    node.intake.put(0, node.blocks.set_capacities, (TierCapacity(DRAM, 7, 6),), None)
    node.step()
    assert [told.capacities for told in node.network.registrations] == [(TierCapacity(DRAM, 7, 6),)]


def test_a_master_that_knows_nobody_is_not_asked_at_full_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    node = ReportingNode(FakeNetwork())
    monkeypatch.setattr(node.network.state, "heartbeat", lambda message, now: HeartbeatReply(NodeStatus.UNKNOWN))
    node.run(60.0)
    assert 20 < node.counters.registrations < 40
    before = node.counters.registrations
    for _ in range(100):
        node.step()
    assert node.counters.registrations <= before + 1


def test_when_the_time_is_up_nothing_is_dialled() -> None:
    node = ReportingNode(FakeNetwork())
    node.link.limit(node.clock.now)
    with pytest.raises(MasterUnavailable, match="no time"):
        node.link.connect()
    assert node.network.dials == 0


def test_an_empty_node_id_ends_in_pauses_not_in_a_crash() -> None:
    node = ReportingNode(FakeNetwork(), node_id="")
    node.run(30.0)
    assert not node.session.registered
    assert 10 < node.network.calls.count("register") < 25


def test_the_fake_network_knows_what_it_does() -> None:
    network = FakeNetwork(native_door=False)
    transport = network.dial(GRPC, 1.0)
    ack = transport.register(Registration("node", incarnation=7), 1.0)
    assert ack.heartbeat_interval_ms == int(INTERVAL * 1000)
    assert network.state.list_nodes(network.clock.now)[0].incarnation == 0
