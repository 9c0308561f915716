"""Bytes that change while nobody looks: on the SSD between two runs, in a file that was cut short or is gone."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from sglang.test.kits.unified_radix_cache.config import CacheConfig

from tests.sglang.kit.conftest import World
from tests.sglang.kit.content import Prompt
from tests.sglang.kit.rig import FILE, UMBP, Engine, Setup
from tests.sglang.kit.shapes import FULL, SWA, prompt_of


def data_files(folder: Path) -> list[Path]:
    """The files with pages in them: the largest ones, of whichever backend."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.suffix == ".bin"]
    assert files, "nothing was written to spoil"
    return files


def flip_everything(folder: Path) -> None:
    """Each byte that is not zero gets another value; the files stay as long as they are."""
    for path in data_files(folder):
        data = np.fromfile(path, dtype=np.uint8)
        data[data != 0] ^= 0x55
        data.tofile(path)


def flip_some(folder: Path) -> None:
    """One bit in each 512 bytes."""
    for path in data_files(folder):
        data = np.fromfile(path, dtype=np.uint8)
        data[100::512] ^= 1
        data.tofile(path)


def cut(folder: Path) -> None:
    """Of each file a little is left, less than two pages."""
    for path in data_files(folder):
        os.truncate(path, min(path.stat().st_size, 1000))


def remove(folder: Path) -> None:
    """The files with pages are gone; what lists them is not."""
    for path in data_files(folder):
        path.unlink()


def spoiled(world: World, setup: Setup, spoil: Callable[[Path], None]) -> tuple[Engine, Prompt]:
    """An engine that starts over what another one stored and somebody spoiled."""
    prompt = prompt_of(setup.cfg, 10)
    first = world.engine(setup)
    first.compute(prompt)
    first.offload(prompt)
    first.stop()
    spoil(world.folder)
    return world.engine(setup), prompt


@pytest.mark.parametrize("spoil", [flip_everything, flip_some, cut, remove])
@pytest.mark.parametrize("cfg", [FULL, SWA], ids=["full", "swa"])
def test_what_does_not_verify_is_a_miss(world: World, spoil: Callable[[Path], None], cfg: CacheConfig) -> None:
    engine, prompt = spoiled(world, Setup(UMBP, cfg), spoil)
    came = engine.prefetch(prompt)
    assert came < len(prompt)
    engine.check_host(prompt)
    rounds = 0
    while came < len(prompt):
        rounds += 1
        assert rounds <= len(cfg.components), "a pool is found to be spoiled when it is read, and written again then"
        engine.flush()
        engine.compute(prompt)
        engine.offload(prompt)
        engine.flush()
        came = engine.prefetch(prompt)
        engine.check_host(prompt)


@pytest.mark.parametrize("spoil", [flip_everything, flip_some])
def test_a_backend_that_does_not_verify_is_noticed(world: World, spoil: Callable[[Path], None]) -> None:
    """The control: SGLang's file backend hands the spoiled bytes out, and these tests see it."""
    engine, prompt = spoiled(world, Setup(FILE, FULL), spoil)
    assert engine.prefetch(prompt) == len(prompt)
    assert world.faults != []
    world.faults.clear()
    with pytest.raises(AssertionError, match="hold other bytes"):
        engine.check_host(prompt)
