"""The batches of KV-cache events that vLLM and SGLang publish, taken apart.

A batch is ``[time, events, rank]`` in msgpack.  An event is a map with its name under ``type`` (today's engines), or an
array that begins with its name (older ones).  Only what says which block is where is read; tokens are skipped.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import NamedTuple

import msgspec

from umbp_core.errors import ProtocolError
from umbp_core.tiers import Tier

TIER_OF_MEDIUM = MappingProxyType(
    {"GPU": Tier.HBM, "CPU": Tier.DRAM, "CPU_PINNED": Tier.DRAM, "DISK": Tier.SSD, "STORAGE": Tier.SSD}
)
"""What the engines call the places of KV that belong to a node; any other place is not reported."""

_LOST_KINDS = frozenset(
    {"sliding_window", "sliding_window_mla", "chunked_local_attention", "mamba", "encoder_only_attention"}
    | {"cross_attention"}
)
"""Kinds of KV that do not keep all tokens of a prefix."""
_REMOTE = "REMOTE"
_MAPS = frozenset([*range(0x80, 0x90), 0xDE, 0xDF])
"""What the first byte of a map in msgpack may be."""

Hash = int | bytes


class _Batch(msgspec.Struct, array_like=True, gc=False):
    ts: float
    events: list[msgspec.Raw]


class _Stored(msgspec.Struct, tag="BlockStored", gc=False):
    block_hashes: list[Hash]
    medium: str | None = None
    group_idx: int | None = None
    kv_cache_spec_kind: str | None = None
    locality: str | None = None


class _Removed(msgspec.Struct, tag="BlockRemoved", gc=False):
    block_hashes: list[Hash]
    medium: str | None = None
    group_idx: int | None = None
    locality: str | None = None


class _Cleared(msgspec.Struct, tag="AllBlocksCleared", gc=False):
    pass


class _StoredArray(msgspec.Struct, array_like=True, tag="BlockStored", gc=False):
    block_hashes: list[Hash]
    parent_block_hash: msgspec.Raw = msgspec.Raw()
    token_ids: msgspec.Raw = msgspec.Raw()
    block_size: msgspec.Raw = msgspec.Raw()
    lora_id: msgspec.Raw = msgspec.Raw()
    medium: str | None = None


class _RemovedArray(msgspec.Struct, array_like=True, tag="BlockRemoved", gc=False):
    block_hashes: list[Hash]
    medium: str | None = None


class _ClearedArray(msgspec.Struct, array_like=True, tag="AllBlocksCleared", gc=False):
    pass


class _Named(msgspec.Struct, gc=False):
    type: str


class _NamedArray(msgspec.Struct, array_like=True, gc=False):
    type: str


class Stored(NamedTuple):
    """Blocks came to a tier."""

    tier: Tier
    hashes: list[bytes]
    group: int = 0
    """The engine's group of layers that the blocks are of."""
    whole: bool = True
    """The group keeps all tokens of a prefix, not only those of a window."""


class Removed(NamedTuple):
    """Blocks left a tier."""

    tier: Tier
    hashes: list[bytes]
    group: int | None = None
    """``None``: of every group."""


class Cleared(NamedTuple):
    """The engine forgot what is in its memory: HBM, and DRAM, of which it may say nothing more."""


@dataclass(frozen=True, slots=True)
class EventBatch:
    """What one batch says."""

    events: Sequence[Stored | Removed | Cleared]
    elsewhere: int = 0
    """Hashes in places that are none of this node's tiers."""
    unknown: tuple[str, ...] = ()
    """Names of events that are not known here."""


class BatchDecoder:
    """Takes batches apart.  One thread at a time."""

    def __init__(self) -> None:
        self._batch = msgspec.msgpack.Decoder(_Batch)
        self._map = msgspec.msgpack.Decoder(_Stored | _Removed | _Cleared)
        self._array = msgspec.msgpack.Decoder(_StoredArray | _RemovedArray | _ClearedArray)
        self._named = msgspec.msgpack.Decoder(_Named)
        self._named_array = msgspec.msgpack.Decoder(_NamedArray)

    def decode(self, payload: bytes) -> EventBatch:
        """What ``payload`` says.  Raises ``ProtocolError`` when it is not understood.

        Makes lists of the hashes that are in it, and nothing that is larger.
        """
        events: list[Stored | Removed | Cleared] = []
        unknown: list[str] = []
        elsewhere = 0
        try:
            for raw in self._batch.decode(payload).events:
                event = self._event(raw, unknown)
                if isinstance(event, (_Cleared, _ClearedArray)):
                    events.append(Cleared())
                elif event is not None:
                    read = _read(event)
                    if read is None:
                        elsewhere += len(event.block_hashes)
                    elif read.hashes:
                        events.append(read)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            raise ProtocolError(f"a batch of {len(payload)} bytes is none of KV-cache events: {error}") from error
        return EventBatch(events, elsewhere, tuple(unknown))

    def _event(self, raw: msgspec.Raw, unknown: list[str]) -> _Known | None:
        is_map = memoryview(raw)[0] in _MAPS
        event: _Known
        try:
            event = self._map.decode(raw) if is_map else self._array.decode(raw)
        except msgspec.ValidationError:
            name = self._named.decode(raw).type if is_map else self._named_array.decode(raw).type
            if name in _NAMES:
                raise
            unknown.append(name)
            return None
        return event


_Known = _Stored | _Removed | _Cleared | _StoredArray | _RemovedArray | _ClearedArray
_NAMES = frozenset({"BlockStored", "BlockRemoved", "AllBlocksCleared"})


def _read(event: _Stored | _Removed | _StoredArray | _RemovedArray) -> Stored | Removed | None:
    """``event`` in our words; ``None`` when it is about a place that is no tier of the node."""
    medium = "GPU" if event.medium is None else event.medium.upper()
    tier = TIER_OF_MEDIUM.get(medium)
    if tier is None:
        return None
    hashes = published(event.block_hashes)
    if isinstance(event, _StoredArray):
        return Stored(tier, hashes)
    if isinstance(event, _RemovedArray):
        return Removed(tier, hashes)
    if event.locality == _REMOTE:
        return None
    if isinstance(event, _Removed):
        return Removed(tier, hashes, event.group_idx)
    return Stored(tier, hashes, event.group_idx or 0, event.kv_cache_spec_kind not in _LOST_KINDS)


def published(hashes: Sequence[Hash]) -> list[bytes]:
    """``hashes`` as a master knows them: integers in decimal, bytes in lower-case hex."""
    return [b"%d" % key if isinstance(key, int) else key.hex().encode() for key in hashes]
