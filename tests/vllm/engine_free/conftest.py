"""What the engine-free tests share: the connectors they name, and engines that are always closed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

import umbp_vllm
from tests.vllm.harness import EngineSpec, Harness, broken
from tests.vllm.harness.umbp import UmbpHarness

MakeEngine = Callable[..., Harness]
MakeUmbp = Callable[..., UmbpHarness]


@pytest.fixture(scope="session", autouse=True)
def _known_connectors() -> None:
    broken.register()
    umbp_vllm.register()


@pytest.fixture
def make_engine() -> Iterator[MakeEngine]:
    """A factory ``make(connector, **spec)``; engines that a test leaves open are shut down without checks."""
    engines: list[Harness] = []

    def make(connector: str, **spec: Any) -> Harness:
        engine = Harness(EngineSpec(connector, **spec))
        engines.append(engine)
        return engine

    yield make
    for engine in engines:
        engine.close(check=False)


@pytest.fixture
def make_umbp() -> Iterator[MakeUmbp]:
    """A factory ``make(extra, **spec)`` for engines with the real connector; open ones are shut down unchecked."""
    engines: list[UmbpHarness] = []

    def make(extra: dict[str, Any] | None = None, **spec: Any) -> UmbpHarness:
        engine = UmbpHarness(extra, **spec)
        engines.append(engine)
        return engine

    yield make
    for engine in engines:
        engine.close(check=False)
