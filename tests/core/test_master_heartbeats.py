"""Heartbeats: order, replays, gaps, full syncs, capacities."""

from __future__ import annotations

import pytest

from tests.core.master_kit import (
    DRAM,
    EXPIRY,
    HBM,
    SSD,
    START,
    A,
    B,
    C,
    add,
    alive,
    asked,
    beat,
    full_sync,
    master,
    register,
    remove,
    status,
)
from umbp_core.errors import InvalidRequest
from umbp_core.journal import Bundle
from umbp_core.master.changes import SLICES, finish
from umbp_core.master.model import GetRoute, Heartbeat, HeartbeatReply, NodeStatus, TierCapacity
from umbp_core.master.state import MasterState

DELTA_SLICE = SLICES.deltas
SMALL = TierCapacity(DRAM, 100, 60)
LARGE = TierCapacity(DRAM, 200, 160)


@pytest.fixture
def state() -> MasterState:
    return register(master(), "n1", capacities=[SMALL])


def capacities(state: MasterState) -> tuple[TierCapacity, ...]:
    (info,) = state.list_nodes(START)
    return info.capacities


def test_an_unknown_node_has_to_register(state: MasterState) -> None:
    assert beat(state, "ghost", (1, [add(A)])) == HeartbeatReply(NodeStatus.UNKNOWN)
    assert state.lookup([A]) == [False]


def test_bundles_count_once_and_in_order(state: MasterState) -> None:
    assert beat(state, "n1", (1, [add(A)])) == alive(1)
    assert beat(state, "n1", (2, [add(B)])) == alive(2)
    assert beat(state, "n1", (4, [add(C)])) == asked(2)
    assert state.lookup([A, B, C]) == [True, True, False]


def test_bundles_before_a_gap_are_applied(state: MasterState) -> None:
    assert beat(state, "n1", (1, [add(A)]), (2, [add(B)]), (5, [add(C)])) == asked(2)
    assert state.lookup([A, B, C]) == [True, True, False]


def test_a_replay_is_acknowledged_and_changes_nothing(state: MasterState) -> None:
    beat(state, "n1", (1, [add(A)]), (2, [remove(A)]))
    assert beat(state, "n1", (1, [add(A)])) == alive(2)
    assert beat(state, "n1", (1, [add(A)]), (2, [remove(A)]), (3, [add(B)])) == alive(3)
    assert state.lookup([A, B]) == [False, True]


def test_a_delta_adds_removes_and_resizes(state: MasterState) -> None:
    beat(state, "n1", (1, [add(A), add(B), add(B, SSD)]))
    beat(state, "n1", (2, [remove(A), remove(C), add(B, DRAM, 999)]))
    assert state.lookup([A, B]) == [False, True]
    assert state.route_get("n1", [B], (), START) == [GetRoute("n1", DRAM, 999, "n1.host:1")]


def test_a_gap_is_a_sign_of_life_and_nothing_else(state: MasterState) -> None:
    assert beat(state, "n1", (9, [add(A)]), at=START + 20, capacities=[LARGE], counts={DRAM: 9}) == asked(0)
    assert state.tick(START + 20 + EXPIRY).expired == ()
    assert capacities(state) == (SMALL,)
    assert state.list_nodes(START)[0].told_counts == {}


def test_a_keepalive_is_a_sign_of_life_with_capacities(state: MasterState) -> None:
    assert beat(state, "n1", at=START + 20, capacities=[LARGE], counts={DRAM: 9}) == alive(0)
    assert state.tick(START + 20 + EXPIRY).expired == ()
    assert capacities(state) == (LARGE,)
    assert state.list_nodes(START)[0].told_counts == {DRAM: 9}


def test_what_a_heartbeat_does_not_tell_stays(state: MasterState) -> None:
    beat(state, "n1", (1, [add(A)]), counts={DRAM: 1})
    full_sync(state, "n1", 1, add(A))
    beat(state, "n1")
    assert capacities(state) == (SMALL,)
    assert state.list_nodes(START)[0].told_counts == {DRAM: 1}
    assert state.list_nodes(START)[0].block_counts == {DRAM: 1}


def test_a_full_sync_replaces_everything_of_its_node() -> None:
    state = register(master(), "n1", "n2")
    for node in ("n1", "n2"):
        beat(state, node, (1, [add(A), add(B, HBM)]))
    assert full_sync(state, "n1", 50, add(C, size=7), remove(A)) == alive(50)
    assert state.list_nodes(START)[0].block_counts == {DRAM: 1}
    assert state.route_get("n1", [A, B, C], (), START) == [
        GetRoute("n2", DRAM, 10, "n2.host:1"),
        GetRoute("n2", HBM, 10, "n2.host:1"),
        GetRoute("n1", DRAM, 7, "n1.host:1"),
    ]
    assert beat(state, "n1", (51, [remove(C)])) == alive(51)


def test_an_empty_full_sync_empties_the_node(state: MasterState) -> None:
    beat(state, "n1", (1, [add(A)]))
    assert full_sync(state, "n1", 4) == alive(4)
    assert state.lookup([A]) == [False]


def test_a_full_sync_takes_capacities(state: MasterState) -> None:
    heartbeat = Heartbeat("n1", full_sync=True, baseline=1, capacities=(LARGE,))
    state.heartbeat(heartbeat, START)
    assert capacities(state) == (LARGE,)


def test_a_node_names_a_few_tiers_only(state: MasterState) -> None:
    many = [add(A, tier) for tier in range(33)]
    with pytest.raises(InvalidRequest, match="n1 names more than 32 tiers"):
        beat(state, "n1", (1, many))
    with pytest.raises(InvalidRequest, match="n1 names more than 32 tiers"):
        full_sync(state, "n1", 1, *many)
    assert beat(state, "n1", (1, many[:32])) == alive(1)


def test_of_a_heartbeat_with_too_many_tiers_nothing_is_applied(state: MasterState) -> None:
    """Not what comes in bundles or slices before the one that names the last of them, either."""
    few = [add(b"%d" % number, number) for number in range(20)]
    more = [add(b"-%d" % number, number) for number in range(20, 40)]
    with pytest.raises(InvalidRequest, match="more than 32 tiers"):
        beat(state, "n1", (1, few), (2, more))
    assert state.lookup([b"0"]) == [False]
    assert beat(state, "n1") == alive(0)
    with pytest.raises(InvalidRequest, match="more than 32 tiers"):
        full_sync(state, "n1", 1, *few, *[add(b"again", 1)] * DELTA_SLICE, *more)
    assert (state.sweep(1 << 20), state.blocks.stats().keys) == (0, 0), "nothing was put aside"
    assert full_sync(state, "n1", 3, *few) == alive(3)


def test_a_node_that_expires_while_its_heartbeat_is_looked_at_is_asked_for_everything(state: MasterState) -> None:
    deltas = [add(b"%d" % number) for number in range(20 * DELTA_SLICE)]
    for full in (False, True):
        steps = state.heartbeat_steps(Heartbeat("n1", [Bundle(1, tuple(deltas))], full_sync=full, baseline=1), START)
        next(steps)
        assert state.lookup([b"0"]) == [False]
        assert state.tick(START + EXPIRY + 1).expired == ("n1",)
        assert finish(steps) == asked(0)
        assert state.lookup([b"0"]) == [False]
        register(state, "n1")


# In steps: three slices, between which others come.


def large(node: str = "n1", seq: int = 1, full: bool = False) -> Heartbeat:
    deltas = tuple(add(b"%d" % number) for number in range(2 * DELTA_SLICE + 1))
    return Heartbeat(node, [Bundle(seq, deltas)], full_sync=full, baseline=seq)


def test_a_large_bundle_is_acknowledged_when_all_of_it_is_applied(state: MasterState) -> None:
    steps = state.heartbeat_steps(large(), START)
    next(steps)
    assert state.lookup([b"0", b"%d" % DELTA_SLICE]) == [True, False]
    next(steps)
    assert finish(steps) == alive(1)
    assert state.list_nodes(START)[0].block_counts == {DRAM: 2 * DELTA_SLICE + 1}


def test_a_bundle_that_is_given_up_halfway_comes_again(state: MasterState) -> None:
    steps = state.heartbeat_steps(large(), START)
    next(steps)
    steps.close()
    assert beat(state, "n1") == alive(0)
    assert state.heartbeat(large(), START) == alive(1)
    assert state.list_nodes(START)[0].block_counts == {DRAM: 2 * DELTA_SLICE + 1}


@pytest.mark.parametrize("full", [False, True])
def test_a_node_that_expires_halfway_is_asked_for_everything(state: MasterState, full: bool) -> None:
    steps = state.heartbeat_steps(large(full=full), START)
    next(steps)
    state.tick(START + EXPIRY + 1)
    assert finish(steps) == asked(0)
    assert state.list_nodes(START)[0].block_counts == {}


@pytest.mark.parametrize("full", [False, True])
def test_a_node_that_is_replaced_halfway_has_to_register(state: MasterState, full: bool) -> None:
    steps = state.heartbeat_steps(large(full=full), START)
    next(steps)
    state.unregister("n1", START)
    register(state, "n1")
    assert finish(steps) == HeartbeatReply(NodeStatus.UNKNOWN)
    assert state.list_nodes(START)[0].block_counts == {}


@pytest.mark.parametrize("full", [False, True])
def test_a_node_that_goes_halfway_is_gone(state: MasterState, full: bool) -> None:
    steps = state.heartbeat_steps(large(full=full), START)
    next(steps)
    state.unregister("n1", START)
    assert finish(steps) == HeartbeatReply(NodeStatus.UNKNOWN)
    assert state.lookup([b"0"]) == [False]


def test_a_heartbeat_that_waited_while_its_node_expired_revives_it(state: MasterState) -> None:
    steps = state.heartbeat_steps(Heartbeat("n1"), START + EXPIRY + 1)
    state.tick(START + EXPIRY + 1)
    assert finish(steps) == asked(0)
    assert status(state, "n1") is NodeStatus.ALIVE


def test_a_heartbeat_that_waited_while_its_node_was_replaced_is_not_the_new_ones(state: MasterState) -> None:
    steps = state.heartbeat_steps(large(), START)
    state.unregister("n1", START)
    register(state, "n1")
    assert finish(steps) == HeartbeatReply(NodeStatus.UNKNOWN)
    assert state.lookup([b"0"]) == [False]


def test_a_full_sync_is_seen_as_a_whole(state: MasterState) -> None:
    beat(state, "n1", (1, [add(A)]))
    steps = state.heartbeat_steps(large(seq=9, full=True), START)
    next(steps)
    assert state.lookup([A, b"0"]) == [True, False]
    assert finish(steps) == alive(9)
    assert state.lookup([A, b"0"]) == [False, True]
