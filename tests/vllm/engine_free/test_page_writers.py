"""Who packs a page is part of its identity: the attention backend, and on CPUs the instruction set."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
from vllm.v1.attention.backends import cpu_attn

from tests.vllm.engine_free.conftest import MakeUmbp
from tests.vllm.harness import spec as harness_spec
from tests.vllm.harness.fake_daemon import FakeDaemon
from tests.vllm.harness.host import HostHarness
from tests.vllm.harness.traffic import tokens
from tests.vllm.harness.umbp import UmbpHarness

Backends = Callable[..., None]
PROMPT = tokens(24)


@pytest.fixture
def backends(monkeypatch: pytest.MonkeyPatch) -> Backends:
    """``backends(*names)``: from now on the layers of engines have the backends of these names, in turn."""
    make = harness_spec.rank_config

    def choose(*names: str) -> None:
        def rank_config(config: Any, rank: int) -> Any:
            own = make(config, rank)
            modules = {
                f"model.layers.{index}.self_attn.attn": SimpleNamespace(
                    get_attn_backend=lambda name=name: backend(name)
                )
                for index, name in enumerate(names * 4)
            }
            own.compilation_config = copy.copy(config.compilation_config)
            own.compilation_config.static_forward_context = AnyLayer(modules)
            return own

        monkeypatch.setattr("tests.vllm.harness.engine.rank_config", rank_config)

    return choose


class AnyLayer(dict[str, Any]):
    """The modules, whatever the layers are called: a name's last number is the index."""

    def get(self, layer: str, default: Any = None) -> Any:
        number = int("".join(filter(str.isdigit, layer)) or 0)
        return list(self.values())[number % len(self)]


def backend(name: str) -> Any:
    return SimpleNamespace(get_name=lambda: name)


def layouts(engine: UmbpHarness) -> list[bytes]:
    return [worker.hello.layout for worker in engine.workers]


def isa(name: str) -> Any:
    return patch.object(cpu_attn, "_get_attn_isa", lambda *facts: name)


def test_a_folder_of_another_instruction_set_gives_nothing(
    make_umbp: MakeUmbp, backends: Backends, tmp_path: Path
) -> None:
    """K and V are packed otherwise for AMX than for plain vectors, in pages of the same size."""
    backends("CPU_ATTN")
    disk = {"ssd_dir": str(tmp_path), "ssd_capacity": "4MiB"}

    def external(name: str) -> int:
        with isa(name):
            engine = make_umbp(disk)
            request = engine.add(PROMPT, max_tokens=1)
            engine.drain()
            engine.close()
        return engine.external_tokens(request)

    assert [external("amx"), external("amx"), external("vec"), external("vec")] == [0, 24, 0, 24]


def test_the_backends_of_the_layers_count_each_for_itself(make_umbp: MakeUmbp, backends: Backends) -> None:
    told = []
    for names in ((), ("FLASH_ATTN",), ("FLASHINFER",), ("FLASH_ATTN", "FLASHINFER"), ("FLASHINFER", "FLASH_ATTN")):
        if names:
            backends(*names)
        first, second = layouts(make_umbp(tp=2))
        assert first == second
        told.append(first)
    assert len(set(told)) == len(told)


def test_over_the_daemon_too(backends: Backends, monkeypatch: pytest.MonkeyPatch) -> None:
    daemon = FakeDaemon()
    daemon.serve(monkeypatch)
    told = []
    for name in ("CPU_ATTN", "CPU_MLA"):
        backends(name)
        with isa("vec"):
            engine = HostHarness(daemon, {})
        told += layouts(engine)
        engine.close(check=False)
    assert len(set(told)) == 2


def test_the_instruction_set_is_asked_for_what_the_layer_is(backends: Backends, make_umbp: MakeUmbp) -> None:
    asked: list[tuple[Any, ...]] = []

    def noted(*facts: Any) -> str:
        asked.append(facts)
        return "vec"

    backends("CPU_ATTN")
    with patch.object(cpu_attn, "_get_attn_isa", noted):
        config = make_umbp(block_size=4).config
    assert set(asked) == {(config.model_config.dtype, 4, 8, config.cache_config.cache_dtype)}
