"""Our connector against the base class of the installed vLLM: what it must have, and that it takes every call."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import pytest

from tests.vllm.contract.releases import ADDED, NEVER, REMOVED, installed_release
from umbp_vllm import compat
from umbp_vllm.connector import UmbpConnector
from umbp_vllm.metadata import HandshakeHello, StepMetadata, WorkerReport

BASE = compat.KVConnectorBase_V1
MEMBERS = {
    *ADDED,
    *REMOVED,
    "bind_connector_metadata",
    "bind_gpu_block_pool",
    "build_connector_meta",
    "build_connector_worker_meta",
    "build_kv_connector_stats",
    "build_prom_metrics",
    "clear_connector_metadata",
    "get_block_ids_with_load_errors",
    "get_finished",
    "get_finished_count",
    "get_handshake_metadata",
    "get_kv_connector_kv_cache_events",
    "get_kv_connector_stats",
    "get_num_new_matched_tokens",
    "get_required_kvcache_layout",
    "handle_preemptions",
    "has_connector_metadata",
    "has_pending_push_work",
    "on_new_request",
    "register_kv_caches",
    "request_finished",
    "requires_kv_delivery",
    "requires_piecewise_for_cudagraph",
    "reset_cache",
    "role",
    "save_kv_layer",
    "set_host_xfer_buffer_ops",
    "set_xfer_handshake_metadata",
    "set_xfer_handshake_metadata_pp_aware",
    "shutdown",
    "start_load_kv",
    "supports_divergent_local_hybrid_hits",
    "take_events",
    "update_connector_output",
    "update_state_after_alloc",
    "wait_for_layer_load",
    "wait_for_save",
}
ABSTRACT = {
    "build_connector_meta",
    "get_num_new_matched_tokens",
    "save_kv_layer",
    "start_load_kv",
    "update_state_after_alloc",
    "wait_for_layer_load",
    "wait_for_save",
}


def expected_members(release: tuple[int, int]) -> set[str]:
    return {name for name in MEMBERS if ADDED.get(name, (0, 0)) <= release < REMOVED.get(name, NEVER)}


def public(cls: type) -> set[str]:
    return {name for name in vars(cls) if not name.startswith("_")}


def test_the_installed_base_class_has_the_members_we_know() -> None:
    found, expected = public(BASE), expected_members(installed_release())
    assert found == expected, (
        f"vLLM {compat.vllm_version()} changed KVConnectorBase_V1: new {sorted(found - expected)}, gone "
        f"{sorted(expected - found)}. For each new one read its docstring and its callers (scheduler, model runners, "
        "engine core), decide whether the default is right for a cache, then note it here and in docs/vllm-versions.md."
    )


def test_the_installed_base_class_asks_for_what_we_know() -> None:
    assert BASE.__abstractmethods__ == ABSTRACT
    assert compat.SupportsHMA.__abstractmethods__ == {"request_finished_all_groups"}
    assert compat.KVConnectorWorkerMetadata.__abstractmethods__ == {"aggregate"}


def test_nothing_abstract_is_left() -> None:
    for cls in (UmbpConnector, StepMetadata, WorkerReport, HandshakeHello):
        assert not cls.__abstractmethods__, cls
    assert issubclass(UmbpConnector, BASE)
    assert issubclass(UmbpConnector, compat.SupportsHMA)


def overridden() -> Iterator[tuple[str, type]]:
    for base in (BASE, compat.SupportsHMA):
        for name in sorted(vars(UmbpConnector).keys() & vars(base).keys()):
            if callable(inspect.getattr_static(base, name)) or isinstance(
                inspect.getattr_static(base, name), (classmethod, staticmethod, property)
            ):
                yield name, base


def kind_of(cls: type, name: str) -> type:
    found = inspect.getattr_static(cls, name)
    return type(found) if isinstance(found, (classmethod, staticmethod, property)) else type(lambda: None)


OVERRIDDEN = [pair for pair in overridden() if not pair[0].startswith("__")]


def test_the_methods_of_both_generations_are_ours() -> None:
    # Up to 0.29 vLLM calls get_finished, later get_transfer_results; the defaults would report nothing.
    names = {name for name, _ in OVERRIDDEN}
    assert names >= ABSTRACT | {"get_finished", "request_finished", "request_finished_all_groups"}
    assert names >= {"get_block_ids_with_load_errors", "requires_kv_delivery", "has_pending_push_work", "shutdown"}
    assert "get_transfer_results" in vars(UmbpConnector)


@pytest.mark.parametrize(("name", "base"), OVERRIDDEN, ids=[name for name, _ in OVERRIDDEN])
def test_an_override_is_of_the_same_kind_and_takes_the_same_calls(name: str, base: type) -> None:
    assert kind_of(UmbpConnector, name) is kind_of(base, name)
    if isinstance(inspect.getattr_static(base, name), property):
        return
    take_all_calls(getattr(UmbpConnector, name), getattr(base, name))


def take_all_calls(ours: Any, theirs: Any) -> None:
    """Raise ``TypeError`` when ``ours`` refuses a call that ``theirs`` allows."""
    for args, kwargs in calls_of(inspect.signature(theirs)):
        inspect.signature(ours).bind(*args, **kwargs)


def calls_of(signature: inspect.Signature) -> Iterator[tuple[list[str], dict[str, Any]]]:
    """Calls that a signature allows: all by position, all by name, and only what is mandatory."""
    parameters = list(signature.parameters.values())
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    named = {p.name: p.name for p in parameters if p.kind is p.KEYWORD_ONLY}
    extra = {"anything_else": 1} if any(p.kind is p.VAR_KEYWORD for p in parameters) else {}
    first = [p.name for p in positional[:1] if p.name == "self"]
    rest = [p for p in positional if p.name != "self"]
    yield [p.name for p in positional], {**named, **extra}
    yield first, {**{p.name: p.name for p in rest}, **named, **extra}
    yield first + [p.name for p in rest if p.default is p.empty], {}


def test_the_constructor_takes_what_the_factory_gives() -> None:
    # KVConnectorFactory refuses classes without a parameter of this name.
    parameters = list(inspect.signature(UmbpConnector).parameters)
    assert parameters[:3] == ["vllm_config", "role", "kv_cache_config"]
    assert list(inspect.signature(BASE).parameters) == ["vllm_config", "role", "kv_cache_config"]


def test_a_changed_member_would_be_noticed() -> None:
    assert expected_members((0, 28)) ^ expected_members((0, 29)) == set(REMOVED)
    assert expected_members((0, 32)) - expected_members((0, 31)) == {
        "get_external_cache_hit_sources",
        "get_loaded_kv_cache_group_ids",
    }


def test_an_incompatible_override_would_be_noticed() -> None:
    def theirs(self: object, request: object, blocks: object, *, more: int = 0) -> None: ...
    def renamed(self: object, request: object, block: object, *, more: int = 0) -> None: ...
    def shorter(self: object, request: object) -> None: ...

    for ours in (renamed, shorter):
        with pytest.raises(TypeError):
            take_all_calls(ours, theirs)
    take_all_calls(theirs, theirs)
