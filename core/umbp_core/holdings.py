"""What a node holds, tier by tier, when several parts of it speak for the same tier.

An engine may have two kinds of DRAM (SGLang's host pool and a storage pool beneath it), each with its own list of what
is in it.  To everybody else they are one tier of one node: a hash is there while any of them has it.

No I/O, no threads, no clock.  One thread at a time.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator


class Holdings:
    """Sets of hashes per tier and per *source*, a name for one part of the node that speaks for itself.

    Every change may be repeated without harm.  Every method that changes something returns what that changed for the
    tier as a whole, each hash once and in the order given; where no order was given, in any.
    """

    def __init__(self) -> None:
        self._tiers: dict[int, dict[str, set[bytes]]] = {}
        self._counts: dict[int, int] = {}

    def add(self, source: str, tier: int, hashes: Iterable[bytes]) -> list[bytes]:
        """``source`` has ``hashes`` on ``tier``.  Returns those that nobody had there."""
        sources = self._tiers.setdefault(tier, {})
        own = sources.setdefault(source, set())
        fresh = [key for key in dict.fromkeys(hashes) if key not in own]
        own.update(fresh)
        added = _not_in(fresh, source, sources)
        self._count(tier, len(added))
        return added

    def remove(self, source: str, tier: int, hashes: Iterable[bytes]) -> list[bytes]:
        """``source`` has ``hashes`` on ``tier`` no more.  Returns those that nobody has there any more."""
        sources = self._tiers.get(tier, {})
        own = sources.get(source)
        if not own:
            return []
        gone = [key for key in dict.fromkeys(hashes) if key in own]
        own.difference_update(gone)
        removed = _not_in(gone, source, sources)
        self._count(tier, -len(removed))
        return removed

    def clear(self, source: str, tier: int) -> list[bytes]:
        """``source`` has nothing on ``tier`` any more.  Returns what nobody has there any more."""
        sources = self._tiers.get(tier, {})
        removed = _not_in(list(sources.pop(source, ())), source, sources)
        self._count(tier, -len(removed))
        return removed

    def replace(self, source: str, tier: int, hashes: Iterable[bytes]) -> tuple[list[bytes], list[bytes]]:
        """``source`` has exactly ``hashes`` on ``tier``.  Returns what came to the tier, and what left it."""
        sources = self._tiers.setdefault(tier, {})
        before = sources.get(source, set())
        now = dict.fromkeys(hashes)
        sources[source] = set(now)
        added = _not_in([key for key in now if key not in before], source, sources)
        removed = _not_in(list(before.difference(now)), source, sources)
        self._count(tier, len(added) - len(removed))
        return added, removed

    def tiers_of(self, source: str) -> list[int]:
        """The tiers that ``source`` has spoken for and not cleared, in the order of their numbers."""
        return sorted(tier for tier, sources in self._tiers.items() if source in sources)

    def count(self, tier: int) -> int:
        """How many hashes ``tier`` holds."""
        return self._counts.get(tier, 0)

    def counts(self) -> dict[int, int]:
        """The same for every tier that anybody ever spoke of."""
        return dict(self._counts)

    def snapshot(self) -> Iterator[tuple[int, list[bytes]]]:
        """Every tier that holds anything, with its hashes as they are at the moment when that tier is reached.

        There may be changes between two steps of the iteration.
        """
        for tier in sorted(self._tiers):
            sets = [own for own in self._tiers[tier].values() if own]
            if sets:
                yield tier, list(sets[0] if len(sets) == 1 else set().union(*sets))

    def _count(self, tier: int, change: int) -> None:
        self._counts[tier] = self._counts.get(tier, 0) + change


def _not_in(hashes: list[bytes], source: str, sources: dict[str, set[bytes]]) -> list[bytes]:
    """``hashes`` without those that another source than ``source`` has."""
    for name, other in sources.items():
        if name != source and other:
            hashes = [key for key in hashes if key not in other]
    return hashes
