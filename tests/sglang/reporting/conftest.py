"""One master for all tests, and engines of the kit that report to it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import pytest

from tests.master.app.master_process import MasterProcess
from tests.sglang.kit.conftest import World, patient_lookups, plugins, world
from tests.sglang.kit.rig import UMBP, Setup
from tests.sglang.kit.shapes import FULL
from tests.sglang.reporting.rig import Reported, settings
from umbp_sglang.reporting_hooks import EVENTS

__all__ = ["patient_lookups", "plugins", "world"]


class Start(Protocol):
    """Starts an engine that reports."""

    def __call__(self, cfg: Any = FULL, core: str = "rust", **options: Any) -> Reported: ...


@pytest.fixture(scope="module")
def master(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MasterProcess]:
    with MasterProcess(tmp_path_factory.mktemp("master"), "--listen=none") as running:
        yield running


@pytest.fixture
def start(world: World, master: MasterProcess) -> Iterator[Start]:
    """Starts engines over the same folder, one after the other."""
    started: list[Reported] = []

    def start(cfg: Any = FULL, core: str = "rust", extra: dict[str, Any] | None = None, **options: Any) -> Reported:
        setup = Setup(UMBP, cfg, core=core, events=EVENTS, extra=settings(master, **(extra or {})), **options)
        started.append(Reported(world.engine(setup, ledger=False), master))
        return started[-1]

    yield start
    for reported in started:
        if reported.component.kv_event_publisher is not None:
            reported.component.kv_event_publisher.shutdown()
