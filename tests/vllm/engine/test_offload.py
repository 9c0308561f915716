"""Offload policies in a real vLLM: what a request's priority and a second use let pass, and what is counted."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.vllm.engine.local import BLOCK, Ask, engine, pool
from tests.vllm.engine.oracle import Oracle
from tests.vllm.models import prompt
from umbp_core.tiers import Tier
from umbp_vllm.priorities import PARAMETER

TEXT = prompt(5 * BLOCK + 3, seed=61)
CHEAP = prompt(4 * BLOCK + 3, seed=62)
REFUSED = "vllm:umbp_refused_blocks"


@pytest.mark.statement("connector", 21)
@pytest.mark.statement("connector", 73)
def test_the_second_use_brings_a_prompt_to_ssd_and_a_low_priority_keeps_one_out_of_dram(
    llama: Path, oracle: Oracle, tmp_path: Path
) -> None:
    """The priority comes in the request's ``kv_transfer_params``, as it does from the OpenAI API."""
    head, tail = {"token_start": 0, "token_end": 2 * BLOCK, "priority": 80}, {"token_start": 2 * BLOCK, "priority": 10}
    cheap = Ask(CHEAP, max_tokens=1, sampling={"extra_args": {"kv_transfer_params": {PARAMETER: [head, tail]}}})
    ask = Ask(TEXT, max_tokens=4)
    (right,) = oracle.ask(llama, ask)
    policies = {"dram_offload_policy": "presence,priority", "ssd_offload_policy": "presence,frequency"}
    transfer = pool(tmp_path, offload_min_priority=30, **policies)
    with engine(llama, kv_transfer_config=transfer) as opened:
        opened.ask_one(cheap)
        first = opened.ask_one(ask)
        opened.forget()
        assert len(opened.pages_of(ask)) == 5
        assert opened.pages_of(ask, Tier.SSD) == []
        assert len(opened.pages_of(cheap)) == 2
        assert opened.metric(REFUSED, tier="ssd", policy="frequency") == 7
        assert opened.metric(REFUSED, tier="dram", policy="priority") == 2

        second = opened.ask_one(ask)
        opened.drain()
        assert opened.external_tokens() == 5 * BLOCK
        assert len(opened.pages_of(ask, Tier.SSD)) == 5
        assert opened.pages_of(cheap, Tier.SSD) == []
    with engine(llama, kv_transfer_config=transfer) as restarted:
        third = restarted.ask_one(ask)
        assert restarted.external_tokens() == 5 * BLOCK
    assert {first.tokens, second.tokens, third.tokens} == {right.tokens}
