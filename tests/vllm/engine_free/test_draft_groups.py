"""A KV group of a draft model: the last slot of a block is final only with the first token of the next block."""

from __future__ import annotations

import random

import pytest

from tests.vllm.engine_free.conftest import MakeUmbp
from tests.vllm.harness import GroupSpec, engine
from tests.vllm.harness.traffic import Traffic, tokens
from tests.vllm.harness.umbp import UmbpHarness
from umbp_core.tiers import Tier

BLOCK = 4
GROUPS = (GroupSpec("full"), GroupSpec("window", window=64))
"""The target's layers, and a draft's beside them."""


@pytest.fixture(autouse=True)
def _the_last_group_is_the_drafts(monkeypatch: pytest.MonkeyPatch) -> None:
    """As vLLM marks it for drafts whose layers it tells apart (MTP)."""
    make_geometry = engine.make_geometry

    def marked(*arguments: object) -> object:
        geometry = make_geometry(*arguments)
        for config in (*geometry.ranks, geometry.scheduler):
            config.kv_cache_groups[-1].is_eagle_group = True
        return geometry

    monkeypatch.setattr(engine, "make_geometry", marked)


def stored(opened: UmbpHarness, prompt: list[int]) -> list[int]:
    """Blocks of ``prompt`` in DRAM, per group."""
    copy = opened.pool.directory.copy
    return [sum(copy(key, Tier.DRAM) is not None for key in keys) for keys in opened.keys(prompt, None, None)]


@pytest.mark.parametrize(("length", "blocks"), [(24, [6, 5]), (25, [6, 6]), (27, [6, 6]), (28, [7, 6])])
def test_the_drafts_last_block_waits_for_the_next_token(make_umbp: MakeUmbp, length: int, blocks: list[int]) -> None:
    """One output token: the last prompt token is the last one computed."""
    opened = make_umbp(groups=GROUPS)
    opened.store(tokens(length))
    assert stored(opened, tokens(length)) == blocks
    opened.close()


def test_a_hit_ends_where_the_drafts_blocks_end(make_umbp: MakeUmbp) -> None:
    opened = make_umbp(groups=GROUPS)
    opened.store(tokens(24))
    name = opened.add(tokens(40), max_tokens=2)
    opened.drain()
    assert opened.external_tokens(name) == 5 * BLOCK
    assert stored(opened, tokens(40)) == [10, 10], "what was computed behind the hit is stored, with the block missed"
    opened.reset_prefix_cache()
    again = opened.add(tokens(44), max_tokens=2)
    opened.drain()
    assert opened.external_tokens(again) == 10 * BLOCK
    opened.check_stored()
    opened.close()


@pytest.mark.parametrize("seed", range(3))
def test_random_traffic(make_umbp: MakeUmbp, seed: int) -> None:
    opened = make_umbp(groups=GROUPS, num_blocks=96, max_model_len=96, draft_tokens=3)
    loaded = Traffic(opened, random.Random(seed)).run(steps=150)
    assert opened.check_stored() > 0
    opened.close()
    assert loaded > 0
