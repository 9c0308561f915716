"""What is on SSD outlives the engine: a clean stop, the end of the process, ``kill -9`` in the middle of a store."""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from tests.vllm.engine.local import BLOCK, Ask, Engine, engine, pool
from tests.vllm.engine.oracle import Oracle
from tests.vllm.engine.processes import children, in_child
from tests.vllm.models import prompt
from umbp_core.tiers import Tier
from umbp_vllm import compat


def test_ssd_hit_after_an_engine_restart(llama: Path, oracle: Oracle, tmp_path: Path) -> None:
    asks = [Ask(prompt(300, seed=seed)) for seed in range(4)]
    right = [reply.tokens for reply in oracle.ask(llama, *asks)]
    with engine(llama, kv_transfer_config=pool(tmp_path)) as first:
        cold = first.ask(*asks)
    with engine(llama, kv_transfer_config=pool(tmp_path)) as second:
        from_ssd = [second.ask_one(ask) for ask in asks]
        second.drain()
        by_source = second.metric("vllm:prompt_tokens_cached_by_source", source="disk")
        second.forget()
        from_dram = [second.ask_one(ask) for ask in asks]  # what came from SSD stays in DRAM
        by_host = second.metric("vllm:prompt_tokens_cached_by_source", source="host")
    assert [reply.tokens for reply in cold] == right
    assert [reply.tokens for reply in from_ssd] == right
    assert [reply.tokens for reply in from_dram] == right
    assert [reply.cached for reply in from_ssd] == [288] * 4
    if compat.CacheHitSource is not None:  # before 0.32, vLLM does not ask for it
        assert by_source == by_host == 4 * 288


def test_a_smaller_capacity_keeps_what_was_stored_last(llama: Path, oracle: Oracle, tmp_path: Path) -> None:
    asks = [Ask(prompt(300, seed=40 + seed)) for seed in range(6)]
    right = [reply.tokens for reply in oracle.ask(llama, *asks)]
    with engine(llama, kv_transfer_config=pool(tmp_path)) as first:
        for ask in asks:
            first.ask_one(ask)
            first.drain()
        ends = [max(first.pages_of(ask, Tier.SSD)) for ask in asks]
    fewer = pool(tmp_path, ssd_capacity=(1 << 20) + 24 * BLOCK * 2048)
    with engine(llama, kv_transfer_config=fewer) as second:
        slots = second.slab.slots
        latest = [second.ask_one(ask) for ask in asks[-2:]]
        second.drain()
    assert 18 <= slots <= ends[-2], "the latest do not lie beyond the slots that are left"
    assert [reply.tokens for reply in latest] == right[-2:]
    assert [reply.cached for reply in latest] == [288] * 2


def test_partial_ssd_hit_followed_by_more_prompt(llama: Path, oracle: Oracle, tmp_path: Path) -> None:
    text = prompt(420, seed=20)
    turns = [Ask(text[:170]), Ask(text[:300]), Ask(text)]
    right = [reply.tokens for reply in oracle.ask(llama, *turns)]
    replies = []
    for turn in turns:
        with engine(llama, kv_transfer_config=pool(tmp_path)) as opened:
            replies.append(opened.ask_one(turn))
    assert [reply.tokens for reply in replies] == right
    assert [reply.cached for reply in replies] == [0, 160, 288]


@pytest.mark.statement("connector", 80)
def test_ssd_hit_after_the_process_has_ended(llama: Path, oracle: Oracle, tmp_path: Path) -> None:
    asks = [Ask(prompt(200, seed=seed)) for seed in (30, 31)]
    right = [reply.tokens for reply in oracle.ask(llama, *asks)]
    in_child(_serve_and_stop, llama, tmp_path, asks)
    with engine(llama, kv_transfer_config=pool(tmp_path)) as second:
        replies = [second.ask_one(ask) for ask in asks]
    assert [reply.tokens for reply in replies] == right
    assert [reply.cached for reply in replies] == [192, 192]


@pytest.mark.parametrize("survives", [False, True])
@pytest.mark.statement("connector", 80)
def test_kill_while_storing(llama: Path, oracle: Oracle, tmp_path: Path, survives: bool) -> None:
    """A restart starts and serves only what verifies; what was written well before the kill is still there."""
    ours, theirs = children().Pipe(duplex=False)
    child = children().Process(target=_serve_for_ever, args=(llama, tmp_path, theirs))
    child.start()
    theirs.close()
    assert ours.poll(200), "the engine to be killed does not answer"
    ours.recv()
    answered = 1
    kill_at = time.monotonic() + (10.0 if survives else 0.0)
    while answered < 4 or time.monotonic() < kill_at:
        assert ours.poll(120), "the engine to be killed does not answer any more"
        ours.recv()
        answered += 1
    child.kill()
    child.join(20)
    asks = [Ask(prompt(200, seed=1000 + number)) for number in [*range(4), answered - 1, answered, answered + 1]]
    right = [reply.tokens for reply in oracle.ask(llama, *asks)]
    with engine(llama, kv_transfer_config=pool(tmp_path)) as second:
        replies = [second.ask_one(ask) for ask in asks]
        second.forget()
        again = [second.ask_one(ask) for ask in asks]
    assert [reply.tokens for reply in replies] == right
    assert [reply.tokens for reply in again] == right
    assert [reply.cached for reply in again] == [192] * len(asks)
    if survives:
        assert replies[0].cached == 192


def _serve_and_stop(model: Path, ssd_dir: Path, asks: Sequence[Ask]) -> None:
    with engine(model, kv_transfer_config=pool(ssd_dir)) as opened:
        opened.ask(*asks)


def _serve_for_ever(model: Path, ssd_dir: Path, pipe: Connection) -> None:
    opened = Engine(model, kv_transfer_config=pool(ssd_dir))
    first = opened.ask_one(Ask(prompt(200, seed=1000)))
    opened.drain()
    pipe.send(first.tokens)
    for seed in itertools.count(1001):
        pipe.send(opened.ask_one(Ask(prompt(200, seed=seed))).tokens)
