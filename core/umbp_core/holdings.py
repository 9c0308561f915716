"""What a node holds, tier by tier, when several parts of it speak for the same tier.

An engine may have two kinds of DRAM (SGLang's host pool and a storage pool beneath it), each with its own list of what
is in it.  To everybody else they are one tier of one node: a hash is there while any of them has it.

No I/O, no threads, no clock.  One thread at a time.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice

_PIECE = 1 << 13
"""Hashes that are copied at one go: other threads get their turn between two pieces."""


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
        added: list[bytes] = []
        for piece in _pieces(hashes):
            new, before = [key for key in piece if key not in own], len(own)
            own.update(new)
            added += self._came(tier, _not_in(_once(new, len(own) - before), source, sources))
        return added

    def remove(self, source: str, tier: int, hashes: Iterable[bytes]) -> list[bytes]:
        """``source`` has ``hashes`` on ``tier`` no more.  Returns those that nobody has there any more."""
        sources = self._tiers.get(tier, {})
        own = sources.get(source)
        if not own:
            return []
        removed: list[bytes] = []
        for piece in _pieces(hashes):
            old, before = [key for key in piece if key in own], len(own)
            own.difference_update(old)
            removed += self._left(tier, _not_in(_once(old, before - len(own)), source, sources))
        return removed

    def clear(self, source: str, tier: int) -> list[bytes]:
        """``source`` has nothing on ``tier`` any more.  Returns what nobody has there any more."""
        sources = self._tiers.get(tier, {})
        gone = _listed(sources.pop(source, set()))
        return self._left(tier, _not_in(gone, source, sources))

    def replace(self, source: str, tier: int, hashes: Iterable[bytes]) -> tuple[list[bytes], list[bytes]]:
        """``source`` has exactly ``hashes`` on ``tier``.  Returns what came to the tier, and what left it."""
        sources = self._tiers.setdefault(tier, {})
        before = sources.get(source, set())
        now: set[bytes] = set()
        fresh: list[bytes] = []
        for piece in _pieces(hashes):
            fresh += [key for key in dict.fromkeys(piece) if not (key in before or key in now)]
            now.update(piece)
        sources[source] = now
        removed = self._left(tier, _not_in([key for key in before if key not in now], source, sources))
        return self._came(tier, _not_in(fresh, source, sources)), removed

    def tiers_of(self, source: str) -> list[int]:
        """The tiers that ``source`` has spoken for and not cleared, in the order of their numbers."""
        return sorted(tier for tier, sources in self._tiers.items() if source in sources)

    def tiers(self) -> list[int]:
        """The tiers that hold anything, in the order of their numbers."""
        return sorted(tier for tier, count in self._counts.items() if count)

    def count(self, tier: int) -> int:
        """How many hashes ``tier`` holds."""
        return self._counts.get(tier, 0)

    def counts(self) -> dict[int, int]:
        """The same for every tier that anybody ever spoke of."""
        return dict(self._counts)

    def held(self, tier: int) -> list[bytes]:
        """The hashes that ``tier`` holds, each once."""
        found: list[bytes] = []
        passed: list[set[bytes]] = []
        for own in self._tiers.get(tier, {}).values():
            mine = _listed(own)
            for other in passed:
                mine = [key for key in mine if key not in other]
            found += mine
            passed.append(own)
        return found

    def snapshot(self) -> Iterator[tuple[int, list[bytes]]]:
        """Every tier that holds anything, with its hashes as they are at the moment when that tier is reached.

        There may be changes between two steps of the iteration.
        """
        for tier in self.tiers():
            yield tier, self.held(tier)

    def _came(self, tier: int, hashes: list[bytes]) -> list[bytes]:
        self._counts[tier] = self._counts.get(tier, 0) + len(hashes)
        return hashes

    def _left(self, tier: int, hashes: list[bytes]) -> list[bytes]:
        self._counts[tier] = self._counts.get(tier, 0) - len(hashes)
        return hashes


def _pieces(hashes: Iterable[bytes]) -> Iterator[list[bytes]]:
    """``hashes`` a few at a time."""
    rest = iter(hashes)
    return iter(lambda: list(islice(rest, _PIECE)), [])


def _once(hashes: list[bytes], distinct: int) -> list[bytes]:
    """``hashes`` without repetitions, ``distinct`` in number; as a rule there are none."""
    return hashes if len(hashes) == distinct else list(dict.fromkeys(hashes))


def _listed(hashes: set[bytes]) -> list[bytes]:
    """What ``list`` makes of it, which no other thread could interrupt."""
    found: list[bytes] = []
    for piece in _pieces(hashes):
        found += piece
    return found


def _not_in(hashes: list[bytes], source: str, sources: dict[str, set[bytes]]) -> list[bytes]:
    """``hashes`` without those that another source than ``source`` has."""
    for name, other in sources.items():
        if name != source and other:
            hashes = [key for key in hashes if key not in other]
    return hashes
