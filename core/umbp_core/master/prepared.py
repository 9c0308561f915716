"""Answers to matches that are ready before they are asked for.

All hashes of a query mostly lie in the same places: it is a chain that one node holds, or nobody does.  What is
answered then depends on these places and on the number of hashes alone, until a tier or a node comes or goes.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Generic, TypeVar

from umbp_core.index import ExternalKvIndex, PositionMatch
from umbp_core.master.clients import ClientTable

A = TypeVar("A")

_KEPT = 512
"""Answers that are kept; before there are more, all are forgotten."""
_LARGEST = 1 << 14
"""Positions, summed over nodes, of an answer that is kept: it has some kilobytes."""


class PreparedMatches(Generic[A]):
    """Answers to ``match_positions`` as ``make`` makes them, which nobody may change; made by ``MasterState``.

    ``check`` refuses what is too large.  Every answer is what ``make`` would make of the matches at that moment, nodes
    that are about to expire left out.
    """

    def __init__(
        self,
        index: ExternalKvIndex,
        clients: ClientTable,
        check: Callable[[str, int], None],
        make: Callable[[Sequence[PositionMatch]], A],
    ) -> None:
        self._index = index
        self._clients = clients
        self._check = check
        self._make = make
        self._revision = 0
        self._ready: dict[tuple[int, int], tuple[A, int]] = {}

    def match(self, hashes: Sequence[bytes], count_as_hit: bool, now: float) -> tuple[A, int]:
        """The answer, and how many positions each node holds, summed over nodes."""
        count = len(hashes)
        self._check("hashes", count)
        index, clients = self._index, self._clients
        places = index.places_of(hashes)
        if count_as_hit:
            index.count_hits(hashes, places, now)
        silent = clients.silent(now)
        if silent or not count or places.count(places[0]) != count:
            return self._answer(places, silent)
        revision = index.revision + clients.revision  # neither ever shrinks
        if revision != self._revision:
            self._ready.clear()
            self._revision = revision
        key = (places[0], count)
        ready = self._ready.get(key)
        if ready is None:
            ready = self._answer(places)
            if len(self._ready) >= _KEPT:
                self._ready.clear()
            if ready[1] <= _LARGEST:
                self._ready[key] = ready
        return ready

    def _answer(self, places: Sequence[int], silent: Collection[str] = ()) -> tuple[A, int]:
        matches = self._index.match_places(places)
        if silent:
            matches = [match for match in matches if match.node not in silent]
        return self._make(matches), sum(map(PositionMatch.matched, matches))
