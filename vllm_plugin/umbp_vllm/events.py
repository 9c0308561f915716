"""KV events of our tiers, in vLLM's own event types.

A router that follows the engine's event stream then also learns what DRAM (medium ``CPU``) and SSD (medium
``STORAGE``) hold, with token ids, parent hash and block size, in the hash form that the engine publishes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from vllm.distributed.kv_events import BlockRemoved, BlockStored, KVCacheEvent
from vllm.v1.core.kv_cache_utils import maybe_convert_block_hash

from umbp_core.ids import group_of
from umbp_core.tiers import Tier
from umbp_vllm.groups import KvGroup
from umbp_vllm.matching import block_hash_of

MEDIA = {Tier.DRAM: "CPU", Tier.SSD: "STORAGE"}


@dataclass(frozen=True, slots=True)
class BlockOrigin:
    """What an event says about a block beyond its hash."""

    token_ids: tuple[int, ...]
    parent: bytes | None
    lora_id: int | None
    lora_name: str | None


class EventLog:
    """Turns tier changes into events.  Scheduler thread only; does nothing unless ``enabled``."""

    def __init__(self, groups: Sequence[KvGroup], *, enabled: bool) -> None:
        self._groups = groups
        self.enabled = enabled
        self._origins: dict[bytes, BlockOrigin] = {}
        self._tiers: dict[bytes, set[Tier]] = {}
        self._events: list[KVCacheEvent] = []

    def remember(self, request: Any, group: KvGroup, block: int, key: bytes) -> None:
        """Note the tokens of a block that is about to be stored for ``request``."""
        if not self.enabled:
            return
        first = block * group.block_tokens
        parent_index = block * group.hashes_per_block - 1
        lora = request.lora_request
        self._origins[key] = BlockOrigin(
            token_ids=tuple(request.all_token_ids[first : first + group.block_tokens]),
            parent=bytes(request.block_hashes[parent_index]) if parent_index >= 0 else None,
            lora_id=lora.adapter_id if lora else None,
            lora_name=lora.name if lora else None,
        )

    def forget(self, key: bytes) -> None:
        """The block was not stored after all."""
        if key not in self._tiers:
            self._origins.pop(key, None)

    def changed(self, keys: Iterable[bytes], tier: Tier, *, added: bool) -> None:
        """``keys`` became readable in ``tier``, or stopped being so."""
        if not self.enabled or tier not in MEDIA:
            return
        change = self._added if added else self._removed
        for key in keys:
            change(key, tier)

    def _added(self, key: bytes, tier: Tier) -> None:
        self._tiers.setdefault(key, set()).add(tier)
        self._events.append(self._stored(key, tier))

    def _removed(self, key: bytes, tier: Tier) -> None:
        tiers = self._tiers.get(key, set())
        tiers.discard(tier)
        self._events.append(BlockRemoved(block_hashes=[_published(key)], medium=MEDIA[tier], group_idx=group_of(key)))
        if not tiers:
            self._tiers.pop(key, None)
            self._origins.pop(key, None)

    def _stored(self, key: bytes, tier: Tier) -> BlockStored:
        origin = self._origins.get(key)
        return BlockStored(
            block_hashes=[_published(key)],
            parent_block_hash=maybe_convert_block_hash(origin.parent) if origin and origin.parent else None,
            token_ids=list(origin.token_ids) if origin else [],
            block_size=self._groups[group_of(key)].block_tokens,
            lora_id=origin.lora_id if origin else None,
            lora_name=origin.lora_name if origin else None,
            medium=MEDIA[tier],
            group_idx=group_of(key),
        )

    def take(self) -> list[KVCacheEvent]:
        """The events since the last call, in order."""
        if not self._events:
            return []
        events, self._events = self._events, []
        return events


def _published(key: bytes) -> Any:
    return maybe_convert_block_hash(block_hash_of(key))
