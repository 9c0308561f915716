"""SGLang's own failure injector, ours behind it: hits are lost, but no byte, no host page and no thread is."""

from __future__ import annotations

import random

import pytest
from sglang.srt.environ import envs
from sglang.test.kits.unified_radix_cache.config import CacheConfig

from tests.sglang.kit.conftest import World
from tests.sglang.kit.content import Prompt
from tests.sglang.kit.rig import Backend, Engine, Setup
from tests.sglang.kit.shapes import FULL, MAMBA, SWA, branch, prompt_of


def free_pages(engine: Engine) -> dict[str, int]:
    """Slots that each host pool has free, once what is under way has ended."""
    engine.flush()
    return {str(name): size for name, size in engine.kit._host_avail_sizes(engine.cache).items()}


def traffic(engine: Engine, choice: random.Random, steps: int) -> int:
    """Prompts that share beginnings are computed, stored, dropped and asked for again; tokens that came back."""
    cfg = engine.setup.cfg
    trunk = prompt_of(cfg, 12)
    prompts: list[Prompt] = [trunk, *(branch(trunk, pages, more=choice.randint(1, 4)) for pages in (2, 5, 7, 11))]
    came = 0
    for _ in range(steps):
        prompt = choice.choice(prompts).cut(cfg.page_size * choice.randint(1, 12))
        came += engine.prefetch(prompt)
        if engine.setup.memory == "cache":
            engine.check_host(prompt)
            engine.onboard(prompt)
        engine.check_device(prompt)
        engine.compute(prompt)
        engine.check_device(prompt)
        engine.offload(prompt)
        if choice.random() < 0.5:
            engine.flush()
    return came


@pytest.mark.parametrize(
    ("cfg", "memory"),
    [(FULL, "cache"), (SWA, "cache"), (MAMBA, "cache"), (FULL, "buffer_only"), (SWA, "buffer_only")],
    ids=["full", "swa", "mamba", "full-buffer", "swa-buffer"],
)
@pytest.mark.parametrize(("share", "hits"), [(0.0, {True}), (0.3, {True, False}), (1.0, {False})])
def test_the_injector_costs_hits_only(
    world: World, backend: Backend, cfg: CacheConfig, memory: str, share: float, hits: set[bool]
) -> None:
    with envs.SGLANG_TEST_HICACHE_BACKEND_RANDOM_FAILURE.override(share):
        engine = world.engine(Setup(backend, cfg, "page_first_direct", memory))
    assert type(engine.backend).__name__ == "HiCacheStorageFailureInjector"
    before = free_pages(engine)
    came = traffic(engine, random.Random(f"{cfg.label}{memory}"), steps=12)
    assert (came > 0) in hits
    assert free_pages(engine) == before


def test_a_slow_backend_changes_nothing(world: World, backend: Backend) -> None:
    with envs.SGLANG_TEST_HICACHE_BACKEND_RANDOM_DELAY.override(0.02):
        engine = world.engine(Setup(backend, FULL))
    assert traffic(engine, random.Random("slow"), steps=8) > 0
