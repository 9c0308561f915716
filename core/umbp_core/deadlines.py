"""Keys with a deadline, cheapest first."""

from __future__ import annotations

import heapq

_COMPACT_ABOVE = 64


class Deadlines:
    """A set of keys, each with the moment at which it expires.  One thread.

    Removing a key leaves its heap entry behind; entries are dropped when they come to the top, and all at
    once when they outnumber the living ones, so memory stays proportional to the keys that are left.
    """

    def __init__(self) -> None:
        self._deadline: dict[str, float] = {}
        self._heap: list[tuple[float, str]] = []

    def __len__(self) -> int:
        return len(self._deadline)

    def set(self, key: str, deadline: float) -> None:
        """Let ``key`` expire at ``deadline``, whatever was set before."""
        self._deadline[key] = deadline
        heapq.heappush(self._heap, (deadline, key))
        self._compact()

    def discard(self, key: str) -> None:
        """Forget ``key``; a no-op when it is not known."""
        self._deadline.pop(key, None)
        self._compact()

    def next(self) -> float | None:
        """The earliest deadline, or ``None`` when there is no key."""
        while self._heap:
            deadline, key = self._heap[0]
            if self._deadline.get(key) == deadline:
                return deadline
            heapq.heappop(self._heap)
        return None

    def pop_expired(self, now: float) -> list[str]:
        """Remove and return the keys whose deadline is at or before ``now``, earliest first."""
        expired = []
        while (deadline := self.next()) is not None and deadline <= now:
            key = heapq.heappop(self._heap)[1]
            del self._deadline[key]
            expired.append(key)
        return expired

    def _compact(self) -> None:
        if len(self._heap) > _COMPACT_ABOVE and len(self._heap) > 2 * len(self._deadline):
            self._heap = [(deadline, key) for key, deadline in self._deadline.items()]
            heapq.heapify(self._heap)
