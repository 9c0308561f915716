"""What routers ask a master, answered in steps: each step is one look at the index, and the answers are put together.

A tier that is cleared between two steps is left out of the answer, as if it had been cleared before the first.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from typing import Generic, TypeVar

from umbp_core.index import ExternalKvIndex, NodeMatch, PositionMatch, PrefixMatch, TierRun
from umbp_core.master.changes import Steps

P = TypeVar("P")


class Queries:
    """Large questions to ``index``, ``size`` hashes in a step."""

    def __init__(self, index: ExternalKvIndex, size: int) -> None:
        self._index = index
        self._size = size

    def match(self, hashes: Sequence[bytes], count_as_hit: bool, now: float) -> Steps[list[NodeMatch]]:
        """Steps of ``ExternalKvIndex.match``."""
        found: _Found[list[bytes]] = _Found(self._index)
        matched: Counter[str] = Counter()
        counted: set[bytes] = set()
        for _, part in self._slices(hashes):
            if count_as_hit:
                self._count(part, counted, now)
                yield
            for match in self._index.match(part):
                matched[match.node] += match.matched
                for tier, held in match.tiers.items():
                    found.add(match.node, tier, held)
            yield
        lists: dict[tuple[int, ...], list[bytes]] = {}
        matches = []
        for node, tiers in found.by_node():
            whole = {}
            for tier, parts in tiers.items():
                same = tuple(map(id, parts))
                if same not in lists:
                    lists[same] = list(chain.from_iterable(parts))
                    yield
                whole[tier] = lists[same]
            matches.append(NodeMatch(node, whole, matched[node]))
        return matches

    def match_positions(self, hashes: Sequence[bytes], count_as_hit: bool, now: float) -> Steps[list[PositionMatch]]:
        """Steps of ``ExternalKvIndex.match_positions``."""
        found: _Found[tuple[int, bytes]] = _Found(self._index)
        counted: set[bytes] = set()
        for start, part in self._slices(hashes):
            if count_as_hit:
                self._count(part, counted, now)
                yield
            for match in self._index.match_positions(part):
                for tier, bitmap in match.tiers.items():
                    found.add(match.node, tier, (start // 8, bitmap))
            yield
        size = (len(hashes) + 7) // 8
        return [
            PositionMatch(node, {tier: _joined(parts, size) for tier, parts in tiers.items()})
            for node, tiers in found.by_node()
        ]

    def _count(self, part: Sequence[bytes], counted: set[bytes], now: float) -> None:
        """Count those of ``part`` that were not ``counted`` for this query."""
        new = [key for key in part if key not in counted]
        self._index.count_hits(new, self._index.places_of(new), now)
        counted.update(part)

    def match_prefix(self, hashes: Sequence[bytes], weights: Mapping[int, float] | None) -> Steps[list[PrefixMatch]]:
        """Steps of ``ExternalKvIndex.match_prefix``; they end where no node goes on."""
        results: dict[str, PrefixMatch] = {}
        lives: dict[str, dict[int, int]] = {}
        for start, part in self._slices(hashes):
            going = 0
            for match in self._index.match_prefix(part, weights):
                if start == 0:
                    results[match.node] = match
                elif match.node in results and results[match.node].length == start:
                    _extend(results[match.node], match)
                else:
                    continue
                node_lives = lives.setdefault(match.node, {})
                for tier, _ in match.runs:
                    node_lives.setdefault(tier, self._index.life(match.node, tier))
                going += results[match.node].length == start + len(part)
            if not going:
                break
            yield
        usable = (match for match in results.values() if self._lasts(match.node, lives[match.node]))
        return sorted(usable, key=lambda match: (-match.length, match.cost, match.node))

    def _slices(self, hashes: Sequence[bytes]) -> Iterator[tuple[int, Sequence[bytes]]]:
        for start in range(0, len(hashes), self._size):
            yield start, hashes[start : start + self._size]

    def _lasts(self, node: str, lives: Mapping[int, int]) -> bool:
        return all(self._index.life(node, tier) == life for tier, life in lives.items())


class _Found(Generic[P]):
    """The parts of an answer, per node and tier."""

    def __init__(self, index: ExternalKvIndex) -> None:
        self._index = index
        self._parts: dict[tuple[str, int], tuple[int, list[P]]] = {}

    def add(self, node: str, tier: int, part: P) -> None:
        """The next part; what was found before the tier was cleared is dropped."""
        life = self._index.life(node, tier)
        known = self._parts.get((node, tier))
        if known is None or known[0] != life:
            known = self._parts[node, tier] = (life, [])
        known[1].append(part)

    def by_node(self) -> Iterator[tuple[str, dict[int, list[P]]]]:
        """What still counts; tiers by number, nodes in the order in which they were found."""
        nodes: dict[str, dict[int, list[P]]] = {}
        for (node, tier), (life, parts) in self._parts.items():
            if self._index.life(node, tier) == life:
                nodes.setdefault(node, {})[tier] = parts
        for node, tiers in nodes.items():
            yield node, {tier: tiers[tier] for tier in sorted(tiers)}


def _joined(parts: Sequence[tuple[int, bytes]], size: int) -> bytes:
    """One bitmap of ``size`` bytes from those that begin at some of its bytes."""
    whole = bytearray(size)
    for start, bitmap in parts:
        whole[start : start + len(bitmap)] = bitmap
    return bytes(whole)


def _extend(match: PrefixMatch, more: PrefixMatch) -> None:
    """``more`` goes on where ``match`` ends."""
    runs = more.runs
    if match.runs[-1].tier == runs[0].tier:
        last = match.runs.pop()
        runs = [TierRun(last.tier, last.length + runs[0].length), *runs[1:]]
    match.runs += runs
    match.length += more.length
    match.cost += more.cost
