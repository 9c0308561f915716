"""Keys with a deadline, earliest first."""

from __future__ import annotations

import heapq
from collections import deque

_COMPACT_ABOVE = 64

_Entry = tuple[float, str]


class Deadlines:
    """A set of keys, each with the moment at which it expires.  One thread.

    Where every key is given the same time, deadlines come in their order: those are queued, and cost the same however
    many there are.  Only a deadline that comes before one set earlier goes to a heap.

    Removing a key leaves its entry behind; entries are dropped when they come to the front, and all at
    once when they outnumber the living ones, so memory stays proportional to the keys that are left.
    """

    def __init__(self) -> None:
        self._deadline: dict[str, float] = {}
        self._queue: deque[_Entry] = deque()
        self._heap: list[_Entry] = []

    def __len__(self) -> int:
        return len(self._deadline)

    def set(self, key: str, deadline: float) -> None:
        """Let ``key`` expire at ``deadline``, whatever was set before."""
        self._deadline[key] = deadline
        if not self._queue or deadline >= self._queue[-1][0]:
            self._queue.append((deadline, key))
        else:
            heapq.heappush(self._heap, (deadline, key))
        self._compact()

    def discard(self, key: str) -> None:
        """Forget ``key``; a no-op when it is not known."""
        self._deadline.pop(key, None)
        self._compact()

    def next(self) -> float | None:
        """The earliest deadline, or ``None`` when there is no key."""
        entry = self._first()
        return entry[0] if entry is not None else None

    def pop_expired(self, now: float) -> list[str]:
        """Remove and return the keys whose deadline is at or before ``now``: earliest first, then by key."""
        expired = []
        while (entry := self._first()) is not None and entry[0] <= now:
            del self._deadline[entry[1]]
            expired.append(entry)
        return [key for _, key in sorted(expired)]

    def _first(self) -> _Entry | None:
        """The entry of the key that expires first; those before it, which stand for nothing any more, are dropped."""
        queue, heap, deadline = self._queue, self._heap, self._deadline
        while queue and deadline.get(queue[0][1]) != queue[0][0]:
            queue.popleft()
        while heap and deadline.get(heap[0][1]) != heap[0][0]:
            heapq.heappop(heap)
        if queue and heap:
            return min(queue[0], heap[0])
        return queue[0] if queue else heap[0] if heap else None

    def _compact(self) -> None:
        entries = len(self._queue) + len(self._heap)
        if entries > _COMPACT_ABOVE and entries > 2 * len(self._deadline):
            self._queue = deque(sorted([(deadline, key) for key, deadline in self._deadline.items()]))
            self._heap = []
