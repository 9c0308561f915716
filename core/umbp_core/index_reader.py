"""Reading the rows of an index: a query's hashes to their masks, many at once where the query follows a chain.

A chain is mostly reported in its order, so that its rows follow each other: where a part of a query equals the keys of
as many rows, nothing has to be hashed and looked up.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain, repeat

from umbp_core.joined import JoinedHashes

NOWHERE = 0
"""The row of every hash that is not known: its mask is empty."""
_RUN = 16
"""Hashes of a query that are compared with as many rows at once; twice as many after each part that is no run ..."""
_LONGEST = 256
"""... up to here."""


class MaskReader:
    """Reads what the index keeps: ``rows`` by hash, and the keys and masks of the rows, all of which it may change."""

    __slots__ = ("_keys", "_masks", "_rows")

    def __init__(self, rows: Mapping[bytes, int], keys: Sequence[bytes], masks: Sequence[int]) -> None:
        self._rows = rows
        self._keys = keys
        self._masks = masks

    def read(self, hashes: Sequence[bytes]) -> Sequence[int]:
        """The masks of ``hashes``."""
        rows, count = self._rows, len(hashes)
        if count == 1:
            return (self._masks[rows.get(hashes[0], NOWHERE)],)
        if isinstance(hashes, JoinedHashes):
            hashes.row = NOWHERE
            first, last = hashes.ends()
            start = rows.get(first, NOWHERE)
            end = start + count
            if start and rows.get(last) == end - 1 and b"" not in rows and hashes.consists_of(self._keys[start:end]):
                hashes.row = start
                return self._masks[start:end]
            hashes = hashes.apart()
        return list(chain.from_iterable(self.runs(hashes)))

    def runs(self, hashes: Sequence[bytes]) -> Iterator[Iterable[int]]:
        """The masks of ``hashes``, in parts."""
        get, keys, masks = self._rows.get, self._keys, self._masks
        row, at, step = NOWHERE, 0, _RUN
        unambiguous = b"" not in self._rows  # the key of a free row
        while at < len(hashes):
            part = hashes[at : at + step]
            at += step
            row = row or get(part[0], NOWHERE)
            end = row + len(part)
            if row and unambiguous and keys[row:end] == part:
                yield masks[row:end]
                row, step = end, _RUN
            else:
                yield map(masks.__getitem__, map(get, part, repeat(NOWHERE)))
                row, step = NOWHERE, min(2 * step, _LONGEST)
