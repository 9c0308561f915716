"""What SGLang's event stream says of the device (L1) and the host pool (L2), summed up.

The stream is told one event for each page and node of the tree.  Nodes of several namespaces may publish the same id,
so that an id is there for as long as more nodes stored it than removed it.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from sglang.srt.disaggregation.kv_events import AllBlocksCleared, BlockRemoved, BlockStored, StorageMedium

from umbp_connectors.reporting.words import Word, WordKind
from umbp_core.tiers import Tier

TIER_OF: dict[Any, Tier] = {
    None: Tier.HBM,
    **dict.fromkeys((StorageMedium.GPU, StorageMedium.GPU.value), Tier.HBM),
    **dict.fromkeys((StorageMedium.CPU, StorageMedium.CPU.value), Tier.DRAM),
}
"""Other media are not told from here: what lies in L3 is told by the store itself."""
TIERS = (Tier.HBM, Tier.DRAM)
_OF_BLOCKS = (BlockStored, BlockRemoved)
_WHOLE = "the whole truth"


class _Sum:
    """The net effect of events: per tier, by how many nodes an id is stored more or less than before."""

    def __init__(self) -> None:
        self.cleared = False
        self.changes: dict[Tier, dict[int, int]] = {tier: {} for tier in TIERS}

    def take(self, events: Iterable[Any]) -> None:
        for event in events:
            kind = type(event)
            if kind is AllBlocksCleared:
                self.cleared = True
                for changes in self.changes.values():
                    changes.clear()
                continue
            tier = TIER_OF.get(event.medium) if kind in _OF_BLOCKS else None
            if tier is not None:
                self._count(self.changes[tier], event.block_hashes, 1 if kind is BlockStored else -1)

    def add(self, later: _Sum) -> None:
        """``later`` happened after this."""
        if later.cleared:
            self.cleared, self.changes = True, later.changes
            return
        for tier, changes in later.changes.items():
            for published, change in changes.items():
                self._count(self.changes[tier], (published,), change)

    @staticmethod
    def _count(changes: dict[int, int], hashes: Sequence[int], change: int) -> None:
        for published in hashes:
            now = changes.get(published, 0) + change
            if now:
                changes[published] = now
            else:
                changes.pop(published, None)


class Placements:
    """The decoder of one scheduler's events.

    The scheduler calls :meth:`note` and, from within the feed, :meth:`fold`; the reporter's thread :meth:`decode`.
    What waits between the two is a list of events, in the order of the scheduler.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._waiting: list[Sequence[Any] | _Sum] = []
        self._nodes: dict[Tier, dict[int, int]] = {tier: {} for tier in TIERS}
        self.unbalanced = 0
        """Removals of what was not stored."""

    def note(self, events: Sequence[Any]) -> int:
        """Keep ``events`` for the reporter's thread; returns how many hashes they carry."""
        with self._lock:
            self._waiting.append(events)
        return sum([len(event.block_hashes) for event in events if type(event) in _OF_BLOCKS])

    def fold(self) -> str:
        """Too much waits: keep its net effect only, which is never more than the caches hold.

        Returns the item that has everything told.
        """
        with self._lock:
            waiting, self._waiting = self._waiting, []
        total = _Sum()
        for part in waiting:
            if isinstance(part, _Sum):
                total.add(part)
            else:
                total.take(part)
        with self._lock:
            self._waiting.insert(0, total)
        return _WHOLE

    def decode(self, item: str) -> Iterator[Word]:
        """What happened since the last time."""
        with self._lock:
            waiting, self._waiting = self._waiting, []
        words = [word for part in waiting for word in self._words_of(part)]
        if item is _WHOLE:
            yield from (Word(WordKind.REPLACE, tier, _published(self._nodes[tier])) for tier in TIERS)
        else:
            yield from words

    def _words_of(self, part: Sequence[Any] | _Sum) -> Iterator[Word]:
        if isinstance(part, _Sum):
            total = part
        else:
            total = _Sum()
            total.take(part)
        if total.cleared:
            for tier in TIERS:
                self._nodes[tier].clear()
                yield Word(WordKind.CLEAR, tier)
        for tier in TIERS:
            added, removed = self._apply(self._nodes[tier], total.changes[tier])
            if removed:
                yield Word(WordKind.REMOVE, tier, _published(removed))
            if added:
                yield Word(WordKind.ADD, tier, _published(added))

    def _apply(self, nodes: dict[int, int], changes: dict[int, int]) -> tuple[list[int], list[int]]:
        added, removed = [], []
        for published, change in changes.items():
            before = nodes.get(published, 0)
            now = before + change
            if now > 0:
                nodes[published] = now
                if not before:
                    added.append(published)
            else:
                self.unbalanced -= now
                if before:
                    del nodes[published]
                    removed.append(published)
        return added, removed


def _published(hashes: Iterable[int]) -> list[bytes]:
    return [b"%d" % published for published in hashes]
