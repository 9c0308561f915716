"""Several ranks: a block counts when every rank stored its part, and comes back on every rank."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.vllm import models
from tests.vllm.engine.local import ENGINE_ARGUMENTS, REFERENCE_MLA, Ask, pool
from tests.vllm.engine.oracle import Oracle
from tests.vllm.engine.processes import forked_ranks, in_child
from tests.vllm.engine.ranks import RankView
from tests.vllm.models import prompt

TP = {"tensor_parallel_size": 2}

PP = {"pipeline_parallel_size": 2, "enforce_eager": False, "compilation_config": {"mode": 1, "backend": "eager"}}
"""vLLM 0.32 dies on the CPU with two stages that have not warmed up, which they do for a compiled model only."""


@pytest.mark.slow
def test_two_tensor_parallel_ranks(llama: Path, oracle: Oracle, tmp_path: Path) -> None:
    asks = [Ask(prompt(300, seed=seed)) for seed in range(3)]
    right = [reply.tokens for reply in oracle.ask(llama, *asks)]
    tiers = pool(tmp_path, dram_capacity="32MiB", ssd_capacity="64MiB")
    (cold, dram), ranks = in_child(serve_and_look, llama, tiers, TP, asks, 2, timeout=280)
    (ssd,) = in_child(serve_ranks, llama, tiers, TP, asks, 1, timeout=280)
    for phase in (cold, dram, ssd):
        assert [tokens for tokens, _ in phase] == right
    assert [cached for _, cached in dram] == [288] * 3
    assert [cached for _, cached in ssd] == [288] * 3
    assert_stored_what_they_computed(ranks, 27)


@pytest.mark.slow
def test_two_pipeline_stages(llama: Path, oracle: Oracle, tmp_path: Path) -> None:
    asks = [Ask(prompt(300, seed=seed)) for seed in range(3)]
    right = [reply.tokens for reply in oracle.ask(llama, *asks)]
    tiers = pool(tmp_path, dram_capacity="32MiB", ssd_capacity="64MiB")
    (cold, dram), ranks = in_child(serve_and_look, llama, tiers, PP, asks, 2, timeout=280)
    (ssd,) = in_child(serve_ranks, llama, tiers, PP, asks, 1, timeout=280)
    for phase in (cold, dram, ssd):
        assert [tokens for tokens, _ in phase] == right
    assert [cached for _, cached in dram] == [288] * 3
    assert [cached for _, cached in ssd] == [288] * 3
    assert_stored_what_they_computed(ranks, 27)


@pytest.mark.slow
@pytest.mark.statement("connector", 84)
def test_latent_kv_is_kept_once_for_all_ranks(make_model: Callable[..., Path], tmp_path: Path) -> None:
    """All ranks of a tensor-parallel MLA model have the same KV: one of them stores it, the others map that memory."""
    model = make_model(models.tiny_mla)
    asks = [Ask(prompt(301, seed=seed)) for seed in range(3)]
    tiers = pool(tmp_path, dram_capacity="32MiB", ssd_capacity="64MiB")
    arguments = {**TP, **REFERENCE_MLA}
    (_, dram), ranks = in_child(serve_and_look, model, tiers, arguments, asks, 2, timeout=280)
    (ssd,) = in_child(serve_ranks, model, tiers, arguments, asks, 1, timeout=280)
    assert [cached for _, cached in dram] == [288] * 3
    assert [cached for _, cached in ssd] == [288] * 3
    assert [(rank["stored"], rank["different"], rank["foreign"]) for rank in ranks] == [(57, 57, 0)] * 2, (
        "with the blocks that the answers filled"
    )
    assert len({rank["memory"] for rank in ranks}) == 1, "the ranks look at one memory"
    (slab,) = tmp_path.rglob("slab*")
    assert slab.stat().st_size <= 64 << 20


def assert_stored_what_they_computed(ranks: Sequence[dict[str, Any]], blocks: int) -> None:
    """Bit by bit, and each rank a part of its own."""
    assert [(rank["stored"], rank["different"], rank["foreign"]) for rank in ranks] == [(blocks, blocks, 0)] * 2
    assert len({rank["content"] for rank in ranks}) == len({rank["memory"] for rank in ranks}) == 2


def serve_ranks(
    model: Path, tiers: dict[str, Any], sizes: dict[str, Any], asks: Sequence[Ask], phases: int
) -> list[list[tuple[tuple[int, ...], int]]]:
    """The replies of every phase, from an engine core and workers in processes of their own."""
    return _serve(model, tiers, sizes, asks, phases, lambda llm: None)


def serve_and_look(
    model: Path, tiers: dict[str, Any], sizes: dict[str, Any], asks: Sequence[Ask], phases: int
) -> tuple[list[list[tuple[tuple[int, ...], int]]], list[dict[str, Any]]]:
    """The same, and how each rank's arena compares with its KV cache after the first phase."""
    seen: list[list[dict[str, Any]]] = []
    replies = _serve(model, tiers, sizes, asks, phases, lambda llm: seen.append(llm.collective_rpc("compare_stored")))
    return replies, seen[0]


def _serve(
    model: Path,
    tiers: dict[str, Any],
    sizes: dict[str, Any],
    asks: Sequence[Ask],
    phases: int,
    when_stored: Callable[[Any], None],
) -> list[list[tuple[tuple[int, ...], int]]]:
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "1"
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
    from vllm import LLM

    ours = {"kv_transfer_config": tiers, "worker_extension_cls": f"{RankView.__module__}.{RankView.__qualname__}"}
    with forked_ranks(compiling=sizes == PP):
        llm = LLM(str(model), **{**ENGINE_ARGUMENTS, **ours, **sizes})
    replies = []
    for _ in range(phases):
        outputs = llm.generate([ask.input() for ask in asks], asks[0].parameters(), use_tqdm=False)
        replies.append([(tuple(output.outputs[0].token_ids), output.num_cached_tokens) for output in outputs])
        while not llm.reset_prefix_cache():  # false as long as a store still reads its blocks
            pass
        when_stored(llm)
    llm.llm_engine.engine_core.shutdown()
    return replies
