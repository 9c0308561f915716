"""Speculative decoding with drafts that have a KV of their own: it is kept, and comes back, with the target's."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.vllm import models
from tests.vllm.engine.local import BLOCK, Ask, Engine, Reply, engine, pool
from tests.vllm.engine.oracle import Oracle
from tests.vllm.models import prompt

DRAFT_TOKENS = 2


def speculative(method: str, model: Path) -> dict[str, object]:
    """A ``speculative_config``."""
    return {"method": method, "model": str(model), "num_speculative_tokens": DRAFT_TOKENS}


def with_kv(opened: Engine, ask: Ask) -> tuple[Reply, dict[str, torch.Tensor]]:
    """The reply, and what every layer holds of the prompt's full blocks once the request runs."""
    request = opened.add(ask)
    blocks: list[int] = []
    while not blocks:
        opened.step()
        blocks = opened.blocks_of(request)
    full = blocks[: len(ask.prompt) // BLOCK]
    kv = {name: cache[full].clone() for name, cache in opened.kv_caches().items()}
    return opened.run()[request], kv


def accepted(opened: Engine) -> tuple[float, float]:
    """Draft tokens so far, and how many of them the target took."""
    names = ("vllm:spec_decode_num_draft_tokens", "vllm:spec_decode_num_accepted_tokens")
    drafted, taken = (opened.metric(name) for name in names)
    return drafted, taken


@pytest.mark.slow
def test_a_draft_model_finds_its_own_kv_again(llama: Path, oracle: Oracle) -> None:
    """The draft is the target itself: every draft is right, unless its KV after a hit is not."""
    ask = Ask(prompt(300, seed=3), max_tokens=BLOCK)
    longer = Ask([*ask.prompt, *oracle.ask(llama, ask)[0].tokens, *prompt(5, seed=4)], max_tokens=BLOCK)
    right = [reply.tokens for reply in oracle.ask(llama, ask, longer)]
    with engine(llama, kv_transfer_config=pool(), speculative_config=speculative("draft_model", llama)) as opened:
        cold = opened.ask_one(ask)
        after_cold = accepted(opened)
        opened.forget()
        hits = [opened.ask_one(ask), opened.ask_one(longer)]
        after_hits = accepted(opened)
    assert [cold.tokens, *[hit.tokens for hit in hits]] == [right[0], *right]
    assert [hit.cached for hit in hits] == [288, 320]
    assert after_cold[0] == after_cold[1] > 0
    assert after_hits[0] == after_hits[1] > 2 * after_cold[0]


@pytest.mark.slow
def test_an_eagle_head(llama: Path, oracle: Oracle, tmp_path: Path) -> None:
    """Its layer's KV lies in the same blocks: after a hit, all layers hold what the cold run computed."""
    ask = Ask(prompt(300, seed=5), max_tokens=BLOCK)
    (right,) = oracle.ask(llama, ask)
    head = models.tiny_eagle(tmp_path / "eagle")
    with engine(llama, kv_transfer_config=pool(), speculative_config=speculative("eagle", head)) as opened:
        cold, computed = with_kv(opened, ask)
        opened.forget()
        hit, loaded = with_kv(opened, ask)
        drafted, _ = accepted(opened)
    assert cold.tokens == hit.tokens == right.tokens
    assert hit.cached == 288
    assert drafted > 0
    assert len(computed) == 5, "the target's four layers and the head's one"
    for layer, blocks in computed.items():
        assert blocks.any()
        assert torch.equal(loaded[layer], blocks), layer
