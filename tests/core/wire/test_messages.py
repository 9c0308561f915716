"""Messages: numbers for ever, bounds of every field, and what happens to what is not understood (law L10)."""

from __future__ import annotations

import tracemalloc
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from umbp_core.wire import bounds, messages, replies
from umbp_core.wire.codec import decode_as, decode_hello, decode_request, encode
from umbp_core.wire.codes import ErrorCode, WireError
from umbp_core.wire.messages import Message

ALL: list[type[Message]] = sorted(
    {
        kind
        for module in (messages, replies)
        for kind in vars(module).values()
        if isinstance(kind, type) and issubclass(kind, Message) and kind is not Message
    },
    key=lambda kind: kind.__name__,
)


def number_of(kind: type[Message]) -> int:
    return int(kind.__struct_config__.tag)  # type: ignore[arg-type]


def test_numbers_are_given_once_and_for_ever() -> None:
    assert {kind.__name__: number_of(kind) for kind in ALL} == {
        "Hello": 1, "Welcome": 2, "Failure": 3, "Done": 4,
        "Register": 11, "Unregister": 12, "ReportHeartbeat": 13, "RoutePut": 14, "RouteGet": 15, "Lookup": 16,
        "Report": 17, "Revoke": 18, "ClearTier": 19, "ClearNode": 20, "Match": 21, "HitCounts": 22,
        "ReportMetrics": 23,
        "ApplyBatch": 31, "Probe": 32, "MatchPrefix": 33, "ListNodes": 34, "ListBlocks": 35, "Watch": 36,
        "Explain": 37,
        "Registered": 111, "HeartbeatAnswer": 113, "PutRoutes": 114, "GetRoutes": 115, "Found": 116,
        "Accepted": 117, "Matches": 121, "HitCountsAnswer": 122,
        "BatchAnswer": 131, "Prefixes": 133, "Nodes": 134, "Blocks": 135, "Changes": 136, "Explained": 137,
    }  # fmt: skip


def test_every_message_is_a_request_a_reply_or_part_of_the_greeting() -> None:
    greeting = {messages.Hello, replies.Welcome, replies.Failure}
    assert set(messages.Request.__args__) | set(replies.Reply.__args__) | greeting == set(ALL)


def refused(payload: bytes) -> WireError:
    with pytest.raises(WireError) as caught:
        decode_request(payload)
    return caught.value


def verdict_on(payload: bytes) -> ErrorCode | None:
    """What a payload is refused with; ``None`` when it is a request."""
    try:
        decode_request(payload)
    except WireError as error:
        return error.code
    return None


@pytest.mark.parametrize("number", [0, 1, 3, 99, 127])
def test_a_number_that_is_not_known_is_said_so(number: int) -> None:
    error = refused(msgspec.msgpack.encode([number, "n"]))
    assert error.code is ErrorCode.UNKNOWN_MESSAGE
    assert not error.fatal
    assert f"message {number} is not known" in str(error)


GARBAGE = {
    "nothing": b"",
    "an empty array": b"\x90",
    "a map": msgspec.msgpack.encode({21: b"x"}),
    "a name for a number": msgspec.msgpack.encode(["Match", b"x"]),
    "too few fields": msgspec.msgpack.encode([21]),
    "text for bytes": msgspec.msgpack.encode([21, "x"]),
    "a number for a flag": msgspec.msgpack.encode([21, b"x", 1]),
    "bytes for text": msgspec.msgpack.encode([12, b"x"]),
    "text that is no UTF-8": b"\x92\x0c\xa2\xff\xfe",
    "an end in between": msgspec.msgpack.encode([21, b"xyz"])[:-1],
    "more behind the end": msgspec.msgpack.encode([21, b"x"]) + b"\0",
    "an extension type": b"\x92\x15\xd4\x01x",
}


@pytest.mark.parametrize("payload", GARBAGE.values(), ids=GARBAGE)
def test_what_looks_wrong_is_malformed(payload: bytes) -> None:
    assert refused(payload).code is ErrorCode.MALFORMED


@given(st.binary(max_size=80))
def test_random_bytes_are_refused(payload: bytes) -> None:
    assert verdict_on(payload) in (None, ErrorCode.MALFORMED, ErrorCode.UNKNOWN_MESSAGE)


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary(), st.lists))
def test_random_values_are_refused(value: Any) -> None:
    for number in (11, 13, 21, 23, 31, 33):
        try:
            payload = msgspec.msgpack.encode([number, value, value, value, value, value])
        except OverflowError:  # msgpack has no integers above 64 bits
            return
        assert verdict_on(payload) in (None, ErrorCode.MALFORMED)


TOO_MUCH = {
    "a name": [12, "x" * (bounds.STRING_CHARS + 1)],
    "a description": [11, "n", "", "", b"x" * (bounds.ENGINE_DESC_BYTES + 1)],
    "capacities": [11, "n", "", "", b"", [[1, 2, 3]] * (bounds.SMALL_LIST + 1)],
    "tags": [11, "n", "", "", b"", [], ["t"] * (bounds.SMALL_LIST + 1)],
    "an incarnation": [11, "n", "", "", b"", [], [], 1 << 63],
    "a negative incarnation": [11, "n", "", "", b"", [], [], -1],
    "bundles": [13, "n", [[1, b"", b"", b"", b""]] * (bounds.LIST + 1)],
    "counts": [13, "n", [], False, 0, None, dict.fromkeys(range(bounds.SMALL_LIST + 1), 1)],
    "nodes to exclude": [15, "n", b"", ["x"] * (bounds.LIST + 1)],
    "a tier": [19, "n", 1 << 31],
    "samples": [23, "n", [["m", [1, 1.0]]] * (bounds.SAMPLES + 1)],
    "labels": [23, "n", [["m", [1, 1.0], "", [["a", "b"]] * (bounds.SMALL_LIST + 1)]]],
    "the help of a metric": [23, "n", [["m", [1, 1.0], "x" * (bounds.TEXT_CHARS + 1)]]],
    "actions": [31, "n", 1, 1, [[3, 1, b""]] * (bounds.LIST + 1)],
    "weights": [33, b"", dict.fromkeys(range(bounds.SMALL_LIST + 1), 1.0)],
    "a page": [35, "n", 1, 0, bounds.PAGE_HASHES + 1],
    "an empty page": [35, "n", 1, 0, 0],
    "a hash": [37, "n", b"x" * (bounds.HASH_BYTES + 1)],
}


def trimmed(value: Any) -> Any:
    """``value`` one smaller at the place that was too large."""
    if isinstance(value, dict) and len(value) > bounds.SMALL_LIST:
        return dict(list(value.items())[:-1])
    if isinstance(value, (str, bytes)) and len(value) > 100:
        return value[:-1]
    if isinstance(value, list):
        shorter = value[:-1] if len(value) > bounds.SMALL_LIST else value
        return [trimmed(one) for one in shorter]
    return {1 << 63: (1 << 63) - 1, -1: 0, 1 << 31: (1 << 31) - 1, bounds.PAGE_HASHES + 1: bounds.PAGE_HASHES}.get(
        value, value
    )


@pytest.mark.parametrize("fields", TOO_MUCH.values(), ids=TOO_MUCH)
def test_a_field_above_its_bound_is_malformed(fields: list[Any]) -> None:
    assert refused(msgspec.msgpack.encode(fields)).code is ErrorCode.MALFORMED
    if fields[-1] != 0:
        decode_request(msgspec.msgpack.encode(trimmed(fields)))


def test_a_token_above_its_bound_is_malformed() -> None:
    decode_hello(encode(messages.Hello(token=b"x" * bounds.TOKEN_BYTES)))
    with pytest.raises(WireError):
        decode_hello(encode(messages.Hello(token=b"x" * (bounds.TOKEN_BYTES + 1))))


@pytest.mark.parametrize(
    "claim",
    [
        b"\x93\x0b\xa1n\xdd\xff\xff\xff\xff",
        b"\x95\x0b\xa1n\xa0\xa0\xc6\xff\xff\xff\xff",
        b"\x94\x17\xa1n\xdd\x10\x00\x00\x00\x93",
        b"\x93\x21\xc4\x01x\xdf\xff\xff\xff\xff",
        b"\xdd\xff\xff\xff\xff\x15",
        b"\x94\x15\xc4\x01x\xc2\xdd\xff\xff\xff\xff",
    ],
)
def test_a_claim_costs_no_memory(claim: bytes) -> None:
    tracemalloc.start()
    try:
        assert refused(claim).code is ErrorCode.MALFORMED
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 1 << 20


def test_fields_of_a_later_revision_are_ignored() -> None:
    later = msgspec.msgpack.encode([21, b"packed", True, "something new", {"more": [1]}])
    assert decode_request(later) == messages.Match(b"packed", True)


def test_fields_that_are_left_out_have_their_defaults() -> None:
    assert decode_request(msgspec.msgpack.encode([21, b"packed"])) == messages.Match(b"packed", False)


def test_a_reply_is_the_one_that_was_asked_for() -> None:
    with pytest.raises(WireError, match="not what it should look like"):
        decode_as(replies.Found, encode(replies.Accepted(True)))
