"""What waits to be written to the catalogue: the last word on each key, in order."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from itertools import islice
from typing import Generic, TypeVar

Row = TypeVar("Row")


@dataclass(frozen=True)
class Batch(Generic[Row]):
    """Words to write together; ``None`` means forget.  ``sealed`` batches of words are complete with it."""

    words: list[tuple[bytes, Row | None]]
    sealed: int


class PendingWords(Generic[Row]):
    """A bounded queue that keeps only the last word on a key, behind everything that was said before it.

    :meth:`seal` marks a barrier: words before it are neither overtaken nor replaced by later ones.  Not thread-safe.
    """

    def __init__(self, max_records: int) -> None:
        self._max_records = max_records
        self._records = 0
        self._generations: deque[dict[bytes, Row | None]] = deque([{}])
        self._sealed = 0
        self._taken = 0

    def __len__(self) -> int:
        return sum(map(len, self._generations))

    def record(self, key: bytes, row: Row) -> bool:
        """Queue ``row``; false when there are already too many records, and then nothing has changed."""
        newest = self._generations[-1]
        if newest.get(key) is None and self._records >= self._max_records:
            return False
        self._put(key, row)
        return True

    def forget(self, key: bytes) -> None:
        """Queue that ``key`` is gone.  Never refused: there can be no more of them than keys that were recorded."""
        self._put(key, None)

    def seal(self) -> int:
        """Close what is queued off from what follows; returns the number of barriers up to and with this one."""
        self._generations.append({})
        self._sealed += 1
        return self._sealed

    def take(self, count: int) -> Batch[Row]:
        """Remove the oldest ``count`` words at most, none of them from beyond the next barrier."""
        oldest = self._generations[0]
        words = list(islice(oldest.items(), count))
        for key, row in words:
            del oldest[key]
            self._records -= row is not None
        if not oldest and len(self._generations) > 1:
            self._generations.popleft()
            self._taken += 1
        return Batch(words, self._taken)

    def _put(self, key: bytes, row: Row | None) -> None:
        newest = self._generations[-1]
        # Removed and appended, not replaced in place: a later word about the same slot must be written later.
        if newest.pop(key, None) is not None:
            self._records -= 1
        newest[key] = row
        self._records += row is not None
