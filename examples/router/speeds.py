"""Seconds per token, and what waits, read off what a worker's ``/metrics`` says.  Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from prometheus_client.parser import text_string_to_metric_families

from examples.router.costs import Speeds
from umbp_core.tiers import Tier

LEAST_TOKENS = 256
"""A measurement over fewer says more about fixed costs than about tokens."""
_SHARE = 0.3
"""How much the latest measurement counts against those before."""
_STAGE = "prefill_forward"
"""SGLang times every stage of a request under one name."""
_TIERS = {"dram": Tier.DRAM, "ssd": Tier.SSD}
_PREFILL_SECONDS = ("vllm:request_prefill_time_seconds_sum", "sglang:per_stage_req_latency_seconds_sum")
_PREFILL_TOKENS = ("vllm:request_prefill_kv_computed_tokens_sum", "sglang:uncached_prompt_tokens_histogram_sum")
_WAITING = ("vllm:num_requests_waiting", "sglang:num_queue_reqs")


@dataclass(frozen=True, slots=True)
class Totals:
    """Sums since the worker started; those that it does not tell are 0."""

    prefill_seconds: float = 0.0
    prefill_tokens: float = 0.0
    load_seconds: float = 0.0
    load_tokens: tuple[tuple[int, float], ...] = ()
    """Per tier."""
    waiting: float = 0.0
    """Not a sum: requests that wait now."""


def totals_of(text: str, block_tokens: int) -> Totals:
    """What a page of metrics says.  Raises ``ValueError`` when it is none."""
    sums: dict[tuple[str, str], float] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            label = _label(sample.labels)
            if label is not None:
                key = (sample.name, label)
                sums[key] = sums.get(key, 0.0) + sample.value
    vllm = {tier: sums.get(("vllm:umbp_hit_tokens_total", name), 0.0) for name, tier in _TIERS.items()}
    sglang = {tier: sums.get(("umbp_sglang_pages_total", name), 0.0) * block_tokens for name, tier in _TIERS.items()}
    return Totals(
        prefill_seconds=sum(sums.get((name, ""), 0.0) for name in _PREFILL_SECONDS),
        prefill_tokens=sum(sums.get((name, ""), 0.0) for name in _PREFILL_TOKENS),
        load_seconds=sums.get(("vllm:umbp_op_seconds_total", ""), 0.0)
        + sums.get(("umbp_sglang_call_seconds_sum", ""), 0.0),
        load_tokens=tuple((tier, vllm[tier] + sglang[tier]) for tier in _TIERS.values()),
        waiting=sum(sums.get((name, ""), 0.0) for name in _WAITING),
    )


def measured(speeds: Speeds, before: Totals, after: Totals) -> Speeds:
    """``speeds`` with what happened between two looks; a restart or too little of it changes nothing.

    Loads are timed together, so that they are told apart only when all of them came from one tier.
    """
    tokens = after.prefill_tokens - before.prefill_tokens
    seconds = after.prefill_seconds - before.prefill_seconds
    if tokens >= LEAST_TOKENS and seconds > 0:
        speeds = replace(speeds, prefill=_mixed(speeds.prefill, seconds / tokens))
    earlier = dict(before.load_tokens)
    loaded = {tier: count - earlier.get(tier, 0.0) for tier, count in after.load_tokens}
    used = {tier: count for tier, count in loaded.items() if count > 0}
    seconds = after.load_seconds - before.load_seconds
    if len(used) == 1 and seconds > 0 and min(loaded.values()) >= 0:
        ((tier, count),) = used.items()
        if count >= LEAST_TOKENS and tier in speeds.tiers:
            tiers = {**speeds.tiers, tier: _mixed(speeds.tiers[tier], seconds / count)}
            speeds = replace(speeds, tiers=tiers)
    return speeds


def _mixed(before: float, latest: float) -> float:
    return before + _SHARE * (latest - before)


def _label(labels: Mapping[str, str]) -> str | None:
    """What tells the samples of a name apart here: the tier of what was read; ``None`` for what is of no interest."""
    if labels.get("direction", "load") not in {"load", "get"} or labels.get("stage", _STAGE) != _STAGE:
        return None
    if "result" in labels:
        return labels["result"] if labels["result"] in _TIERS else None
    return labels.get("tier", "")
