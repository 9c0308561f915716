"""A backend that comes and goes while the engine runs, as the admin API lets it."""

from __future__ import annotations

import threading

import pytest

from tests.connectors.waiting import until
from tests.sglang.kit.conftest import World
from tests.sglang.kit.rig import FILE, UMBP, Backend, Setup
from tests.sglang.kit.shapes import FULL, SWA, prompt_of


@pytest.mark.parametrize("cfg", [FULL, SWA], ids=["full", "swa"])
def test_attached_while_running_and_again(world: World, backend: Backend, cfg: object) -> None:
    engine = world.engine(Setup(backend, cfg), attach=False)
    prompt = prompt_of(cfg, 8)
    engine.compute(prompt)
    for _ in range(3):
        assert engine.attach() == (True, "Attached HiCache storage backend successfully.")
        assert engine.attach()[0], "the same backend again is an update of policies"
        engine.offload(prompt)
        engine.flush()
        assert engine.prefetch(prompt) == len(prompt)
        assert engine.onboard(prompt) == len(prompt)
        assert engine.check_device(prompt) > 0
        assert engine.detach()[0]
        assert engine.prefetch(prompt) == 0
    assert engine.detach()[0], "nothing is attached; that is no error"


def test_another_backend_is_refused_until_the_first_is_gone(world: World, backend: Backend) -> None:
    engine = world.engine(Setup(backend, FULL))
    other = Backend("sim", lambda folder: {})
    done, why = engine.attach(other)
    assert not done
    assert "Detach first" in why


def test_a_configuration_that_cannot_be_used_is_refused_and_the_engine_goes_on(world: World) -> None:
    engine = world.engine(Setup(UMBP, FULL), attach=False)
    prompt = prompt_of(FULL, 8)
    engine.compute(prompt)
    for wrong, advice in (({"dram_capcity": "1GiB"}, "did you mean 'dram_capacity'"), ({"dram_capacity": 1}, "larger")):
        done, why = engine.attach(**wrong)
        assert not done
        assert advice in why
        assert engine.prefetch(prompt) == 0
        assert engine.check_device(prompt) > 0
    assert engine.attach()[0]
    engine.offload(prompt)
    engine.flush()
    assert engine.prefetch(prompt) == len(prompt)


def test_what_was_stored_before_a_detach_is_there_after_the_next_attach(world: World, backend: Backend) -> None:
    engine = world.engine(Setup(backend, FULL))
    prompt = prompt_of(FULL, 8)
    engine.compute(prompt)
    engine.offload(prompt)
    assert engine.detach()[0]
    engine.flush()
    assert engine.attach()[0]
    assert engine.prefetch(prompt) == len(prompt)
    assert engine.check_host(prompt) > 0


def test_clear_empties_the_storage_at_once(world: World, backend: Backend) -> None:
    engine = world.engine(Setup(backend, FULL))
    prompt = prompt_of(FULL, 8)
    engine.compute(prompt)
    engine.offload(prompt)
    engine.flush()
    assert engine.cache.clear_storage_backend()
    assert engine.prefetch(prompt) == 0
    engine.compute(prompt)
    engine.offload(prompt)
    engine.flush()
    assert engine.prefetch(prompt) == len(prompt)


def test_no_thread_is_left(world: World, backend: Backend) -> None:
    before = set(threading.enumerate())
    engine = world.engine(Setup(backend, FULL))
    prompt = prompt_of(FULL, 8)
    engine.compute(prompt)
    engine.offload(prompt)
    assert engine.detach()[0]
    until(lambda: not set(threading.enumerate()) - before)


def test_backends_can_be_exchanged(world: World, backend: Backend) -> None:
    """From ours to SGLang's and back; each finds what it had stored itself."""
    engine = world.engine(Setup(backend, FULL))
    prompt = prompt_of(FULL, 8)
    engine.compute(prompt)
    engine.offload(prompt)
    for other in (FILE, backend):
        assert engine.detach()[0]
        assert engine.attach(other)[0]
        engine.offload(prompt)
    engine.flush()
    assert engine.prefetch(prompt) == len(prompt)
    assert engine.check_host(prompt) > 0
