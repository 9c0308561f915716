"""What vLLM can do beside plain requests: the pool serves it, or stays out of its way, and the tokens are right."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.vllm import models
from tests.vllm.engine.local import BLOCK, Ask, Engine, Reply, engine, pool
from tests.vllm.engine.oracle import Oracle
from tests.vllm.engine.processes import in_child
from tests.vllm.models import prompt

NGRAM = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3, "prompt_lookup_min": 1}


@pytest.mark.statement("connector", 12)
@pytest.mark.bug("B12")
def test_lora_adapters_are_kept_apart(llama: Path, oracle: Oracle, tmp_path: Path) -> None:
    adapter = str(models.tiny_lora(tmp_path / "adapter"))
    text = prompt(200, seed=1)
    plain, adapted = Ask(text), Ask(text, adapter=adapter)
    arguments: dict[str, Any] = {"enable_lora": True, "max_lora_rank": 8}
    right = [reply.tokens for reply in oracle.ask(llama, plain, adapted, **arguments)]
    assert right[0] != right[1]
    with engine(llama, kv_transfer_config=pool(), **arguments) as opened:
        cold = opened.ask_one(adapted)
        opened.forget()
        other = opened.ask_one(plain)
        opened.forget()
        hits = [opened.ask_one(plain), opened.ask_one(adapted)]
    assert (cold.tokens, other.tokens) == (right[1], right[0])
    assert [hit.tokens for hit in hits] == right
    assert other.cached == 0
    assert [hit.cached for hit in hits] == [192, 192]


def test_speculative_decoding(llama: Path, oracle: Oracle) -> None:
    motif = prompt(16, seed=2)
    asks = [Ask(motif * 12 + prompt(seed, seed=seed), max_tokens=2 * BLOCK) for seed in (3, 9)]
    cold, hits = in_child(_speculate, llama, asks)
    longer = [Ask([*ask.prompt, *reply.tokens]) for ask, reply in zip(asks, cold, strict=True)]
    assert [reply.tokens for reply in cold] == [reply.tokens for reply in oracle.ask(llama, *asks)]
    assert [reply.tokens for reply in hits] == [reply.tokens for reply in oracle.ask(llama, *longer)]
    assert [hit.cached for hit in hits] == [(len(ask.prompt) - 1) // BLOCK * BLOCK for ask in longer]


def _speculate(model: Path, asks: Sequence[Ask]) -> tuple[list[Reply], list[Reply]]:
    """In a process of its own: n-gram drafts bring in numba, after which vLLM 0.32 starts no second CPU engine."""
    with engine(model, kv_transfer_config=pool(), speculative_config=NGRAM) as opened:
        cold = opened.ask(*asks)
        opened.forget()
        hits = opened.ask(*[Ask([*ask.prompt, *reply.tokens]) for ask, reply in zip(asks, cold, strict=True)])
    return cold, hits


def test_without_vllms_own_prefix_cache(llama: Path, oracle: Oracle) -> None:
    ask = Ask(prompt(200, seed=4))
    (right,) = oracle.ask(llama, ask)
    with engine(llama, kv_transfer_config=pool(), enable_prefix_caching=False) as opened:
        cold = opened.ask_one(ask)
        opened.drain()
        hits = opened.ask(ask, ask)
    assert cold.tokens == right.tokens
    assert [hit.tokens for hit in hits] == [right.tokens] * 2
    assert [hit.cached for hit in hits] == [192, 192]


def test_as_a_child_of_multi_connector(llama: Path, oracle: Oracle, tmp_path: Path) -> None:
    ask = Ask(prompt(200, seed=5))
    (right,) = oracle.ask(llama, ask)
    example = {
        "kv_connector": "ExampleConnector",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {"shared_storage_path": str(tmp_path)},
    }
    both = {
        "kv_connector": "MultiConnector",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {"connectors": [pool(), example]},
    }
    with engine(llama, kv_transfer_config=both) as opened:
        cold = opened.ask_one(ask)
        opened.drain()
        assert opened.llm.reset_prefix_cache()
        hit = opened.ask_one(ask)
        moved = opened.metric("vllm:umbp_hit_tokens", tier="dram")
    assert cold.tokens == hit.tokens == right.tokens
    assert hit.cached == 192
    assert moved == 192


@pytest.mark.parametrize(
    "arguments",
    [
        {"kv_connector": "umbp"},
        {"kv_offloading_backend": "umbp", "kv_offloading_size": 0.0625},
        {"kv_transfer_config": {"kv_connector": "umbp", "kv_role": "kv_both"}},
    ],
    ids=["kv_connector", "kv_offloading_backend", "kv_transfer_config"],
)
def test_every_way_to_switch_it_on(llama: Path, monkeypatch: pytest.MonkeyPatch, arguments: dict[str, Any]) -> None:
    monkeypatch.setenv("UMBP_DRAM_CAPACITY", "64MiB")
    monkeypatch.setenv("UMBP_DRAM_PREFAULT", "false")
    ask = Ask(prompt(100, seed=6))
    with engine(llama, **arguments) as opened:
        cold = opened.ask_one(ask)
        opened.forget()
        hit = opened.ask_one(ask)
        pages = opened.arena.pages
    assert hit.tokens == cold.tokens
    assert hit.cached == 96
    assert pages == 1024


class TestAbort:
    """A request that is aborted leaves nothing behind, whatever it was waiting for."""

    @pytest.fixture(scope="class")
    def shared(self, llama: Path) -> Any:
        with engine(llama, kv_transfer_config=pool(), max_num_batched_tokens=128) as opened:
            yield opened

    @pytest.mark.parametrize("steps", range(7))
    def test_abort_after_every_step_of_a_load_and_a_prefill(
        self, shared: Engine, oracle: Oracle, llama: Path, steps: int
    ) -> None:
        text = prompt(450, seed=20 + steps)
        known, whole = Ask(text[:250]), Ask(text, max_tokens=4)
        shared.ask_one(known)
        shared.forget()
        doomed = shared.add(whole)
        for _ in range(steps):
            shared.step()
        shared.abort(doomed)
        shared.run()
        shared.drain()
        assert shared.leader.live_requests == 0
        assert len(shared.leader.held) == 0
        again = shared.ask_one(whole)
        shared.forget()
        hit = shared.ask_one(whole)
        (right,) = oracle.ask(llama, whole)
        assert again.tokens == hit.tokens == right.tokens
        assert hit.cached == 448

    def test_abort_of_one_of_several_that_share_a_load(self, shared: Engine, oracle: Oracle, llama: Path) -> None:
        asks = [Ask(prompt(200, seed=40) + prompt(30, seed=41 + number)) for number in range(3)]
        shared.ask_one(Ask(asks[0].prompt[:200]))
        shared.forget()
        ids = [shared.add(ask) for ask in asks]
        shared.step()
        shared.abort(ids[0])
        replies = shared.run()
        shared.drain()
        right = [reply.tokens for reply in oracle.ask(llama, *asks)]
        assert [replies[request].tokens for request in ids[1:]] == right[1:]
        assert shared.leader.live_requests == 0
