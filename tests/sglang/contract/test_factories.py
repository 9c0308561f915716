"""The doors by which a backend, an allocator, an event publisher and a plug-in come in."""

from __future__ import annotations

import ast
import inspect
import os
import subprocess
import sys
from typing import Any

import pytest
from sglang.srt.disaggregation.kv_events import EventPublisher, EventPublisherFactory
from sglang.srt.mem_cache.hicache_storage import HiCacheStorageConfig
from sglang.srt.mem_cache.pool_host import common
from sglang.srt.mem_cache.storage.backend_factory import StorageBackendFactory
from sglang.srt.plugins import GENERAL_PLUGINS_GROUP, hook_registry
from sglang.srt.plugins.hook_registry import HookRegistry, HookType
from sglang.srt.server_args import ServerArgs

from umbp_sglang.store import UMBPStore


def names(function: Any) -> list[str]:
    return list(inspect.signature(function).parameters)


def config_of(**extra: object) -> HiCacheStorageConfig:
    return HiCacheStorageConfig(0, 1, 0, 1, 0, 1, False, False, True, "tiny", extra_config=dict(extra))


def test_storage_factory() -> None:
    assert names(StorageBackendFactory.register_backend) == ["name", "module_path", "class_name"]
    assert names(StorageBackendFactory.create_backend) == ["backend_name", "storage_config", "mem_pool_host", "kwargs"]
    made = ["backend_name", "backend_class", "storage_config", "mem_pool_host"]
    assert names(StorageBackendFactory._create_builtin_backend) == made


def test_a_registered_backend_is_not_made_without_our_hook(monkeypatch: pytest.MonkeyPatch) -> None:
    """The factory knows the names that it can make; when that ends, the hook is no longer needed."""
    monkeypatch.setattr(StorageBackendFactory, "_registry", dict(StorageBackendFactory._registry))
    StorageBackendFactory.register_backend("umbp_unhooked", "umbp_sglang.store", "UMBPStore")
    with pytest.raises(ValueError, match="Unknown built-in backend: umbp_unhooked"):
        StorageBackendFactory.create_backend("umbp_unhooked", config_of(), None)


def test_dynamic_passes_the_configuration_and_an_empty_dict(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[tuple[object, ...]] = []

    class Recorded(UMBPStore):
        def __init__(self, *arguments: object) -> None:
            made.append(arguments)

    monkeypatch.setattr("umbp_sglang.store.UMBPStore", Recorded)
    config = config_of(backend_name="umbp", module_path="umbp_sglang.store", class_name="UMBPStore")
    StorageBackendFactory.create_backend("dynamic", config, None)
    assert made == [(config, {})]


def test_the_failure_injector_wraps_what_the_factory_makes() -> None:
    source = inspect.getsource(StorageBackendFactory.create_backend)
    assert "_maybe_wrap_hicache_storage_failure_injector(backend)" in source


def test_event_publishers() -> None:
    assert names(EventPublisherFactory.register_publisher) == ["name", "ctor"]
    assert names(EventPublisherFactory.create) == ["config", "attn_dp_rank"]
    assert EventPublisher.__abstractmethods__ == {"publish", "shutdown"}
    assert names(EventPublisher.publish) == ["self", "events"]
    assert EventPublisherFactory._registry.keys() - {"umbp"} == {"null", "zmq"}, "the name of ours is free"


def test_a_publisher_gets_the_rank_and_the_rest_of_its_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, object] = {}

    class Publisher(EventPublisher):
        def __init__(self, **given: object) -> None:
            seen.update(given)

        def publish(self, events: object) -> None:
            """Nothing is published."""

        def shutdown(self) -> None:
            """Nothing is open."""

    monkeypatch.setattr(EventPublisherFactory, "_registry", dict(EventPublisherFactory._registry))
    EventPublisherFactory.register_publisher("theirs", Publisher)
    EventPublisherFactory.create('{"publisher": "theirs", "topic": "t"}', attn_dp_rank=3)
    assert set(seen) == {
        "attn_dp_rank",
        "bind",
        "buffer_steps",
        "endpoint",
        "hwm",
        "max_queue_size",
        "replay_endpoint",
        "topic",
    }
    assert (seen["attn_dp_rank"], seen["topic"]) == (3, "t")


def test_hooks() -> None:
    assert GENERAL_PLUGINS_GROUP == "sglang.srt.plugins"
    assert {member.name for member in HookType} == {"BEFORE", "AFTER", "AROUND", "REPLACE"}
    assert names(HookRegistry.register) == ["target", "hook", "hook_type", "source"]
    assert "_current_plugin_source" in vars(hook_registry)


def test_what_our_hooks_aim_at_is_there() -> None:
    assert names(ServerArgs.add_cli_args) == ["parser"]
    assert isinstance(inspect.getattr_static(ServerArgs, "add_cli_args"), staticmethod)
    assert isinstance(inspect.getattr_static(StorageBackendFactory, "_create_builtin_backend"), classmethod)
    assert names(common.get_allocator_from_storage) == ["allocator_type"]
    assert names(common.get_allocator_type) == []


def test_the_shared_memory_allocator_tells_its_descriptor() -> None:
    """The host pool in a memfd: another process of this host can map the same pages."""
    import torch

    allocator = common.get_allocator_from_storage("shm")
    pages = allocator.allocate((2, 64, 4096), torch.uint8, "cpu")
    assert pages.shape == (2, 64, 4096)
    pages[1, 63] = 7
    script = "import mmap, os, sys; print(set(mmap.mmap(os.open(sys.argv[1], os.O_RDONLY), 0, prot=1)[-4096:]))"
    path = f"/proc/{os.getpid()}/fd/{allocator.fd}"
    done = subprocess.run([sys.executable, "-c", script, path], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "{7}\n"


def test_plugins_are_loaded_before_arguments_are_read() -> None:
    """Without it, `--hicache-storage-backend umbp` would be refused as an invalid choice."""
    from pathlib import Path

    import sglang

    for file, parse in (("launch_server.py", "prepare_server_args("), ("cli/serve.py", "parse_args(")):
        text = ast.unparse(ast.parse((Path(sglang.__file__).parent / file).read_text(encoding="utf-8")))
        assert "load_plugins()" in text, file
        assert parse in text or "prepare_server_args" in text, file
