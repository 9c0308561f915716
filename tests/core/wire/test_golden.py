"""The frames that are written down: taken apart and put together again, byte for byte."""

from __future__ import annotations

from pathlib import Path

import pytest

from umbp_core.wire import messages, replies
from umbp_core.wire.codec import decode_as, decode_hello, decode_request, encode
from umbp_core.wire.frames import FrameSplitter, FrameType, encode_frame
from umbp_core.wire.messages import Message

FILES = sorted((Path(__file__).parent / "golden").glob("*.hex"))
SESSION = 0x0102030405060708
NUMBERS: dict[int, type[Message]] = {
    kind.__struct_config__.tag: kind  # type: ignore[misc]
    for kind in (*replies.Reply.__args__, replies.Failure, replies.Welcome)
}


def side(path: Path, mark: str) -> bytes:
    """The bytes of the lines that begin with ``mark``: ``>`` from the client, ``<`` from the server."""
    return b"".join(bytes.fromhex(line[2:]) for line in path.read_text().splitlines() if line.startswith(mark))


def number_in(payload: bytes) -> int:
    """The number of a message; a small msgpack integer."""
    return payload[2] if payload[1] == 0xCC else payload[1]


def again(kind: int, payload: bytes) -> bytes:
    """A payload, decoded and encoded."""
    if kind == FrameType.HELLO and number_in(payload) == 1:
        return encode(decode_hello(payload))
    if kind == FrameType.REQUEST:
        return encode(decode_request(payload))
    if kind == FrameType.CANCEL:
        return payload
    return encode(decode_as(NUMBERS[number_in(payload)], payload))


def test_there_is_an_exchange_for_every_message() -> None:
    numbers = set()
    for path in FILES:
        for mark in "><":
            splitter = FrameSplitter(FrameType, 1 << 24, 0 if "hello" in path.name else SESSION)
            numbers |= {number_in(bytes(payload)) for _, _, payload in splitter.feed(side(path, mark)) if payload}
    requests = {kind.__struct_config__.tag for kind in (*messages.Request.__args__, messages.Hello)}
    assert numbers >= requests | set(NUMBERS)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
@pytest.mark.parametrize("mark", ["client", "server"])
def test_frames_byte_for_byte(path: Path, mark: str) -> None:
    data = side(path, {"client": ">", "server": "<"}[mark])
    session = 0 if path.stem.endswith("hello") else SESSION
    splitter = FrameSplitter(FrameType, 1 << 24, session)
    frames = splitter.feed(data)
    if path.stem.endswith(("error-version", "error-unknown-message", "error-malformed")) and mark == "client":
        assert len(data) >= 40
        return  # wrong on purpose; the server's side of the file says what it got
    assert splitter.error is None
    assert not splitter.partial
    rebuilt = [encode_frame(kind, session, number, again(kind, bytes(payload))) for kind, number, payload in frames]
    assert b"".join(rebuilt) == data
