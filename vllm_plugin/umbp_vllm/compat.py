"""Every difference between the supported vLLM versions, and nothing else.

Supported are 0.28 up to and including 0.33; ``docs/vllm-versions.md`` says what differs and where it was
looked up.  Outside the range the connector is still tried, after one sentence in the log.  This is the only
module of the adapter that asks for attributes which may not be there.  Importing it imports vLLM's
connector base class, so it belongs into the connector's modules, never into ``umbp_vllm`` itself.
"""

from __future__ import annotations

import enum
import importlib
import re
import socket
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1 import base as _base

MINIMUM = (0, 28)
"""First supported version."""
BELOW = (0, 34)
"""First version after the supported ones."""

_TAGGED_HASH_KEYS = (0, 31)
_FIXED_NONE_HASH = (0, 29)


def optional(owner: Any, name: str, default: Any = None) -> Any:
    """``owner.name``, or ``default`` where this vLLM has no such attribute (or no such owner)."""
    return getattr(owner, name, default)


def vllm_version() -> str:
    """The version that vLLM itself states, such as ``0.32.0+cpu``."""
    return str(importlib.import_module("vllm.version").__version__)


def release_of(version: str) -> tuple[int, int] | None:
    """Major and minor number; ``None`` for a development build that states none."""
    found = re.match(r"(\d+)\.(\d+)", version)
    if found is None:
        return None
    release = (int(found.group(1)), int(found.group(2)))
    return None if release == (0, 0) or version.startswith("0.1.dev") else release


def version_notice(version: str) -> str | None:
    """One sentence for the log when ``version`` is outside the supported range, else ``None``."""
    release = release_of(version)
    supported = f"{MINIMUM[0]}.{MINIMUM[1]} to {BELOW[0]}.{BELOW[1] - 1}"
    if release is None:
        return f"umbp is tested with vLLM {supported}; this one ({version}) states no release, so it is only tried."
    if MINIMUM <= release < BELOW:
        return None
    side = "older" if release < MINIMUM else "newer"
    return (
        f"umbp is tested with vLLM {supported}; this one ({version}) is {side}, so it is only tried: "
        f"install a vLLM in that range if the engine does not start or never reports a hit."
    )


def has_tagged_hash_keys(version: str) -> bool:
    """True when LoRA, multimodal and salt keys enter block hashes with a tag (0.31 and later)."""
    release = release_of(version)
    return release is None or release >= _TAGGED_HASH_KEYS


def has_fixed_none_hash(version: str) -> bool:
    """True when SHA-256 hash chains start from a fixed value without PYTHONHASHSEED (0.29 and later)."""
    release = release_of(version)
    return release is None or release >= _FIXED_NONE_HASH


@dataclass
class _TransferResults:
    """What ``KVConnectorTransferResults`` is, for vLLM 0.28 and 0.29 that do not have it."""

    finished_sending: set[str] = field(default_factory=set)
    finished_recving: set[str] = field(default_factory=set)
    failed_recving: set[str] = field(default_factory=set)


def _cache_hit_source() -> Any:
    try:
        return importlib.import_module("vllm.v1.metrics.cache_hit_source").CacheHitSource
    except ImportError:
        return None


KVConnectorBase_V1: Any = _base.KVConnectorBase_V1
KVConnectorRole: Any = _base.KVConnectorRole
SupportsHMA: Any = _base.SupportsHMA
KVConnectorMetadata: Any = _base.KVConnectorMetadata
KVConnectorHandshakeMetadata: Any = _base.KVConnectorHandshakeMetadata
KVConnectorWorkerMetadata: Any = _base.KVConnectorWorkerMetadata
KVConnectorTransferResults: Any = optional(_base, "KVConnectorTransferResults", _TransferResults)
"""vLLM's own (0.30 and later) or a dataclass of the same three sets."""
CacheHitSource: Any = _cache_hit_source()
"""vLLM's enum of hit sources (0.32 and later) or ``None``."""
REPORTS_FAILED_REQUESTS = KVConnectorTransferResults is not _TransferResults
"""Whether a failed load can be reported by request (0.30 and later).

Before that only block ids can, and the scheduler cannot take those for a model with several KV groups: it unpacks
the request's single block list and dies.  There no load may be promised at all.
"""


class GeometrySource(enum.Enum):
    """How the places of blocks in the KV tensors are told."""

    STRIDES = "strides"
    """``KVCacheTensor(size, layers, layer_stride, block_stride, offset)``; 0.29 and later."""
    SHARED_BY = "shared_by"
    """``KVCacheTensor(size, shared_by, offset, block_stride)``, one tensor per place; 0.28."""


def geometry_source(kv_cache_config: Any) -> GeometrySource:
    """Which form ``kv_cache_config.kv_cache_tensors`` has.

    Raises ``TypeError`` for a form that is not known; the message names the attributes that are there.
    """
    tensors = kv_cache_config.kv_cache_tensors
    if not tensors:
        return GeometrySource.STRIDES
    first = tensors[0]
    if all(hasattr(first, name) for name in ("layers", "layer_stride", "block_stride", "offset")):
        return GeometrySource.STRIDES
    if all(hasattr(first, name) for name in ("shared_by", "block_stride", "offset")):
        return GeometrySource.SHARED_BY
    raise TypeError(
        f"the KVCacheTensor of vLLM {vllm_version()} has the fields {sorted(vars(first))}, which umbp does not know; "
        "use a vLLM in the supported range"
    )


def kv_tp_replicas(kv_cache_config: Any) -> int:
    """Consecutive TP ranks with identical KV as vLLM counts them; 1 where it does not say (before 0.31)."""
    return int(optional(kv_cache_config, "kv_tp_replicas", 1))


def kv_cache_layout(kv_cache_config: Any) -> str | None:
    """The resolved layout's name (0.29 and later), or ``None``."""
    layout = optional(kv_cache_config, "kv_cache_layout")
    return None if layout is None else str(layout)


def transfer_group_ids(kv_cache_config: Any) -> tuple[int, ...]:
    """Indices of the KV groups that take part in transfers; all of them where vLLM does not say (0.28)."""
    every = tuple(range(len(kv_cache_config.kv_cache_groups)))
    return tuple(optional(kv_cache_config, "transfer_group_ids", every))


def is_idle(forward_context: Any) -> bool:
    """True in a step without tokens: vLLM then sets a forward context without attention metadata."""
    return optional(forward_context, "attn_metadata") is None


def asks_by_layer(forward_context: Any) -> bool:
    """Whether the forward pass of this context will call ``wait_for_layer_load``: not when it replays a whole graph."""
    mode = optional(optional(forward_context, "cudagraph_runtime_mode"), "name", "NONE")
    return not is_idle(forward_context) and mode != "FULL"


def layers_that_do_not_ask(vllm_config: Any, layers: Sequence[str]) -> list[str]:
    """Those of ``layers`` whose class reads its KV without calling ``wait_for_layer_load`` first, as indexers do."""
    modules = vllm_config.compilation_config.static_forward_context
    asking = {"Attention", "MLAAttention"}
    return [
        layer
        for layer in layers
        if layer in modules and asking.isdisjoint(parent.__name__ for parent in type(modules[layer]).__mro__)
    ]


def why_not_layerwise(vllm_config: Any) -> str | None:
    """Why this engine must not be given KV that may turn out to be missing in the very step that uses it.

    It would have to take tokens back, which vLLM only does where a step's output is looked at before the next one is
    scheduled, and where its runner forgets what the scheduler discards.
    """
    if optional(vllm_config.scheduler_config, "async_scheduling", False):
        return "the engine schedules a step before it has seen the one before (--no-async-scheduling changes that)"
    if vllm_config.parallel_config.pipeline_parallel_size > 1:
        return "pipeline parallelism keeps several steps under way"
    if optional(vllm_config, "speculative_config") is not None:
        return "speculative decoding drafts from tokens that may have to be taken back"
    if optional(vllm_config, "use_v2_model_runner", False):
        return "model runner V2 cannot take tokens back"
    return None


def why_not_store_by_layer(vllm_config: Any) -> str | None:
    """Why a layer that was called once may still change in this engine's step."""
    parallel = vllm_config.parallel_config
    if optional(parallel, "enable_dbo", False) or optional(parallel, "ubatch_size", 0) > 1:
        return "microbatches (--enable-dbo, --ubatch-size) call every layer more than once per step"
    if optional(vllm_config, "speculative_config") is not None:
        return "speculative decoding calls the draft's layers more than once per step"
    return None


ENDS_BY_ITSELF = frozenset({"FINISHED_STOPPED", "FINISHED_LENGTH_CAPPED", "FINISHED_REPETITION"})
"""Names of vLLM's request states that follow from the tokens a request got."""


def ended_by_itself(request: Any) -> bool:
    """Whether a request is over because of the tokens it got, and not because somebody ended it."""
    return request.status.name in ENDS_BY_ITSELF


def is_running(request: Any) -> bool:
    """Whether a request is in vLLM's batch, and so holds all that it needs."""
    return bool(request.status.name == "RUNNING")


def before_reset(block_pool: Any, callback: Callable[[], None]) -> None:
    """Have ``callback`` called whenever vLLM is about to empty its prefix cache, before it looks whether it may.

    No version tells a connector in time: ``reset_cache`` comes after it, and only where the pool is to be emptied too.
    """
    reset = block_pool.reset_prefix_cache

    def reset_prefix_cache() -> bool:
        callback()
        return bool(reset())

    block_pool.reset_prefix_cache = reset_prefix_cache


def block_lists(kv_cache_manager: Any) -> Sequence[Mapping[str, Sequence[Any]]] | None:
    """Per KV group every request's blocks, live, as the cache manager has them; ``None`` where it keeps them otherwise.

    ``get_blocks`` tells the same, in five calls that make objects for all groups.
    """
    managers = optional(optional(kv_cache_manager, "coordinator"), "single_type_managers", ())
    lists = [optional(manager, "req_to_blocks") for manager in managers]
    return tuple(lists) if lists and all(isinstance(some, Mapping) for some in lists) else None


def own_address() -> str:
    """This machine's address as vLLM would give it to others (``VLLM_HOST_IP``), or its name where there is none."""
    address = str(importlib.import_module("vllm.utils.network_utils").get_ip())
    return socket.gethostname() if address == "0.0.0.0" else address


def page_writer(vllm_config: Any, layer: str, spec: Any) -> dict[str, str]:
    """Who decides what the bytes of ``layer`` mean inside its pages, beyond their layout; empty where vLLM has no word.

    The name of the attention backend; on CPUs also the instruction set that K and V are packed for, which vLLM chooses
    by the machine.  Only workers have the layers.
    """
    backend = optional(vllm_config.compilation_config.static_forward_context.get(layer), "get_attn_backend")
    if backend is None:
        return {}
    name = str(backend().get_name())
    if name != "CPU_ATTN":
        return {"backend": name}
    choose = optional(importlib.import_module("vllm.v1.attention.backends.cpu_attn"), "_get_attn_isa")
    if choose is None:
        return {"backend": name}
    dtype, kv_dtype = vllm_config.model_config.dtype, vllm_config.cache_config.cache_dtype
    return {"backend": name, "isa": str(choose(dtype, spec.block_size, spec.head_size, kv_dtype))}


def why_not_by_prefix(vllm_config: Any, specs: Iterable[Any]) -> str | None:
    """Why what a request left must not serve another one that begins alike; ``None`` when it may.

    As vLLM decides about its own prefix caching, which the user may have turned off for other reasons.
    """
    if any(optional(spec, "non_causal", False) for spec in specs):
        return "its attention sees what comes after a token, so that equal beginnings have different KV"
    model = vllm_config.model_config
    if optional(model, "runner_type") == "pooling" and not optional(model, "is_prefix_caching_supported", True):
        return "its pooler needs every token of a prompt to be computed"
    return None


def clears_before_fences(vllm_config: Any, kv_cache_config: Any) -> bool:
    """Whether a step may clear the blocks that it was given before ``handle_preemptions`` (model runner V2)."""
    second = optional(vllm_config, "use_v2_model_runner", False)
    return bool(second and optional(kv_cache_config, "needs_kv_cache_zeroing", False))


def hash_tokens(vllm_config: Any, kv_cache_config: Any) -> int:
    """Tokens per block hash, as ``Request.block_hashes`` has them.

    vLLM decides it once per engine; before it notes the result in the cache configuration it is asked to
    decide again, which gives the same answer.
    """
    noted = optional(kv_cache_config, "hash_block_size")
    if noted is not None:
        return int(noted)
    utils = importlib.import_module("vllm.v1.core.kv_cache_utils")
    resolve = optional(utils, "resolve_kv_cache_block_sizes")
    if resolve is None:
        return int(vllm_config.cache_config.block_size)
    return int(resolve(kv_cache_config, vllm_config)[1])
