"""Leases: promises not to evict, with a deadline.

An owner leases a set of keys until one deadline.  A key may be leased by several owners; it is protected
until the last of them releases it or expires.  Time is whatever monotonic seconds the caller passes.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable
from dataclasses import dataclass, field

from umbp_core.errors import UnknownOwner

_SLACK = 32
"""Stale heap entries that are tolerated whatever the number of owners."""


@dataclass(slots=True)
class _Lease:
    deadline: float
    keys: dict[bytes, None] = field(default_factory=dict)


class LeaseTable:
    """Who leases what until when.  Every call costs time in proportion to what it changes.  Not thread-safe."""

    def __init__(self) -> None:
        self._leases: dict[str, _Lease] = {}
        self._counts: dict[bytes, int] = {}
        # Every owner has an entry at or before its deadline; entries of renewed or released owners are
        # recognised when they come up.
        self._heap: list[tuple[float, str]] = []

    def __len__(self) -> int:
        """Owners that hold a lease."""
        return len(self._leases)

    def is_leased(self, key: bytes) -> bool:
        """Whether any owner leases ``key``."""
        return key in self._counts

    def grant(self, owner: str, keys: Iterable[bytes], deadline: float) -> None:
        """Lease ``keys`` to ``owner`` until ``deadline``, in addition to what it leases already.

        All keys of an owner share one deadline, the latest it was given: a promise is never shortened.
        """
        lease = self._leases.get(owner)
        if lease is None:
            lease = self._leases[owner] = _Lease(deadline)
            self._push(owner, deadline)
        elif deadline > lease.deadline:
            lease.deadline = deadline
        for key in keys:
            if key not in lease.keys:
                lease.keys[key] = None
                self._counts[key] = self._counts.get(key, 0) + 1

    def renew(self, owner: str, deadline: float) -> None:
        """Extend ``owner``'s lease to ``deadline``; an earlier one than it has changes nothing.

        Raises ``UnknownOwner`` when it holds none (any more): its keys may be gone by now.
        """
        lease = self._leases.get(owner)
        if lease is None:
            raise UnknownOwner(
                f"owner {owner} holds no lease (any more); look its objects up again and lease them anew"
            )
        lease.deadline = max(lease.deadline, deadline)

    def release(self, owner: str) -> tuple[bytes, ...]:
        """End ``owner``'s lease; the keys it held, in the order they were granted.  Empty when it held none."""
        lease = self._leases.pop(owner, None)
        if lease is None:
            return ()
        for key in lease.keys:
            left = self._counts[key] - 1
            if left:
                self._counts[key] = left
            else:
                del self._counts[key]
        return tuple(lease.keys)

    def expire(self, now: float) -> list[str]:
        """End every lease whose deadline is at or before ``now``; their owners, earliest deadline first."""
        expired = []
        while self._heap and self._heap[0][0] <= now:
            due, owner = heapq.heappop(self._heap)
            lease = self._leases.get(owner)
            if lease is None:
                continue
            if lease.deadline > due:
                heapq.heappush(self._heap, (lease.deadline, owner))
                continue
            self.release(owner)
            expired.append(owner)
        return expired

    def _push(self, owner: str, deadline: float) -> None:
        heapq.heappush(self._heap, (deadline, owner))
        if len(self._heap) > 2 * len(self._leases) + _SLACK:
            self._heap = [(lease.deadline, name) for name, lease in self._leases.items()]
            heapq.heapify(self._heap)
