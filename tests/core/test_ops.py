"""The messages about transfers: values, wire form, small helpers."""

from __future__ import annotations

import msgspec
import pytest

from umbp_core.ops import (
    BlockCopy,
    Direction,
    ImmediateTransferResult,
    LeaderTransferRequest,
    NewWorkerSlot,
    OpResult,
    OpStatus,
    Requirement,
    RequirementKind,
    TransferScheduleRequest,
    WorkerTransferRequest,
)

MESSAGES = [
    LeaderTransferRequest(
        "op",
        "request",
        Direction.STORE,
        (BlockCopy(b"key", 1, 2, 3, 4, b"c" * 32),),
        Requirement(RequirementKind.LAYER_NAME_COMPLETE, 9, "layer.3"),
        True,
        2.5,
    ),
    WorkerTransferRequest("op", "request", Direction.LOAD),
    ImmediateTransferResult("op", "request", Direction.LOAD, OpStatus.FAILED, (1,), "io"),
    NewWorkerSlot("request", ("op", "another")),
    OpResult("op", "request", Direction.LOAD, OpStatus.EXPIRED, (0, 2), b"", 0, 0.5, "deadline_started", True),
]


@pytest.mark.parametrize("message", MESSAGES)
def test_messages_survive_the_wire(message: msgspec.Struct) -> None:
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(message), type=type(message)) == message


@pytest.mark.parametrize("message", MESSAGES)
def test_messages_are_values(message: msgspec.Struct) -> None:
    assert hash(message) == hash(msgspec.structs.replace(message))
    with pytest.raises(AttributeError):
        message.op_id = "other"  # type: ignore[attr-defined]


def test_what_a_scheduler_is_asked_survives_the_wire() -> None:
    (leader_half,) = [message for message in MESSAGES if isinstance(message, LeaderTransferRequest)]
    request = TransferScheduleRequest(leader_half)
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(request), type=TransferScheduleRequest) == request


def test_a_result_without_the_newer_fields_is_understood() -> None:
    old = ["op", "request", int(Direction.STORE), "done"]
    result = msgspec.msgpack.decode(msgspec.msgpack.encode(old), type=OpResult)
    assert result == OpResult("op", "request", Direction.STORE, OpStatus.DONE)
    assert not result.quarantined


def test_every_rank_finds_its_own_checksum() -> None:
    block = BlockCopy(b"key", 0, 1, 2, checksums=b"a" * 16 + b"b" * 16)
    assert (block.checksum_of(0), block.checksum_of(1), block.checksum_of(2)) == (b"a" * 16, b"b" * 16, b"")


def test_directions_sort_by_precedence() -> None:
    assert sorted(Direction) == [Direction.LOAD, Direction.STORE, Direction.DEMOTE]
