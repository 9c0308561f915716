"""What a node has to tell about its blocks: changes coalesced into numbered bundles, kept until acknowledged.

The sender's half of law L11; ``SequenceGate`` is the receiver's.  The owner records every change of its tiers, and
sends the bundles that are not acknowledged, in order.  It never waits for the receiver: what is kept is bounded, and
when the bound is passed everything is dropped and a full sync is due instead.

A full sync is the owner's own snapshot of its tiers, sent under the number that :meth:`Journal.begin_full_sync` gives.
What is recorded from that call on is told afterwards, so the snapshot has to be taken at the same moment or later.
A snapshot that is too large for one message begins with that number, and its rest goes on in ordinary bundles.

A journal is new with every life of its owner, and so is its incarnation.  No I/O, no threads, no clock.  One thread at
a time.
"""

from __future__ import annotations

import enum
from collections import deque
from collections.abc import Iterable, Iterator
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


class Answer(enum.Enum):
    """What an answer of the receiver means."""

    LATE = "late"
    """It was meant for an earlier life: ignore it."""
    TAKEN = "taken"
    """It is about what was sent."""
    SURPRISE = "surprise"
    """The receiver knows what it cannot know from us: a full sync is due, under larger numbers."""


class Numbering:
    """The numbers of a sender: its incarnation, and the last ones that were given and acknowledged."""

    __slots__ = ("acked", "incarnation", "last")

    def __init__(self, incarnation: int) -> None:
        self.incarnation = incarnation
        self.last = self.acked = 0

    def next(self) -> int:
        """The next number."""
        self.last += 1
        return self.last

    def renew(self, incarnation: int) -> None:
        """Begin a life with the number ``incarnation``."""
        self.incarnation = incarnation
        self.last = self.acked = 0

    def receive(self, incarnation: int, acked: int) -> Answer:
        """What it means that the receiver applied everything up to ``acked`` of ``incarnation``.

        After a surprise, the next numbers are larger than what the receiver knows.
        """
        if incarnation < self.incarnation:
            return Answer.LATE
        if incarnation > self.incarnation:
            self.renew(incarnation + 1)
            return Answer.SURPRISE
        if acked > self.last:
            self.last = acked
            return Answer.SURPRISE
        return Answer.TAKEN

    def acknowledge(self, seq: int) -> None:
        """Everything up to ``seq`` is known over there."""
        self.acked = max(self.acked, seq)


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
        self._numbers = Numbering(incarnation)
        self._max_deltas = max_deltas
        self._bundle_deltas = bundle_deltas
        self._pending: dict[tuple[bytes, int], int | None] = {}
        self._outbox: deque[Bundle] = deque()
        self._outbox_deltas = 0
        self._full_sync: int | None = None
        self._rest: Iterator[Delta] | None = None
        self._due = True

    @property
    def incarnation(self) -> int:
        """The number of this life."""
        return self._numbers.incarnation

    @property
    def last_seq(self) -> int:
        """The last number that was given to a bundle or a full sync; 0 before the first."""
        return self._numbers.last

    @property
    def acked_seq(self) -> int:
        """The last number that was acknowledged; 0 before the first.  What a keepalive tells, see ``BatchApplier``."""
        return self._numbers.acked

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

    @property
    def settled(self) -> bool:
        """Whether everything that was recorded, and every full sync, is acknowledged."""
        return not (self._due or self.full_sync_pending or self._rest is not None or len(self))

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
        while (self._pending or self._rest is not None) and len(self._outbox) < limit:
            self._cut()
        return list(islice(self._outbox, limit))

    def receive(self, incarnation: int, acked: int, request_full_sync: bool) -> None:
        """The receiver's answer: it has applied everything up to ``acked`` of ``incarnation``.

        Where the wire has no incarnations, pass our own.  Answers may be late, lost, or come twice.  What the receiver
        cannot know from us, a later incarnation or a number that was never given, makes us go on with larger ones and
        a full sync.
        """
        answer = self._numbers.receive(incarnation, acked)
        if answer is Answer.SURPRISE or (answer is Answer.TAKEN and request_full_sync):
            self.request_full_sync()
        elif answer is Answer.TAKEN:
            self._acknowledge(acked)

    def renew(self, incarnation: int) -> None:
        """Go on as life ``incarnation``, which is larger than any before: a full sync is due."""
        self._numbers.renew(incarnation)
        self.request_full_sync()

    def request_full_sync(self) -> None:
        """Everything has to be told anew: the receiver asked for it, or too much was not acknowledged."""
        self._pending.clear()
        self._outbox.clear()
        self._outbox_deltas = 0
        self._full_sync = None
        self._rest = None
        self._due = True

    def begin_full_sync(self, rest: Iterator[Delta] | None = None) -> int:
        """The number under which the owner sends a snapshot that it takes now.

        ``rest`` is what of the snapshot does not fit that message.  It is read, bundle by bundle, once the message is
        acknowledged, and all of it is told before anything that is recorded meanwhile.

        Begin again when it could not be sent or was not acknowledged in time: every try has a number of its own.
        """
        self.request_full_sync()
        self._due = False
        self._rest = rest
        self._full_sync = self._numbers.next()
        return self._full_sync

    def _acknowledge(self, seq: int) -> None:
        self._numbers.acknowledge(seq)
        if self._full_sync is not None and seq >= self._full_sync:
            self._full_sync = None
        while self._outbox and self._outbox[0].seq <= seq:
            self._outbox_deltas -= len(self._outbox.popleft().deltas)

    def _cut(self) -> None:
        deltas = tuple(islice(self._rest, self._bundle_deltas)) if self._rest is not None else ()
        if not deltas:
            self._rest = None
            keys = list(islice(self._pending, self._bundle_deltas))
            deltas = tuple(Delta(*key, self._pending.pop(key)) for key in keys)
        if deltas:
            self._outbox.append(Bundle(self._numbers.next(), deltas))
            self._outbox_deltas += len(deltas)
