"""What a node tells about itself, in order: sequence numbers, incarnations, full syncs (law L11).

A node numbers its messages 1, 2, 3 … within one *incarnation*, a number that is larger in every later life of the node.
The receiver applies each message once and in order.  A replay is acknowledged and changes nothing, a gap is answered
by asking for a full sync, a message of an earlier incarnation is refused, and the first one of a later incarnation
voids all that the earlier said.

No I/O, no threads, no clock.  One thread at a time.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass

from umbp_core.index import ExternalKvIndex


class Verdict(enum.Enum):
    """What to do with a message."""

    APPLY = "apply"
    REPLAY = "replay"
    """It was applied before: acknowledge it."""
    GAP = "gap"
    """Something before it is missing, or was forgotten here: ask for a full sync."""
    STALE = "stale"
    """It was sent by an earlier life of the node: refuse it."""
    UNREGISTERED = "unregistered"
    """The receiver does not know the node: it has to register, and to begin with a full sync."""


class SequenceGate:
    """The order of one sender's messages.

    ``acked`` is the number of the last message that was applied, and ``synced`` whether what was applied is still
    known: an expired sender has to start with a full sync.  Where the wire has no incarnations, use 0 throughout.
    """

    __slots__ = ("acked", "incarnation", "synced")

    def __init__(self, incarnation: int = 0) -> None:
        self.incarnation = incarnation
        self.acked = 0
        self.synced = True

    def supersedes(self, incarnation: int) -> bool:
        """Whether a message of ``incarnation`` comes from a later life; if so, it is the one that counts from now on.

        The caller then voids what the earlier one said.
        """
        if incarnation <= self.incarnation:
            return False
        self.incarnation = incarnation
        self.acked = 0
        self.synced = True
        return True

    def judge(self, incarnation: int, seq: int, full_sync: bool = False) -> Verdict:
        """What to do with message ``seq``; ``APPLY`` counts as applied.

        A full sync is applied whatever is missing before it.
        """
        verdict = self.examine(incarnation, seq, full_sync)
        if verdict is Verdict.APPLY:
            self.resume(seq)
        return verdict

    def examine(self, incarnation: int, seq: int, full_sync: bool = False) -> Verdict:
        """What :meth:`judge` would say.  Who applies the message in parts calls :meth:`resume` when it is done."""
        if incarnation != self.incarnation:
            return Verdict.STALE
        if self.synced and seq <= self.acked:
            return Verdict.REPLAY
        if full_sync or (self.synced and seq == self.acked + 1):
            return Verdict.APPLY
        return Verdict.GAP

    def resume(self, seq: int) -> None:
        """Everything up to ``seq`` is known: it was applied, or a full sync without a number of its own says so."""
        self.acked = seq
        self.synced = True

    def forget(self) -> None:
        """What was applied is not known any more: nothing but a full sync is accepted next."""
        self.synced = False


class ActionKind(enum.IntEnum):
    """What an action of a batch does."""

    REPORT = 1
    REVOKE = 2
    CLEAR = 3
    """Drop all hashes of the tier; the action names none."""


@dataclass(frozen=True, slots=True)
class Action:
    """One action of a batch, on one tier."""

    kind: ActionKind
    tier: int
    hashes: Sequence[bytes] = ()


@dataclass(frozen=True, slots=True)
class Batch:
    """One message of a node.  A full sync says everything: what it does not report is gone.

    A full sync that is too large for one message begins one, and goes on with ordinary batches.
    """

    incarnation: int
    seq: int
    actions: Sequence[Action]
    full_sync: bool = False


@dataclass(frozen=True, slots=True)
class Acknowledgement:
    """The answer to a batch."""

    verdict: Verdict
    incarnation: int
    """The one that counts.  Where it is larger than the sender's and the sender is alive, it goes on with a larger one
    and a full sync."""
    acked: int
    request_full_sync: bool


class BatchApplier:
    """Batches of all nodes to the external KV index ``index``, which others may read, and change, too."""

    def __init__(self, index: ExternalKvIndex) -> None:
        self.index = index
        self._gates: dict[str, SequenceGate] = {}

    def apply(self, node: str, batch: Batch, now: float = 0.0) -> Acknowledgement:
        """Apply ``batch`` of ``node``, wholly or not at all."""
        answer = self.begin(node, batch, now)
        if answer.verdict is not Verdict.APPLY:
            return answer
        for action in batch.actions:
            self.act(node, action, now)
        return self.end(node, batch)

    def begin(self, node: str, batch: Batch, now: float = 0.0) -> Acknowledgement:
        """The answer to ``batch`` of ``node`` unless it is ``APPLY``; then its actions are to be applied, then ended.

        For batches that are too large to be applied in one go.  One that is not ended is not acknowledged, and will be
        sent again, which does no harm.  The caller sees to it that no other message of the node comes in between.
        """
        gate = self._gates.get(node)
        if gate is None:
            gate = self._gates[node] = SequenceGate(batch.incarnation)
        elif gate.supersedes(batch.incarnation):
            self.index.clear_node(node, now, f"incarnation {batch.incarnation} began")
        verdict = gate.examine(batch.incarnation, batch.seq, batch.full_sync)
        if verdict is Verdict.APPLY and batch.full_sync:
            self.index.clear_node(node, now, "full sync")
        return Acknowledgement(verdict, gate.incarnation, gate.acked, verdict is Verdict.GAP)

    def end(self, node: str, batch: Batch) -> Acknowledgement:
        """All actions of ``batch``, which was begun, are applied.

        Not to be called when the node was dropped in between: then the batch is void.
        """
        gate = self._gates[node]
        gate.resume(batch.seq)
        return Acknowledgement(Verdict.APPLY, gate.incarnation, gate.acked, request_full_sync=False)

    def probe(self, node: str, incarnation: int, acked: int) -> Acknowledgement:
        """The answer to a keepalive of ``node``, which believes that everything up to ``acked`` is known here.

        Never applies anything.  Without keepalives, a node that has nothing to tell never learns that it was forgotten.
        """
        gate = self._gates.get(node)
        if gate is None or incarnation > gate.incarnation:
            return Acknowledgement(Verdict.GAP, incarnation, 0, request_full_sync=True)
        if incarnation < gate.incarnation:
            return Acknowledgement(Verdict.STALE, gate.incarnation, gate.acked, request_full_sync=False)
        known = gate.synced and gate.acked >= acked
        return Acknowledgement(
            Verdict.REPLAY if known else Verdict.GAP, incarnation, gate.acked, request_full_sync=not known
        )

    def act(self, node: str, action: Action, now: float = 0.0) -> None:
        """Apply one action, or a part of one, of a batch that was admitted."""
        if action.kind is ActionKind.REPORT:
            self.index.report(node, action.hashes, action.tier, now)
        elif action.kind is ActionKind.REVOKE:
            self.index.revoke(node, action.hashes, action.tier, now)
        else:
            self.index.clear_tier(node, action.tier, now)

    def register(self, node: str, incarnation: int, now: float = 0.0, reason: str = "registered anew") -> int:
        """``node`` begins a life: what an earlier one said is dropped, and what it may still say is refused.

        Returns how many entries are gone.
        """
        self._gates[node] = SequenceGate(incarnation)
        return self.index.clear_node(node, now, reason)

    def expire(self, node: str, now: float = 0.0, reason: str = "expired") -> int:
        """Drop what ``node`` said, and accept nothing but a full sync next; returns how many entries are gone."""
        gate = self._gates.get(node)
        if gate is not None:
            gate.forget()
        return self.index.clear_node(node, now, reason)

    def forget(self, node: str, now: float = 0.0, reason: str = "unregistered") -> int:
        """Drop what ``node`` said, and its incarnation too; returns how many entries are gone."""
        self._gates.pop(node, None)
        return self.index.clear_node(node, now, reason)

    def gate(self, node: str) -> SequenceGate | None:
        """What is known of the order of ``node``'s batches; ``None`` when it sent none.  To be read only."""
        return self._gates.get(node)
