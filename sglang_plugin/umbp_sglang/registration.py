"""What ``register()`` does: the backend's name in SGLang's factory, and the hooks that give the name its meaning.

SGLang's registry knows names, but other places of its code decide by the name what a backend can do.  Each hook is
probed first: where SGLang changed, one sentence says what to use instead, and the start goes on.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from umbp_sglang import compat, hooks, reporting_hooks
from umbp_sglang.hooks import BACKEND
from umbp_sglang.reporting_hooks import PUBLISHER

NO_HOOKS = "UMBP_SGLANG_NO_HOOKS"
"""Kill switch: with this variable set nothing is registered, and only ``dynamic`` starts the backend."""
OVERRIDE = "UMBP_SGLANG_OVERRIDE"
"""With this variable set, our backend takes the name even where SGLang has a backend of that name itself."""

STORE_MODULE = "umbp_sglang.store"
STORE_CLASS = "UMBPStore"
DYNAMIC = (
    "--hicache-storage-backend dynamic --hicache-storage-backend-extra-config "
    f'\'{{"backend_name":"{BACKEND}","module_path":"{STORE_MODULE}","class_name":"{STORE_CLASS}","interface_v1":1}}\''
)
"""The form that needs no hook at all."""

FACTORY = "sglang.srt.mem_cache.storage.backend_factory:StorageBackendFactory"
_CONTROLLER = "sglang.srt.managers.cache_controller:HiCacheController"
_REGISTRY = "sglang.srt.plugins.hook_registry:HookRegistry"
_KINDS = "sglang.srt.plugins.hook_registry:HookType"
_HYBRID = "sglang.srt.mem_cache.hybrid_cache.hybrid_cache_controller:HybridCacheController"
_NO = frozenset({"", "0", "false", "no", "off"})
_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Hook:
    """One change of SGLang in memory: where, how (a name of ``HookType``), with what, and what it rests on.

    ``without`` completes the sentence "this SGLang is not as expected, so ..."; ``needs`` are further places that the
    hook uses.
    """

    name: str
    target: str
    parameters: Sequence[str]
    kind: str
    function: Callable[..., Any]
    without: str
    needs: Sequence[str] = ()

    def probe(self) -> None:
        """Raise ``LookupError`` where SGLang has not what the hook rests on."""
        compat.require_parameters(self.target, self.parameters)
        for place in self.needs:
            compat.find(place)


FACTORY_HOOK = Hook(
    "factory",
    f"{FACTORY}._create_builtin_backend",
    ("backend_name", "backend_class", "storage_config", "mem_pool_host"),
    "AROUND",
    hooks.create_backend,
    f"it cannot make the backend {BACKEND}; use {DYNAMIC}",
    needs=(f"{FACTORY}.register_backend",),
)
"""Without this one the name must not be offered: it would be refused only after the model is loaded."""

MORE_HOOKS = (
    Hook(
        "command line",
        "sglang.srt.server_args:ServerArgs.add_cli_args",
        ("parser",),
        "AFTER",
        hooks.offer_choice,
        f"its command line does not take {BACKEND}; use {DYNAMIC}",
    ),
    Hook(
        "zero copy",
        f"{_CONTROLLER}._start_storage_threads",
        ("self",),
        "BEFORE",
        hooks.use_zero_copy,
        f"{BACKEND} would get copies of pages instead of their addresses, which is slow; use {DYNAMIC}",
        needs=(f"{_CONTROLLER}._page_get_zero_copy", f"{_CONTROLLER}._page_set_zero_copy"),
    ),
    Hook(
        "draft heads",
        f"{_HYBRID}.should_backup",
        ("self", "transfer"),
        "AROUND",
        hooks.backs_up,
        "a draft model's heads beside KV that all ranks share are not stored by every rank, which costs its hits",
    ),
    Hook(
        "host pool",
        "sglang.srt.mem_cache.pool_host.common:get_allocator_from_storage",
        ("allocator_type",),
        "AROUND",
        hooks.choose_allocator,
        'the host pool lies in ordinary memory; for "allocator":"shm" use ' + DYNAMIC,
    ),
)


_PUBLISHER = "sglang.srt.managers.scheduler_components.kv_events_publisher:SchedulerKvEventsPublisher"
_EVENTS = "sglang.srt.disaggregation.kv_events"
_FACTORY = f"{_EVENTS}:EventPublisherFactory"
_CACHE = "sglang.srt.mem_cache.unified_radix_cache:UnifiedRadixCache"
_L3_ONLY = "with a master, what lies on the device and in the host pool is not reported"
_UNNAMED = (
    "with a master, pages of requests with a cache_salt, an extra_key or an adapter may be reported by a wrong name"
)

REPORTING_HOOKS = (
    Hook(
        "events",
        "sglang.srt.server_args:ServerArgs.resolve_once",
        ("self",),
        "BEFORE",
        reporting_hooks.ask_for_events,
        f"{_L3_ONLY} unless --kv-events-config is given",
    ),
    Hook(
        "publisher",
        f"{_PUBLISHER}.init_kv_events",
        ("self", "kv_events_config"),
        "AFTER",
        reporting_hooks.follow_events,
        _L3_ONLY,
        needs=(f"{_PUBLISHER}.publish_kv_events", f"{_EVENTS}:EventPublisher", f"{_EVENTS}:StorageMedium"),
    ),
    Hook(
        "every step",
        "sglang.srt.managers.scheduler_components.metrics_reporter:SchedulerMetricsReporter.report_decode_stats",
        ("self",),
        "AFTER",
        reporting_hooks.publish_each_step,
        "with a master, what decoding adds is reported with a delay",
    ),
    Hook(
        "names of stored pages",
        f"{_CACHE}.write_backup_storage",
        ("self", "node_id"),
        "BEFORE",
        reporting_hooks.describe_backup,
        _UNNAMED,
    ),
    Hook(
        "names of buffered pages",
        "sglang.srt.mem_cache.buffer_mode.pipeline:BufferModePipeline.enqueue_backup_intent",
        ("self", "node_id"),
        "BEFORE",
        reporting_hooks.describe_buffered,
        _UNNAMED,
    ),
    Hook(
        "names of pages asked for",
        f"{_HYBRID}._storage_hit_query",
        ("self", "operation"),
        "AFTER",
        reporting_hooks.describe_query,
        _UNNAMED,
    ),
)
"""What a configured master needs; without one they do nothing."""


def register() -> None:
    """Register the backend and its hooks, or say why not.  SGLang applies hooks when all plug-ins have run.

    Raises what importing SGLang's plug-in framework raises.
    """
    if is_set(os.environ, NO_HOOKS):
        return
    registry = compat.find(_REGISTRY)
    try:
        FACTORY_HOOK.probe()
        factory = compat.find(FACTORY)
    except LookupError as error:
        _say(error, FACTORY_HOOK)
        return
    owner = other_owner(factory)
    if owner and not is_set(os.environ, OVERRIDE):
        _logger.warning(
            "umbp: this SGLang has a backend %s of its own (%s), which is used; for ours use %s, or set %s=1",
            BACKEND,
            owner,
            DYNAMIC,
            OVERRIDE,
        )
        return
    if owner or BACKEND not in _registered(factory):
        factory.register_backend(BACKEND, STORE_MODULE, STORE_CLASS)
    _install(registry, FACTORY_HOOK)
    _register_publisher()
    for hook in (*MORE_HOOKS, *REPORTING_HOOKS):
        try:
            hook.probe()
        except LookupError as error:
            _say(error, hook)
        else:
            _install(registry, hook)


def _register_publisher() -> None:
    """Make our publisher's name known; SGLang refuses a name that it has."""
    try:
        factory = compat.find(_FACTORY)
        compat.require_parameters(f"{_FACTORY}.register_publisher", ("name", "ctor"))
    except LookupError as error:
        _logger.warning("umbp: this SGLang is not as expected (%s), so %s", error, _L3_ONLY)
        return
    if PUBLISHER not in compat.optional(factory, "_registry", {}):
        factory.register_publisher(PUBLISHER, reporting_hooks.make_publisher)


def is_set(env: Mapping[str, str], name: str) -> bool:
    """Whether the variable ``name`` says yes."""
    return env.get(name, "").strip().lower() not in _NO


def other_owner(factory: Any) -> str:
    """Where the backend of our name lies that is not ours; empty when there is none."""
    entry = _registered(factory).get(BACKEND)
    if entry is None or entry.get("module_path") == STORE_MODULE:
        return ""
    return f"{entry.get('module_path')}.{entry.get('class_name')}"


def is_applied(hook: Hook) -> bool:
    """Whether SGLang has put ``hook`` into its place."""
    registry = compat.find(_REGISTRY)
    return _is_known(registry, hook) and _dotted(hook) in registry._patched


def _is_known(registry: Any, hook: Hook) -> bool:
    return any(given is hook.function for _, given, *_ in registry._hooks.get(_dotted(hook), ()))


def _install(registry: Any, hook: Hook) -> None:
    if not _is_known(registry, hook):
        registry.register(_dotted(hook), hook.function, compat.find(_KINDS)[hook.kind])


def _dotted(hook: Hook) -> str:
    return hook.target.replace(":", ".")


def _registered(factory: Any) -> Mapping[str, Any]:
    known: Mapping[str, Any] = compat.optional(factory, "_registry", {})
    return known


def _say(error: LookupError, hook: Hook) -> None:
    _logger.warning("umbp: this SGLang is not as expected (%s), so %s", error, hook.without)
