"""Engines of the kit for one test; what they stored is compared at its end."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from sglang.srt.plugins import load_plugins

from tests.sglang.kit.proxies import PageId
from tests.sglang.kit.rig import FILE, UMBP, Backend, Engine, Setup
from tests.sglang.store.conftest import patient_lookups

__all__ = ["patient_lookups"]


class World:
    """All engines of one test, the pages that they stored, and what a ledger had to complain about."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.pages: dict[PageId, bytes] = {}
        self.faults: list[str] = []
        self.engines: list[Engine] = []

    def engine(
        self,
        setup: Setup,
        *,
        attach: bool = True,
        ledger: bool = True,
        wrap: Callable[[object], object] | None = None,
    ) -> Engine:
        """A started engine; it is closed when the test ends."""
        engine = Engine(setup, self.folder, self.pages, self.faults)
        if wrap is not None:
            engine.wrap = wrap
        self.engines.append(engine)
        engine.start(attach=attach, ledger=ledger)
        return engine

    def close(self) -> None:
        while self.engines:
            self.engines.pop().close()


@pytest.fixture(scope="session", autouse=True)
def plugins() -> None:
    """Plug-ins are loaded as every process of SGLang loads them: ours, and the tests' for a machine without a GPU."""
    load_plugins()


@pytest.fixture(params=[FILE, UMBP], ids=lambda backend: backend.name)
def backend(request: pytest.FixtureRequest) -> Backend:
    """Ours, and SGLang's own ``file`` as the control: what fails for both is a fault of the test or of SGLang."""
    return request.param


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    """Where a test starts its engines; no page may have come back wrong by the time it ends."""
    world = World(tmp_path)
    try:
        yield world
    finally:
        world.close()
    assert world.faults == []
