"""What each hook does in its place, with SGLang's own code around it."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from sglang.srt.mem_cache.hicache_storage import PoolName, PoolTransfer
from sglang.srt.mem_cache.hybrid_cache.hybrid_cache_controller import HybridCacheController
from sglang.srt.mem_cache.pool_host import common
from sglang.srt.mem_cache.pool_host.mamba import MambaPoolHost
from sglang.srt.mem_cache.pool_host.mha import MHATokenToKVPoolHost
from sglang.srt.mem_cache.pool_host.mla import MLATokenToKVPoolHost
from sglang.srt.mem_cache.storage.backend_factory import StorageBackendFactory
from sglang.srt.plugins.hook_registry import HookRegistry
from sglang.srt.server_args import ServerArgs

import umbp_sglang
from umbp_core.errors import ConfigError
from umbp_sglang import allocator, hooks


def choices(parser: argparse.ArgumentParser) -> list[str]:
    return list(parser._option_string_actions[hooks.OPTION].choices or ())


def test_the_option_takes_one_more_name() -> None:
    plain, extended = argparse.ArgumentParser(), argparse.ArgumentParser()
    add = ServerArgs.add_cli_args
    original = getattr(add, "__wrapped__", add)
    original(plain)
    original(extended)
    for _ in range(2):
        hooks.offer_choice(None, extended)
    assert choices(extended) == [*choices(plain), "umbp"]
    assert "umbp" not in choices(plain)


def test_an_sglang_without_the_option_starts(caplog: pytest.LogCaptureFixture) -> None:
    hooks.offer_choice(None, argparse.ArgumentParser())
    (record,) = [each for each in caplog.records if each.levelno >= logging.WARNING]
    assert hooks.OPTION in record.getMessage()


def test_an_option_without_choices_takes_everything_already() -> None:
    parser = argparse.ArgumentParser()
    action = parser.add_argument(hooks.OPTION)
    hooks.offer_choice(None, parser)
    assert action.choices is None


@pytest.mark.usefixtures("registries")
def test_sglangs_factory_makes_our_store_and_still_the_others(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    made = []

    class Store:
        def __init__(self, *arguments: object) -> None:
            made.append(arguments)

    original = StorageBackendFactory.__dict__["_create_builtin_backend"]
    monkeypatch.setattr(StorageBackendFactory, "_create_builtin_backend", original)  # put back after the test
    monkeypatch.setattr(StorageBackendFactory, "_load_backend_class", staticmethod(lambda *_: Store))
    umbp_sglang.register()
    target = "sglang.srt.mem_cache.storage.backend_factory.StorageBackendFactory._create_builtin_backend"
    HookRegistry._apply_target(target, HookRegistry._hooks[target])
    StorageBackendFactory._do_create_backend("umbp", "config", "pool")
    StorageBackendFactory._create_builtin_backend("file", Store, "config", "pool")
    assert made == [("config", "pool"), ("config",)]


def test_only_our_pages_go_by_their_addresses() -> None:
    def controller(backend: str) -> Any:
        return SimpleNamespace(
            storage_backend_type=backend,
            page_get_func="copies",
            page_set_func="copies",
            _page_get_zero_copy="addresses",
            _page_set_zero_copy="addresses",
        )

    ours, theirs = controller("umbp"), controller("file")
    for each in (ours, theirs):
        assert hooks.use_zero_copy(each) is None, "a hook that returns something would change the arguments"
    assert (ours.page_get_func, ours.page_set_func) == ("addresses", "addresses")
    assert (theirs.page_get_func, theirs.page_set_func) == ("copies", "copies")


class Options:
    """SGLang's start options as far as the allocator asks."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, text: str | None) -> None:
        options = SimpleNamespace(hicache_storage_backend="umbp", hicache_storage_backend_extra_config=text)
        monkeypatch.setattr("sglang.srt.runtime_context.get_memory", lambda: options)


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ('{"allocator": "shm", "dram_capacity": "1GiB"}', "ShmHostTensorAllocator"),
        ('{"allocator": "default"}', "HostTensorAllocator"),
        ("{}", "HostTensorAllocator"),
        (None, "HostTensorAllocator"),
        ("{ this is not JSON", "HostTensorAllocator"),
        ("@/no/such/file.json", "HostTensorAllocator"),
    ],
)
def test_the_host_pool_lies_where_the_configuration_says(
    monkeypatch: pytest.MonkeyPatch, text: str | None, kind: str
) -> None:
    Options(monkeypatch, text)
    original = getattr(common.get_allocator_from_storage, "__wrapped__", common.get_allocator_from_storage)
    assert type(hooks.choose_allocator(original, "umbp")).__name__ == kind


@pytest.mark.parametrize("suffix", ["json", "toml"])
def test_the_allocator_is_read_from_a_file_too(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"extra.{suffix}"
    path.write_text('{"allocator": "shm"}' if suffix == "json" else 'allocator = "shm"', encoding="utf-8")
    Options(monkeypatch, f"@{path}")
    assert allocator.configured() == "shm"


def test_other_backends_keep_their_allocator(monkeypatch: pytest.MonkeyPatch) -> None:
    Options(monkeypatch, '{"allocator": "shm"}')
    asked = []
    hooks.choose_allocator(asked.append, "mooncake")
    assert asked == ["mooncake"]


def test_an_allocator_that_does_not_exist_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    Options(monkeypatch, '{"allocator": "hugepages"}')
    with pytest.raises(ConfigError, match="'hugepages' is not known; use 'shm'"):
        allocator.configured()


def test_an_sglang_that_reads_its_configuration_elsewhere_keeps_its_allocator(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delattr("sglang.srt.runtime_context.get_memory")
    assert allocator.configured() is None
    assert "get_memory" in caplog.text


def asked_to_back_up(backend: str, name: PoolName, pool: object) -> bool:
    """What SGLang's own method and our hook around it say on a rank that does not write the KV that all ranks share."""
    controller = SimpleNamespace(
        backup_skip=True,
        storage_backend_type=backend,
        mem_pool_host=SimpleNamespace(entry_map={name: SimpleNamespace(host_pool=pool)}),
    )
    method = HybridCacheController.should_backup
    original = getattr(method, "__wrapped__", method)
    return hooks.backs_up(original, controller, PoolTransfer(name))


@pytest.mark.parametrize(
    ("backend", "name", "kind", "expected"),
    [
        ("umbp", PoolName.DRAFT, MHATokenToKVPoolHost, True),
        ("umbp", PoolName.DRAFT_SWA, MHATokenToKVPoolHost, True),
        ("umbp", PoolName.DRAFT, MLATokenToKVPoolHost, False),
        ("umbp", PoolName.KV, MHATokenToKVPoolHost, False),
        ("umbp", PoolName.MAMBA, MambaPoolHost, True),
        ("file", PoolName.DRAFT, MHATokenToKVPoolHost, False),
    ],
)
def test_each_rank_stores_its_own_heads_of_a_draft(backend: str, name: PoolName, kind: type, expected: bool) -> None:
    assert asked_to_back_up(backend, name, kind.__new__(kind)) is expected
