"""Large requests in steps, and what comes between two of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest

from tests.core.master_kit import DRAM, EXPIRY, HBM, SSD, START, A, B, beat, master, matched, register
from umbp_core.index import PrefixMatch, TierRun
from umbp_core.index_gate import Acknowledgement, Action, ActionKind, Batch, Verdict
from umbp_core.master.changes import SLICES, Steps, finish
from umbp_core.master.state import MasterState

HASH_SLICE, QUERY_SLICE = SLICES.hashes, SLICES.query
MANY = [b"%d" % number for number in range(2 * HASH_SLICE + 1)]
FIRST, LAST = MANY[0], MANY[-1]
LONG = [b"%d" % number for number in range(2 * QUERY_SLICE + 5)]
Disturbance = Callable[[MasterState], object]


@pytest.fixture
def state() -> MasterState:
    return register(master(), "n1", "n2", incarnation=5)


def hashes_of(state: MasterState, node: str = "n1", tier: int = HBM) -> int:
    return state.index.counts(node).get(tier, 0)


# Changes.


def test_a_large_report_comes_in_slices(state: MasterState) -> None:
    steps = state.report_steps("n1", MANY, HBM, START)
    assert hashes_of(state) == 0
    next(steps)
    assert hashes_of(state) == HASH_SLICE
    assert finish(steps)
    assert hashes_of(state) == len(MANY)
    revoke = state.revoke_steps("n1", MANY, HBM, START)
    next(revoke)
    assert hashes_of(state) == len(MANY) - HASH_SLICE
    assert finish(revoke)
    assert hashes_of(state) == 0


def clear_hbm(state: MasterState) -> None:
    state.clear_tier("n1", HBM, START)


def clear_node(state: MasterState) -> None:
    state.clear_node("n1", START)


def expire(state: MasterState) -> None:
    beat(state, "n2", at=START + EXPIRY)
    state.tick(START + EXPIRY + 1)


def expire_and_return(state: MasterState) -> None:
    expire(state)
    beat(state, "n1", at=START + EXPIRY + 2)


def unregister(state: MasterState) -> None:
    state.unregister("n1", START)


def replace(state: MasterState) -> None:
    register(state, "n1", incarnation=6)


VOIDING: Sequence[Disturbance] = (clear_hbm, clear_node, expire, expire_and_return, unregister, replace)


@pytest.mark.parametrize("disturb", VOIDING)
@pytest.mark.parametrize("begun", [False, True])
def test_what_is_left_of_a_change_is_void_after_a_clear(state: MasterState, disturb: Disturbance, begun: bool) -> None:
    state.report("n2", [A], HBM, START)
    steps = state.report_steps("n1", MANY, HBM, START)
    if begun:
        next(steps)
    disturb(state)
    assert finish(steps)
    assert hashes_of(state) == 0
    assert hashes_of(state, "n2") == 1


@pytest.mark.parametrize("disturb", [clear_hbm, clear_node])
def test_a_revoke_does_not_touch_what_came_after_a_clear(state: MasterState, disturb: Disturbance) -> None:
    state.report("n1", MANY, HBM, START)
    steps = state.revoke_steps("n1", MANY, HBM, START)
    next(steps)
    disturb(state)
    state.report("n1", [LAST], HBM, START)
    finish(steps)
    assert hashes_of(state) == 1


def test_a_clear_of_another_tier_does_not_disturb(state: MasterState) -> None:
    steps = state.report_steps("n1", MANY, HBM, START)
    next(steps)
    state.clear_tier("n1", DRAM, START)
    state.clear_tier("n2", HBM, START)
    finish(steps)
    assert hashes_of(state) == len(MANY)


def test_a_registration_that_is_repeated_does_not_disturb(state: MasterState) -> None:
    steps = state.report_steps("n1", MANY, HBM, START)
    next(steps)
    register(state, "n1", incarnation=5)
    finish(steps)
    assert hashes_of(state) == len(MANY)


def test_clears_of_very_many_tiers_are_remembered(state: MasterState) -> None:
    steps = state.report_steps("n1", MANY, 7, START)
    next(steps)
    for tier in range(100, 200):
        state.clear_tier("n1", tier, START)
    state.clear_tier("n1", 7, START)
    finish(steps)
    assert hashes_of(state, tier=7) == 0


def everything(seq: int = 1, full_sync: bool = True) -> Batch:
    actions = [Action(ActionKind.REPORT, HBM, MANY), Action(ActionKind.REPORT, DRAM, [A])]
    return Batch(5, seq, actions, full_sync)


def asks(verdict: Verdict, acked: int = 0) -> Acknowledgement:
    return Acknowledgement(verdict, 5, acked, request_full_sync=True)


@pytest.mark.parametrize("full_sync", [False, True])
def test_a_large_batch_is_acknowledged_at_its_end(state: MasterState, full_sync: bool) -> None:
    steps = state.apply_batch_steps("n1", everything(full_sync=full_sync), START)
    next(steps)
    assert hashes_of(state) == HASH_SLICE
    assert state.probe("n1", 5, 0, START).acked == 0
    assert finish(steps) == Acknowledgement(Verdict.APPLY, 5, 1, request_full_sync=False)
    assert (hashes_of(state), hashes_of(state, tier=DRAM)) == (len(MANY), 1)


def test_a_batch_that_is_given_up_comes_again(state: MasterState) -> None:
    steps = state.apply_batch_steps("n1", everything(), START)
    next(steps)
    steps.close()
    assert state.apply_batch("n1", everything(), START).acked == 1
    assert hashes_of(state) == len(MANY)


def test_a_batch_whose_tier_is_cleared_counts_as_having_come_before(state: MasterState) -> None:
    steps = state.apply_batch_steps("n1", everything(), START)
    next(steps)
    state.clear_tier("n1", HBM, START)
    assert finish(steps).acked == 1
    assert (hashes_of(state), hashes_of(state, tier=DRAM)) == (0, 1)


@pytest.mark.parametrize("full_sync", [False, True])
@pytest.mark.parametrize("begun", [False, True])
@pytest.mark.parametrize(
    ("disturb", "answer"),
    [
        (expire, asks(Verdict.GAP)),
        (expire_and_return, asks(Verdict.GAP)),
        (unregister, asks(Verdict.UNREGISTERED)),
        (replace, asks(Verdict.UNREGISTERED)),
    ],
)
def test_a_batch_of_a_node_that_is_dropped_is_void(
    state: MasterState, disturb: Disturbance, answer: Acknowledgement, begun: bool, full_sync: bool
) -> None:
    steps = state.apply_batch_steps("n1", everything(full_sync=full_sync), START)
    if begun:
        next(steps)
    disturb(state)
    assert finish(steps) == answer
    assert (hashes_of(state), hashes_of(state, tier=DRAM)) == (0, 0)


# Questions.


def whole(steps: Steps[object], state: MasterState, disturb: Disturbance | None = None) -> object:
    next(steps)
    if disturb is not None:
        disturb(state)
    return finish(steps)


@pytest.fixture
def loaded(state: MasterState) -> MasterState:
    """``n1`` holds all of ``LONG`` but one, ``n2`` only its second slice; on two tiers each."""
    state.report("n1", LONG[: QUERY_SLICE + 3], HBM, START)
    state.report("n1", [*LONG[QUERY_SLICE + 2 : QUERY_SLICE + 5], *LONG[QUERY_SLICE + 6 :]], DRAM, START)
    state.report("n2", LONG[QUERY_SLICE : 2 * QUERY_SLICE : 2], DRAM, START)
    state.report("n2", LONG[QUERY_SLICE : 2 * QUERY_SLICE : 2], SSD, START)
    return state


def test_a_long_question_is_answered_like_a_short_one(loaded: MasterState) -> None:
    assert finish(loaded.match_steps(LONG, False, START)) == loaded.match(LONG, False, START)
    positions = {match.node: match.tiers for match in finish(loaded.match_positions_steps(LONG, False, START))}
    assert positions == {match.node: match.tiers for match in loaded.match_positions(LONG, False, START)}
    assert [list(tiers) for tiers in positions.values()] == [[HBM, DRAM], [DRAM, SSD]]
    for weights in (None, {HBM: 1.0, DRAM: 2.0}, {HBM: 1.0}):
        assert loaded.match_prefix(LONG, weights, START) == loaded.index.match_prefix(LONG, weights)
    assert finish(loaded.match_steps([], False, START)) == []
    assert finish(loaded.match_positions_steps([], False, START)) == []
    assert loaded.match_prefix([], None, START) == []


@pytest.mark.parametrize("count", [2 * QUERY_SLICE, QUERY_SLICE + 8, QUERY_SLICE + 7])
def test_bitmaps_are_as_long_as_the_question(loaded: MasterState, count: int) -> None:
    positions = {match.node: match.tiers for match in finish(loaded.match_positions_steps(LONG[:count], False, START))}
    assert positions == {match.node: match.tiers for match in loaded.match_positions(LONG[:count], False, START)}


def test_every_slice_is_a_step(loaded: MasterState) -> None:
    slices, lists = 3, 3
    assert len(list(loaded.match_steps(LONG, False, START))) == slices + lists
    assert len(list(loaded.match_steps(LONG, True, START))) == 2 * slices + lists
    assert len(list(loaded.match_positions_steps(LONG, False, START))) == slices
    assert len(list(loaded.match_positions_steps(LONG, True, START))) == 2 * slices
    assert len(list(loaded.match_prefix_steps(LONG, None, START))) == 1


def test_lists_with_the_same_content_are_one(loaded: MasterState) -> None:
    (match,) = (match for match in finish(loaded.match_steps(LONG, False, START)) if match.node == "n2")
    assert match.tiers[DRAM] is match.tiers[SSD]


def test_a_long_prefix_goes_on_over_slices(state: MasterState) -> None:
    state.report("n1", LONG, HBM, START)
    state.report("n2", LONG[: QUERY_SLICE + 1], HBM, START)
    state.report("n2", LONG[QUERY_SLICE + 1 :], DRAM, START)
    runs = [TierRun(HBM, QUERY_SLICE + 1), TierRun(DRAM, QUERY_SLICE + 4)]
    costs = (2.0 * len(LONG), 2.0 * runs[0].length + runs[1].length)
    assert state.match_prefix(LONG, {HBM: 2.0, DRAM: 1.0}, START) == [
        PrefixMatch("n2", len(LONG), runs, costs[1]),
        PrefixMatch("n1", len(LONG), [TierRun(HBM, len(LONG))], costs[0]),
    ]


def test_a_prefix_may_change_tiers_between_slices(state: MasterState) -> None:
    state.report("n1", LONG[:QUERY_SLICE], HBM, START)
    state.report("n1", LONG[QUERY_SLICE:], DRAM, START)
    runs = [TierRun(HBM, QUERY_SLICE), TierRun(DRAM, QUERY_SLICE + 5)]
    assert state.match_prefix(LONG, None, START) == [PrefixMatch("n1", len(LONG), runs)]


def test_a_prefix_ends_where_a_slice_is_not_whole(state: MasterState) -> None:
    state.report("n1", [*LONG[:5], *LONG[QUERY_SLICE:]], HBM, START)
    state.report("n2", LONG[:QUERY_SLICE], HBM, START)
    found = [(match.node, match.length) for match in state.match_prefix(LONG, None, START)]
    assert found == [("n2", QUERY_SLICE), ("n1", 5)]


@pytest.mark.parametrize("steps", [MasterState.match_steps, MasterState.match_positions_steps])
def test_a_hash_is_counted_once_in_all_slices(state: MasterState, steps: Callable[..., Steps[object]]) -> None:
    state.report("n1", [LONG[0], LONG[-1]], HBM, START)
    finish(steps(state, [*LONG, LONG[0]], True, START))
    assert state.hit_counts([LONG[0], LONG[1], LONG[-1]]) == [(LONG[0], 1), (LONG[-1], 1)]
    finish(steps(state, LONG, False, START))
    assert state.hit_counts([LONG[0]]) == [(LONG[0], 1)]


@pytest.mark.parametrize("disturb", [clear_hbm, expire])
def test_what_is_cleared_meanwhile_is_not_in_the_answer(state: MasterState, disturb: Disturbance) -> None:
    for node in ("n1", "n2"):
        state.report(node, LONG, HBM, START)
    matches = whole(state.match_steps(LONG, False, START), state, disturb)
    assert [(match.node, len(match.tiers[HBM])) for match in matches] == [("n2", len(LONG))]  # type: ignore[attr-defined]
    state.report("n1", LONG, HBM, START)


def test_what_is_cleared_meanwhile_is_in_no_answer_by_position(state: MasterState) -> None:
    for node in ("n1", "n2"):
        state.report(node, LONG, HBM, START)
    found = whole(state.match_positions_steps(LONG, False, START), state, clear_hbm)
    assert [(match.node, match.matched()) for match in found] == [("n2", len(LONG))]  # type: ignore[attr-defined]
    state.report("n1", LONG, HBM, START)
    prefixes = whole(state.match_prefix_steps(LONG, None, START), state, clear_hbm)
    assert [match.node for match in prefixes] == ["n2"]  # type: ignore[attr-defined]


def test_what_is_reported_after_a_clear_is_answered_alone(state: MasterState) -> None:
    def again(state: MasterState) -> None:
        clear_hbm(state)
        state.report("n1", LONG[-2:], HBM, START)

    state.report("n1", LONG, HBM, START)
    (match,) = whole(state.match_steps(LONG, False, START), state, again)  # type: ignore[misc]
    assert match.tiers == {HBM: LONG[-2:]}
    state.report("n1", LONG, HBM, START)
    (found,) = whole(state.match_positions_steps(LONG, False, START), state, again)  # type: ignore[misc]
    assert found.matched() == 2
    assert matched(state, [B]) == {}
