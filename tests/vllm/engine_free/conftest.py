"""What the engine-free tests share: the connectors they name, and engines that are always closed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.vllm.harness import EngineSpec, Harness, broken

MakeEngine = Callable[..., Harness]


@pytest.fixture(scope="session", autouse=True)
def _known_connectors() -> None:
    broken.register()


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
