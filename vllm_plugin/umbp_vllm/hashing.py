"""Whether the engine's block hashes mean the same in every process and after a restart.

A chain of block hashes starts from ``NONE_HASH``.  vLLM derives it from the text of PYTHONHASHSEED; without
that variable it takes a fixed text for SHA-256 since 0.29, and random bytes otherwise.  Where it is random,
another process or the same engine after a restart asks for hashes that nobody has stored.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from umbp_vllm import compat

SEED_VARIABLE = "PYTHONHASHSEED"
_CRYPTOGRAPHIC = frozenset({"sha256", "sha256_cbor"})


@dataclass(frozen=True)
class HashStability:
    """The answer, and when it is no, what the user should set.  ``advice`` is empty when ``stable``."""

    stable: bool
    advice: str


def hash_stability(vllm_config: Any, env: Mapping[str, str], version: str | None = None) -> HashStability:
    """Whether hashes are equal across processes and restarts; ``env`` is the environment of the engine.

    ``version`` is vLLM's, the running one by default.  Without stability nothing must be shared or kept
    beyond the process: the hits would be none, and the space would be used for nothing.
    """
    algorithm = str(vllm_config.cache_config.prefix_caching_hash_algo)
    if _has_own_seed(algorithm, version or compat.vllm_version()) or _is_fixed(env.get(SEED_VARIABLE)):
        return HashStability(True, "")
    state = f"{SEED_VARIABLE} is {_state(env)}"
    if algorithm in _CRYPTOGRAPHIC:
        reason = f"this vLLM starts {algorithm} block hashes from random bytes because {state}"
        remedy = f"set {SEED_VARIABLE}=0 for every engine, or use vLLM 0.29 or later"
    else:
        reason = f"{algorithm} block hashes start from random bytes because {state}"
        remedy = f"use --prefix-caching-hash-algo sha256_cbor, or set {SEED_VARIABLE}=0 for every engine"
    return HashStability(
        False,
        f"{reason}: sharing (mode daemon) and the SSD tier are off, and nothing is reused after a restart; {remedy}.",
    )


def describe_hashing(vllm_config: Any, env: Mapping[str, str], version: str | None = None) -> dict[str, object]:
    """What decides the value of a block hash besides tokens and extra keys, in canonical form.

    It is part of the namespace.  The seed itself does not appear, only a digest of it: for the algorithms
    that are not collision resistant vLLM treats it as a secret.
    """
    version = version or compat.vllm_version()
    algorithm = str(vllm_config.cache_config.prefix_caching_hash_algo)
    seed = env.get(SEED_VARIABLE)
    if seed is not None:
        start = "seed:" + hashlib.sha256(b"umbp none-hash seed\0" + seed.encode()).hexdigest()[:16]
    else:
        start = "default" if _has_own_seed(algorithm, version) else "per-process"
    return {
        "algorithm": algorithm,
        "start": start,
        "extra_keys": "tagged" if compat.has_tagged_hash_keys(version) else "untagged",
    }


def _has_own_seed(algorithm: str, version: str) -> bool:
    return algorithm in _CRYPTOGRAPHIC and compat.has_fixed_none_hash(version)


def _is_fixed(seed: str | None) -> bool:
    return seed is not None and seed.isascii() and seed.isdigit()


def _state(env: Mapping[str, str]) -> str:
    seed = env.get(SEED_VARIABLE)
    return "not set" if seed is None else f"{seed!r}, which is not an integer"
