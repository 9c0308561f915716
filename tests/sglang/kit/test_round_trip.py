"""What was computed once comes back from storage, byte for byte, on every layout and for every pool."""

from __future__ import annotations

import pytest
from sglang.test.kits.unified_radix_cache.config import CacheConfig

from tests.sglang.kit.conftest import World
from tests.sglang.kit.content import Prompt
from tests.sglang.kit.rig import DYNAMIC, UMBP, Backend, Engine, Setup, copied
from tests.sglang.kit.shapes import FULL, LARGE_PAGES, MAMBA, SWA, prompt_of

PAGES = 10
LAYOUTS = ("page_first", "page_first_direct", "page_head", "layer_first")
CASES = [
    *(pytest.param(FULL, layout, id=f"full-{layout}") for layout in LAYOUTS),
    *(pytest.param(SWA, layout, id=f"swa-{layout}") for layout in LAYOUTS),
    pytest.param(MAMBA, "page_first_direct", id="mamba"),
    pytest.param(LARGE_PAGES, "page_first", id="large-pages"),
]


def store_in_another_life(world: World, setup: Setup, prompt: Prompt) -> None:
    """An engine computes the prompt, stores it and ends."""
    engine = world.engine(setup)
    engine.compute(prompt)
    engine.offload(prompt)
    engine.stop()


def check(engine: Engine, prompt: Prompt) -> None:
    """The prompt comes from storage to the host and on to the device, and is what was computed."""
    assert engine.prefetch(prompt) == len(prompt)
    assert engine.check_host(prompt) > len(prompt)
    assert engine.onboard(prompt) == len(prompt)
    assert engine.check_device(prompt) > len(prompt)


@pytest.mark.parametrize(("cfg", "layout"), CASES)
def test_after_a_flush(world: World, backend: Backend, cfg: CacheConfig, layout: str) -> None:
    engine = world.engine(Setup(backend, cfg, layout))
    prompt = prompt_of(cfg, PAGES)
    engine.compute(prompt)
    engine.offload(prompt)
    assert engine.check_host(prompt) > 0
    engine.flush()
    assert engine.match(prompt).host_hit_length == 0
    check(engine, prompt)


@pytest.mark.parametrize(("cfg", "layout"), CASES)
def test_after_a_restart(world: World, backend: Backend, cfg: CacheConfig, layout: str) -> None:
    setup = Setup(backend, cfg, layout)
    prompt = prompt_of(cfg, PAGES)
    store_in_another_life(world, setup, prompt)
    check(world.engine(setup), prompt)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("cfg", [FULL, SWA], ids=["full", "swa"])
def test_host_memory_as_a_buffer_only(world: World, backend: Backend, cfg: CacheConfig, layout: str) -> None:
    setup = Setup(backend, cfg, layout, memory="buffer_only")
    prompt = prompt_of(cfg, PAGES)
    store_in_another_life(world, setup, prompt)
    second = world.engine(setup)
    assert second.prefetch(prompt) == len(prompt)
    assert second.match(prompt).device_prefix_len == len(prompt)
    assert second.check_device(prompt) > len(prompt)


def test_the_dynamic_form_is_the_same_store(world: World) -> None:
    """What was stored under the backend's own name is found by the form that needs no plug-in, and in turn."""
    for first, second, start in ((UMBP, DYNAMIC, 1), (DYNAMIC, UMBP, 1000)):
        prompt = prompt_of(FULL, PAGES, start)
        store_in_another_life(world, Setup(first, FULL), prompt)
        other = world.engine(Setup(second, FULL))
        check(other, prompt)
        other.stop()


@pytest.mark.parametrize(("cfg", "layout"), CASES)
def test_pages_that_are_handed_over_as_copies_are_the_same_objects(world: World, cfg: CacheConfig, layout: str) -> None:
    """``dynamic`` without ``interface_v1``, or an SGLang that our hook does not fit: the oldest interface, slow."""
    for first, second, start in ((copied(DYNAMIC), UMBP, 1), (UMBP, copied(DYNAMIC), 1000)):
        prompt = prompt_of(cfg, PAGES, start)
        store_in_another_life(world, Setup(first, cfg, layout), prompt)
        other = world.engine(Setup(second, cfg, layout))
        check(other, prompt)
        calls = other.cache.cache_controller
        assert calls.page_get_func == (calls._page_get_zero_copy if second is UMBP else calls._generic_page_get)
        other.stop()


@pytest.mark.parametrize(
    ("cfg", "memory"),
    [(FULL, "cache"), (SWA, "cache"), (MAMBA, "cache"), (FULL, "buffer_only"), (SWA, "buffer_only")],
    ids=["full", "swa", "mamba", "full-buffer", "swa-buffer"],
)
def test_the_tree_that_servers_use(world: World, cfg: CacheConfig, memory: str) -> None:
    """SGLang's Rust core, its default; it tells less of itself than the Python one, so the device is looked at."""
    setup = Setup(UMBP, cfg, "page_first_direct", memory, core="rust")
    prompt = prompt_of(cfg, PAGES)
    store_in_another_life(world, setup, prompt)
    second = world.engine(setup)
    assert second.prefetch(prompt) == len(prompt)
    second.onboard(prompt)
    assert second.match(prompt).device_prefix_len == len(prompt)
    assert second.check_device(prompt) > len(prompt)
