"""What a node has to tell about external KV: reports coalesced per tier, in numbered batches, one at a time.

The counterpart of ``Journal`` for hashes that have no size: the sender's half of law L11 towards ``BatchApplier``.  It
is made for very many hashes at once: a tier is one dictionary from hash to the last word on it, so that to report or
revoke a list costs a few passes of C code.

A batch is kept, and given out again, until it is acknowledged; meanwhile words gather.  They are bounded: beyond
``max_hashes`` everything is dropped and a full sync is due instead.  A full sync is the owner's snapshot in slices, of
which the first is the batch that begins it.  Until the last slice is on its way no other word is: words tell what
happened after the full sync began.

No I/O, no threads, no clock.  One thread at a time.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice

from umbp_core.errors import StateError
from umbp_core.index_gate import Action, ActionKind, Batch
from umbp_core.journal import Answer, Numbering

_PIECE = 1 << 14
"""Hashes that are noted at one go: other threads get their turn between two pieces."""


class _Words:
    """What was not told yet of one tier: whether it was cleared, and then words on hashes, oldest first."""

    __slots__ = ("_held", "_parts", "_size", "cleared")

    def __init__(self) -> None:
        self.cleared = False
        self._held: dict[bytes, bool] = {}
        self._parts: deque[dict[bytes, bool]] = deque()
        self._size = 0

    def __bool__(self) -> bool:
        return self.cleared or len(self) > 0

    def __len__(self) -> int:
        return self._size + len(self._held)

    def say(self, hashes: Sequence[bytes], held: bool) -> None:
        """The last word on ``hashes``."""
        self._held.update(dict.fromkeys(hashes, held))

    def cut(self, tier: int, room: int, size: int) -> tuple[list[Action], int]:
        """Up to ``size`` of the oldest words as actions, if there is ``room`` for them; how many they are."""
        if self._held and not self._parts:
            self._split(size)
        actions = [Action(ActionKind.CLEAR, tier)] if self.cleared else []
        self.cleared = False
        if not self._parts or len(self._parts[0]) > room:
            return actions, 0
        part = self._parts.popleft()
        self._size -= len(part)
        reported = [key for key, held in part.items() if held]
        revoked = [key for key, held in part.items() if not held]
        if reported:
            actions.append(Action(ActionKind.REPORT, tier, reported))
        if revoked:
            actions.append(Action(ActionKind.REVOKE, tier, revoked))
        return actions, len(part)

    def _split(self, size: int) -> None:
        """To take parts off the front of a large dictionary takes longer each time: it is divided up at one go."""
        self._size = len(self._held)
        if self._size <= size:
            self._parts.append(self._held)
        else:
            words = iter(self._held.items())
            self._parts.extend(iter(lambda: dict(islice(words, size)), {}))
        self._held = {}


class ReportJournal:
    """Batches of at most ``batch_hashes`` hashes, from at most ``max_hashes`` words that wait to be told.

    ``incarnation`` has to be larger than in any earlier life of the node.  A new journal owes a full sync.
    """

    def __init__(self, incarnation: int, max_hashes: int = 1 << 20, batch_hashes: int = 8192) -> None:
        if max_hashes < 1 or batch_hashes < 1:
            raise StateError(
                f"reports of {max_hashes} hashes in batches of {batch_hashes} can tell nothing; give both at least 1"
            )
        self._numbers = Numbering(incarnation)
        self._max_hashes = max_hashes
        self._batch_hashes = batch_hashes
        self._words: dict[int, _Words] = {}
        self._snapshot: Iterator[list[Action]] | None = None
        self._opening = False
        self._batch: Batch | None = None
        self._due = True

    @property
    def incarnation(self) -> int:
        """The number of this life."""
        return self._numbers.incarnation

    @property
    def acked_seq(self) -> int:
        """The last number that was acknowledged; what a keepalive tells."""
        return self._numbers.acked

    @property
    def full_sync_due(self) -> bool:
        """Whether a full sync has to begin before anything else can be told.  Until then no words are kept."""
        return self._due

    @property
    def settled(self) -> bool:
        """Whether everything that was said, and every full sync, is acknowledged."""
        return not (self._due or self._batch is not None or self._snapshot is not None or any(self._words.values()))

    def __len__(self) -> int:
        """Hashes that wait to be told, those of the batch that is on its way left out."""
        return sum([len(words) for words in self._words.values()])

    def report(self, hashes: Sequence[bytes], tier: int) -> None:
        """``hashes`` can be used from ``tier`` now."""
        self._say(hashes, tier, held=True)

    def revoke(self, hashes: Sequence[bytes], tier: int) -> None:
        """``hashes`` cannot be used from ``tier`` any more."""
        self._say(hashes, tier, held=False)

    def clear(self, tier: int) -> None:
        """Nothing can be used from ``tier`` any more."""
        if not self._due:
            words = self._words[tier] = _Words()
            words.cleared = True

    def batch(self) -> Batch | None:
        """The batch to send now: the one that is not acknowledged, or the next; ``None`` when there is nothing to tell.

        Reads the next slice of the snapshot while there is one, so it raises what the snapshot raises; request another
        full sync then.
        """
        if self._batch is None and not self._due:
            full_sync = self._opening
            actions = self._cut()
            if actions or full_sync:
                self._batch = Batch(self.incarnation, self._numbers.next(), actions, full_sync)
                self._opening = False
        return self._batch

    def receive(self, incarnation: int, acked: int, request_full_sync: bool) -> None:
        """The receiver's answer to a batch or a keepalive, see ``Journal.receive``."""
        answer = self._numbers.receive(incarnation, acked)
        if answer is Answer.SURPRISE or (answer is Answer.TAKEN and request_full_sync):
            self.request_full_sync()
        elif answer is Answer.TAKEN:
            self._numbers.acknowledge(acked)
            if self._batch is not None and self._batch.seq <= acked:
                self._batch = None

    def empty_batch(self) -> int:
        """Take everything out of the batch that is on its way, since it is refused as it is; returns how many hashes.

        Its number has to be sent all the same: the receiver goes by them.
        """
        batch = self._batch
        if batch is None:
            return 0
        self._batch = Batch(batch.incarnation, batch.seq, (), batch.full_sync)
        return sum([len(action.hashes) for action in batch.actions])

    def renew(self, incarnation: int) -> None:
        """Go on as life ``incarnation``, which is larger than any before: a full sync is due."""
        self._numbers.renew(incarnation)
        self.request_full_sync()

    def request_full_sync(self) -> None:
        """Everything has to be told anew."""
        self._words.clear()
        self._snapshot = self._batch = None
        self._opening = False
        self._due = True

    def begin_full_sync(self, snapshot: Iterable[tuple[int, Sequence[bytes]]]) -> None:
        """Tell everything: ``snapshot`` gives tiers with some of their hashes, and is read as it is told.

        What it gives is true at this moment or at a later one.
        """
        self.request_full_sync()
        self._due = False
        self._opening = True
        self._snapshot = _slices(snapshot, self._batch_hashes)

    def _say(self, hashes: Sequence[bytes], tier: int, held: bool) -> None:
        if self._due:
            return
        words = self._words.get(tier)
        if words is None:
            words = self._words[tier] = _Words()
        for start in range(0, len(hashes), _PIECE):
            words.say(hashes[start : start + _PIECE], held)
        if len(self) > self._max_hashes:
            self.request_full_sync()

    def _cut(self) -> list[Action]:
        if self._snapshot is not None:
            piece = next(self._snapshot, None)
            if piece is not None:
                return piece
            self._snapshot = None
        room = self._batch_hashes
        actions: list[Action] = []
        for tier in [tier for tier, words in self._words.items() if words]:
            part, count = self._words[tier].cut(tier, room, self._batch_hashes)
            actions += part
            room -= count
            if count:
                self._words[tier] = self._words.pop(tier)  # the others come first in the next batch
        return actions


def _slices(snapshot: Iterable[tuple[int, Sequence[bytes]]], size: int) -> Iterator[list[Action]]:
    """Everything in ``snapshot`` as reports of ``size`` hashes at a time."""
    actions: list[Action] = []
    room = size
    for tier, hashes in snapshot:
        start = 0
        while start < len(hashes):
            part = hashes[start : start + room]
            actions.append(Action(ActionKind.REPORT, tier, part))
            start += len(part)
            room -= len(part)
            if not room:
                yield actions
                actions, room = [], size
    if actions:
        yield actions
