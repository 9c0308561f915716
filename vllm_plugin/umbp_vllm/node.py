"""Who this engine is for a master: where it serves, which rank it is, and how a router computes its block hashes."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

from umbp_connectors.reporting.node import EVERY_INTERFACE, TAILS_UNKNOWN, NodeFacts, Role
from umbp_vllm import compat
from umbp_vllm.engine_args import SERVING_KEY
from umbp_vllm.groups import KvGroup
from umbp_vllm.hashing import describe_hashing
from umbp_vllm.published import counting_groups, hash_form

_ROLES: dict[tuple[bool, bool], Role] = {(True, False): "prefill", (False, True): "decode"}
"""By (stores, loads); an engine that does both is both."""


def facts_of(vllm_config: Any, groups: Sequence[KvGroup], hash_tokens: int, engines: int, rank: int) -> NodeFacts:
    """What the node of data-parallel engine ``rank`` of ``engines`` says of itself; one node stands for all its ranks.

    ``hash_tokens`` is the number of tokens per block hash.
    """
    transfer = vllm_config.kv_transfer_config
    host, port = _door(transfer.kv_connector_extra_config.get(SERVING_KEY, ""))
    return NodeFacts(
        engine="vllm",
        model=_served_name(vllm_config.model_config),
        version=compat.vllm_version(),
        role=_ROLES.get((transfer.is_kv_producer, transfer.is_kv_consumer), "both"),
        host=compat.own_address() if host in EVERY_INTERFACE else host,
        port=port,
        dp=rank,
        several=engines > 1,
        tags=hash_tags(vllm_config, groups, hash_tokens, os.environ),
    )


def hash_tags(
    vllm_config: Any, groups: Sequence[KvGroup], hash_tokens: int, env: Mapping[str, str], version: str | None = None
) -> dict[str, str]:
    """What a router has to know to compute the hashes that this engine reports.

    ``block`` is the number of tokens per hash of the chain; where only every n-th of these names a block, a tag
    ``hash_every`` says so.  ``tails`` are ``unknown`` where a hit needs windows too, of which nobody is told.
    """
    described = describe_hashing(vllm_config, env, version)
    start = str(described["start"])
    tags = {
        "block": str(hash_tokens),
        "hash": str(described["algorithm"]),
        "hash_form": hash_form(),
        "hash_start": {"default": "default", "per-process": "random"}.get(start, "seed"),
        "hash_keys": str(described["extra_keys"]),
    }
    every = math.lcm(*(group.hashes_per_block for group in counting_groups(groups)))
    if every > 1:
        tags["hash_every"] = str(every)
    if any(group.reach is not None or group.chunk is not None for group in groups):
        tags["tails"] = TAILS_UNKNOWN
    return tags


def _door(serving: str) -> tuple[str, int | None]:
    host, _, port = serving.rpartition(":")
    return (host, int(port)) if port.isdigit() else ("", None)


def _served_name(model: Any) -> str:
    """The name that requests use; the first one where there are several."""
    names = compat.optional(model, "served_model_name") or model.model
    return str(names if isinstance(names, str) else names[0])
