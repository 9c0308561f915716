"""Which prefixes of a chain can be restored, when several pools must have their part of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

Legal = NDArray[np.bool_]
"""Entry ``n`` says whether a prefix of ``n`` pages may be restored; entry 0 is not used."""


def prefixes_up_to(pages: int, boundary: int) -> Legal:
    """Of prefixes of up to ``pages`` pages, those that end at or before ``boundary``."""
    return np.arange(pages + 1) <= boundary


def prefixes_with_tail(present: Sequence[bool], tail: int) -> Legal:
    """The prefixes whose last ``tail`` pages (all of them, if it is shorter) are present."""
    have = np.asarray(present, dtype=bool)
    places = np.arange(1, len(have) + 1)
    last_gap = np.maximum.accumulate(np.where(have, 0, places))
    run = places - last_gap
    return np.concatenate(([True], run >= np.minimum(max(1, tail), places)))


def leading_groups(present: Sequence[bool], group_pages: int) -> int:
    """How many groups of ``group_pages`` pages, from the first on, are present in full."""
    size = max(1, group_pages)
    whole = len(present) // size
    have = np.asarray(present[: whole * size], dtype=bool).reshape(whole, size).all(axis=1)
    gaps = np.flatnonzero(~have)
    return int(gaps[0]) if len(gaps) else whole


@dataclass(slots=True)
class PrefixHits:
    """What a chain's pools have: ``anchor`` leading pages of KV, and per pool the longest prefix that it allows.

    Every pool that :meth:`restrict` names narrows down which prefixes can be restored.
    """

    anchor: int
    anchor_name: str = "kv"
    boundaries: dict[str, int] = field(default_factory=dict)
    _legal: Legal = field(init=False)

    def __post_init__(self) -> None:
        self._legal = prefixes_up_to(self.anchor, self.anchor)
        if self.anchor:
            self.boundaries[self.anchor_name] = self.anchor

    def restrict(self, pool: str, legal: Legal) -> None:
        """Take ``legal`` into account; a pool that allows no prefix at all reports no boundary, as SGLang's own do."""
        boundary = _longest(legal)
        if boundary:
            self.boundaries[pool] = boundary
        self._legal = self._legal & legal

    @property
    def restorable(self) -> list[int]:
        """The lengths in pages, ascending, of the prefixes that every pool allows."""
        lengths: list[int] = (np.flatnonzero(self._legal[1:]) + 1).tolist()
        return lengths

    @property
    def usable(self) -> int:
        """The longest of these, 0 when there is none."""
        return _longest(self._legal)


def _longest(legal: Legal) -> int:
    lengths = np.flatnonzero(legal[1:])
    return int(lengths[-1]) + 1 if len(lengths) else 0
