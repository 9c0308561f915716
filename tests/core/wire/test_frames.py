"""Frames out of bytes: in any pieces, within bounds, and nothing that is not understood (law L10)."""

from __future__ import annotations

import struct
import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from umbp_core.errors import (
    AccessDenied,
    AlreadyRegistered,
    InvalidRequest,
    MasterError,
    MasterUnavailable,
    ProtocolError,
)
from umbp_core.wire import bounds
from umbp_core.wire.codes import ErrorCode, WireError, code_of, exception_of
from umbp_core.wire.frames import MAGIC, VERSION, FrameSplitter, FrameType, encode_frame

SESSION = 0x0102030405060708
KINDS = (FrameType.REQUEST, FrameType.CANCEL)


def splitter(max_payload: int = 1 << 16) -> FrameSplitter:
    return FrameSplitter(KINDS, max_payload, SESSION)


def header(**fields: object) -> bytes:
    """A header by the table in the documentation, field by field."""
    good = {
        "magic": b"UMBP",
        "version": 1,
        "type": 2,
        "session": SESSION,
        "worker": 0,
        "sequence": 7,
        "length": 0,
        "flags": 0,
    }
    return struct.pack("<4sIIQiQII", *(good | fields).values())


@given(
    st.lists(st.tuples(st.sampled_from(KINDS), st.integers(0, 2**64 - 1), st.binary(max_size=300)), max_size=8),
    st.lists(st.integers(1, 200), min_size=1),
)
def test_frames_come_back_from_any_pieces(frames: list[tuple[FrameType, int, bytes]], cuts: list[int]) -> None:
    data = b"".join(encode_frame(kind, SESSION, sequence, payload) for kind, sequence, payload in frames)
    reader, found, at = splitter(), [], 0
    while at < len(data):
        step = cuts[at % len(cuts)]
        found += [(kind, sequence, bytes(payload)) for kind, sequence, payload in reader.feed(data[at : at + step])]
        at += step
    assert found == frames
    assert reader.error is None
    assert not reader.partial


def test_the_header_is_that_of_the_table() -> None:
    assert encode_frame(FrameType.REQUEST, SESSION, 7, b"abc") == header(length=3) + b"abc"
    assert len(header()) == bounds.HEADER_BYTES == 40
    assert (MAGIC, VERSION) == (b"UMBP", 1)


WRONG = {
    "magic": (header(magic=b"HTTP"), ErrorCode.PROTOCOL, "HTTP"),
    "version": (header(version=2), ErrorCode.VERSION, "not 2"),
    "type": (header(type=99), ErrorCode.PROTOCOL, "type 99"),
    "a type that is not expected": (header(type=FrameType.REPLY), ErrorCode.PROTOCOL, "type 3"),
    "flags": (header(flags=1), ErrorCode.PROTOCOL, "flags 0x1"),
    "length": (header(length=(1 << 16) + 1), ErrorCode.TOO_LARGE, "65537 bytes"),
    "session": (header(session=5), ErrorCode.PROTOCOL, "session 5"),
    "worker": (header(worker=-1), ErrorCode.PROTOCOL, "worker -1"),
}


@pytest.mark.parametrize(("data", "code", "text"), WRONG.values(), ids=WRONG)
def test_what_is_not_understood_ends_the_connection(data: bytes, code: ErrorCode, text: str) -> None:
    reader = splitter()
    assert [frame[1] for frame in reader.feed(header() + header(sequence=8) + data)] == [7, 8]
    assert reader.error is not None
    assert reader.error.code is code
    assert reader.error.fatal
    assert text in str(reader.error)
    assert reader.feed(header()) == []


def test_fields_are_looked_at_in_their_order() -> None:
    everything = {"version": 9, "type": 9, "flags": 9, "length": 1 << 31, "session": 9}
    for field in ("version", "type", "flags", "length"):
        reader = splitter()
        reader.feed(header(**everything))
        assert reader.error is not None
        alone = splitter()
        alone.feed(header(**{field: everything[field]}))
        assert str(reader.error) == str(alone.error)
        del everything[field]


def test_the_largest_payload_is_taken() -> None:
    reader = splitter(1000)
    [(_, _, payload)] = reader.feed(encode_frame(FrameType.REQUEST, SESSION, 1, bytes(1000)))
    assert len(payload) == 1000
    reader.feed(header(length=1001))
    assert reader.error is not None


def test_memory_follows_what_came_and_not_what_was_claimed() -> None:
    readers = [splitter(bounds.FRAME_BYTES_CEILING) for _ in range(100)]
    tracemalloc.start()
    try:
        for reader in readers:
            assert reader.feed(header(length=bounds.FRAME_BYTES_CEILING) + b"abc") == []
        held, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert all(reader.partial for reader in readers)
    assert held < 1 << 20


@given(st.binary(max_size=300))
def test_garbage_never_gets_through(data: bytes) -> None:
    reader = splitter()
    frames = reader.feed(data)
    assert frames == [] or data.startswith(MAGIC)


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (InvalidRequest("why"), ErrorCode.INVALID_REQUEST),
        (AlreadyRegistered("why"), ErrorCode.ALREADY_REGISTERED),
        (MasterUnavailable("why"), ErrorCode.UNAVAILABLE),
        (AccessDenied("why"), ErrorCode.ACCESS_DENIED),
        (MasterError("why"), ErrorCode.INTERNAL),
    ],
)
def test_errors_cross_the_wire(error: MasterError, code: ErrorCode) -> None:
    assert code_of(error) is code
    other = exception_of(code, str(error))
    assert (type(other), str(other)) == (type(error), "why")


def test_what_a_server_cannot_read_is_the_request_s_fault() -> None:
    assert code_of(ProtocolError("a column is too short")) is ErrorCode.MALFORMED
    assert type(exception_of(ErrorCode.MALFORMED, "why")) is InvalidRequest
    assert type(exception_of(ErrorCode.VERSION, "why")) is ProtocolError


def test_an_error_of_a_later_revision_is_an_error() -> None:
    assert code_of(exception_of(4711, "why")) is ErrorCode.INTERNAL


def test_a_wire_error_knows_its_code() -> None:
    assert code_of(WireError(ErrorCode.UNKNOWN_MESSAGE, "what?")) is ErrorCode.UNKNOWN_MESSAGE
    assert not WireError(ErrorCode.MALFORMED, "what?").fatal
