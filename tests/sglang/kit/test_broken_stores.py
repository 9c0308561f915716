"""That these tests can fail: each backend with one fault is noticed, and without the fault the same test passes."""

from __future__ import annotations

import pytest
from sglang.test.kits.unified_radix_cache.config import CacheConfig

from tests.sglang.kit import broken
from tests.sglang.kit.conftest import World
from tests.sglang.kit.proxies import Proxy
from tests.sglang.kit.rig import Backend, Engine, Setup
from tests.sglang.kit.shapes import FULL, MAMBA, SWA, branch, prompt_of

PAGES = 20
ON_FULL = [
    broken.FlipsABit,
    broken.SwapsPages,
    broken.MixesUpKeysAndValues,
    broken.ReadsNothing,
    broken.ForgetsWrites,
    broken.ClaimsEverything,
    broken.CountsOneTooMany,
    broken.ShortensKeys,
]
ON_SIDECARS = [broken.SpoilsTheSidecar, broken.DropsTheSidecar, broken.TakesTheAnchorForTheSidecar]
CASES = [
    *(pytest.param(fault, FULL, id=f"{fault.__name__}") for fault in ON_FULL),
    *(pytest.param(fault, SWA, id=f"{fault.__name__}-swa") for fault in ON_SIDECARS),
    *(pytest.param(fault, MAMBA, id=f"{fault.__name__}-mamba") for fault in ON_SIDECARS),
]


def complaints(world: World, backend: Backend, cfg: CacheConfig, fault: type[Proxy]) -> list[str]:
    """A prompt is stored, two that begin like it are asked for; what is wrong with what comes back."""
    engine = world.engine(Setup(backend, cfg, "page_first_direct"), wrap=fault)
    stored = prompt_of(cfg, PAGES)
    longer = prompt_of(cfg, PAGES + 4)
    engine.compute(stored, window_from=4 * cfg.page_size if cfg.has_swa else None)
    engine.offload(stored)
    engine.flush()
    found = [] if engine.prefetch(branch(stored, 3)) == (0 if len(cfg.components) > 1 else 3 * cfg.page_size) else ["?"]
    engine.flush()
    found += [] if engine.prefetch(longer) == len(stored) else ["not all of it came"]
    found += _wrong(engine.check_host, longer)
    engine.onboard(longer)
    found += _wrong(engine.check_device, longer)
    found += world.faults
    world.faults.clear()
    return found


def _wrong(check: object, prompt: object) -> list[str]:
    try:
        check(prompt)  # type: ignore[operator]
    except AssertionError as error:
        return [str(error)]
    return []


@pytest.mark.parametrize("cfg", [FULL, SWA, MAMBA], ids=["full", "swa", "mamba"])
def test_nothing_is_wrong_with_a_backend_that_works(world: World, backend: Backend, cfg: CacheConfig) -> None:
    assert complaints(world, backend, cfg, Proxy) == []


@pytest.mark.parametrize(("fault", "cfg"), CASES)
def test_a_fault_is_noticed(world: World, backend: Backend, cfg: CacheConfig, fault: type[Proxy]) -> None:
    assert complaints(world, backend, cfg, fault) != []


@pytest.mark.parametrize("fault", [broken.FlipsABit, broken.SwapsPages, broken.MixesUpKeysAndValues])
@pytest.mark.parametrize("layout", ["page_first", "page_first_direct", "page_head", "layer_first"])
def test_wrong_bytes_are_seen_without_a_ledger(world: World, backend: Backend, layout: str, fault: type[Proxy]) -> None:
    """The second witness: the tokens say what a page must hold, whatever the ledger believes."""
    engine = world.engine(Setup(backend, FULL, layout), wrap=fault)
    prompt = prompt_of(FULL, PAGES)
    engine.compute(prompt)
    engine.offload(prompt)
    engine.flush()
    engine.prefetch(prompt)
    world.faults.clear()
    assert _wrong(engine.check_host, prompt)
    engine.onboard(prompt)
    assert _wrong(engine.check_device, prompt)


def test_engines_are_what_they_say(world: World, backend: Backend) -> None:
    """An engine that never computed has nothing to give: hits in these tests come from storage."""
    engine: Engine = world.engine(Setup(backend, FULL))
    assert engine.prefetch(prompt_of(FULL, PAGES)) == 0
