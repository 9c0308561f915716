"""A latent cache is the same on every rank: one rank writes it, all ranks read it."""

from __future__ import annotations

import dataclasses

import pytest

from tests.sglang.kit.conftest import World
from tests.sglang.kit.rig import Backend, Setup
from tests.sglang.kit.shapes import FULL, prompt_of


@pytest.mark.parametrize("layout", ["page_first", "page_first_direct", "layer_first"])
def test_one_rank_alone(world: World, backend: Backend, layout: str) -> None:
    engine = world.engine(Setup(backend, FULL, layout, mla=True))
    prompt = prompt_of(FULL, 10)
    engine.compute(prompt)
    engine.offload(prompt)
    engine.flush()
    assert engine.prefetch(prompt) == len(prompt)
    assert engine.check_host(prompt) == len(prompt) * 4
    assert engine.onboard(prompt) == len(prompt)
    assert engine.check_device(prompt) == len(prompt) * 4


@pytest.mark.parametrize("layout", ["page_first", "page_first_direct"])
def test_the_first_rank_writes_and_the_others_read(world: World, backend: Backend, layout: str) -> None:
    ranks = [Setup(backend, FULL, layout, mla=True, tp=(rank, 2)) for rank in range(2)]
    writer, reader = (world.engine(setup) for setup in ranks)
    assert [engine.cache.cache_controller.backup_skip for engine in (writer, reader)] == [False, True]
    prompt = prompt_of(FULL, 10)
    reader.compute(prompt)
    reader.offload(prompt)
    reader.flush()
    assert reader.prefetch(prompt) == 0, "a rank that is no writer wrote"
    writer.compute(prompt)
    writer.offload(prompt)
    assert reader.prefetch(prompt) == len(prompt)
    assert reader.check_host(prompt) == len(prompt) * 4
    assert reader.onboard(prompt) == len(prompt)
    assert reader.check_device(prompt) == len(prompt) * 4


def test_a_reader_whose_writer_went_away_has_misses(world: World, backend: Backend) -> None:
    setup = Setup(backend, FULL, mla=True, tp=(0, 2))
    writer, reader = world.engine(setup), world.engine(dataclasses.replace(setup, tp=(1, 2)))
    prompt = prompt_of(FULL, 10)
    writer.compute(prompt)
    writer.offload(prompt)
    assert reader.prefetch(prompt) == len(prompt)
    writer.stop()
    reader.flush()
    assert reader.prefetch(prompt) in (0, len(prompt)), "never a part, never something else, never a wait"
    reader.check_host(prompt)
