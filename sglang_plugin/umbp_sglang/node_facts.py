"""Who this rank of SGLang is at the master."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable
from typing import Any, Literal

from umbp_connectors.reporting.node import EVERY_INTERFACE, TAILS_UNKNOWN, NodeFacts
from umbp_sglang import compat

_CONTEXT = "sglang.srt.runtime_context"
_PARSER = (
    "sglang.srt.mem_cache.hybrid_cache.hybrid_cache_controller:HybridCacheController.parse_storage_backend_extra_config"
)
_ROLES: dict[object, Literal["prefill", "decode"]] = {"prefill": "prefill", "decode": "decode"}


def node_facts(model: str, page_tokens: int) -> NodeFacts:
    """What the master is told of this rank, by the configuration that SGLang publishes in its processes.

    ``page_tokens`` tokens are behind each hash.
    """
    parallel, serving, disagg = _published("parallel"), _published("serving"), _published("disagg")
    configured = str(compat.optional(serving, "host", "") or "")
    port = compat.optional(serving, "port") if _serves() else None
    tags = {"block": str(page_tokens), "hash": "sglang", "hash_form": "int64", "hash_start": "default"}
    least = -(-_prefetch_threshold() // page_tokens)
    if least > 1:
        tags["min_load"] = str(least)
    if _has_bigrams():
        tags["hash_unit"] = "bigram"
    if _has_tails():
        tags["tails"] = TAILS_UNKNOWN
    sizes = ("dp_size", "pp_size", "tp_size")
    return NodeFacts(
        engine="sglang",
        model=str(compat.optional(serving, "served_model_name") or model),
        version=_version(),
        role=_ROLES.get(str(compat.optional(disagg, "disaggregation_mode")), "both"),
        host=_own_address() if configured in EVERY_INTERFACE else configured,
        port=port,
        dp=_dp_rank(parallel),
        pp=_number(parallel, "pp_rank"),
        tp=_number(parallel, "attn_cp_rank") * max(1, _number(parallel, "attn_tp_size"))
        + _number(parallel, "attn_tp_rank"),
        several=any(_number(parallel, size) > 1 for size in sizes),
        tags=tags,
    )


def data_parallel() -> tuple[int, int]:
    """Which of how many independent caches this rank has a part of; (0, 1) where SGLang has not published it."""
    parallel = _published("parallel")
    return _dp_rank(parallel), max(1, _number(parallel, "num_dp_ranks"))


def publishes_events() -> bool:
    """Whether this rank is the one of its cache that publishes events."""
    parallel = _published("parallel")
    return not any(_number(parallel, rank) for rank in ("pp_rank", "attn_tp_rank", "attn_cp_rank"))


def _dp_rank(parallel: Any) -> int:
    """As SGLang numbers the publishers of independent caches."""
    return _number(parallel, "attn_dp_rank" if _number(parallel, "attn_dp_size") > 1 else "dp_rank")


def _serves() -> bool:
    """Whether there is an HTTP server, which an ``Engine`` has not; SGLang notes how it was started."""
    try:
        arguments = compat.find(f"{_CONTEXT}:get_server_args")()
    except (LookupError, ValueError):
        return False
    started = compat.optional(arguments, "launch_command")
    return bool(started) and not str(started).startswith("Engine(")


def _has_bigrams() -> bool:
    """Whether the tree's pages are of pairs of tokens, as speculative decoding of EAGLE's kind has them.

    Trees of models with states have pages of tokens whatever the speculation.
    """
    name = compat.optional(_published("spec"), "speculative_algorithm")
    try:
        kind = compat.find("sglang.srt.speculative.spec_info:SpeculativeAlgorithm")
        return bool(name) and bool(kind.from_string(str(name)).is_eagle()) and not _of_model(_has_states)
    except (LookupError, ValueError):
        return False


def _has_tails() -> bool:
    """Whether the model has layers with windows or states, of which a hit needs the last ones and nothing is told."""
    return _of_model(lambda model: bool(compat.optional(model, "is_hybrid_swa")) or _has_states(model))


def _has_states(model: Any) -> bool:
    return bool(compat.find("sglang.srt.mem_cache.kv_cache_builder:uses_ssm_state")(model))


def _of_model(ask: Callable[[Any], bool]) -> bool:
    """The answer about the model that this process serves; false where SGLang says nothing of it."""
    try:
        return ask(compat.find(f"{_CONTEXT}:process_model_config")())
    except (AttributeError, LookupError, OSError, RuntimeError, ValueError):  # SGLang's answers without a model
        return False


def _prefetch_threshold() -> int:
    """Tokens below which SGLang does not read from L3; 0 where that is not known.

    By the configuration that the engine was started with: of a storage that is attached later SGLang tells its own
    controller only.
    """
    given = compat.optional(_published("memory"), "hicache_storage_backend_extra_config")
    try:
        return max(0, int(compat.find(_PARSER)(given)[1]))
    except (LookupError, OSError, TypeError, ValueError):
        return 0


def _own_address() -> str:
    """The address of this machine that SGLang would use itself."""
    try:
        address: str = compat.find("sglang.srt.utils.network:get_local_ip_auto")("127.0.0.1")
    except LookupError:
        return "127.0.0.1"
    return address


def _version() -> str:
    try:
        return importlib.metadata.version("sglang")
    except importlib.metadata.PackageNotFoundError:
        return ""


def _number(bag: Any, name: str) -> int:
    try:
        return int(compat.optional(bag, name) or 0)
    except (AttributeError, RuntimeError, ValueError):  # SGLang's answer for what is not known in this process
        return 0


def _published(name: str) -> Any:
    try:
        return compat.find(f"{_CONTEXT}:get_{name}")()
    except (LookupError, ValueError):
        return None
