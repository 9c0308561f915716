"""What the transfer scheduler keeps of one op, and the limits it works within."""

from __future__ import annotations

import dataclasses
import enum

from umbp_core.errors import ConfigError
from umbp_core.ops import Direction, ImmediateTransferResult, LeaderTransferRequest, WorkerTransferRequest

Half = LeaderTransferRequest | WorkerTransferRequest | ImmediateTransferResult
"""What may be the first that a scheduler hears of an op."""


@dataclasses.dataclass(frozen=True, slots=True)
class Limits:
    """Transfers that run at the same time per direction, and bounds on what is remembered.

    An op of ``blocks`` blocks or more is a transfer; smaller ones make one together, up to that number of blocks.
    ``orphan_timeout_s`` is how long a worker's half waits for the leader's; ``remember`` is the number of
    ended ops whose ids are kept to recognise replays.  Raises ``ConfigError`` unless all are positive.
    """

    loads: int = 4
    stores: int = 4
    demotions: int = 2
    orphan_timeout_s: float = 30.0
    remember: int = 65536
    blocks: int = 16

    def __post_init__(self) -> None:
        for name, value in dataclasses.asdict(self).items():
            if not value > 0:
                raise ConfigError(f"transfer limit {name} must be positive, got {value}; leave it out for the default")

    def tokens(self) -> dict[Direction, int]:
        """How many transfers may run at the same time, per direction."""
        return {Direction.LOAD: self.loads, Direction.STORE: self.stores, Direction.DEMOTE: self.demotions}


class Phase(enum.IntEnum):
    """How far an op is; the scheduler's page has the drawing."""

    HALF = 0
    WAITING = 1
    READY = 2
    STARTED = 3
    COMMITTED = 4
    ENDED = 5


class Fate(enum.Enum):
    """What a worker can say about an op that it is asked about."""

    PENDING = "pending"
    """It has not ended; it will be reported."""
    QUARANTINED = "quarantined"
    """It was reported; its executor is still at work on its memory."""
    ENDED = "ended"
    """It was reported, and nothing touches its memory."""
    REFUSED = "refused"
    """It was never heard of, and will not be carried out; it has just been reported as cancelled."""


class Transfer:
    """What holds a token: ops that were started together."""

    __slots__ = ("ops", "room")

    def __init__(self, room: int) -> None:
        self.ops = 0
        self.room = room

    def add(self, blocks: int) -> None:
        """One more op of ``blocks`` blocks belongs to it."""
        self.ops += 1
        self.room -= max(1, blocks)


class OpState:
    """One op that has not ended."""

    __slots__ = ("direction", "leader", "op_id", "paired", "phase", "request_id", "started_at", "transfer")

    def __init__(self, half: Half) -> None:
        self.op_id = half.op_id
        self.request_id = half.request_id
        self.direction = half.direction
        self.leader: LeaderTransferRequest | None = None
        self.paired = False
        self.phase = Phase.HALF
        self.started_at = 0.0
        self.transfer: Transfer | None = None

    @property
    def blocks(self) -> int:
        """Blocks of the op; 0 while the leader's half is missing."""
        return len(self.leader.blocks) if self.leader is not None else 0

    @property
    def is_layerwise(self) -> bool:
        """Whether a forward pass waits for the op."""
        return self.leader is not None and self.leader.layerwise
