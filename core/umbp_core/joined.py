"""A query that came as one string of bytes, and is taken apart only when somebody has to look at its hashes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import overload


class JoinedHashes(Sequence[bytes]):
    """``count`` hashes with a separator between two of them: ``joined`` has the separator ``count - 1`` times.

    Whoever made it has checked that, and that there is a hash at all.  Not thread-safe.
    """

    __slots__ = ("_count", "_hashes", "_joined", "_separator", "row")

    def __init__(self, joined: bytes, separator: bytes, count: int) -> None:
        self._joined = joined
        self._separator = separator
        self._count = count
        self._hashes: Sequence[bytes] | None = None
        self.row = 0
        """Set by an index that was just asked: the first of the rows in which the hashes lie one after the other, or 0
        where they do not.  Until anything changes there."""

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[bytes]:
        return iter(self.apart())

    @overload
    def __getitem__(self, place: int) -> bytes: ...

    @overload
    def __getitem__(self, place: slice) -> Sequence[bytes]: ...

    def __getitem__(self, place: int | slice) -> bytes | Sequence[bytes]:
        return self.apart()[place]

    def apart(self) -> Sequence[bytes]:
        """The hashes one by one; the work is done once."""
        if self._hashes is None:
            self._hashes = self._joined.split(self._separator)
        return self._hashes

    def ends(self) -> tuple[bytes, bytes]:
        """The first hash and the last one; nothing is taken apart for them."""
        joined, separator = self._joined, self._separator
        first, last = joined.find(separator), joined.rfind(separator)
        return (joined, joined) if first < 0 else (joined[:first], joined[last + 1 :])

    def consists_of(self, keys: Sequence[bytes]) -> bool:
        """Whether these are ``keys``, in this order; if so, they are what it is taken apart into, without any work."""
        # As many keys with as many separators in all: no key can have one of its own.
        if len(keys) != self._count or self._separator.join(keys) != self._joined:
            return False
        self._hashes = keys
        return True
