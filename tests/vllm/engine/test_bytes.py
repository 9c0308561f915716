"""Block by block, the pool holds the bytes that a plain engine computes and would have in its own KV cache."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.vllm.engine.local import BLOCK, Ask, Engine, engine, pool
from tests.vllm.models import prompt
from umbp_core.tiers import Tier

TEXT = prompt(14 * BLOCK + 9, seed=1)


@pytest.fixture(scope="module")
def computed(llama: Path) -> list[bytes]:
    """What a plain engine computes for each full block of ``TEXT`` in one prefill: its bytes over all layers."""
    with engine(llama) as plain:
        request = plain.add(Ask(TEXT))
        plain.step()
        values = [block_bytes(plain, block) for block in plain.blocks_of(request)[: len(TEXT) // BLOCK]]
        plain.run()
    assert len(values) == 14
    return values


def test_a_cold_run_stores_what_a_plain_engine_computes(llama: Path, computed: list[bytes]) -> None:
    with engine(llama, kv_transfer_config=pool()) as opened:
        opened.ask_one(Ask(TEXT))
        opened.drain()
        assert_equal(opened, computed)


@pytest.mark.parametrize(("first", "held"), [(5, 0), (5, 2), (1, 0), (9, 8)])
@pytest.mark.statement("connector", 17)
@pytest.mark.bug("B3")
def test_blocks_stored_behind_a_partial_hit(llama: Path, computed: list[bytes], first: int, held: int) -> None:
    """The pool gives blocks ``held`` to ``first``, the rest is computed; each lands under its own key."""
    with engine(llama, kv_transfer_config=pool()) as opened:
        opened.ask_one(Ask(TEXT[: first * BLOCK], max_tokens=1))
        opened.forget()
        if held:
            opened.ask_one(Ask(TEXT[: held * BLOCK + 1], max_tokens=1))
        opened.ask_one(Ask(TEXT, max_tokens=1))
        opened.drain()
        assert_equal(opened, computed)


def test_loaded_blocks_are_the_stored_ones(llama: Path, computed: list[bytes], tmp_path: Path) -> None:
    """From DRAM and, after a restart, from SSD: what arrives in the KV cache is what a plain engine computes."""
    for _ in range(2):
        with engine(llama, kv_transfer_config=pool(tmp_path)) as opened:
            opened.ask_one(Ask(TEXT, max_tokens=1))
            opened.forget()
            request = opened.add(Ask(TEXT))
            blocks: list[int] = []
            while not blocks:
                opened.step()
                blocks = opened.blocks_of(request)
            values = [block_bytes(opened, block) for block in blocks[: len(TEXT) // BLOCK]]
            opened.run()
            opened.drain()
            assert_equal(opened, computed, Tier.SSD)
        assert_close(values, computed)


def assert_equal(opened: Engine, computed: list[bytes], tier: Tier = Tier.DRAM) -> None:
    """What ``tier`` holds for ``TEXT`` is what was computed, up to the order of additions in a chunked prefill."""
    pages = opened.pages_of(Ask(TEXT), tier)
    if tier is Tier.DRAM:
        held = [bytes(opened.arena.page(page))[: len(computed[0])] for page in pages]
    else:
        held = [opened.slot_bytes(slot)[: len(computed[0])] for slot in pages]
    assert_close(held, computed)


def assert_close(held: list[bytes], computed: list[bytes]) -> None:
    """Same blocks at the same positions; two different blocks of random text are far apart."""
    assert len(held) == len(computed)
    for index, (mine, theirs) in enumerate(zip(held, computed, strict=True)):
        np.testing.assert_allclose(
            np.frombuffer(mine, np.float32),
            np.frombuffer(theirs, np.float32),
            rtol=1e-4,
            atol=1e-4,
            err_msg=f"block {index}",
        )


def block_bytes(opened: Engine, block: int) -> bytes:
    """KV block ``block`` of all layers in layer order, read from the engine's tensors by vLLM's own strides."""
    config = opened.core.scheduler.kv_cache_config
    layers = config.kv_cache_groups[0].layer_names
    caches = opened.kv_caches()
    return b"".join(caches[name][block].contiguous().numpy().tobytes() for name in layers)
