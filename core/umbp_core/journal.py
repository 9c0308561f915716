"""What a node has to tell about its blocks: changes coalesced into numbered bundles, kept until acknowledged.

The sender's half of law L11; ``SequenceGate`` is the receiver's.  The owner records every change of its tiers, and
sends the bundles that are not acknowledged, in order.  It never waits for the receiver: what is kept is bounded, and
when the bound is passed everything is dropped and a full sync is due instead.

A full sync is the owner's own snapshot of its tiers, sent under the number that :meth:`Journal.begin_full_sync` gives.
What is recorded from that call on is told afterwards, so the snapshot has to be taken at the same moment or later.

A journal is new with every life of its owner, and so is its incarnation.  No I/O, no threads, no clock.  One thread at
a time.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple

from umbp_core.errors import StateError


class Delta(NamedTuple):
    """A block became readable in a tier (``size`` bytes), or stopped being so (``size`` is ``None``)."""

    key: bytes
    tier: int
    size: int | None


@dataclass(frozen=True, slots=True)
class Bundle:
    """Deltas that are told, and acknowledged, together.  Each block and tier occurs at most once in it."""

    seq: int
    deltas: tuple[Delta, ...]


class Journal:
    """Changes to tell, at most ``max_deltas`` of them, in bundles of at most ``bundle_deltas``.

    ``incarnation`` has to be larger than in any earlier life of the owner.  A new journal owes a full sync: the
    receiver may know things from an earlier life.
    """

    def __init__(self, incarnation: int, max_deltas: int = 1 << 18, bundle_deltas: int = 1024) -> None:
        if max_deltas < 1 or bundle_deltas < 1:
            raise StateError(
                f"a journal of {max_deltas} deltas in bundles of {bundle_deltas} can tell nothing; give both at least 1"
            )
        self._incarnation = incarnation
        self._max_deltas = max_deltas
        self._bundle_deltas = bundle_deltas
        self._pending: dict[tuple[bytes, int], int | None] = {}
        self._outbox: deque[Bundle] = deque()
        self._outbox_deltas = 0
        self._last = 0
        self._acked = 0
        self._full_sync: int | None = None
        self._due = True

    @property
    def incarnation(self) -> int:
        """The number of this life."""
        return self._incarnation

    @property
    def last_seq(self) -> int:
        """The last number that was given to a bundle or a full sync; 0 before the first."""
        return self._last

    @property
    def acked_seq(self) -> int:
        """The last number that was acknowledged; 0 before the first.  What a keepalive tells, see ``BatchApplier``."""
        return self._acked

    @property
    def full_sync_due(self) -> bool:
        """Whether the owner has to begin a full sync before anything else can be told.

        Until then changes are not even kept: the snapshot will contain them.
        """
        return self._due

    @property
    def full_sync_pending(self) -> bool:
        """Whether a full sync was begun and is not acknowledged yet.  No bundles are cut meanwhile."""
        return self._full_sync is not None

    def __len__(self) -> int:
        """Deltas that are kept: recorded, or cut and not acknowledged."""
        return len(self._pending) + self._outbox_deltas

    def record(self, deltas: Iterable[Delta]) -> None:
        """Note ``deltas``.  Of those of one block and tier that were not cut yet, only the last is kept."""
        if self._due:
            return
        self._pending.update(((key, tier), size) for key, tier, size in deltas)
        if len(self) > self._max_deltas:
            self.request_full_sync()

    def bundles(self, limit: int = 16) -> list[Bundle]:
        """The first ``limit`` bundles that are not acknowledged; cuts new ones from what was recorded.

        Empty while a full sync is due or pending.
        """
        if self._due or self._full_sync is not None:
            return []
        while self._pending and len(self._outbox) < limit:
            self._cut()
        return list(islice(self._outbox, limit))

    def receive(self, incarnation: int, acked: int, request_full_sync: bool) -> None:
        """The receiver's answer: it has applied everything up to ``acked`` of ``incarnation``.

        Where the wire has no incarnations, pass our own.  Answers may be late, lost, or come twice.  What the receiver
        cannot know from us, a later incarnation or a number that was never given, makes us go on with larger ones and
        a full sync.
        """
        if incarnation > self._incarnation:
            self._incarnation = incarnation + 1
            self._last = self._acked = 0
            self.request_full_sync()
        elif incarnation == self._incarnation:
            if acked > self._last:
                self._last = acked
                self.request_full_sync()
            elif request_full_sync:
                self.request_full_sync()
            else:
                self._acknowledge(acked)

    def request_full_sync(self) -> None:
        """Everything has to be told anew: the receiver asked for it, or too much was not acknowledged."""
        self._pending.clear()
        self._outbox.clear()
        self._outbox_deltas = 0
        self._full_sync = None
        self._due = True

    def begin_full_sync(self) -> int:
        """The number under which the owner sends a snapshot that it takes now.

        Begin again when it could not be sent or was not acknowledged in time: every try has a number of its own.
        """
        self.request_full_sync()
        self._due = False
        self._last += 1
        self._full_sync = self._last
        return self._last

    def _acknowledge(self, seq: int) -> None:
        self._acked = max(self._acked, seq)
        if self._full_sync is not None and seq >= self._full_sync:
            self._full_sync = None
        while self._outbox and self._outbox[0].seq <= seq:
            self._outbox_deltas -= len(self._outbox.popleft().deltas)

    def _cut(self) -> None:
        keys = list(islice(self._pending, self._bundle_deltas))
        self._last += 1
        deltas = tuple(Delta(*key, self._pending.pop(key)) for key in keys)
        self._outbox.append(Bundle(self._last, deltas))
        self._outbox_deltas += len(deltas)
