"""What the log says about blocks that did not arrive."""

from __future__ import annotations

import logging
import threading
from typing import Final

from umbp_core.ops import Direction, LeaderTransferRequest, OpResult, OpStatus
from umbp_core.ports import Clock

logger = logging.getLogger(__name__)

LOST: Final = "lost"
"""The label of blocks of which nobody can say any more what became of them."""

QUIET_S: Final = 10.0
"""After a warning, failures of the same direction and reason are only counted for this long."""


class FailureLog:
    """Warns once per direction, reason and :data:`QUIET_S` seconds: a dead disk fails hundreds of ops per second.

    Every failure is in the results and in the statistics; the log is for the first look.  Any thread.
    """

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._quiet_until: dict[tuple[Direction, str], float] = {}
        self._kept_back: dict[tuple[Direction, str], int] = {}

    def failed(self, op: LeaderTransferRequest, count: int, reason: str, error: Exception) -> None:
        """``count`` blocks of ``op`` failed, the first one by ``error``."""
        kind = (op.direction, reason)
        now = self._clock()
        with self._lock:
            if now < self._quiet_until.get(kind, now):
                self._kept_back[kind] = self._kept_back.get(kind, 0) + 1
                return
            self._quiet_until[kind] = now + QUIET_S
            kept_back = self._kept_back.pop(kind, 0)
        logger.warning(
            "%s %s of request %s: %d of %d blocks failed (%s): %s: %s%s",
            op.direction.label,
            op.op_id,
            op.request_id,
            count,
            len(op.blocks),
            reason,
            type(error).__name__,
            error,
            f" ({kept_back} more ops like this since the last message)" if kept_back else "",
        )


def lost_result(op: LeaderTransferRequest) -> OpResult:
    """Nobody works on ``op`` any more, and nobody knows what became of it."""
    failed = tuple(range(len(op.blocks)))
    return OpResult(op.op_id, op.request_id, op.direction, OpStatus.FAILED, failed, reason=LOST)
