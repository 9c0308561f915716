"""SGLang's registries as they are before any plug-in has run."""

from __future__ import annotations

from collections import defaultdict

import pytest
from sglang.srt.disaggregation.kv_events import EventPublisherFactory
from sglang.srt.mem_cache.storage.backend_factory import StorageBackendFactory
from sglang.srt.plugins.hook_registry import HookRegistry

from umbp_sglang.registration import NO_HOOKS, OVERRIDE


@pytest.fixture
def registries(monkeypatch: pytest.MonkeyPatch) -> None:
    """No hook, no backend or publisher called umbp, no variable of ours; what a test registers is forgotten after."""
    monkeypatch.setattr(HookRegistry, "_hooks", defaultdict(list))
    monkeypatch.setattr(HookRegistry, "_patched", set())
    known = {name: entry for name, entry in StorageBackendFactory._registry.items() if name != "umbp"}
    monkeypatch.setattr(StorageBackendFactory, "_registry", known)
    publishers = {name: made for name, made in EventPublisherFactory._registry.items() if name != "umbp"}
    monkeypatch.setattr(EventPublisherFactory, "_registry", publishers)
    for variable in (NO_HOOKS, OVERRIDE):
        monkeypatch.delenv(variable, raising=False)
