"""Where blocks are put and read: the original's checklist of strategies, through the master's state."""

from __future__ import annotations

import sys
from collections import Counter
from types import FrameType

import pytest

from tests.core.master_kit import DRAM, EXPIRY, HBM, SSD, START, UNKNOWN, A, B, C, add, beat, master, register
from umbp_core.errors import ConfigError, InvalidRequest
from umbp_core.master.changes import finish
from umbp_core.master.model import GetRoute, MasterSettings, PutOutcome, PutRoute, Registration, TierCapacity
from umbp_core.master.state import MasterState

GIB = 1 << 30
NONE = PutRoute(PutOutcome.UNAVAILABLE)
EXISTS = PutRoute(PutOutcome.ALREADY_EXISTS)
Room = dict[int, int]


def cluster(select: str = "most_available", affinity: str = "none", seed: int = 7, **rooms: Room) -> MasterState:
    """Nodes with so many bytes available per tier."""
    state = master(MasterSettings(put_select=select, put_affinity=affinity), seed)
    for node, room in rooms.items():
        register(state, node, capacities=[TierCapacity(tier, GIB, free) for tier, free in room.items()])
    return state


def put(state: MasterState, *sizes: int, asks: str = "n1", exclude: tuple[str, ...] = ()) -> list[PutRoute]:
    keys = [b"new-%d" % number for number in range(len(sizes))]
    return state.route_put(asks, keys, sizes, exclude, START)


def places(routes: list[PutRoute]) -> list[tuple[str, int]]:
    return [(route.node_id, route.tier) for route in routes]


# Puts.


def test_a_route_names_node_tier_and_address() -> None:
    state = cluster(n1={DRAM: 100})
    assert put(state, 10) == [PutRoute(PutOutcome.ROUTED, "n1", DRAM, "n1.host:1")]


def test_hbm_comes_before_dram_and_ssd_never() -> None:
    assert places(put(cluster(n1={DRAM: 1000}, n2={HBM: 10}), 10)) == [("n2", HBM)]
    assert put(cluster(n1={SSD: 1000, UNKNOWN: 1000}), 10) == [NONE]


@pytest.mark.parametrize("room", [{}, {DRAM: 9}, {DRAM: 9, HBM: 9}])
@pytest.mark.parametrize("select", ["most_available", "random"])
@pytest.mark.parametrize("affinity", ["none", "same", "local"])
def test_a_block_that_fits_nowhere_is_unavailable(room: Room, select: str, affinity: str) -> None:
    assert put(cluster(select, affinity, n1=room), 10, 11) == [NONE, NONE]
    assert put(cluster(select, affinity), 10) == [NONE]


def test_most_room_wins_and_ties_go_to_the_first() -> None:
    assert places(put(cluster(n1={DRAM: 50}, n2={DRAM: 60}, n3={DRAM: 60}), 10)) == [("n2", DRAM)]


@pytest.mark.parametrize("select", ["most_available", "random"])
def test_a_block_without_bytes_is_routed(select: str) -> None:
    assert places(put(cluster(select, n1={DRAM: 0}), 0)) == [("n1", DRAM)]


def test_excluded_nodes_are_not_used() -> None:
    state = cluster(n1={DRAM: 90}, n2={DRAM: 50})
    assert places(put(state, 10, exclude=("n1",))) == [("n2", DRAM)]
    assert put(state, 10, exclude=("n1", "n2")) == [NONE]


def test_a_batch_sees_the_room_that_it_takes() -> None:
    state = cluster(n1={DRAM: 100}, n2={DRAM: 90})
    assert places(put(state, 30, 30, 30, 30, 30, 30, 30)) == [
        ("n1", DRAM),
        ("n2", DRAM),
        ("n1", DRAM),
        ("n2", DRAM),
        ("n1", DRAM),
        ("n2", DRAM),
        ("", UNKNOWN),
    ]


def test_nothing_of_it_is_written_back() -> None:
    state = cluster(n1={DRAM: 100}, n2={DRAM: 90})
    first = put(state, 60, 60)
    assert put(state, 60, 60) == first
    assert state.list_nodes(START)[0].capacities == (TierCapacity(DRAM, GIB, 100),)


def test_a_large_block_does_not_keep_a_small_one_away() -> None:
    assert places(put(cluster(n1={DRAM: 20}), 30, 20)) == [("", UNKNOWN), ("n1", DRAM)]


def test_blocks_that_exist_are_not_put_again_and_take_no_room() -> None:
    state = cluster(n1={DRAM: 10}, n2={})
    beat(state, "n2", (1, [add(A, SSD, 999)]))
    assert state.route_put("n1", [A, B, A], [10, 10, 10], ("n2",), START) == [
        EXISTS,
        PutRoute(PutOutcome.ROUTED, "n1", DRAM, "n1.host:1"),
        EXISTS,
    ]
    assert state.route_put("n1", [A], [10**9], (), START) == [EXISTS]


def test_keys_need_sizes() -> None:
    with pytest.raises(InvalidRequest, match="keys and block_sizes must have the same length"):
        cluster().route_put("n1", [A, B], [1], (), START)


def test_dead_and_unreachable_nodes_are_not_used() -> None:
    state = cluster(n1={DRAM: 90})
    state.tick(START + EXPIRY + 1)
    assert put(state, 10) == [NONE]
    state.register(Registration("n2", "host", capacities=(TierCapacity(DRAM, 100, 50),)), START)
    assert put(state, 10) == [NONE]
    assert places(put(state, 10, asks="n2")) == [("n2", DRAM)]


def test_a_capacity_that_makes_no_sense_is_none() -> None:
    assert put(cluster("random", n1={DRAM: -5}), 0, 1) == [
        PutRoute(PutOutcome.ROUTED, "n1", DRAM, "n1.host:1"),
        NONE,
    ]


# Random.


def test_random_goes_by_room() -> None:
    state = cluster("random", n1={DRAM: 80_000}, n2={DRAM: 20_000})
    counts = Counter(put(state, 1)[0].node_id for _ in range(2000))
    assert 0.75 < counts["n1"] / 2000 < 0.85


def test_random_goes_by_the_room_that_is_left() -> None:
    """``n1`` gives most of its room to the first block; the second goes by 10 to 90."""
    seconds: Counter[str] = Counter()
    for seed in range(600):
        state = cluster("random", seed=seed, n1={DRAM: 100}, n2={DRAM: 89})
        first, second = put(state, 90, 1)
        assert first.node_id == "n1"
        seconds[second.node_id] += 1
    assert 0.05 < seconds["n1"] / 600 < 0.16


def test_random_never_takes_what_does_not_fit() -> None:
    state = cluster("random", n1={DRAM: 9}, n2={DRAM: 10}, n3={HBM: 9, DRAM: 1000})
    chosen = {place for _ in range(200) for place in places(put(state, 10))}
    assert chosen == {("n2", DRAM), ("n3", DRAM)}


def test_random_finds_the_last_room() -> None:
    state = cluster("random", n1={DRAM: 10**9}, n2={DRAM: 10})
    routes = put(state, 10**9 - 1, *[1] * 11)
    assert Counter(route.node_id for route in routes) == {"n1": 2, "n2": 10}


# Affinity.


def test_same_keeps_a_batch_together_where_it_fits() -> None:
    state = cluster(affinity="same", n1={HBM: 20, DRAM: 90}, n2={HBM: 30})
    assert places(put(state, 10, 10, 10)) == [("n2", HBM)] * 3
    assert places(put(state, 10, 10, 20)) == [("n1", DRAM)] * 3


def test_same_does_not_count_blocks_that_exist() -> None:
    state = cluster(affinity="same", n1={DRAM: 30}, n2={DRAM: 29})
    beat(state, "n1", (1, [add(A)]))
    routes = state.route_put("n1", [A, B, C], [1000, 15, 15], (), START)
    assert routes[0] == EXISTS
    assert places(routes[1:]) == [("n1", DRAM)] * 2


def test_same_stays_with_the_last_node_where_the_batch_does_not_fit() -> None:
    state = cluster(affinity="same", n1={DRAM: 50}, n2={DRAM: 49})
    nodes = [route.node_id for route in put(state, 10, 10, 10, 10, 10, 10, 10)]
    assert nodes == ["n1"] * 5 + ["n2"] * 2


def test_same_prefers_hbm_elsewhere_to_dram_of_the_last_node() -> None:
    state = cluster(affinity="same", n1={HBM: 20, DRAM: 25}, n2={HBM: 15})
    assert places(put(state, 15, 15, 15)) == [("n1", HBM), ("n2", HBM), ("n1", DRAM)]


def test_same_never_drops_a_block_that_fits() -> None:
    state = cluster(affinity="same", n1={DRAM: 10}, n2={DRAM: 10})
    assert places(put(state, 10, 20, 10)) == [("n1", DRAM), ("", UNKNOWN), ("n2", DRAM)]


def test_local_prefers_the_own_node_on_any_tier() -> None:
    state = cluster(affinity="local", n1={DRAM: 20}, n2={HBM: 100})
    assert places(put(state, 10, 10, 10)) == [("n1", DRAM), ("n1", DRAM), ("n2", HBM)]
    assert places(put(state, 10, asks="stranger")) == [("n2", HBM)]
    assert places(put(state, 10, exclude=("n1",))) == [("n2", HBM)]


def test_local_uses_the_own_hbm_first() -> None:
    state = cluster(affinity="local", n1={HBM: 10, DRAM: 20}, n2={HBM: 100})
    assert places(put(state, 10, 10)) == [("n1", HBM), ("n1", DRAM)]


@pytest.mark.parametrize("setting", ["put_select", "put_affinity"])
def test_an_unknown_strategy_is_refused(setting: str) -> None:
    with pytest.raises(ConfigError, match=f"{setting} 'best' is unknown; use one of "):
        master(MasterSettings(**{setting: "best"}))  # type: ignore[arg-type]


# Gets.


def holding(**copies: tuple[int, ...]) -> MasterState:
    """Nodes that hold ``A`` on these tiers."""
    state = register(master(), *copies)
    for node, tiers in copies.items():
        beat(state, node, (1, [add(A, tier) for tier in tiers]))
    return state


def got(state: MasterState, asks: str = "other", exclude: tuple[str, ...] = ()) -> tuple[str, int] | None:
    (route,) = state.route_get(asks, [A], exclude, START)
    return None if route is None else (route.node_id, route.tier)


def test_answers_come_in_the_order_of_the_keys() -> None:
    state = holding(n1=(DRAM,))
    beat(state, "n1", (2, [add(C, SSD, 5)]))
    assert state.route_get("n1", [A, B, C], (), START) == [
        GetRoute("n1", DRAM, 10, "n1.host:1"),
        None,
        GetRoute("n1", SSD, 5, "n1.host:1"),
    ]
    assert state.route_get("n1", [], (), START) == []


def test_the_fastest_tier_wins() -> None:
    assert got(holding(n1=(SSD,), n2=(DRAM,))) == ("n2", DRAM)
    assert got(holding(n1=(SSD, DRAM), n2=(DRAM, HBM))) == ("n2", HBM)
    assert got(holding(n1=(SSD,), n2=(UNKNOWN,))) == ("n1", SSD)
    assert got(holding(n1=(UNKNOWN,))) == ("n1", UNKNOWN)


def test_the_own_copy_wins_within_the_fastest_tier_only() -> None:
    assert {got(holding(n1=(HBM,), n2=(HBM,), n3=(HBM,)), asks="n2") for _ in range(20)} == {("n2", HBM)}
    assert got(holding(n1=(HBM,), n2=(DRAM,)), asks="n2") == ("n1", HBM)


def test_equal_copies_are_used_equally() -> None:
    state = holding(n1=(DRAM,), n2=(DRAM, SSD), n3=(DRAM,))
    counts = Counter(got(state) for _ in range(3000))
    assert set(counts) == {("n1", DRAM), ("n2", DRAM), ("n3", DRAM)}
    assert all(0.27 < count / 3000 < 0.4 for count in counts.values())
    state = holding(n1=(DRAM,), n2=(DRAM,))
    assert {got(state) for _ in range(40)} == {("n1", DRAM), ("n2", DRAM)}


def test_excluded_nodes_are_not_read() -> None:
    state = holding(n1=(HBM,), n2=(SSD,))
    assert got(state, exclude=("n1",)) == ("n2", SSD)
    assert got(state, exclude=("n1", "n2")) is None


def test_lookups_say_what_exists() -> None:
    assert holding(n1=(SSD,)).lookup([A, B, A]) == [True, False, True]


# In steps.


def test_a_large_batch_of_puts_sees_the_room_that_it_takes() -> None:
    state = cluster(n1={DRAM: 1500}, n2={DRAM: 1000})
    beat(state, "n2", (1, [add(b"new-7", SSD)]))
    keys = [b"new-%d" % number for number in range(2502)]
    routes = finish(state.route_put_steps("n1", keys, [1] * 2502, (), START))
    assert Counter(route.node_id for route in routes) == {"n1": 1500, "n2": 1000, "": 2}
    slices = 3
    assert len(list(state.route_put_steps("n1", keys, [1] * 2502, (), START))) == 2 * slices


@pytest.mark.parametrize("select", ["most_available", "random"])
@pytest.mark.parametrize("affinity", ["none", "same", "local"])
def test_a_put_makes_nothing_for_each_node(select: str, affinity: str) -> None:
    """What is called is counted: with forty times the nodes it is the same, or nearly."""

    def calls(nodes: int) -> int:
        state = cluster(select, affinity, **{f"n{number}": {HBM: 100, DRAM: 100} for number in range(nodes)})
        put(state, 10)
        counted = 0

        def count(frame: FrameType, event: str, _: object) -> None:
            nonlocal counted
            counted += event == "call" and "<" not in frame.f_code.co_name

        sys.setprofile(count)
        try:
            put(state, 10, 10, 10)
        finally:
            sys.setprofile(None)
        return counted

    assert calls(400) <= 2 * calls(10)


def test_a_large_batch_of_gets_is_answered_in_order() -> None:
    state = register(master(), "n1")
    keys = [b"%d" % number for number in range(2500)]
    beat(state, "n1", (1, [add(key) for key in keys[::2]]))
    steps = state.route_get_steps("n2", keys, (), START)
    next(steps)
    assert [route is not None for route in finish(steps)] == state.lookup(keys) == [True, False] * 1250
    with pytest.raises(InvalidRequest):
        state.route_get_steps("n2", [A] * (2 << 20), (), START)
