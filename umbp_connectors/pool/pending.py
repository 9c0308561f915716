"""What waits to be written to the catalogue: the last word on each key, in order."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from itertools import islice
from typing import Generic, TypeVar

Row = TypeVar("Row")


@dataclass(frozen=True)
class Batch(Generic[Row]):
    """Words to write together; ``None`` means forget, ``everything`` that all keys are gone before them.

    When they are written, everything before the barrier ``sealed`` is; ``last`` says that it was not before.
    """

    words: list[tuple[bytes, Row | None]]
    sealed: int
    last: bool = False
    everything: bool = False


class PendingWords(Generic[Row]):
    """A bounded queue that keeps only the last word on a key, behind everything that was said before it.

    :meth:`seal` marks a barrier: words before it are neither overtaken nor replaced by later ones.  Not thread-safe.
    """

    def __init__(self, max_records: int) -> None:
        self._max_records = max_records
        self._records = 0
        self._generations: deque[dict[bytes, Row | None]] = deque([{}])
        self._everything = False
        """Whether all keys are to be forgotten, before any other word."""
        self._sealed = 0
        self._taken = 0

    def __len__(self) -> int:
        return sum(map(len, self._generations)) + self._everything

    def __contains__(self, key: bytes) -> bool:
        return self._everything or any(key in generation for generation in self._generations)

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

    def forget_all(self) -> None:
        """Queue that every key is gone, in place of all that was said before; barriers stay."""
        for generation in self._generations:
            generation.clear()
        self._records = 0
        self._everything = True

    def seal(self) -> int:
        """Close what is queued off from what follows; returns the number of barriers up to and with this one."""
        self._generations.append({})
        self._sealed += 1
        return self._sealed

    def take(self, count: int) -> Batch[Row]:
        """Remove the oldest ``count`` words at most, none of them from beyond the next barrier."""
        oldest = self._generations[0]
        everything, self._everything = self._everything, False
        words = list(islice(oldest.items(), count))
        for key, row in words:
            del oldest[key]
            self._records -= row is not None
        if not oldest and len(self._generations) > 1:
            self._generations.popleft()
            self._taken += 1
            return Batch(words, self._taken, True, everything)
        return Batch(words, self._taken, False, everything)

    def give_back(self, batch: Batch[Row]) -> None:
        """Queue before everything else that the keys of ``batch`` are gone: it was taken last and cannot be written."""
        self._everything |= batch.everything
        if batch.last:
            self._generations.appendleft({})
            self._taken -= 1
        oldest = self._generations[0]
        gone: dict[bytes, Row | None] = {key: None for key, _ in batch.words if key not in oldest}
        self._generations[0] = gone | oldest

    def _put(self, key: bytes, row: Row | None) -> None:
        newest = self._generations[-1]
        # Removed and appended, not replaced in place: a later word about the same slot must be written later.
        if newest.pop(key, None) is not None:
            self._records -= 1
        newest[key] = row
        self._records += row is not None
