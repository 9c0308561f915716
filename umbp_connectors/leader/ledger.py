"""Ops in flight, and the verdict over all ranks.

An op is sent to every rank and ends once on each.  The ledger keeps what each rank said until all of
them have, then gives one :class:`Verdict`.  Ranks are a set: a rank that reports twice is ignored
(checklist 96), as is a report for an op that is not in flight.

Messages may be lost on either way.  So the ranks are asked, every :data:`HEARTBEAT_S`, about what is older than that
and not over: a rank that never heard of the op refuses it, one that has ended it says so again, one that works on it
says that it does (:meth:`OpLedger.overdue`).  A rank that answers none of :data:`QUESTIONS` such questions is lost: its
part of every op fails, and what it may still touch is never used again.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from typing import Final

import msgspec

from umbp_core.errors import StateError
from umbp_core.ops import CHECKSUM_BYTES, Direction, LeaderTransferRequest, OpResult, OpStatus
from umbp_core.ports import Clock

HEARTBEAT_S: Final = 5.0
"""How old an op is when the ranks are asked about it for the first time, and how long until the next time."""

QUESTIONS: Final = 3
"""Questions that a rank leaves unanswered before it is lost."""

STEPS: Final = 32
"""Steps that must have been planned since the first of these questions: several long ones may be under way."""

RANK_LOST: Final = "rank_lost"
"""The label of blocks that nobody can say anything about any more."""


class Verdict(msgspec.Struct, frozen=True, gc=False):
    """How an op ended on all ranks together.

    ``status`` is ``DONE`` only if every rank said so; otherwise the first other status by rank.
    ``failed`` holds the indexes into ``op.blocks`` that are bad on at least one rank.  ``reasons`` are the
    distinct labels that ranks gave.  ``stored`` are the checksums as the ranks gave them, in world-rank order,
    those of a rank's writer where it shares a copy.  ``seconds`` is the slowest rank's, ``moved_bytes`` the sum.
    ``quarantined`` means that a rank's executor is still at work on the op's memory: neither its pages nor
    its HBM blocks may be used for anything else until :meth:`OpLedger.release` says so.
    """

    op: LeaderTransferRequest
    status: OpStatus
    failed: frozenset[int]
    reasons: tuple[str, ...]
    moved_bytes: int
    seconds: float
    quarantined: bool
    stored: tuple[bytes, ...]

    def checksums(self) -> list[bytes]:
        """The stored checksums of each block of a store, those of all ranks in world-rank order."""
        ends = range(CHECKSUM_BYTES, CHECKSUM_BYTES * (len(self.op.blocks) + 1), CHECKSUM_BYTES)
        if len(self.stored) == 1:
            (stored,) = self.stored
            return [stored[end - CHECKSUM_BYTES : end] for end in ends]
        return [b"".join([stored[end - CHECKSUM_BYTES : end] for stored in self.stored]) for end in ends]


class _InFlight(msgspec.Struct, frozen=True):
    op: LeaderTransferRequest
    results: dict[int, OpResult]
    since: float


class OpLedger:
    """Ops in flight on all ranks.  Scheduler thread only.

    ``writers`` names, for each world rank, the rank that writes its copy: itself, or another one where several
    ranks hold the same bytes and share one copy; the writer's checksums then stand for theirs.
    """

    def __init__(self, writers: Sequence[int], clock: Clock = time.monotonic) -> None:
        self._clock = clock
        self._writers = tuple(writers)
        self._ranks = len(self._writers)
        self._in_flight: dict[str, _InFlight] = {}
        self._blocks = dict.fromkeys(Direction, 0)
        self._quarantine: dict[str, set[int]] = {}
        self._in_quarantine: dict[str, LeaderTransferRequest] = {}
        self._ask_at = 0.0
        self._ask_all = False
        self._unanswered: dict[int, int] = {}
        self._steps = 0
        self._lost: set[int] = set()

    def __len__(self) -> int:
        return len(self._in_flight)

    def __contains__(self, op_id: str) -> bool:
        return op_id in self._in_flight

    def will_end(self, op_id: str) -> bool:
        """Whether the end of ``op_id`` is still to come and leaves nobody at work on its memory, as far as is known."""
        return op_id in self._in_flight and op_id not in self._quarantine

    def blocks_in_flight(self, direction: Direction) -> int:
        """Blocks of all ops of ``direction`` that have not ended on every rank."""
        return self._blocks[direction]

    def open(self, op: LeaderTransferRequest) -> None:
        """Remember ``op`` as sent.  Raises ``StateError`` when its id is in flight already."""
        if op.op_id in self._in_flight:
            raise StateError(f"op {op.op_id} of request {op.request_id} was sent twice; op ids must be fresh")
        self._in_flight[op.op_id] = _InFlight(op, {}, self._clock())
        self._blocks[op.direction] += len(op.blocks)

    def add(self, rank: int, result: OpResult) -> Verdict | None:
        """Take ``rank``'s result; the verdict when it was the last one, else ``None``."""
        flight = self._in_flight.get(result.op_id)
        if flight is None or rank in flight.results or not 0 <= rank < self._ranks:
            return None
        flight.results[rank] = result
        if result.quarantined:
            self._quarantine.setdefault(result.op_id, set()).add(rank)
            self._in_quarantine[result.op_id] = flight.op
        if len(flight.results) < self._ranks:
            return None
        del self._in_flight[result.op_id]
        self._blocks[flight.op.direction] -= len(flight.op.blocks)
        return self._verdict(flight)

    def release(self, rank: int, op_id: str) -> bool:
        """``rank``'s executor has let go of ``op_id``; True when it was the last and the verdict is out."""
        ranks = self._quarantine.get(op_id)
        if ranks is None or rank not in ranks:
            return False
        ranks.discard(rank)
        if ranks:
            return False
        del self._quarantine[op_id], self._in_quarantine[op_id]
        return op_id not in self._in_flight

    @property
    def quarantined(self) -> int:
        """Ops whose memory some rank, of those that answer, still touches although they were given up."""
        if not self._lost:
            return len(self._quarantine)
        return sum(not ranks <= self._lost for ranks in self._quarantine.values())

    @property
    def lost(self) -> frozenset[int]:
        """The ranks that do not answer any more; no op should be opened when there is one."""
        return frozenset(self._lost)

    def heard(self, ranks: Iterable[int]) -> None:
        """These ranks said something."""
        if self._unanswered:
            for rank in ranks:
                self._unanswered.pop(rank, None)

    def ask_all(self) -> None:
        """A message to a rank was lost: ask about everything with the next step."""
        self._ask_all = True
        self._ask_at = 0.0

    def step(self) -> bool:
        """A step is being planned; whether it is time to look for overdue ops.  Next to free without ops."""
        self._steps += 1
        return bool(self._in_flight or self._quarantine) and self._clock() >= self._ask_at

    def overdue(self) -> list[LeaderTransferRequest]:
        """The ops to ask all ranks about with this step."""
        now = self._clock()
        horizon = now if self._ask_all else now - HEARTBEAT_S
        self._ask_at = now + HEARTBEAT_S
        self._ask_all = False
        late = [flight for flight in self._in_flight.values() if flight.since <= horizon]
        kept = [op_id for op_id in self._in_quarantine if op_id not in self._in_flight]
        asked = {rank for flight in late for rank in range(self._ranks) if rank not in flight.results}
        asked.update(rank for op_id in kept for rank in self._quarantine[op_id])
        if not self._unanswered:
            self._steps = 0
        for rank in asked - self._lost:
            self._unanswered[rank] = self._unanswered.get(rank, 0) + 1
        return [flight.op for flight in late] + [self._in_quarantine[op_id] for op_id in kept]

    def give_up_silent(self) -> tuple[list[int], list[Verdict]]:
        """The ranks that are lost now, and the verdicts on all that waits for nobody but lost ranks.

        To be called after :meth:`overdue`: the question that was asked last still counts as open.
        """
        unanswered = self._unanswered.items() if self._steps >= STEPS else ()
        silent = [rank for rank, questions in unanswered if questions > QUESTIONS]
        for rank in silent:
            del self._unanswered[rank]
        self._lost.update(silent)
        verdicts: list[Verdict] = []
        for rank in self._lost:
            for flight in tuple(self._in_flight.values()):
                verdict = self.add(rank, _nothing_known(flight.op))
                if verdict is not None:
                    verdicts.append(verdict)
        return silent, verdicts

    def dump(self, now: float) -> list[dict[str, object]]:
        """One row per op that has not ended on every rank or whose memory a rank still touches, for debugging.

        ``age_s`` counts from :meth:`open`; ``waits_for`` are the ranks that have not said how it ended, ``quarantined``
        those whose executor has not let go of it.  Only reads; any thread.
        """
        quarantine = {op_id: sorted(ranks) for op_id, ranks in list(self._quarantine.items())}
        flights = list(self._in_flight.items())
        rows = [self._row(flight, quarantine.pop(op_id, []), now) for op_id, flight in flights]
        return rows + [{"op": op_id, "quarantined": ranks} for op_id, ranks in quarantine.items()]

    def _row(self, flight: _InFlight, quarantined: list[int], now: float) -> dict[str, object]:
        op = flight.op
        return {
            "op": op.op_id,
            "request": op.request_id,
            "direction": op.direction.label,
            "blocks": len(op.blocks),
            "age_s": round(now - flight.since, 3),
            "timeout_s": op.timeout_s,
            "waits_for": [rank for rank in range(self._ranks) if rank not in flight.results],
            "quarantined": quarantined,
        }

    def _verdict(self, flight: _InFlight) -> Verdict:
        op, results = flight.op, flight.results
        status = OpStatus.DONE
        failed: set[int] = set()
        reasons: dict[str, None] = {}
        moved_bytes, seconds = 0, 0.0
        for rank in range(self._ranks):
            result = results[rank]
            moved_bytes += result.moved_bytes
            seconds = max(seconds, result.seconds)
            if result.status is OpStatus.DONE:
                continue
            if status is OpStatus.DONE:
                status = result.status
            failed.update(result.failed or range(len(op.blocks)))
            if result.reason:
                reasons[result.reason] = None
        return Verdict(
            op=op,
            status=status,
            failed=frozenset(failed),
            reasons=tuple(reasons),
            moved_bytes=moved_bytes,
            seconds=seconds,
            quarantined=op.op_id in self._quarantine,
            stored=tuple([results[writer].checksums for writer in self._writers]),
        )


def _nothing_known(op: LeaderTransferRequest) -> OpResult:
    failed = tuple(range(len(op.blocks)))
    return OpResult(op.op_id, op.request_id, op.direction, OpStatus.EXPIRED, failed, reason=RANK_LOST, quarantined=True)
