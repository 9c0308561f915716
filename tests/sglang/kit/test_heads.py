"""Heads cut into equal ranges: engines of different TP size read each other's pages, each its own heads."""

from __future__ import annotations

import dataclasses
from array import array

import pytest
from sglang.srt.mem_cache.radix_cache import RadixKey
from sglang.srt.mem_cache.utils import get_storage_hash_str

from tests.sglang.kit.conftest import World
from tests.sglang.kit.rig import UMBP, Setup
from tests.sglang.kit.shapes import FULL, prompt_of

WHOLE = Setup(UMBP, FULL, "page_head", extra={"tp_lcm_size": 2})
"""One rank with both heads, stored as two objects a page."""
HALVES = [dataclasses.replace(WHOLE, cfg=dataclasses.replace(FULL, head_num=1), tp=(rank, 2)) for rank in range(2)]
"""Two ranks with one head each."""


def check(world: World, setup: Setup, *, write: bool) -> None:
    """An engine computes and stores, or finds what others stored; it is stopped afterwards, as is the test's custom."""
    prompt = prompt_of(FULL, 8)
    engine = world.engine(setup, ledger=False)
    if write:
        engine.compute(prompt)
        engine.offload(prompt)
    else:
        assert engine.prefetch(prompt) == len(prompt)
        assert engine.check_host(prompt) == len(prompt) * 8
        assert engine.onboard(prompt) == len(prompt)
        assert engine.check_device(prompt) == len(prompt) * 8
    engine.stop()


def test_two_ranks_read_what_one_wrote(world: World) -> None:
    check(world, WHOLE, write=True)
    for half in HALVES:
        check(world, half, write=False)


def test_one_rank_reads_what_two_wrote(world: World) -> None:
    for half in HALVES:
        check(world, half, write=True)
    check(world, WHOLE, write=False)


@pytest.mark.parametrize("missing", [0, 1])
def test_half_a_page_is_no_page(world: World, missing: int) -> None:
    check(world, HALVES[1 - missing], write=True)
    engine = world.engine(WHOLE, ledger=False)
    prompt = prompt_of(FULL, 8)
    hashes = get_storage_hash_str(RadixKey(array("q", prompt.tokens)), page_size=FULL.page_size)
    assert engine.backend.batch_exists(hashes) == 0
    assert engine.prefetch(prompt) == 0
