"""Ops in flight, and the verdict over all ranks.

An op is sent to every rank and ends once on each.  The ledger keeps what each rank said until all of
them have, then gives one :class:`Verdict`.  Ranks are a set: a rank that reports twice is ignored
(checklist 96), as is a report for an op that is not in flight.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import msgspec

from umbp_core.errors import StateError
from umbp_core.ops import CHECKSUM_BYTES, Direction, LeaderTransferRequest, OpResult, OpStatus
from umbp_core.ports import Clock


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

    def __len__(self) -> int:
        return len(self._in_flight)

    def __contains__(self, op_id: str) -> bool:
        return op_id in self._in_flight

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
        del self._quarantine[op_id]
        return op_id not in self._in_flight

    @property
    def quarantined(self) -> int:
        """Ops whose memory some rank still touches although they were given up."""
        return len(self._quarantine)

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
