"""How often each hash was asked for and found, with the last time; what nobody asks for any more is forgotten.

Counts do not depend on where a hash lies, or whether it still lies anywhere.  Time is whatever monotonic seconds the
caller passes.  One thread at a time.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray


class HitCounters:
    """Counters of hashes.  ``ttl`` is how many seconds a counter outlives the last hit.

    Each hash has a place in two arrays, so that a query costs one lookup per hash and the rest is arithmetic on arrays.
    """

    def __init__(self, ttl: float = 7200.0) -> None:
        self._ttl = ttl
        self._places: dict[bytes, int] = {}
        self._keys: list[bytes] = []
        self._counts = array("Q")
        self._seen = array("d")
        self._cursor = 0
        self._now = -math.inf

    def __len__(self) -> int:
        """Hashes that have a counter."""
        return len(self._keys)

    def record(self, hashes: Iterable[bytes], now: float) -> None:
        """Count one hit of each of ``hashes`` at ``now``; one that is named twice is counted once.

        A ``now`` that goes back counts as the latest one that was given.
        """
        self._now = max(self._now, now)
        queried = list(hashes)
        if not queried:
            return
        place = self._places.get(queried[0])
        if place is not None and self._keys[place : place + len(queried)] == queried:
            self._hit(slice(place, place + len(queried)))  # a chain that was counted as a whole before
        else:
            self._hit(self._places_of(queried))

    def _places_of(self, hashes: Sequence[bytes]) -> NDArray[np.intp]:
        """The places of ``hashes``, which are made where there are none."""
        found = list(map(self._places.get, hashes))
        if None in found:
            self._add(dict.fromkeys([key for key, place in zip(hashes, found, strict=True) if place is None]))
            found = list(map(self._places.get, hashes))
        return np.array(found, np.intp)

    def _hit(self, places: slice | NDArray[np.intp]) -> None:
        # Of a place that is named twice, both sums are the same: it is counted once.
        np.frombuffer(self._counts, np.uint64)[places] += np.uint64(1)
        np.frombuffer(self._seen, np.float64)[places] = self._now

    def counts(self, hashes: Iterable[bytes]) -> dict[bytes, int]:
        """The counters of ``hashes`` in the order of the query; those without one are left out, duplicates too."""
        places, counts = self._places, self._counts
        return {key: counts[places[key]] for key in hashes if key in places}

    def collect(self, now: float, limit: int | None = None) -> int:
        """Forget counters without a hit for the time to live; returns how many.

        Looks at ``limit`` counters and goes on there the next time, or at all of them (``None``).
        """
        keys, oldest = self._keys, now - self._ttl
        before = len(keys)
        cursor = 0 if limit is None else self._cursor
        for _ in range(before if limit is None else min(limit, before)):
            if cursor >= len(keys):
                cursor = 0
            if self._seen[cursor] > oldest:
                cursor += 1
            else:
                self._forget(cursor)
        self._cursor = cursor
        return before - len(keys)

    def _add(self, new: Iterable[bytes]) -> None:
        before = len(self._keys)
        self._keys += new
        self._places.update(zip(self._keys[before:], range(before, len(self._keys)), strict=True))
        zeros = bytes(8 * (len(self._keys) - before))
        self._counts.frombytes(zeros)
        self._seen.frombytes(zeros)

    def _forget(self, place: int) -> None:
        """Free ``place``, to which the last counter moves."""
        del self._places[self._keys[place]]
        key, count, seen = self._keys.pop(), self._counts.pop(), self._seen.pop()
        if place < len(self._keys):
            self._keys[place], self._counts[place], self._seen[place] = key, count, seen
            self._places[key] = place
