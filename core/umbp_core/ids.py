"""Identifiers, and the identity of an object.

``object key = SHA-256(namespace, layout digest, rank scope) ‖ block key`` where the *block key* is the
engine's block hash followed by the KV group (4 bytes, big endian).  Two engines that differ in model,
dtype, layout or rank therefore never share bytes by accident (architecture §4).
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NewType

RequestId = NewType("RequestId", str)
"""The engine's request id."""
OpId = NewType("OpId", str)
"""UUID (hex) of one load, store or demotion."""
BlockKey = NewType("BlockKey", bytes)
"""The engine's block hash ‖ KV group (4 bytes, big endian); names a block on every rank."""
ObjectKey = NewType("ObjectKey", bytes)
"""Identity digest (32 bytes) ‖ block key; names one rank's bytes of a block."""

IDENTITY_BYTES = 32
GROUP_BYTES = 4
"""How many bytes at the end of a block key name its KV group."""


def block_key(block_hash: bytes, group: int) -> BlockKey:
    """The key of a block of KV group ``group`` whose engine hash is ``block_hash``."""
    return BlockKey(block_hash + key_suffix(group))


@functools.cache
def key_suffix(group: int) -> bytes:
    """What follows the engine's block hash in the block keys of KV group ``group``."""
    return group.to_bytes(GROUP_BYTES, "big")


def group_of(key: bytes) -> int:
    """The KV group of a block key."""
    return int.from_bytes(key[-GROUP_BYTES:], "big")


def digest_of(description: Mapping[str, object]) -> bytes:
    """SHA-256 of a canonical JSON form of ``description`` (sorted keys, no spaces, ASCII).

    Raises ``TypeError`` when a value is not JSON: a description must not depend on ``repr``.
    """
    text = json.dumps(description, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode("ascii")).digest()


@dataclass(frozen=True, slots=True)
class RankScope:
    """Which part of the model's KV one worker holds."""

    tp_rank: int = 0
    tp_size: int = 1
    pp_rank: int = 0
    pp_size: int = 1
    cp_rank: int = 0
    cp_size: int = 1
    replicated: bool = False
    """True when every TP rank holds the same bytes (MLA); then ``tp_rank`` and ``tp_size`` do not count."""
    dcp_rank: int = 0
    dcp_size: int = 1
    """Decode context parallelism, where it is not part of ``cp``."""
    heads: tuple[int, int] | None = None
    """Part ``k`` of ``n`` equal ranges of heads; then ``tp_rank`` and ``tp_size`` do not count."""

    def describe(self) -> dict[str, object]:
        """The canonical descriptor that enters the identity; what is not used is not in it."""
        tp = (0, 1) if self.replicated or self.heads is not None else (self.tp_rank, self.tp_size)
        described: dict[str, object] = {
            "tp": list(tp),
            "pp": [self.pp_rank, self.pp_size],
            "cp": [self.cp_rank, self.cp_size],
            "replicated": self.replicated,
        }
        if self.dcp_size != 1:
            described["dcp"] = [self.dcp_rank, self.dcp_size]
        if self.heads is not None:
            described["heads"] = list(self.heads)
        return described


@dataclass(frozen=True, slots=True)
class Identity:
    """What all objects of one rank have in common.

    ``namespace`` names the model and what its block hashes do not contain; ``layout`` is the SHA-256 of
    the canonical layout descriptor (:func:`digest_of`).
    """

    namespace: str
    layout: bytes
    rank: RankScope

    @property
    def digest(self) -> bytes:
        """32 bytes that stand for the whole identity."""
        return digest_of({"namespace": self.namespace, "layout": self.layout.hex(), "rank": self.rank.describe()})

    def object_key(self, key: bytes) -> ObjectKey:
        """The object key of block key ``key`` under this identity."""
        return ObjectKey(self.digest + key)
