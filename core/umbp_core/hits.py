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
    Where the owner numbers its hashes by rows, and a query names those of rows that follow each other, the places are
    known by row too, and nothing is looked up.
    """

    def __init__(self, ttl: float = 7200.0) -> None:
        self._ttl = ttl
        self._places: dict[bytes, int] = {}
        self._keys: list[bytes] = []
        self._counts = array("Q")
        self._seen = array("d")
        self._row_of = array("I")
        """By place: the row of its hash, or 0 where it is not known."""
        self._place_of = array("I")
        """By row: the place, if that agrees in ``_row_of``; of rows with a hash it is that of some counter, or 0."""
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
        if len(queried) > 1:
            self._hit(np.array(self._places_of(queried), np.uint32))
        elif queried:
            (place,) = self._places_of(queried)
            self._counts[place] += 1
            self._seen[place] = self._now

    def record_rows(self, hashes: Sequence[bytes], start: int, now: float) -> None:
        """:meth:`record` of different hashes which lie in the owner's rows from ``start``, at least 1, on.

        The owner has to call :meth:`forget_rows` before a row gets another hash.
        """
        self._now = max(self._now, now)
        end = start + len(hashes)
        missing = end - len(self._place_of)
        if missing > 0:
            self._place_of.frombytes(bytes(self._place_of.itemsize * missing))
        places = np.frombuffer(self._place_of, np.uint32)[start:end]
        rows = np.arange(start, end, dtype=np.uint32)
        if not self._keys or np.frombuffer(self._row_of, np.uint32)[places].tobytes() != rows.tobytes():
            places[:] = self._places_of(hashes)
            np.frombuffer(self._row_of, np.uint32)[places] = rows
        self._hit(places)

    def forget_rows(self, rows: Iterable[int]) -> None:
        """Each of ``rows`` is about to get another hash."""
        for row in rows:
            if row < len(self._place_of):
                place, self._place_of[row] = self._place_of[row], 0
                if place < len(self._keys) and self._row_of[place] == row:
                    self._row_of[place] = 0

    def _places_of(self, hashes: Sequence[bytes]) -> list[int]:
        """The places of ``hashes``, which are made where there are none."""
        places = self._places
        if not all(map(places.__contains__, hashes)):
            self._add(dict.fromkeys([key for key in hashes if key not in places]))
        return list(map(places.__getitem__, hashes))

    def _hit(self, places: NDArray[np.uint32]) -> None:
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
        self._row_of.frombytes(bytes(self._row_of.itemsize * (len(self._keys) - before)))

    def _forget(self, place: int) -> None:
        """Free ``place``, to which the last counter moves."""
        del self._places[self._keys[place]]
        if self._row_of[place]:
            self._place_of[self._row_of[place]] = 0
        key, count, seen, row = self._keys.pop(), self._counts.pop(), self._seen.pop(), self._row_of.pop()
        if place < len(self._keys):
            self._keys[place], self._counts[place], self._seen[place], self._row_of[place] = key, count, seen, row
            self._places[key] = place
            if row:
                self._place_of[row] = place
