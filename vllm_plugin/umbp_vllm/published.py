"""Block keys as the words that a master is told: in the form of the engine's events, and only what all groups hold.

A key is the engine's block hash followed by the KV group, in our pool and in vLLM's block pool alike; in our pool the
digest of a LoRA adapter may come first, and says nothing to a master.  A master knows hashes without groups, as
routers do.  So a hash counts on a tier when every group whose attention sees all tokens has
it there.  Groups with a window do not count: what they must hold for a hit depends on where the hit ends, and is a
tail only.  When no group sees all tokens, every group counts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

from vllm.v1.core.kv_cache_utils import maybe_convert_block_hash

from umbp_connectors.reporting.words import Word, WordKind
from umbp_core.ids import GROUP_BYTES, key_suffix
from umbp_core.tiers import Tier
from umbp_vllm.groups import KvGroup
from umbp_vllm.matching import block_hash_of

INT64 = "int64"
HEX = "hex"


def hash_form() -> str:
    """How vLLM's events show a hash: its low 64 bits as a number (``int64``), or all of it (``hex``)."""
    return INT64 if isinstance(maybe_convert_block_hash(bytes(32)), int) else HEX


def counting_groups(groups: Sequence[KvGroup]) -> list[KvGroup]:
    """The groups that must hold a block so that its hash counts."""
    return [group for group in groups if group.reach is None and group.chunk is None] or list(groups)


def _as_int64(keys: Iterable[bytes]) -> list[bytes]:
    number = int.from_bytes
    return [b"%d" % number(key[-GROUP_BYTES - 8 : -GROUP_BYTES], "big") for key in keys]


def _as_hex(keys: Iterable[bytes]) -> list[bytes]:
    return [block_hash_of(key).hex().encode() for key in keys]


_FORMS: dict[str, Callable[[Iterable[bytes]], list[bytes]]] = {INT64: _as_int64, HEX: _as_hex}


class GroupWords:
    """Makes words of what one source says about block keys.  One thread at a time.

    Methods say what is so already again without harm, as long as ``came`` and ``gone`` of one call have no key in
    common.
    """

    def __init__(self, groups: Sequence[KvGroup], form: str) -> None:
        counting = counting_groups(groups)
        self._published = _FORMS[form]
        self._bits = {key_suffix(group.index): 1 << position for position, group in enumerate(counting)}
        self._all = (1 << len(counting)) - 1
        self._alone = len(groups) == 1
        self._masks: dict[Tier, dict[bytes, int]] = {}

    def changed(self, tier: Tier, came: Iterable[bytes], gone: Iterable[bytes]) -> Iterator[Word]:
        """``came`` are on ``tier`` from now on, ``gone`` are not any more."""
        if not self._alone:
            # What is gone comes first: one group's going must not be missed by another's coming.
            gone = self._broken(tier, gone)
            came = self._completed(tier, came)
        removed, added = self._published(gone), self._published(came)
        if removed:
            yield Word(WordKind.REMOVE, tier, removed)
        if added:
            yield Word(WordKind.ADD, tier, added)

    def cleared(self, tier: Tier) -> Word:
        """Nothing is on ``tier`` any more."""
        self._masks.pop(tier, None)
        return Word(WordKind.CLEAR, tier)

    def replaced(self, tier: Tier, keys: Iterable[bytes]) -> Word:
        """Exactly ``keys`` are on ``tier``."""
        self._masks.pop(tier, None)
        return Word(
            WordKind.REPLACE, tier, self._published(keys if self._alone else self._completed(tier, dict.fromkeys(keys)))
        )

    def _completed(self, tier: Tier, keys: Iterable[bytes]) -> list[bytes]:
        """Those of ``keys`` with which every counting group has their hash."""
        masks, whole, complete = self._masks.setdefault(tier, {}), self._all, []
        for key in keys:
            bit = self._bits.get(key[-GROUP_BYTES:], 0)
            if bit:
                hashed = key[:-GROUP_BYTES]
                before = masks.get(hashed, 0)
                masks[hashed] = before | bit
                if before != whole == before | bit:
                    complete.append(key)
        return complete

    def _broken(self, tier: Tier, keys: Iterable[bytes]) -> list[bytes]:
        """Those of ``keys`` without which not every counting group has their hash any more."""
        masks, whole, broken = self._masks.setdefault(tier, {}), self._all, []
        for key in keys:
            hashed = key[:-GROUP_BYTES]
            before = masks.get(hashed, 0)
            after = before & ~self._bits.get(key[-GROUP_BYTES:], 0)
            if after:
                masks[hashed] = after
            else:
                masks.pop(hashed, None)
            if before == whole != after:
                broken.append(key)
        return broken
