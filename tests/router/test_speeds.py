"""Seconds per token from what engines' metrics say."""

from __future__ import annotations

import pytest

from examples.router.costs import Speeds
from examples.router.speeds import Totals, measured, totals_of
from umbp_core.tiers import Tier

VLLM = """\
# TYPE vllm:num_requests_waiting gauge
vllm:num_requests_waiting{engine="0",model_name="m"} 3.0
vllm:num_requests_waiting{engine="1",model_name="m"} 1.0
# TYPE vllm:request_prefill_time_seconds histogram
vllm:request_prefill_time_seconds_bucket{engine="0",le="+Inf",model_name="m"} 4.0
vllm:request_prefill_time_seconds_count{engine="0",model_name="m"} 4.0
vllm:request_prefill_time_seconds_sum{engine="0",model_name="m"} 2.5
# TYPE vllm:request_prefill_kv_computed_tokens histogram
vllm:request_prefill_kv_computed_tokens_sum{engine="0",model_name="m"} 5000.0
# TYPE vllm:umbp_op_seconds counter
vllm:umbp_op_seconds_total{direction="load",engine="0",model_name="m"} 0.5
vllm:umbp_op_seconds_total{direction="store",engine="0",model_name="m"} 9.0
# TYPE vllm:umbp_hit_tokens counter
vllm:umbp_hit_tokens_total{engine="0",model_name="m",tier="dram"} 1000.0
"""
SGLANG = """\
# TYPE sglang:num_queue_reqs gauge
sglang:num_queue_reqs{model_name="m",tp_rank="0"} 2.0
# TYPE sglang:per_stage_req_latency_seconds histogram
sglang:per_stage_req_latency_seconds_sum{model_name="m",stage="request_process",tp_rank="0"} 40.0
sglang:per_stage_req_latency_seconds_sum{model_name="m",stage="prefill_forward",tp_rank="0"} 1.5
# TYPE sglang:uncached_prompt_tokens_histogram histogram
sglang:uncached_prompt_tokens_histogram_sum{model_name="m"} 3000.0
# TYPE umbp_sglang_pages counter
umbp_sglang_pages_total{direction="get",pool="kv",result="ssd"} 10.0
umbp_sglang_pages_total{direction="get",pool="kv",result="missing"} 99.0
umbp_sglang_pages_total{direction="put",pool="kv",result="stored"} 99.0
# TYPE umbp_sglang_call_seconds histogram
umbp_sglang_call_seconds_sum{direction="get",pool="kv"} 0.25
umbp_sglang_call_seconds_sum{direction="put",pool="kv"} 7.0
"""


def test_what_a_vllm_says() -> None:
    found = totals_of(VLLM, 16)
    assert (found.prefill_seconds, found.prefill_tokens, found.load_seconds, found.waiting) == (2.5, 5000.0, 0.5, 4.0)
    assert dict(found.load_tokens) == {Tier.DRAM: 1000.0, Tier.SSD: 0.0}


def test_what_an_sglang_says() -> None:
    found = totals_of(SGLANG, 64)
    assert (found.prefill_seconds, found.prefill_tokens, found.load_seconds, found.waiting) == (1.5, 3000.0, 0.25, 2.0)
    assert dict(found.load_tokens) == {Tier.DRAM: 0.0, Tier.SSD: 640.0}


def test_a_page_that_is_none() -> None:
    with pytest.raises(ValueError, match=r".*"):
        totals_of('<html lang="en">no metrics</html>', 16)


def totals(prefill: tuple[float, float], load: float = 0.0, dram: float = 0.0, ssd: float = 0.0) -> Totals:
    return Totals(*prefill, load, ((Tier.DRAM, dram), (Tier.SSD, ssd)))


def test_speeds_move_towards_what_was_measured() -> None:
    speeds = Speeds(prefill=1.0)
    for step in range(1, 40):
        speeds = measured(speeds, totals((step - 1.0, (step - 1) * 1000.0)), totals((step * 1.0, step * 1000.0)))
    assert speeds.prefill == pytest.approx(0.001, rel=0.01)


def test_a_load_from_one_tier_is_that_tiers() -> None:
    before = Speeds()
    after = measured(before, totals((0, 0)), totals((0, 0), load=10.0, ssd=1000.0))
    assert after.tiers[Tier.SSD] > before.tiers[Tier.SSD]
    assert after.tiers[Tier.DRAM] == before.tiers[Tier.DRAM]
    assert after.prefill == before.prefill


@pytest.mark.parametrize(
    "after",
    [
        totals((0.1, 10.0)),  # too few tokens
        totals((0, 0), load=1.0, dram=500.0, ssd=500.0),  # two tiers at once
        totals((0, 0), load=1.0, dram=10.0),
        totals((0, 0)),
    ],
)
def test_too_little_changes_nothing(after: Totals) -> None:
    assert measured(Speeds(), totals((0, 0)), after) == Speeds()


def test_a_restart_changes_nothing() -> None:
    assert (
        measured(Speeds(), totals((9.0, 9000.0), 9.0, 9000.0, 9000.0), totals((0, 0), load=1.0, dram=0.0)) == Speeds()
    )
