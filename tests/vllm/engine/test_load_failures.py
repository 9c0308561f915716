"""A load that fails, does not verify or does not end is computed again, and the tokens are right (law L1)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.vllm.engine.faults import break_scatter, stored
from tests.vllm.engine.local import BLOCK, Engine, engine, pool
from tests.vllm.engine.oracle import Oracle

BLOCKS = 6


@pytest.fixture(scope="module")
def shared(llama: Path) -> Iterator[Engine]:
    """One engine for all tests of this module; each uses prompts of its own."""
    with engine(llama, kv_transfer_config=pool()) as opened:
        yield opened


@pytest.mark.statement("connector", 52)
@pytest.mark.statement("connector", 54)
@pytest.mark.parametrize("index", range(BLOCKS))
def test_a_block_whose_bytes_changed_in_dram(shared: Engine, oracle: Oracle, llama: Path, index: int) -> None:
    ask = stored(shared, BLOCKS, seed=100 + index)
    page = shared.pages_of(ask)[index]
    shared.arena.page(page)[1234] ^= 0x10
    wrong_before = shared.metric("vllm:umbp_failed_blocks", direction="load")
    reply = shared.ask_one(ask)
    shared.forget()
    again = shared.ask_one(ask)
    (right,) = oracle.ask(llama, ask)
    assert reply.tokens == again.tokens == right.tokens
    assert shared.metric("vllm:umbp_failed_blocks", direction="load") == wrong_before + 1
    assert again.cached == BLOCKS * BLOCK, "the bad block was not replaced by the recomputed one"


@pytest.mark.statement("connector", 51)
@pytest.mark.statement("connector", 52)
@pytest.mark.parametrize("index", range(BLOCKS))
def test_a_copy_that_fails_at_every_block(
    shared: Engine, oracle: Oracle, llama: Path, monkeypatch: pytest.MonkeyPatch, index: int
) -> None:
    ask = stored(shared, BLOCKS, seed=200 + index)
    bad = shared.pages_of(ask)[index]
    break_scatter(monkeypatch, shared, bad)
    reply = shared.ask_one(ask)
    monkeypatch.undo()
    shared.forget()
    again = shared.ask_one(ask)
    (right,) = oracle.ask(llama, ask)
    assert reply.tokens == again.tokens == right.tokens
    assert again.cached == BLOCKS * BLOCK


def test_several_requests_of_which_one_load_fails(
    shared: Engine, oracle: Oracle, llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asks = [stored(shared, BLOCKS, seed=300 + number) for number in range(4)]
    break_scatter(monkeypatch, shared, shared.pages_of(asks[2])[0])
    replies = shared.ask(*asks)
    assert [reply.tokens for reply in replies] == [reply.tokens for reply in oracle.ask(llama, *asks)]
