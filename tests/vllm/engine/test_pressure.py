"""Tiers and HBM that are smaller than what is asked for: fewer hits, the same tokens, exact bounds."""

from __future__ import annotations

from pathlib import Path

from tests.vllm.engine.local import BLOCK, Ask, engine, pool
from tests.vllm.engine.oracle import Oracle
from tests.vllm.models import prompt
from umbp_core.tiers import Tier

BLOCK_BYTES = 64 << 10
"""One block of the tiny Llama: 32 tokens of 2 KiB."""


def test_working_set_larger_than_dram(llama: Path, oracle: Oracle) -> None:
    asks = [Ask(prompt(300, seed=seed)) for seed in range(8)]
    right = [reply.tokens for reply in oracle.ask(llama, *asks)]
    with engine(llama, kv_transfer_config=pool(dram_capacity=20 * BLOCK_BYTES)) as small:
        for _ in range(3):
            replies = [small.ask_one(ask) for ask in asks]
            small.forget()
            assert [reply.tokens for reply in replies] == right
            assert small.leader.pool.objects(Tier.DRAM) <= 20
        newest = small.ask_one(asks[-1])
    assert newest.tokens == right[-1]
    assert newest.cached == 288


def test_working_set_larger_than_dram_and_ssd(llama: Path, oracle: Oracle, tmp_path: Path) -> None:
    asks = [Ask(prompt(300, seed=10 + seed)) for seed in range(8)]
    right = [reply.tokens for reply in oracle.ask(llama, *asks)]
    ssd_bytes = 60 * BLOCK_BYTES
    tiers = pool(tmp_path, dram_capacity=15 * BLOCK_BYTES, ssd_capacity=ssd_bytes)
    for _ in range(2):
        with engine(llama, kv_transfer_config=tiers) as small:
            for _ in range(2):
                replies = [small.ask_one(ask) for ask in asks]
                small.forget()
                assert [reply.tokens for reply in replies] == right
            newest = small.ask_one(asks[-1])
            assert (newest.tokens, newest.cached) == (right[-1], 288)
        assert sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file()) <= ssd_bytes


def test_what_dram_lost_comes_from_ssd(llama: Path, oracle: Oracle, tmp_path: Path) -> None:
    asks = [Ask(prompt(300, seed=30 + seed)) for seed in range(6)]
    right = [reply.tokens for reply in oracle.ask(llama, *asks)]
    with engine(llama, kv_transfer_config=pool(tmp_path, dram_capacity=15 * BLOCK_BYTES)) as small:
        for ask in asks:
            small.ask_one(ask)
            small.forget()
        replies = [small.ask_one(ask) for ask in asks]
        from_disk = small.metric("vllm:prompt_tokens_cached_by_source", source="disk")
    assert [reply.tokens for reply in replies] == right
    assert [reply.cached for reply in replies] == [288] * 6
    assert from_disk >= 4 * 288


def test_preemption(llama: Path, oracle: Oracle) -> None:
    """HBM for about two requests: the others are preempted and resumed, from the pool where it has their blocks."""
    asks = [Ask(prompt(150 + 10 * seed, seed=50 + seed), max_tokens=3 * BLOCK) for seed in range(5)]
    right = [reply.tokens for reply in oracle.ask(llama, *asks)]
    with engine(llama, kv_transfer_config=pool(), num_gpu_blocks_override=22, max_model_len=512) as small:
        cold = small.ask(*asks)
        preemptions = small.metric("vllm:num_preemptions")
        small.forget()
        again = small.ask(*asks)
        small.drain()
        assert len(small.leader.held) == 0
        assert small.leader.live_requests == 0
    assert preemptions > 0
    assert [reply.tokens for reply in cold] == right
    assert [reply.tokens for reply in again] == right


def test_chunked_prefill(llama: Path, oracle: Oracle) -> None:
    asks = [Ask(prompt(length, seed=70 + length)) for length in (500, 333, 96, 97)]
    right = [reply.tokens for reply in oracle.ask(llama, *asks)]
    with engine(llama, kv_transfer_config=pool(), max_num_batched_tokens=48, enable_chunked_prefill=True) as chunked:
        cold = chunked.ask(*asks)
        chunked.forget()
        hit = chunked.ask(*asks)
    assert [reply.tokens for reply in cold] == right
    assert [reply.tokens for reply in hit] == right
    assert [reply.cached for reply in hit] == [480, 320, 96, 96]


def test_objects_stay_within_the_tiers(llama: Path, tmp_path: Path) -> None:
    """The directory counts no more objects than the configured bytes can hold, in either tier."""
    with engine(llama, kv_transfer_config=pool(tmp_path, dram_capacity=7 * BLOCK_BYTES)) as small:
        small.ask(*[Ask(prompt(400, seed=90 + seed)) for seed in range(3)])
        small.forget()
        stats = small.leader.pool.directory.stats(Tier.DRAM)
    assert (stats.total_pages, stats.pinned, stats.reserved) == (7, 0, 0)
    assert stats.objects <= 7
