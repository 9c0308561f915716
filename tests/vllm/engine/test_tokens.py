"""Greedy tokens with the pool are the tokens without it, wherever the KV of the prompt comes from."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.vllm.contract.releases import installed_release
from tests.vllm.engine.local import BLOCK, Ask, Engine, engine, pool
from tests.vllm.engine.oracle import Oracle
from tests.vllm.models import prompt


@pytest.fixture(scope="module")
def shared(llama: Path) -> Iterator[Engine]:
    """One engine for all tests of this module; each uses prompts of its own."""
    with engine(llama, kv_transfer_config=pool(dram_capacity="32MiB")) as opened:
        yield opened


def test_cold_engine_hit_and_dram_hit(shared: Engine, oracle: Oracle, llama: Path) -> None:
    asks = [Ask(prompt(300, seed=seed)) for seed in range(100, 104)]
    right = oracle.ask(llama, *asks)
    cold = [shared.ask_one(ask) for ask in asks]
    local = [shared.ask_one(ask) for ask in asks]
    shared.forget()
    before = shared.external_tokens()
    from_dram = [shared.ask_one(ask) for ask in asks]
    assert [reply.tokens for reply in cold] == [reply.tokens for reply in right]
    assert [reply.tokens for reply in local] == [reply.tokens for reply in right]
    assert [reply.tokens for reply in from_dram] == [reply.tokens for reply in right]
    assert [reply.cached for reply in from_dram] == [288] * 4
    assert shared.external_tokens() - before == 4 * 288


@pytest.mark.parametrize("length", [BLOCK - 1, BLOCK, BLOCK + 1, 5 * BLOCK - 1, 5 * BLOCK, 5 * BLOCK + 1])
def test_prompts_around_block_boundaries(shared: Engine, oracle: Oracle, llama: Path, length: int) -> None:
    ask = Ask(prompt(length, seed=200 + length))
    (right,) = oracle.ask(llama, ask)
    cold = shared.ask_one(ask)
    shared.forget()
    hit = shared.ask_one(ask)
    assert cold.tokens == right.tokens
    assert hit.tokens == right.tokens
    assert hit.cached == length // BLOCK * BLOCK


@pytest.mark.parametrize("local_blocks", [0, 1, 3, 5])
@pytest.mark.parametrize("pool_blocks", [1, 4])
@pytest.mark.statement("connector", 17)
@pytest.mark.bug("B3")
def test_partial_hit_followed_by_more_prompt(
    shared: Engine, oracle: Oracle, llama: Path, local_blocks: int, pool_blocks: int
) -> None:
    """The blocks computed behind a partial hit are stored at their own position: a third turn still agrees."""
    seed = 300 + 10 * local_blocks + pool_blocks
    text = prompt(14 * BLOCK + 7, seed=seed)
    known = (local_blocks + pool_blocks) * BLOCK
    turns = [Ask(text[:known]), Ask(text[: local_blocks * BLOCK + 1]), Ask(text[: 11 * BLOCK + 3]), Ask(text)]
    right = oracle.ask(llama, *turns)
    first = shared.ask_one(turns[0])
    shared.forget()
    second = shared.ask_one(turns[1])  # what vLLM itself holds before the partial hit
    third = shared.ask_one(turns[2])
    shared.forget()
    last = shared.ask_one(turns[3])
    again = shared.ask_one(turns[2])
    assert [reply.tokens for reply in (first, second, third, last)] == [reply.tokens for reply in right]
    assert again.tokens == right[2].tokens
    assert third.cached == known
    assert last.cached == 11 * BLOCK


@pytest.mark.statement("connector", 23)
def test_blocks_that_fill_up_while_decoding_come_back(shared: Engine, oracle: Oracle, llama: Path) -> None:
    ask = Ask(prompt(2 * BLOCK + 5, seed=400), max_tokens=3 * BLOCK)
    (right,) = oracle.ask(llama, ask)
    answer = shared.ask_one(ask)
    shared.forget()
    longer = Ask([*ask.prompt, *answer.tokens])
    hit = shared.ask_one(longer)
    assert answer.tokens == right.tokens
    assert hit.tokens == oracle.ask(llama, longer)[0].tokens
    assert hit.cached == (len(longer.prompt) - 1) // BLOCK * BLOCK


def test_requests_that_run_together_and_share_a_prefix(shared: Engine, oracle: Oracle, llama: Path) -> None:
    prefix = prompt(6 * BLOCK, seed=500)
    asks = [Ask(prefix + prompt(20 + seed, seed=510 + seed)) for seed in range(6)]
    right = [reply.tokens for reply in oracle.ask(llama, *asks)]
    assert [reply.tokens for reply in shared.ask(*asks)] == right
    shared.forget()
    before = shared.metric("vllm:umbp_bytes", direction="load")
    again = shared.ask(*asks)
    shared.drain()
    loaded = shared.metric("vllm:umbp_bytes", direction="load") - before
    assert [reply.tokens for reply in again] == right
    assert [reply.cached for reply in again] == [6 * BLOCK] * 6
    assert loaded == 6 * BLOCK * 2048, "the six requests did not share one load"


def test_parallel_samples(shared: Engine, oracle: Oracle, llama: Path) -> None:
    ask = Ask(prompt(150, seed=600), n=3, sampling={"temperature": 1.0, "seed": 7})
    (right,) = oracle.ask(llama, ask)
    cold = shared.ask_one(ask)
    shared.forget()
    hit = shared.ask_one(ask)
    if installed_release() >= (0, 32):  # 0.28 and 0.31 gave all samples of a request the same seed
        assert len(set(right.samples)) == 3
    assert cold.samples == right.samples
    assert hit.samples == right.samples
    assert hit.cached == 150 // BLOCK * BLOCK


def test_a_cache_salt_separates(shared: Engine, oracle: Oracle, llama: Path) -> None:
    text = prompt(200, seed=700)
    mine, yours = Ask(text, cache_salt="mine"), Ask(text, cache_salt="yours")
    (right,) = oracle.ask(llama, mine)
    shared.ask_one(mine)
    shared.forget()
    stranger = shared.ask_one(yours)
    shared.forget()
    owner = shared.ask_one(mine)
    assert stranger.cached == 0
    assert owner.cached == 192
    assert stranger.tokens == owner.tokens == right.tokens


def test_resetting_vllms_cache_keeps_the_pool_and_resetting_both_does_not(shared: Engine) -> None:
    ask = Ask(prompt(200, seed=800))
    shared.ask_one(ask)
    shared.forget()
    kept = shared.ask_one(ask)
    shared.drain()
    assert shared.llm.reset_prefix_cache(reset_connector=True)
    shared.drain()
    dropped = shared.ask_one(ask)
    shared.forget()
    stored_again = shared.ask_one(ask)
    assert (kept.cached, dropped.cached, stored_again.cached) == (192, 0, 192)
    assert kept.tokens == dropped.tokens == stored_again.tokens
