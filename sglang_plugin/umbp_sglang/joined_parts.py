"""Pages that lie in several pools: on which tier a page as a whole is."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from umbp_core.directory import Change, EventKind
from umbp_core.tiers import Tier


class JoinedParts:
    """Of every page the tiers of each of its ``parts``.

    A page is in DRAM when all its parts are, and on SSD when all have a copy there, or when some parts are to be read
    from there because they are nowhere else.  No threads.
    """

    def __init__(self, parts: int) -> None:
        self._parts = parts
        self._masks: dict[bytes, list[int]] = {}

    def apply(self, part: int, changes: Iterable[Change]) -> list[Change]:
        """``part`` changed; what that means for whole pages."""
        joined: list[Change] = []
        for change in changes:
            bit, added = change.tier.bit, change.kind is EventKind.ADDED
            turned: dict[tuple[EventKind, Tier], list[bytes]] = {}
            for key in change.keys:
                masks = self._masks.setdefault(key, [0] * self._parts)
                before = _tiers(masks)
                masks[part] = masks[part] | bit if added else masks[part] & ~bit
                now = _tiers(masks)
                if not any(masks):
                    del self._masks[key]
                for tier in (Tier.DRAM, Tier.SSD):
                    if (before ^ now) & tier.bit:
                        kind = EventKind.ADDED if now & tier.bit else EventKind.REMOVED
                        turned.setdefault((kind, tier), []).append(key)
            joined += [Change(kind, tier, keys, ()) for (kind, tier), keys in turned.items()]
        return joined

    def holdings(self) -> list[tuple[Tier, list[bytes]]]:
        """Every whole page, tier by tier."""
        tiers = {key: _tiers(masks) for key, masks in self._masks.items()}
        return [(tier, [key for key, mask in tiers.items() if mask & tier.bit]) for tier in (Tier.DRAM, Tier.SSD)]


def _tiers(masks: Sequence[int]) -> int:
    """The tiers of a page whose parts have ``masks``."""
    if not all(masks):
        return 0
    shared = masks[0]
    for mask in masks:
        shared &= mask
    return shared or Tier.SSD.bit
