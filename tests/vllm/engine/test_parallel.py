"""Several ranks: a block counts when every rank stored its part, and comes back on every rank."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.vllm.engine.local import ENGINE_ARGUMENTS, Ask, pool
from tests.vllm.engine.oracle import Oracle
from tests.vllm.engine.processes import in_child
from tests.vllm.models import prompt

SIZES = [{"tensor_parallel_size": 2}, {"pipeline_parallel_size": 2}]


@pytest.mark.slow
@pytest.mark.parametrize("sizes", SIZES, ids=["tp2", "pp2"])
def test_two_ranks(llama: Path, oracle: Oracle, tmp_path: Path, sizes: dict[str, int]) -> None:
    asks = [Ask(prompt(300, seed=seed)) for seed in range(3)]
    right = [reply.tokens for reply in oracle.ask(llama, *asks)]
    tiers = pool(tmp_path, dram_capacity="32MiB", ssd_capacity="64MiB")
    cold, dram = in_child(_serve, llama, tiers, sizes, asks, ["cold", "dram"], timeout=280)
    (ssd,) = in_child(_serve, llama, tiers, sizes, asks, ["ssd"], timeout=280)
    assert [tokens for tokens, _ in cold] == right
    assert [tokens for tokens, _ in dram] == right
    assert [tokens for tokens, _ in ssd] == right
    assert [cached for _, cached in dram] == [288] * 3
    assert [cached for _, cached in ssd] == [288] * 3


def _serve(
    model: Path, tiers: dict[str, Any], sizes: dict[str, int], asks: Sequence[Ask], phases: Sequence[str]
) -> list[list[tuple[tuple[int, ...], int]]]:
    """The replies of every phase, from an engine core and workers in processes of their own."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "1"
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
    from vllm import LLM

    llm = LLM(str(model), **{**ENGINE_ARGUMENTS, "kv_transfer_config": tiers, **sizes})
    replies = []
    for _ in phases:
        outputs = llm.generate([ask.input() for ask in asks], asks[0].parameters(), use_tqdm=False)
        replies.append([(tuple(output.outputs[0].token_ids), output.num_cached_tokens) for output in outputs])
        while not llm.reset_prefix_cache():  # false as long as a store still reads its blocks
            pass
    llm.llm_engine.engine_core.shutdown()
    return replies
