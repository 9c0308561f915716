"""What a server gets from strangers: errors come back, and the master serves on (law L10)."""

from __future__ import annotations

import random
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from tests.master.native.harness import DEADLINE, DRAM, Master, RawClient, client
from umbp_connectors.client.native_blocking import NativeBlockingClient
from umbp_connectors.master.native_limits import NativeLimits
from umbp_core.master.model import Registration
from umbp_core.wire import bounds
from umbp_core.wire.codes import ErrorCode
from umbp_core.wire.frames import FrameType, encode_frame
from umbp_core.wire.hashes import pack_hashes

FAILURE = 3
MATCH, LOOKUP = 21, 16
REQUESTS = [*range(11, 24), *range(31, 38)]


def refused(raw: RawClient) -> tuple[int, int, str]:
    """Sequence, code and text of the error that comes next."""
    kind, sequence, payload = raw.receive()
    assert kind == FrameType.ERROR, payload
    assert payload[0] == FAILURE
    return sequence, payload[1], payload[2]


def ended(raw: RawClient, code: ErrorCode) -> str:
    """Why the server ends the connection."""
    sequence, found, text = refused(raw)
    assert (sequence, found) == (0, code), text
    assert raw.at_end()
    return text


BAD_FRAMES = {
    "magic": (b"HTTP", 0, ErrorCode.PROTOCOL),
    "version": (b"\2", 4, ErrorCode.VERSION),
    "type": (b"\x63", 8, ErrorCode.PROTOCOL),
    "a reply": (b"\3", 8, ErrorCode.PROTOCOL),
    "another hello": (b"\1", 8, ErrorCode.PROTOCOL),
    "session": (b"\xff\xff", 12, ErrorCode.PROTOCOL),
    "worker": (b"\1", 20, ErrorCode.PROTOCOL),
    "too large": (b"\1\0\0\1", 32, ErrorCode.TOO_LARGE),
    "flags": (b"\1", 36, ErrorCode.PROTOCOL),
}


@pytest.mark.parametrize(("patch", "at", "code"), BAD_FRAMES.values(), ids=BAD_FRAMES)
def test_a_frame_that_is_not_understood_ends_the_connection_after_what_came_before(
    raw: RawClient, patch: bytes, at: int, code: ErrorCode
) -> None:
    good = encode_frame(FrameType.REQUEST, raw.session, 1, msgspec.msgpack.encode([LOOKUP, pack_hashes([b"k"])]))
    bad = bytearray(encode_frame(FrameType.REQUEST, raw.session, 2))
    bad[at : at + len(patch)] = patch
    raw.send(good + bytes(bad) + good)
    assert raw.receive()[:2] == (FrameType.REPLY, 1)
    assert ended(raw, code)


BAD_HELLOS = {
    "a request first": (encode_frame(FrameType.REQUEST, 0, 1, msgspec.msgpack.encode([34])), ErrorCode.PROTOCOL),
    "a session of its own": (encode_frame(FrameType.HELLO, 7, 0, b"\x91\x01"), ErrorCode.PROTOCOL),
    "another message": (encode_frame(FrameType.HELLO, 0, 0, b"\x91\x22"), ErrorCode.PROTOCOL),
    "garbage": (encode_frame(FrameType.HELLO, 0, 0, b"\xff\xff"), ErrorCode.PROTOCOL),
    "too much": (encode_frame(FrameType.HELLO, 0, 0, bytes(bounds.HELLO_BYTES + 1)), ErrorCode.TOO_LARGE),
    "another protocol": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(32), ErrorCode.PROTOCOL),
}


@pytest.mark.parametrize(("data", "code"), BAD_HELLOS.values(), ids=BAD_HELLOS)
def test_a_greeting_that_is_not_understood_ends_the_connection(path: str, data: bytes, code: ErrorCode) -> None:
    with RawClient(path) as raw:
        raw.send(data)
        assert ended(raw, code)


def test_nobody_greets_twice(path: str) -> None:
    with RawClient(path) as raw:
        raw.send(2 * encode_frame(FrameType.HELLO, 0, 0, msgspec.msgpack.encode([1])))
        assert raw.receive()[0] == FrameType.HELLO
        assert "already" in ended(raw, ErrorCode.PROTOCOL)


def test_the_token_is_checked(running: Master, tmp_path: Path) -> None:
    path = tmp_path / "locked"
    running.serve(path, token=b"secret")
    for token in (b"", b"secre", b"secrets"):
        with RawClient(str(path)) as raw:
            raw.send(encode_frame(FrameType.HELLO, 0, 0, msgspec.msgpack.encode([1, 1, "", "", token])))
            assert "token" in ended(raw, ErrorCode.ACCESS_DENIED)
    with RawClient(str(path)) as raw:
        raw.greet(b"secret")
        assert raw.ask(34)[0] == FrameType.REPLY


def test_half_a_frame_is_waited_for(raw: RawClient) -> None:
    frame = encode_frame(FrameType.REQUEST, raw.session, 9, msgspec.msgpack.encode([LOOKUP, pack_hashes([b"k"])]))
    for at in range(len(frame)):
        raw.send(frame[at : at + 1])
    assert raw.receive() == (FrameType.REPLY, 9, [116, b"\0"])


def test_a_client_that_goes_in_the_middle_of_a_frame_is_gone(path: str, blocking: NativeBlockingClient) -> None:
    with RawClient(path) as raw:
        raw.greet()
        raw.send(encode_frame(FrameType.REQUEST, raw.session, 1, bytes(1000))[:500])
    assert blocking.lookup([b"k"], DEADLINE) == [False]


WRONG_REQUESTS = {
    "an unknown message": ([99, "n"], ErrorCode.UNKNOWN_MESSAGE),
    "a message of the server": ([4], ErrorCode.UNKNOWN_MESSAGE),
    "a field of another kind": ([MATCH, "text"], ErrorCode.MALFORMED),
    "a list that is none": ([MATCH, b"?"], ErrorCode.MALFORMED),
    "a list that is none, in steps": ([MATCH, pack_hashes([b"%d" % n for n in range(9000)])[:-5]], ErrorCode.MALFORMED),
    "columns of different length": ([14, "n", pack_hashes([b"k"]), b""], ErrorCode.MALFORMED),
    "too many keys": ([LOOKUP, pack_hashes([b""] * (bounds.KEYS + 1))], ErrorCode.MALFORMED),
    "a kind of event": ([13, "n", [[1, b"\7", bytes(4), bytes(8), pack_hashes([b"k"])]]], ErrorCode.MALFORMED),
    "a kind of action": ([31, "n", 1, 1, [[9, 2, pack_hashes([])]]], ErrorCode.MALFORMED),
    "weights that are no costs": ([33, pack_hashes([b"h"]), {1: -1.0}], ErrorCode.INVALID_REQUEST),
    "a node without a name": ([11, ""], ErrorCode.INVALID_REQUEST),
    "a report of nothing": ([17, "n", DRAM, pack_hashes([])], ErrorCode.INVALID_REQUEST),
}


@pytest.mark.parametrize(("fields", "code"), WRONG_REQUESTS.values(), ids=WRONG_REQUESTS)
def test_a_request_that_is_wrong_gets_an_error_and_the_connection_goes_on(
    raw: RawClient, fields: list[Any], code: ErrorCode
) -> None:
    number = raw.request(*fields)
    assert refused(raw)[:2] == (number, code)
    assert raw.ask(LOOKUP, pack_hashes([b"k"])) == (FrameType.REPLY, [116, b"\0"])


def at_once(*_: object) -> None:
    raise ZeroDivisionError("a mistake")


async def in_steps(*_: object) -> None:
    raise ZeroDivisionError("a mistake")


@pytest.mark.parametrize(
    ("method", "broken", "fields", "name"),
    [
        ("list_nodes", at_once, [34], "ListNodes"),
        ("match_prefix", in_steps, [33, pack_hashes([b"h"]), None], "MatchPrefix"),
    ],
)
def test_a_mistake_in_the_master_costs_one_call(
    raw: RawClient,
    running: Master,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    method: str,
    broken: Callable[..., object],
    fields: list[Any],
    name: str,
) -> None:
    monkeypatch.setattr(running.service, method, broken)
    number = raw.request(*fields)
    sequence, code, text = refused(raw)
    assert (sequence, code) == (number, ErrorCode.INTERNAL)
    assert name in text
    assert "a mistake" not in text
    assert raw.ask(LOOKUP, pack_hashes([b"k"])) == (FrameType.REPLY, [116, b"\0"])
    assert "a mistake" in caplog.text
    assert running.observer.calls[0] == ("native", name, "INTERNAL")


def some_value(rng: random.Random, depth: int = 0) -> Any:
    """Anything that msgpack can say, small."""
    kinds = [
        lambda: None,
        lambda: rng.random() < 0.5,
        lambda: rng.choice([0, 1, -1, 2, 3, 7, 127, 128, 2**31, 2**32, 2**63 - 1, 2**63, 2**64 - 1, -(2**63)]),
        lambda: rng.choice([0.0, -1.5, float("nan"), float("inf")]),
        lambda: rng.choice(["", "n", "node-a", "\0", "ä" * 20]),
        lambda: rng.randbytes(rng.choice([0, 1, 4, 8, 9, 16, 30])),
        lambda: pack_hashes([b"%d" % rng.randrange(100) for _ in range(rng.randrange(4))]),
    ]
    if depth < 3:
        kinds.append(lambda: [some_value(rng, depth + 1) for _ in range(rng.randrange(5))])
        kinds.append(lambda: {rng.randrange(4): some_value(rng, depth + 1) for _ in range(rng.randrange(3))})
    return rng.choice(kinds)()


def some_payload(rng: random.Random) -> bytes:
    """A request of the wrong shape: wrong fields, or right ones with wrong bytes."""
    way = rng.randrange(4)
    if way == 0:
        return rng.randbytes(rng.randrange(60))
    payload = msgspec.msgpack.encode([rng.choice(REQUESTS), *(some_value(rng) for _ in range(rng.randrange(8)))])
    if way == 1:
        return payload[: rng.randrange(len(payload) + 1)]
    if way == 2:
        spoilt = bytearray(payload)
        for _ in range(rng.randrange(1, 4)):
            spoilt[rng.randrange(len(spoilt))] = rng.randrange(256)
        return bytes(spoilt)
    return payload


def test_a_hundred_thousand_wrong_messages_bring_answers_and_no_crash(path: str, running: Master) -> None:
    rng = random.Random(20_261_121)
    burst, bursts = 500, 200
    answers = {FrameType.REPLY: 0, FrameType.ERROR: 0, FrameType.EVENT: 0}
    with RawClient(path) as raw:
        raw.greet()
        for _ in range(bursts):
            first = raw.sequence + 1
            frames = []
            for _ in range(burst):
                raw.sequence += 1
                frames.append(encode_frame(FrameType.REQUEST, raw.session, raw.sequence, some_payload(rng)))
            raw.send(b"".join(frames))
            answered, expected = set(), set(range(first, raw.sequence + 1))
            while answered != expected:
                kind, sequence, payload = raw.receive()
                answers[FrameType(kind)] += 1
                if kind == FrameType.EVENT:  # a watch that was understood
                    raw.send(encode_frame(FrameType.CANCEL, raw.session, sequence))
                    expected.discard(sequence)
                    answered.discard(sequence)
                else:
                    if kind == FrameType.ERROR:
                        assert payload[1] != ErrorCode.INTERNAL, payload
                    answered.add(sequence)
                    answered &= expected
    assert answers[FrameType.ERROR] > 50_000
    assert answers[FrameType.REPLY] > 1_000
    with client(path) as it:
        it.register(Registration("survivor"), DEADLINE)
        assert "survivor" in {info.node_id for info in it.list_nodes(DEADLINE)}


def test_wrong_frames_end_their_connections_only(path: str, blocking: NativeBlockingClient) -> None:
    rng = random.Random(7)
    good = encode_frame(FrameType.HELLO, 0, 0, msgspec.msgpack.encode([1]))
    for _ in range(2_000):
        with RawClient(path) as raw:
            spoilt = bytearray(good * 10)
            for _ in range(10):
                spoilt[rng.randrange(len(spoilt))] = rng.randrange(256)
            raw.send(bytes(spoilt))
            raw.socket.shutdown(socket.SHUT_WR)
            raw.drain()
    assert blocking.lookup([b"k"], DEADLINE) == [False]


def test_connections_are_bounded(running: Master, tmp_path: Path) -> None:
    path = tmp_path / "narrow"
    server, _ = running.serve(path, limits=NativeLimits(connections=2))
    with RawClient(str(path)) as first, RawClient(str(path)) as second, RawClient(str(path)) as third:
        first.greet()
        second.greet()
        third.send(encode_frame(FrameType.HELLO, 0, 0, msgspec.msgpack.encode([1])))
        assert "2 connections are open" in ended(third, ErrorCode.UNAVAILABLE)
        assert first.ask(34)[0] == second.ask(34)[0] == FrameType.REPLY
    assert server.connections <= 2
