"""What an engine holds by its events, tier by tier, over the groups of layers that it keeps apart.

A model whose layers are of several kinds has a group of blocks for each kind, and an engine speaks of each group by
itself.  A prefix can be used where every group that keeps all tokens has it; the windows and states of other groups are
not counted on.  Where no group keeps all tokens, every group has to have it.
"""

from __future__ import annotations

from collections.abc import Sequence

from umbp_connectors.reporting.words import Word, WordKind
from umbp_connectors.reporting.zmq_batches import Cleared, Removed, Stored
from umbp_core.tiers import Tier

_CLEARED = (Tier.HBM, Tier.DRAM)
"""A reset of vLLM's connectors empties their DRAM without a word of its own; what is on a disk survives it."""


class BlockTable:
    """Applies events, in their order, and says in words what they changed.  Not thread-safe."""

    def __init__(self) -> None:
        self._tiers: dict[Tier, _Groups] = {}
        self.absent = 0
        """Hashes that were removed, and not known to be there."""

    def apply(self, event: Stored | Removed | Cleared) -> list[Word]:
        """What ``event`` changes.  To apply one again changes nothing."""
        if isinstance(event, Stored):
            return self._store(event)
        if isinstance(event, Removed):
            return self._remove(event)
        return self._clear(_CLEARED)

    def clear(self) -> list[Word]:
        """Nothing is known to be there any more."""
        return self._clear(tuple(self._tiers))

    def whole(self) -> list[Word]:
        """Everything that is there, for every tier that the engine ever spoke of."""
        return [Word(WordKind.REPLACE, tier, groups.held()) for tier, groups in self._tiers.items()]

    def _store(self, event: Stored) -> list[Word]:
        groups = self._tiers.setdefault(event.tier, _Groups())
        if groups.learn(event.group, event.whole):
            groups.add(event.group, event.hashes)
            return [Word(WordKind.REPLACE, event.tier, groups.held())]
        came = groups.add(event.group, event.hashes)
        return [Word(WordKind.ADD, event.tier, came)] if came else []

    def _remove(self, event: Removed) -> list[Word]:
        groups = self._tiers.get(event.tier, _Groups())
        self.absent += groups.lacking(event.group, event.hashes)
        gone = groups.remove(event.group, event.hashes)
        return [Word(WordKind.REMOVE, event.tier, gone)] if gone else []

    def _clear(self, tiers: Sequence[Tier]) -> list[Word]:
        found = [tier for tier in tiers if tier in self._tiers]
        for tier in found:
            self._tiers[tier].clear()
        return [Word(WordKind.CLEAR, tier) for tier in found]


class _Groups:
    """The groups of one tier."""

    def __init__(self) -> None:
        self._sets: dict[int, set[bytes]] = {}
        self._whole: set[int] = set()
        self._counted: list[set[bytes]] = []

    def learn(self, group: int, whole: bool) -> bool:
        """Note ``group``; whether other groups count now than before, though there were some."""
        if group in self._sets and (not whole or group in self._whole):
            return False
        self._sets.setdefault(group, set())
        if whole:
            self._whole.add(group)
        before = self._counted
        self._counted = [own for number, own in self._sets.items() if number in self._whole or not self._whole]
        return bool(before) and [id(own) for own in before] != [id(own) for own in self._counted]

    def add(self, group: int, hashes: Sequence[bytes]) -> list[bytes]:
        """``group`` has ``hashes``; which of them the groups that count have now and had not before."""
        own = self._sets[group]
        fresh = [key for key in dict.fromkeys(hashes) if key not in own]
        own.update(fresh)
        return self._held(fresh) if any(own is each for each in self._counted) else []

    def lacking(self, group: int | None, hashes: Sequence[bytes]) -> int:
        """How many of ``hashes`` are not in ``group``, or with ``None`` in no group."""
        asked = set(hashes)
        return len(asked.difference(*self._of(group)))

    def remove(self, group: int | None, hashes: Sequence[bytes]) -> list[bytes]:
        """``group``, or with ``None`` every one, has ``hashes`` no more; which of them are not held any more."""
        held = self._held(list(dict.fromkeys(hashes)))
        for own in self._of(group):
            own.difference_update(hashes)
        still = set(self._held(held))
        return [key for key in held if key not in still]

    def clear(self) -> None:
        """No group has anything."""
        for own in self._sets.values():
            own.clear()

    def held(self) -> list[bytes]:
        """What all groups that count have."""
        return list(set.intersection(*self._counted)) if self._counted else []

    def _of(self, group: int | None) -> list[set[bytes]]:
        return list(self._sets.values()) if group is None else [self._sets.get(group, set())]

    def _held(self, hashes: list[bytes]) -> list[bytes]:
        for own in self._counted:
            hashes = [key for key in hashes if key in own]
        return hashes if self._counted else []
