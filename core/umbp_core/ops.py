"""Transfer operations and the messages about them.

All messages are frozen msgspec structs: they cross from the leader (scheduler process) to the
workers (one per rank) and back, and are compared by value in tests.
"""

from __future__ import annotations

import enum

import msgspec

CHECKSUM_BYTES = 16
"""xxh3-128 over object key ‖ object bytes."""


class Direction(enum.IntEnum):
    """What an op does; smaller values start first (loads before stores, law of the scheduler)."""

    LOAD = 0
    """Towards HBM, from DRAM or SSD."""
    STORE = 1
    """From HBM to DRAM."""
    DEMOTE = 2
    """From DRAM to SSD; touches no HBM."""

    __hash__ = int.__hash__  # Enum's own is a Python function, and members are keys on hot paths

    @property
    def label(self) -> str:
        """The name in metrics and messages."""
        return _LABELS[self]


_LABELS = {direction: direction.name.lower() for direction in Direction}


class OpStatus(enum.Enum):
    """How an op ended; every op ends in exactly one of them (law L4)."""

    DONE = "done"
    FAILED = "failed"
    CANCELLED = "cancelled"
    EXPIRED = "expired"

    __hash__ = object.__hash__  # as Direction's: members are keys on hot paths


class RequirementKind(enum.IntEnum):
    """When an op may touch HBM."""

    NONE = 0
    ITERATION_COMPLETE = 1
    LAYER_NAME_COMPLETE = 2
    LAYER_COMPLETE = 3


class Requirement(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """A condition on the worker's progress; ``iteration`` is the leader's step number."""

    kind: RequirementKind = RequirementKind.NONE
    iteration: int = 0
    layer_name: str = ""
    layer_index: int = -1


class BlockCopy(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """One block of an op; the same numbers are valid on every rank.

    ``hbm_block`` is -1 in a demotion.  ``dram_page`` is an arena page; in a load from SSD it is the page
    that the bytes pass through and stay in.  ``ssd_slot`` is -1 when SSD is not
    involved.  ``checksums`` holds one xxh3-128 per rank in world-rank order (16 bytes each); it is empty
    in a store, whose checksums come back in :class:`OpResult`.
    """

    key: bytes
    group: int
    hbm_block: int
    dram_page: int
    ssd_slot: int = -1
    checksums: bytes = b""

    def checksum_of(self, rank: int) -> bytes:
        """The expected checksum of world rank ``rank``; empty when unknown."""
        return self.checksums[rank * CHECKSUM_BYTES : (rank + 1) * CHECKSUM_BYTES]


class LeaderTransferRequest(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """The leader's half of an op: what to move, when, and by when.

    ``timeout_s`` counts from the moment the worker receives the op.  ``immediate`` ops need no
    worker half (they touch no HBM or are safe at once).  A ``layerwise`` op is a load, from DRAM alone, for whose
    layers the forward pass waits one by one.  A store that requires a layer of an iteration, and not all of it, reads
    each layer of its blocks as soon as the iteration is through with that layer; it ends when it has all of them.
    """

    op_id: str
    request_id: str
    direction: Direction
    blocks: tuple[BlockCopy, ...]
    requirement: Requirement = Requirement()
    immediate: bool = False
    timeout_s: float = 30.0
    layerwise: bool = False


class WorkerTransferRequest(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """The worker's half: the request's slot exists here and expects this op."""

    op_id: str
    request_id: str
    direction: Direction


class TransferScheduleRequest(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """The side that moves bytes has got the leader's half and asks the scheduler when it may start."""

    leader_request: LeaderTransferRequest


class ImmediateTransferResult(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """An immediate op was carried out without asking the scheduler, and this is how it ended.

    It may come before or after the worker's half, or without one.  ``failed`` as in :class:`OpResult`.
    """

    op_id: str
    request_id: str
    direction: Direction
    status: OpStatus
    failed: tuple[int, ...] = ()
    reason: str = ""


class NewWorkerSlot(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """The engine waits, on this worker, until all ``op_ids`` of a request have ended."""

    request_id: str
    op_ids: tuple[str, ...]


class OpResult(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """The completion of an op: how it ended on one rank.

    ``failed`` holds the indexes into ``blocks`` that did not arrive (all of them unless ``DONE``;
    a load may be ``FAILED`` with only some blocks bad).  ``checksums`` holds, for a store that is
    ``DONE``, this rank's 16 bytes per block, in order.  ``seconds`` runs from the start of the transfer and
    is 0 for one that never started.  ``reason`` is a short label for metrics.  ``quarantined`` is true when
    the op was ended by a deadline or a cancellation while this rank was still at work on it: its DRAM pages
    must not be given away until the rank releases the op.  HBM is not touched after a result (but for a copy
    that hangs and was given up by a shutdown).
    """

    op_id: str
    request_id: str
    direction: Direction
    status: OpStatus
    failed: tuple[int, ...] = ()
    checksums: bytes = b""
    moved_bytes: int = 0
    seconds: float = 0.0
    reason: str = ""
    quarantined: bool = False
