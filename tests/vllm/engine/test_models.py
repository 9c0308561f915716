"""Models whose KV is not one tensor per layer with one group: sliding windows, latent attention, recurrent state."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.vllm import models
from tests.vllm.engine.local import REFERENCE_MLA, Ask, Engine, Reply, engine, pool
from tests.vllm.engine.oracle import Oracle
from tests.vllm.models import prompt
from umbp_core.errors import ConfigError

MakeModel = Callable[..., Path]


def phases(model: Path, asks: list[Ask], ssd_dir: Path, **arguments: Any) -> dict[str, list[Reply]]:
    """Cold, from DRAM, and from SSD after a restart."""
    tiers = {"kv_transfer_config": pool(ssd_dir)}
    with engine(model, **tiers, **arguments) as first:
        cold = [first.ask_one(ask) for ask in asks]
        first.forget()
        dram = [first.ask_one(ask) for ask in asks]
        _nothing_left(first)
    with engine(model, **tiers, **arguments) as second:
        ssd = [second.ask_one(ask) for ask in asks]
        _nothing_left(second)
    return {"cold": cold, "dram": dram, "ssd": ssd}


def _nothing_left(opened: Engine) -> None:
    opened.drain()
    assert opened.leader.live_requests == 0
    assert len(opened.leader.held) == 0


@pytest.mark.parametrize(("window", "length"), [(128, 90), (128, 300), (128, 449), (129, 256), (97, 320)])
@pytest.mark.statement("connector", 84)
def test_sliding_window(make_model: MakeModel, oracle: Oracle, tmp_path: Path, window: int, length: int) -> None:
    """Three KV groups; of the windowed ones only the blocks that the window still reaches are needed.

    A prompt that ends on a block boundary has its last token computed again, and the window of that token reaches one
    token further back than the window of the next.
    """
    model = make_model(models.tiny_sliding_window, window=window)
    asks = [Ask(prompt(length, seed=seed), max_tokens=40) for seed in (length, length + 1)]
    right = [reply.tokens for reply in oracle.ask(model, *asks)]
    replies = phases(model, asks, tmp_path)
    for name, got in replies.items():
        assert [reply.tokens for reply in got] == right, name
    assert [reply.cached for reply in replies["dram"]] == [(length - 1) // 32 * 32] * 2
    assert [reply.cached for reply in replies["ssd"]] == [(length - 1) // 32 * 32] * 2


def test_sliding_window_partial_hit(make_model: MakeModel, oracle: Oracle) -> None:
    model = make_model(models.tiny_sliding_window)
    text = prompt(440, seed=7)
    turns = [Ask(text[:200]), Ask(text[:340]), Ask(text)]
    right = [reply.tokens for reply in oracle.ask(model, *turns)]
    with engine(model, kv_transfer_config=pool()) as opened:
        replies = []
        for turn in turns:
            replies.append(opened.ask_one(turn))
            opened.forget()
    assert [reply.tokens for reply in replies] == right
    assert [reply.cached for reply in replies] == [0, 192, 320]


def test_sliding_window_with_a_bad_block_in_any_group(make_model: MakeModel, oracle: Oracle) -> None:
    """With several groups a failed load is named by request, not by block; the request is computed again."""
    model = make_model(models.tiny_sliding_window)
    asks = [Ask(prompt(200, seed=20 + group), max_tokens=20) for group in range(3)]
    right = [reply.tokens for reply in oracle.ask(model, *asks)]
    with engine(model, kv_transfer_config=pool()) as opened:
        for ask in asks:
            opened.ask_one(ask)
        opened.forget()
        for group, ask in enumerate(asks):
            opened.arena.page(opened.pages_of(ask, group=group)[5])[99] ^= 1
        replies = opened.ask(*asks)
        failed = opened.metric("vllm:umbp_failed_blocks", direction="load", reason="verify")
        opened.forget()
        again = [opened.ask_one(ask) for ask in asks]
        _nothing_left(opened)
    assert [reply.tokens for reply in replies] == right
    assert [reply.tokens for reply in again] == right
    assert failed == 3
    assert [reply.cached for reply in again] == [192] * 3


@pytest.mark.statement("connector", 84)
def test_latent_attention(make_model: MakeModel, tmp_path: Path) -> None:
    """DeepSeek's MLA: the loaded latents are, bit by bit, the computed ones, from DRAM and from SSD.

    Tokens prove nothing here: vLLM's reference MLA for the CPU gives other tokens for a prompt whose last token goes
    through its decode kernel than for the same prompt in one prefill, with any connector or none.
    """
    model = make_model(models.tiny_mla)
    ask = Ask(prompt(301, seed=301))
    with engine(model, **REFERENCE_MLA) as plain:
        computed = _layers(plain, plain.add(ask))
        plain.run()
    for source in ("host", "disk"):
        with engine(model, **REFERENCE_MLA, kv_transfer_config=pool(tmp_path)) as opened:
            if source == "host":
                opened.ask_one(ask)
                opened.drain()
            loaded = _layers(opened, opened.add(ask))
            opened.run()
            _nothing_left(opened)
            assert opened.metric("vllm:prompt_tokens_cached_by_source", source=source) == 288
        for name, values in computed.items():
            torch.testing.assert_close(loaded[name], values, rtol=0, atol=0)


def _layers(opened: Engine, request: str) -> dict[str, torch.Tensor]:
    """The first 288 tokens' KV of every layer, as soon as the request has been scheduled."""
    blocks: list[int] = []
    while not blocks:
        opened.step()
        blocks = opened.blocks_of(request)
    return {name: cache[blocks[:18]].clone() for name, cache in opened.kv_caches().items()}


def test_recurrent_state_is_refused_in_one_sentence(make_model: MakeModel) -> None:
    """Qwen3-Next keeps a state per sequence, not KV per block."""
    model = make_model(models.tiny_linear_attention)
    with (
        pytest.raises(ConfigError, match=r"MambaSpec.* Start this model without --kv-connector umbp"),
        engine(model, dtype="bfloat16", kv_transfer_config=pool()),
    ):
        pass
