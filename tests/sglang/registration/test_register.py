"""What ``register()`` puts into SGLang's registries, and what it says where SGLang is not as expected."""

from __future__ import annotations

import logging
import sys
import time
from typing import Any

import pytest
from sglang.srt.disaggregation.kv_events import EventPublisherFactory
from sglang.srt.managers.cache_controller import HiCacheController
from sglang.srt.managers.scheduler_components.kv_events_publisher import SchedulerKvEventsPublisher
from sglang.srt.managers.scheduler_components.metrics_reporter import SchedulerMetricsReporter
from sglang.srt.mem_cache.buffer_mode.pipeline import BufferModePipeline
from sglang.srt.mem_cache.hybrid_cache.hybrid_cache_controller import HybridCacheController
from sglang.srt.mem_cache.pool_host import common
from sglang.srt.mem_cache.storage.backend_factory import StorageBackendFactory
from sglang.srt.mem_cache.unified_radix_cache import UnifiedRadixCache
from sglang.srt.plugins.hook_registry import HookRegistry, HookType
from sglang.srt.server_args import ServerArgs

import umbp_sglang
from umbp_sglang import registration, reporting_hooks

TARGETS = {
    "sglang.srt.managers.cache_controller.HiCacheController._start_storage_threads": HookType.BEFORE,
    "sglang.srt.mem_cache.hybrid_cache.hybrid_cache_controller.HybridCacheController.should_backup": HookType.AROUND,
    "sglang.srt.mem_cache.pool_host.common.get_allocator_from_storage": HookType.AROUND,
    "sglang.srt.mem_cache.storage.backend_factory.StorageBackendFactory._create_builtin_backend": HookType.AROUND,
    "sglang.srt.server_args.ServerArgs.add_cli_args": HookType.AFTER,
    "sglang.srt.server_args.ServerArgs.resolve_once": HookType.BEFORE,
    "sglang.srt.managers.scheduler_components.kv_events_publisher.SchedulerKvEventsPublisher.init_kv_events": (
        HookType.AFTER
    ),
    "sglang.srt.managers.scheduler_components.metrics_reporter.SchedulerMetricsReporter.report_decode_stats": (
        HookType.AFTER
    ),
    "sglang.srt.mem_cache.unified_radix_cache.UnifiedRadixCache.write_backup_storage": HookType.BEFORE,
    "sglang.srt.mem_cache.buffer_mode.pipeline.BufferModePipeline.enqueue_backup_intent": HookType.BEFORE,
    "sglang.srt.mem_cache.hybrid_cache.hybrid_cache_controller.HybridCacheController._storage_hit_query": (
        HookType.AFTER
    ),
}
THEIRS = {"umbp": {"module_path": "sglang.srt.mem_cache.storage.umbp", "class_name": "UMBPStore", "loader": None}}

pytestmark = pytest.mark.usefixtures("registries")


def hooks() -> dict[str, list[HookType]]:
    """What is registered, by target."""
    return {target: [kind for kind, *_ in given] for target, given in HookRegistry._hooks.items() if given}


def registered() -> str | None:
    """Whose backend the name stands for."""
    entry: dict[str, Any] | None = StorageBackendFactory._registry.get("umbp")
    return None if entry is None else str(entry["module_path"])


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def test_the_name_and_its_hooks_are_registered_once(caplog: pytest.LogCaptureFixture) -> None:
    for _ in range(2):
        umbp_sglang.register()
    assert registered() == "umbp_sglang.store"
    assert hooks() == {target: [kind] for target, kind in TARGETS.items()}
    assert EventPublisherFactory._registry["umbp"] is reporting_hooks.make_publisher
    assert warnings(caplog) == []


def test_it_takes_no_time_where_sglang_is_loaded() -> None:
    times = []
    for _ in range(5):
        HookRegistry._hooks.clear()
        begin = time.thread_time()  # not the clock's: others may have the processor meanwhile
        umbp_sglang.register()
        times.append(time.thread_time() - begin)
    assert len(hooks()) == len(TARGETS)
    assert min(times) < 0.05


def test_the_kill_switch_leaves_sglang_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(registration.NO_HOOKS, "1")
    umbp_sglang.register()
    assert (registered(), hooks()) == (None, {})


@pytest.mark.parametrize(("value", "is_set"), [("1", True), ("true", True), ("0", False), ("", False), ("off", False)])
def test_switches_take_the_usual_words(value: str, is_set: bool) -> None:
    assert registration.is_set({registration.NO_HOOKS: value}, registration.NO_HOOKS) is is_set
    assert not registration.is_set({}, registration.NO_HOOKS)


def test_a_backend_of_sglangs_own_goes_first(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(StorageBackendFactory, "_registry", dict(THEIRS))
    umbp_sglang.register()
    assert (registered(), hooks()) == (THEIRS["umbp"]["module_path"], {})
    (said,) = warnings(caplog)
    assert registration.DYNAMIC in said
    assert registration.OVERRIDE in said


def test_ours_goes_first_when_that_is_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(StorageBackendFactory, "_registry", dict(THEIRS))
    monkeypatch.setenv(registration.OVERRIDE, "1")
    umbp_sglang.register()
    assert registered() == "umbp_sglang.store"
    assert set(hooks()) == set(TARGETS)


@pytest.mark.parametrize(
    ("owner", "name", "lost", "advice"),
    [
        (ServerArgs, "add_cli_args", "ServerArgs.add_cli_args", registration.DYNAMIC),
        (HiCacheController, "_start_storage_threads", "HiCacheController._start_storage_threads", "interface_v1"),
        (HiCacheController, "_page_get_zero_copy", "HiCacheController._start_storage_threads", "interface_v1"),
        (HybridCacheController, "should_backup", "HybridCacheController.should_backup", "draft"),
        (common, "get_allocator_from_storage", "common.get_allocator_from_storage", '"allocator":"shm"'),
        (ServerArgs, "resolve_once", "ServerArgs.resolve_once", "--kv-events-config"),
        (SchedulerKvEventsPublisher, "publish_kv_events", "init_kv_events", "not reported"),
        (SchedulerMetricsReporter, "report_decode_stats", "report_decode_stats", "delay"),
        (UnifiedRadixCache, "write_backup_storage", "write_backup_storage", "wrong name"),
        (BufferModePipeline, "enqueue_backup_intent", "enqueue_backup_intent", "wrong name"),
    ],
)
def test_one_missing_place_costs_what_stood_there(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    owner: Any,
    name: str,
    lost: str,
    advice: str,
) -> None:
    monkeypatch.delattr(owner, name)
    umbp_sglang.register()
    (said,) = warnings(caplog)
    assert name in said
    assert advice in said
    assert {target for target in TARGETS if not target.endswith(lost)} == set(hooks())
    assert registered() == "umbp_sglang.store"


def test_a_factory_of_publishers_that_changed_costs_the_name_only(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delattr(EventPublisherFactory, "register_publisher")
    umbp_sglang.register()
    (said,) = warnings(caplog)
    assert "register_publisher" in said
    assert set(hooks()) == set(TARGETS)


@pytest.mark.parametrize("name", ["_create_builtin_backend", "register_backend"])
def test_a_factory_that_changed_is_left_alone(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    """The name must not be offered then: the server would end after its model is loaded."""
    monkeypatch.delattr(StorageBackendFactory, name)
    umbp_sglang.register()
    assert (registered(), hooks()) == (None, {})
    (said,) = warnings(caplog)
    assert name in said
    assert registration.DYNAMIC in said


def test_other_parameters_are_another_function(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def create(backend_name: str, config: object) -> None:
        """A later SGLang's."""

    monkeypatch.setattr(StorageBackendFactory, "_create_builtin_backend", staticmethod(create))
    umbp_sglang.register()
    (said,) = warnings(caplog)
    assert "takes (backend_name, config)" in said
    assert registered() is None


def test_no_plugin_framework_is_one_line(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setitem(sys.modules, "sglang.srt.plugins.hook_registry", None)
    umbp_sglang.register()
    assert warnings(caplog) == ["umbp could not be registered; SGLang goes on without it"]


def test_a_failed_import_does_not_raise(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setitem(sys.modules, "umbp_sglang.registration", None)
    monkeypatch.delattr(umbp_sglang, "registration")
    umbp_sglang.register()
    assert len(warnings(caplog)) == 1
