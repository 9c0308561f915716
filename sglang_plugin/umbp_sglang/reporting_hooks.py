"""The hooks of reporting: where SGLang's events become ours, and where it says which namespace a page has.

They run in SGLang's threads, the scheduler's among them: each appends at most, and nothing that goes wrong in them
reaches SGLang.
"""

from __future__ import annotations

import functools
import json
import logging
from collections.abc import Callable
from typing import Any

from umbp_connectors.config import resolve
from umbp_connectors.config_model import UmbpConfig
from umbp_core.errors import ConfigError
from umbp_sglang import compat
from umbp_sglang.hooks import BACKEND
from umbp_sglang.page_ids import Description
from umbp_sglang.settings import ENGINE_KEYS

PUBLISHER = "umbp"
"""The name of our publisher in ``--kv-events-config``."""
EVENTS = json.dumps({"publisher": PUBLISHER, "endpoint": f"inproc://{PUBLISHER}"})
"""What ``--kv-events-config`` is set to when a master is configured and the user set nothing.  The endpoint is none
that anybody could connect to, so that SGLang does not announce it."""

_OUR_MODULE = "umbp_sglang.store"
_PARSER = (
    "sglang.srt.mem_cache.hybrid_cache.hybrid_cache_controller:HybridCacheController.parse_storage_backend_extra_config"
)
_KEY = "sglang.srt.mem_cache.radix_cache:RadixKey"
_logger = logging.getLogger(__name__)


def quiet(hook: Callable[..., None]) -> Callable[..., None]:
    """``hook`` with everything that it raises logged, once, and kept from SGLang."""
    logged: list[BaseException] = []

    @functools.wraps(hook)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            hook(*args, **kwargs)
        except Exception as error:  # engine boundary: its own threads run this
            if not logged:
                logged.append(error)
                _logger.exception("umbp: %s failed; the master may be told less than there is", hook.__name__)

    return run


def make_publisher(attn_dp_rank: int = 0, **_options: object) -> Any:
    """What SGLang's factory calls for ``{"publisher": "umbp"}``."""
    return compat.find("umbp_sglang.publisher:UmbpEventPublisher")()


@quiet
def ask_for_events(arguments: Any) -> None:
    """Before ``ServerArgs.resolve_once``: have SGLang record its events when a master is configured."""
    if arguments.kv_events_config or not arguments.enable_hierarchical_cache or not _is_ours(arguments):
        return
    config = _configured(arguments.hicache_storage_backend_extra_config)
    if config is not None and config.report and config.master_address:
        arguments.kv_events_config = EVENTS


@quiet
def follow_events(_result: object, component: Any, *_args: object, **_kwargs: object) -> None:
    """After ``SchedulerKvEventsPublisher.init_kv_events``: our publisher hears what the tree does.

    SGLang's own publisher, where the user has configured one, goes on behind it.  Ranks that publish nothing need to
    know how the one that does names its pages.
    """
    kind = compat.find("umbp_sglang.publisher:UmbpEventPublisher")
    publisher = component.kv_event_publisher
    reporting = _reporting_of(component.tree_cache, alone=isinstance(publisher, kind))
    if reporting is None:
        return
    core = compat.optional(component.tree_cache, "tree_core")
    events = compat.optional(core, "kv_events")
    names = compat.optional(events, "_lora_names", compat.optional(events, "lora_names"))
    dynamo = compat.optional(events, "_dynamo_format", compat.optional(events, "dynamo_format", False))
    reporting.read_names(names, bool(dynamo))
    if not component.enable_kv_cache_events:
        return
    if not isinstance(publisher, kind):
        publisher = kind(publisher)
    publisher.reporting = reporting
    reporting.hold("events")
    component.kv_event_publisher = publisher
    if component.kv_events_config == EVENTS:
        # Nobody asked for the figures that SGLang sends with events, and nobody reads them: they would pile up.
        component.send_metrics_from_scheduler = _NobodyReads()


@quiet
def publish_each_step(_result: object, reporter: Any, *_args: object, **_kwargs: object) -> None:
    """After ``report_decode_stats``, in which SGLang publishes every forty steps only."""
    component = reporter.scheduler.kv_events_publisher
    if component.kv_events_config == EVENTS:
        component.publish_kv_events()


@quiet
def describe_backup(cache: Any, node_id: Any) -> None:
    """Before ``UnifiedRadixCache.write_backup_storage``: which namespace the pages have that are to be stored."""
    namespace = cache.tree_core.prefetch_anchor_info(node_id)
    if namespace == (None, None) or cache.cache_controller is None:
        return
    reporting = _found(cache.cache_controller)
    spec = cache.tree_core.build_storage_backup_spec(node_id, True) if reporting is not None else None
    if reporting is None or spec is None:
        return
    extra_key, cache_salt = namespace
    key = compat.find(_KEY)(
        spec.token_ids, extra_key=extra_key, is_bigram=cache.tree_core.is_eagle, cache_salt=cache_salt
    )
    parent = spec.prefix_keys[-1] if spec.prefix_keys else None
    reporting.describe(Description(key, parent, spec.hash_value))


@quiet
def describe_buffered(pipeline: Any, node_id: Any) -> None:
    """Before ``enqueue_backup_intent``: the same where host memory is a buffer only."""
    cache = pipeline._cache
    if cache.tree_core.prefetch_anchor_info(node_id) == (None, None) or cache.cache_controller is None:
        return
    reporting = _found(cache.cache_controller)
    found = cache.tree_core.snapshot_buffer_backup(node_id, False) if reporting is not None else None
    if reporting is not None and found is not None:
        reporting.describe(Description(found.key, found.parent_last_hash, found.hash_values))


@quiet
def describe_query(_result: object, controller: Any, operation: Any) -> None:
    """After ``_storage_hit_query``, in the thread of prefetches: which pages a request asked L3 for."""
    key = operation.token_ids
    if key.extra_key is None and key.cache_salt is None:
        return
    reporting = _found(controller)
    if reporting is not None and operation.all_hash_values:
        reporting.describe(Description(key, operation.last_hash, operation.all_hash_values))
        controller.storage_backend.tell_names()


class _NobodyReads:
    """In the place of a socket that SGLang asks whether it is closed before it sends."""

    closed = True


def _is_ours(arguments: Any) -> bool:
    name = arguments.hicache_storage_backend
    return name == BACKEND or (name == "dynamic" and _OUR_MODULE in str(arguments.hicache_storage_backend_extra_config))


def _configured(extra: str | None) -> UmbpConfig | None:
    """Our configuration as the store will have it; ``None`` where it is wrong, which the store will say."""
    try:
        given, *_ = compat.find(_PARSER)(extra)
        return resolve(given, engine_keys=ENGINE_KEYS).config
    except (ConfigError, LookupError, OSError, ValueError):
        return None


def _found(controller: Any) -> Any:
    """What reports for the storage of ``controller``, ``None`` when that is none of ours or nothing is reported."""
    return compat.optional(compat.optional(controller, "storage_backend"), "reporting")


def _reporting_of(cache: Any, alone: bool) -> Any:
    """What the store reports with; without one, what the environment configures for a publisher ``alone``."""
    reporting = _found(compat.optional(cache, "cache_controller"))
    if reporting is not None or not alone:
        return reporting
    config = _configured(None)
    if config is None:
        return None
    model = compat.optional(compat.find("sglang.srt.runtime_context:get_serving")(), "served_model_name") or ""
    return compat.find("umbp_sglang.reporting:open_reporting")(config, str(model), int(cache.page_size))
