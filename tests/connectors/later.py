"""Time that passes when a test says so, beside the real one."""

from __future__ import annotations

import time
from types import ModuleType, SimpleNamespace

import pytest


def pass_time(monkeypatch: pytest.MonkeyPatch, seconds: float, *modules: ModuleType) -> None:
    """In these modules it is so many seconds later from now on than it is elsewhere."""
    later = SimpleNamespace(monotonic=lambda: time.monotonic() + seconds)
    for module in modules:
        monkeypatch.setattr(module, "time", later)
