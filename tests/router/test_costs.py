"""The decision: which worker, and why."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from examples.router.costs import Offer, Reason, Speeds, decide, estimate, on_all_ranks
from umbp_core.index_match import TierRun
from umbp_core.tiers import Tier

SPEEDS = Speeds(prefill=1.0, tiers={Tier.HBM: 0.0, Tier.DRAM: 0.1, Tier.SSD: 0.5}, stream=0.0)


def offer(
    seat: str, *runs: tuple[Tier, int], queue: float = 0.0, outstanding: int = 0, speeds: Speeds = SPEEDS
) -> Offer:
    return Offer(seat, speeds, queue, outstanding, [TierRun(*run) for run in runs], block_tokens=10)


def test_each_block_costs_what_its_tier_costs() -> None:
    found = estimate(offer("a", (Tier.HBM, 2), (Tier.DRAM, 3), (Tier.SSD, 1)), prompt_tokens=100)
    assert found.load_seconds == pytest.approx(30 * 0.1 + 10 * 0.5)
    assert found.prefill_seconds == pytest.approx(40)
    assert found.seconds == found.work_seconds == pytest.approx(48)


def test_the_last_token_is_computed_in_any_case() -> None:
    assert estimate(offer("a", (Tier.HBM, 10)), prompt_tokens=100).prefill_seconds == 1.0


def test_the_fastest_tier_wins_among_equal_prefixes() -> None:
    decision = decide([offer("ssd", (Tier.SSD, 8)), offer("dram", (Tier.DRAM, 8)), offer("hbm", (Tier.HBM, 8))], 100)
    assert [each.offer.seat for each in decision.ranking] == ["hbm", "dram", "ssd"]
    assert decision.reason is Reason.PREFIX


def test_a_longer_prefix_on_a_slower_tier_may_win() -> None:
    decision = decide([offer("short", (Tier.HBM, 2)), offer("long", (Tier.SSD, 9))], 100)
    assert decision.ranking[0].offer.seat == "long"


def test_a_queue_outweighs_a_prefix_that_is_worth_less() -> None:
    busy, idle = offer("busy", (Tier.HBM, 5), queue=60.0), offer("idle")
    assert decide([busy, idle], 100).reason is Reason.QUEUE
    assert decide([busy, idle], 100).ranking[0].offer.seat == "idle"
    patient = offer("busy", (Tier.HBM, 5), queue=40.0)
    assert decide([patient, idle], 100).ranking[0].offer.seat == "busy"


def test_without_any_prefix_the_least_busy_is_taken_and_equals_in_turn() -> None:
    assert decide([offer("a", queue=2.0), offer("b", queue=1.0)], 100).ranking[0].offer.seat == "b"
    assert decide([offer("a", outstanding=1), offer("b")], 100).ranking[0].offer.seat == "b"
    decision = decide([offer("first"), offer("second")], 100)
    assert (decision.ranking[0].offer.seat, decision.reason) == ("first", Reason.LOAD)


def test_each_worker_is_judged_by_its_own_speeds() -> None:
    fast = Speeds(prefill=0.01, tiers=SPEEDS.tiers, stream=0.0)
    decision = decide([offer("holds", (Tier.DRAM, 5)), offer("computes", speeds=fast)], 100)
    assert decision.ranking[0].offer.seat == "computes"


def test_what_others_hold_can_be_fetched_where_workers_can() -> None:
    remote = Speeds(prefill=1.0, tiers=SPEEDS.tiers, remote=0.2, stream=0.0)
    here, there = offer("here", (Tier.HBM, 1), speeds=remote), offer("there", (Tier.HBM, 9), queue=1000.0)
    first = decide([here, there], 100).ranking[0]
    assert (first.offer.seat, first.remote_tokens) == ("here", 80)
    assert first.work_seconds == pytest.approx(80 * 0.2 + 10)
    slow = Speeds(prefill=1.0, tiers=SPEEDS.tiers, remote=2.0)
    assert estimate(offer("here", speeds=slow), 100, held_elsewhere=90).remote_tokens == 0


def test_why_is_one_line_that_says_what_was_weighed() -> None:
    why = decide([offer("a", (Tier.HBM, 2), (Tier.DRAM, 3)), offer("b", queue=1.5)], 100, note="a note").why()
    assert why == (
        "prefix; a note; holds 50 of 100 tokens (blocks: 2 HBM 3 DRAM); 53.0000 s, of which queue 0.0000 s; "
        "next b 101.5000 s"
    )


@given(
    st.lists(
        st.tuples(st.integers(0, 12), st.sampled_from([Tier.HBM, Tier.DRAM, Tier.SSD]), st.floats(0, 100)),
        min_size=1,
        max_size=6,
    ),
    st.integers(1, 120),
)
def test_nobody_would_have_been_cheaper(seats: list[tuple[int, Tier, float]], tokens: int) -> None:
    offers = [
        offer(str(number), *([(tier, blocks)] if blocks else []), queue=queue)
        for number, (blocks, tier, queue) in enumerate(seats)
    ]
    decision = decide(offers, tokens)
    best = min(queue + blocks * 10 * SPEEDS.tiers[tier] + max(1, tokens - blocks * 10) for blocks, tier, queue in seats)
    assert decision.ranking[0].seconds == pytest.approx(best)
    assert {each.offer.seat for each in decision.ranking} == {each.seat for each in offers}


@pytest.mark.parametrize(
    ("others", "usable"),
    [
        ([], [(Tier.HBM, 2), (Tier.DRAM, 3), (Tier.SSD, 4)]),
        ([9, 12], [(Tier.HBM, 2), (Tier.DRAM, 3), (Tier.SSD, 4)]),
        ([9, 7], [(Tier.HBM, 2), (Tier.DRAM, 3), (Tier.SSD, 2)]),
        ([5], [(Tier.HBM, 2), (Tier.DRAM, 3)]),
        ([0], [(Tier.HBM, 2), (Tier.DRAM, 3)]),
    ],
)
def test_what_is_on_ssd_counts_as_far_as_every_rank_has_its_part(
    others: list[int], usable: list[tuple[Tier, int]]
) -> None:
    """What is in HBM or DRAM may be in caches, which all ranks have alike and only the first one tells of."""
    runs = [TierRun(Tier.HBM, 2), TierRun(Tier.DRAM, 3), TierRun(Tier.SSD, 4)]
    assert list(on_all_ranks(runs, others)) == usable


def test_behind_what_not_all_ranks_have_nothing_counts() -> None:
    assert list(on_all_ranks([TierRun(Tier.SSD, 2), TierRun(Tier.HBM, 1)], [1])) == [(Tier.SSD, 1)]


def test_weights_for_the_master_are_per_block() -> None:
    assert SPEEDS.weights(16) == {1: 0.0, 2: pytest.approx(1.6), 3: 8.0}
