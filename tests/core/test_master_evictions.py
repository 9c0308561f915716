"""Which blocks nodes are asked to evict."""

from __future__ import annotations

import pytest

from tests.core.master_kit import DRAM, EXPIRY, HBM, SSD, START, A, B, C, add, beat, master, register
from umbp_core.journal import Delta
from umbp_core.master.model import EvictionOrder, MasterSettings, Registration, TierCapacity
from umbp_core.master.state import MasterState
from umbp_core.master.victims import MAX_VICTIMS, ORDER_KEYS

KEYS = [b"%02d" % number for number in range(10)]


def filled(tier: int = DRAM, available: int = 0, settings: MasterSettings | None = None) -> MasterState:
    """``n1`` holds ten blocks of ten bytes, of which it has room for a hundred; the first was added first."""
    state = register(master(settings), "n1")
    for number, key in enumerate(KEYS):
        beat(state, "n1", (number + 1, [add(key, tier)]), at=START + number / 100)
    beat(state, "n1", capacities=[TierCapacity(tier, 100, available)])
    return state


def order(*keys: bytes, nbytes: int = 0, node: str = "n1") -> EvictionOrder:
    return EvictionOrder(node, f"{node}.host:1", keys, nbytes or 10 * len(keys))


def orders(state: MasterState, at: float = START + 1) -> tuple[EvictionOrder, ...]:
    return state.tick(at).evictions


@pytest.mark.parametrize("tier", [HBM, DRAM])
def test_a_full_tier_is_emptied_to_the_low_watermark_oldest_first(tier: int) -> None:
    assert orders(filled(tier)) == (order(*KEYS[:3]),)


def test_it_begins_at_the_high_watermark() -> None:
    assert orders(filled(available=11)) == ()
    assert orders(filled(available=10)) == (order(*KEYS[:2]),)


def test_nodes_look_after_their_ssd_themselves() -> None:
    assert orders(filled(SSD)) == ()
    assert orders(filled(7)) == ()


def test_watermarks_can_be_set() -> None:
    settings = MasterSettings(eviction_high_watermark=0.5, eviction_low_watermark=0.35)
    assert orders(filled(available=50, settings=settings)) == (order(*KEYS[:2]),)


def test_blocks_are_evicted_until_enough_bytes_are_free() -> None:
    """150 bytes too many are two blocks of 100."""
    state = register(master(), "n1")
    beat(state, "n1", (1, [add(A, size=100), add(B, size=100), add(C, size=100)]))
    beat(state, "n1", capacities=[TierCapacity(DRAM, 1000, 150)])
    assert orders(state) == ()
    beat(state, "n1", capacities=[TierCapacity(DRAM, 500, 0)])
    assert orders(state, START + 6) == (order(A, B, nbytes=200),)


def test_what_was_read_lately_stays() -> None:
    state = filled()
    state.route_get("n2", KEYS[:2], (), START + 1)
    assert orders(state, START + 4) == (order(*KEYS[2:5]),)


def test_leased_blocks_are_never_evicted() -> None:
    state = filled()
    state.route_get("n2", KEYS[:9], (), START + 1)
    assert orders(state, START + 1.5) == (order(KEYS[9]),)
    assert orders(state, START + 7) == (order(KEYS[9], *KEYS[:2]),)


def test_lookups_and_reads_elsewhere_lease_nothing() -> None:
    state = filled()
    state.lookup(KEYS)
    state.route_get("n2", KEYS, ("n1",), START + 1)
    assert orders(state, START + 1.5) == (order(*KEYS[:3]),)


def test_every_tier_of_every_node_has_its_own_budget() -> None:
    state = register(master(), "n1", "n2")
    for node in ("n1", "n2"):
        beat(state, node, (1, [add(A, HBM, 50), add(B, HBM, 50), add(C, DRAM, 50)]))
    beat(state, "n1", capacities=[TierCapacity(HBM, 100, 0), TierCapacity(DRAM, 50, 0)])
    beat(state, "n2", capacities=[TierCapacity(HBM, 1000, 900), TierCapacity(DRAM, 50, 0)])
    assert orders(state) == (
        order(A, nbytes=50),
        order(C, nbytes=50),
        order(C, nbytes=50, node="n2"),
    )


def test_rounds_come_every_few_seconds() -> None:
    state = filled()
    assert orders(state, START + 1) != ()
    assert orders(state, START + 5.9) == ()
    assert orders(state, START + 6) != ()


def test_who_cannot_be_asked_is_not_asked() -> None:
    state = filled()
    state.tick(START + EXPIRY + 1)
    assert orders(state, START + EXPIRY + 60) == ()
    state = master()
    state.register(Registration("n1", "host", capacities=(TierCapacity(DRAM, 100, 0),)), START)
    beat(state, "n1", (1, [add(A)]))
    assert orders(state) == ()


@pytest.mark.parametrize("capacity", [TierCapacity(DRAM, 0, 0), TierCapacity(DRAM, 100, 200)])
def test_a_capacity_that_makes_no_sense_evicts_nothing(capacity: TierCapacity) -> None:
    state = filled()
    beat(state, "n1", capacities=[capacity])
    assert orders(state) == ()


def test_a_large_round_is_planned_in_parts() -> None:
    state = register(master(), "n1", "n2", "n3")
    count = 20_000
    for node in ("n1", "n2", "n3"):
        deltas = [Delta(b"%s-%d" % (node.encode(), number), DRAM, 1) for number in range(count)]
        beat(state, node, (1, deltas))
        beat(state, node, capacities=[TierCapacity(DRAM, count, 0)])
    planned = [orders(state, START + 1 + tick) for tick in range(3)]
    rest = count * 3 // 10 - ORDER_KEYS
    last = MAX_VICTIMS - 3 * ORDER_KEYS - 2 * rest
    assert [len(part.keys) for part in planned[0]] == [ORDER_KEYS, rest, ORDER_KEYS, rest, ORDER_KEYS, last]
    assert [part.nbytes for part in planned[0]] == [len(part.keys) for part in planned[0]]
    assert planned[1:] == [(), ()]


def test_a_round_goes_on_with_the_next_call() -> None:
    state = register(master(), "n1", "n2")
    count = 60_000
    deltas = [Delta(b"%d" % number, DRAM, 1) for number in range(count)]
    for node in ("n1", "n2"):
        beat(state, node, (1, deltas))
        beat(state, node, capacities=[TierCapacity(DRAM, count, 0)])
    first, second, third = (orders(state, START + 1 + tick) for tick in range(3))
    assert {part.node_id for part in first} == {"n1"}
    assert {part.node_id for part in second} == {"n2"}
    assert sum(len(part.keys) for part in second) == MAX_VICTIMS
    assert third == ()


def test_blocks_of_the_same_moment_are_all_there() -> None:
    state = register(master(MasterSettings(eviction_low_watermark=0.0)), "n1")
    keys = [b"%02d" % number for number in range(50)]
    beat(state, "n1", (1, map(add, keys)))
    beat(state, "n1", capacities=[TierCapacity(DRAM, 500, 0)])
    assert orders(state) == (order(*keys),)


def test_a_lease_lasts_as_long_as_it_is_set_to() -> None:
    state = filled(settings=MasterSettings(lease_duration=60.0, heartbeat_ttl=100.0))
    state.route_get("n2", KEYS, (), START + 1)
    assert orders(state, START + 11) == ()
    assert orders(state, START + 62) == (order(*KEYS[:3]),)
