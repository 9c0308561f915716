"""How often each hash was asked for and found, with the last time; what nobody asks for any more is forgotten.

Counts do not depend on where a hash lies, or whether it still lies anywhere.  Time is whatever monotonic seconds the
caller passes.  One thread at a time.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from itertools import filterfalse


class HitCounters:
    """Counters of hashes.  ``ttl`` is how many seconds a counter outlives the last hit."""

    def __init__(self, ttl: float = 7200.0) -> None:
        self._ttl = ttl
        self._counts: Counter[bytes] = Counter()
        self._seen: dict[bytes, float] = {}
        self._order: list[bytes] = []
        self._cursor = 0
        self._now = -math.inf

    def __len__(self) -> int:
        """Hashes that have a counter."""
        return len(self._order)

    def record(self, hashes: Iterable[bytes], now: float) -> None:
        """Count one hit of each of ``hashes`` at ``now``; one that is named twice is counted once.

        A ``now`` that goes back counts as the latest one that was given.
        """
        counts = self._counts
        self._now = max(self._now, now)
        unique = dict.fromkeys(hashes, self._now)
        self._order += filterfalse(counts.__contains__, unique)
        counts.update(unique.keys())
        self._seen.update(unique)

    def counts(self, hashes: Iterable[bytes]) -> dict[bytes, int]:
        """The counters of ``hashes`` in the order of the query; those without one are left out, duplicates too."""
        counts = self._counts
        return {key: counts[key] for key in hashes if key in counts}

    def collect(self, now: float, limit: int | None = None) -> int:
        """Forget counters without a hit for the time to live; returns how many.

        Looks at ``limit`` counters and goes on there the next time, or at all of them (``None``).
        """
        order, oldest = self._order, now - self._ttl
        before = len(order)
        cursor = 0 if limit is None else self._cursor
        for _ in range(before if limit is None else min(limit, before)):
            if cursor >= len(order):
                cursor = 0
            key = order[cursor]
            if self._seen[key] > oldest:
                cursor += 1
                continue
            del self._counts[key], self._seen[key]
            last = order.pop()
            if cursor < len(order):
                order[cursor] = last
        self._cursor = cursor
        return before - len(order)
