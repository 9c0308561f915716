"""Two ranks in processes of their own, of which one fails: what the other one has does not count without it."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from vllm.distributed.kv_transfer import get_kv_transfer_group

from tests.vllm.engine.leaks import free_blocks
from tests.vllm.engine.local import BLOCK, Ask, Engine, Reply, engine, pool
from tests.vllm.engine.oracle import Oracle
from tests.vllm.engine.processes import forked_ranks, in_child
from tests.vllm.models import prompt
from umbp_core.errors import TransferError
from umbp_core.tiers import Tier

BLOCKS = 5
STORES = ("gather", "gather_band")
LOADS = ("scatter", "scatter_band")


@pytest.mark.slow
@pytest.mark.statement("connector", 50)
@pytest.mark.statement("connector", 51)
@pytest.mark.statement("connector", 52)
@pytest.mark.statement("connector", 53)
@pytest.mark.bug("B7")
@pytest.mark.parametrize(("load_mode", "granularity"), [("async", "block"), ("layerwise", "layer")])
def test_one_rank_fails(llama: Path, oracle: Oracle, load_mode: str, granularity: str) -> None:
    """L1, L2: its failed stores publish nothing, its failed load is computed again, and no block is lost."""
    asks = [Ask(prompt(BLOCKS * BLOCK + 3 + number, seed=3000 + number)) for number in range(3)]
    settings = pool(load_mode=load_mode, store_granularity=granularity, dram_capacity="32MiB")
    right = [reply.tokens for reply in oracle.ask(llama, *asks)]
    seen = in_child(_serve, llama, settings, asks, timeout=280)
    for replies in (seen["unstored"], seen["cold"], seen["failing"], seen["warm"]):
        assert [reply.tokens for reply in replies] == right
    assert seen["published"] == [0, 3 * BLOCKS]
    assert [reply.cached for reply in seen["cold"]] == [0] * 3, "nothing was stored while a rank could not"
    assert seen["failed_loads"] == 1
    assert [reply.cached for reply in seen["warm"]] == [BLOCKS * BLOCK] * 3
    assert len(set(seen["free"])) == 1, "blocks of vLLM are lost"


def _serve(model: Path, settings: dict[str, Any], asks: Sequence[Ask]) -> dict[str, Any]:
    """What an engine with two ranks answers while rank 1 cannot store, can, cannot load one block, and can again."""
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
    seen: dict[str, Any] = {"published": [], "free": []}

    def rest(opened: Engine) -> None:
        opened.forget()
        seen["free"].append(free_blocks(opened))

    with forked_ranks(), engine(model, kv_transfer_config=settings, tensor_parallel_size=2) as opened:
        on_ranks: Callable[..., Any] = opened.core.model_executor.collective_rpc
        rest(opened)
        for name in ("unstored", "cold"):
            on_ranks(_break if name == "unstored" else _mend, args=(STORES, None))
            seen[name] = _one_by_one(opened, asks)
            rest(opened)
            seen["published"].append(opened.leader.pool.objects(Tier.DRAM))
        on_ranks(_break, args=(LOADS, opened.pages_of(asks[1])[2]))
        seen["failing"] = opened.ask(*asks)
        seen["failed_loads"] = opened.metric("vllm:umbp_ops", direction="load", status="failed")
        on_ranks(_mend, args=(LOADS, None))
        rest(opened)
        seen["warm"] = _one_by_one(opened, asks)
        rest(opened)
    return seen


def _one_by_one(opened: Engine, asks: Sequence[Ask]) -> list[Reply]:
    return [opened.ask_one(ask) for ask in asks]


def _break(worker: Any, names: Sequence[str], page: int | None) -> None:
    """In the process of a rank: on rank 1, copies fail that touch ``page``, or all of them."""
    if worker.rank != 1:
        return
    copier = get_kv_transfer_group()._worker.engine._tools.copier
    for name in names:
        copy = getattr(copier, name)

        def broken(*arguments: Any, copy: Callable[..., None] = copy) -> None:
            *_, pages, _ = arguments
            if page is None or page in pages:
                raise TransferError("the test broke this copy")
            copy(*arguments)

        setattr(copier, name, broken)


def _mend(worker: Any, names: Sequence[str], _: None) -> None:
    """As before :func:`_break`."""
    copier = get_kv_transfer_group()._worker.engine._tools.copier
    for name in names:
        vars(copier).pop(name, None)
