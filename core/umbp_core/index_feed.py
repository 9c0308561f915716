"""The changes of the index, in order: what a router follows, and what an explanation is made from.

A feed belongs to one life of the index, its *incarnation*.  Every change has the next sequence number, from 1 on.
The latest changes are kept; a reader that is further behind, or that followed another incarnation, is told so and has
to take a snapshot (law L11).  Changes are sets being added to and taken from: to apply one twice does no harm.

Time is whatever seconds the caller passes; it is kept for explanations only.  One thread at a time.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass

MAX_CHANGE_HASHES = 4096
"""Hashes that one change names at most: what is sent in one message is bounded."""


class ChangeKind(enum.IntEnum):
    """What happened to hashes of one tier of one node."""

    REPORTED = 1
    REVOKED = 2
    CLEARED = 3
    """All hashes of the tier; ``hashes`` of the change is empty."""


@dataclass(frozen=True, slots=True)
class Change:
    """One change of the index.  It names only hashes for which something changed."""

    seq: int
    kind: ChangeKind
    node: str
    tier: int
    hashes: tuple[bytes, ...]
    at: float
    reason: str = ""
    """Why a tier was cleared."""


@dataclass(frozen=True, slots=True)
class FeedPage:
    """Changes after a cursor."""

    incarnation: int
    changes: list[Change]
    cursor: int
    """To be given to the next call."""
    lost: bool
    """The reader missed changes: it must take a snapshot and follow from the snapshot's cursor."""


class ChangeFeed:
    """The latest changes of one incarnation of the index.

    Keeps at most ``max_changes`` changes that name at most ``max_hashes`` hashes in total, but always the latest one.
    """

    def __init__(self, incarnation: int, max_changes: int = 1 << 16, max_hashes: int = 1 << 18) -> None:
        self.incarnation = incarnation
        self._max_changes = max_changes
        self._max_hashes = max_hashes
        self._changes: dict[int, Change] = {}
        self._hashes = 0
        self._last = 0

    @property
    def cursor(self) -> int:
        """The sequence number of the latest change; 0 before the first."""
        return self._last

    def append(
        self, kind: ChangeKind, node: str, tier: int, hashes: Sequence[bytes], at: float, reason: str = ""
    ) -> None:
        """Add a change, or several when it names very many hashes; forgets the oldest ones when there are too many."""
        for start in range(0, len(hashes) or 1, MAX_CHANGE_HASHES):
            part = tuple(hashes[start : start + MAX_CHANGE_HASHES])
            self._last += 1
            self._changes[self._last] = Change(self._last, kind, node, tier, part, at, reason)
            self._hashes += len(part)
        while len(self._changes) > 1 and (len(self._changes) > self._max_changes or self._hashes > self._max_hashes):
            oldest = self._changes.pop(self._last + 1 - len(self._changes))
            self._hashes -= len(oldest.hashes)

    def since(self, incarnation: int, cursor: int, limit: int = 256, max_hashes: int = 1 << 14) -> FeedPage:
        """Up to ``limit`` changes after ``cursor``, which came from a snapshot or an earlier page.

        They name up to ``max_hashes`` hashes in total, or it is only one change.
        """
        oldest = self._last + 1 - len(self._changes)
        if incarnation != self.incarnation or not oldest - 1 <= cursor <= self._last:
            return FeedPage(self.incarnation, [], self._last, lost=True)
        changes: list[Change] = []
        for seq in range(cursor + 1, min(cursor + limit, self._last) + 1):
            change = self._changes[seq]
            max_hashes -= len(change.hashes)
            if changes and max_hashes < 0:
                break
            changes.append(change)
        return FeedPage(self.incarnation, changes, cursor + len(changes), lost=False)

    def latest_of(self, node: str, key: bytes) -> list[Change]:
        """The last change that is known of each tier of ``node`` that concerned ``key``; the latest first.

        Looks through the whole feed: a question for people.
        """
        found: dict[int, Change] = {}
        for seq in range(self._last, self._last - len(self._changes), -1):
            change = self._changes[seq]
            if change.node != node or change.tier in found:
                continue
            if change.kind is ChangeKind.CLEARED or key in change.hashes:
                found[change.tier] = change
        return list(found.values())
