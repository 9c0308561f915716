"""Stores that are closed when a test ends."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sglang.srt.plugins import load_plugins

from tests.connectors.waiting import PATIENCE
from tests.sglang.store.faults import FakeClock, Faults
from umbp_connectors.daemon import client
from umbp_sglang import siblings
from umbp_sglang.store import UMBPStore


@pytest.fixture(scope="session", autouse=True)
def plugins() -> None:
    """The tests' plug-in for a machine without a GPU makes host pools possible."""
    load_plugins()


@pytest.fixture(autouse=True)
def patient_lookups(monkeypatch: pytest.MonkeyPatch) -> None:
    """A lookup at a sibling or a daemon is no miss because the machine is slow."""
    monkeypatch.setattr(siblings, "_LOOKUP_S", PATIENCE)
    monkeypatch.setattr(client, "_LOOKUP_S", PATIENCE)


def documented_reasons() -> set[str]:
    """Why a call may give less than it should, as ``docs/metrics.md`` has it."""
    page = (Path(__file__).resolve().parents[3] / "docs" / "metrics.md").read_text(encoding="utf-8")
    (row,) = [line for line in page.splitlines() if line.startswith("| `reason` | `get_timeout`")]
    return set(re.findall(r"`(\w+)`", re.sub(r"\([^)]*\)", "", row))) - {"reason"}


def degraded(store: UMBPStore) -> dict[str, float]:
    """How often each reason was counted."""
    family = next(f for f in store.metrics.collect() if f.name == "umbp_sglang_degraded")
    return {s.labels["reason"]: s.value for s in family.samples if s.name.endswith("_total")}


def check_reasons(store: UMBPStore) -> None:
    """Whatever a test's store counted has to be documented."""
    assert set(degraded(store)) <= documented_reasons()


class Stores:
    """Makes stores as SGLang does: constructor, pools, then the word that these were all."""

    def __init__(self, closing: contextlib.ExitStack) -> None:
        self._closing = closing

    def __call__(self, config: Any, pool: Any, sides: dict[Any, Any] | None = None, **more: Any) -> UMBPStore:
        store = UMBPStore(config, pool, **more)
        self._closing.callback(check_reasons, store)
        self._closing.callback(store.close)
        store.register_mem_pool_host(pool)
        store.register_mem_host_pool_v2(pool, "kv")
        for name, side in (sides or {}).items():
            store.register_mem_host_pool_v2(side, name)
        store.on_host_pools_registered()
        return store


@pytest.fixture
def stores() -> Iterator[Stores]:
    """A maker of stores."""
    with contextlib.ExitStack() as closing:
        yield Stores(closing)


@pytest.fixture
def faults() -> Faults:
    """What goes wrong in the pools of the test's store."""
    return Faults()


@pytest.fixture
def clock() -> FakeClock:
    """Time that passes when the test says so."""
    return FakeClock()
