"""Batches of both engines, of today and of before, and what is none."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.connectors.reporting_zmq.publisher import CLEARED, batch, removed, stored
from umbp_connectors.reporting.zmq_batches import BatchDecoder, Cleared, EventBatch, Removed, Stored
from umbp_core.errors import ProtocolError
from umbp_core.tiers import Tier


def decoded(*events: Any) -> EventBatch:
    return BatchDecoder().decode(batch(*events))


def test_events_of_both_engines() -> None:
    found = decoded(
        stored(-5, 2**64 - 1, extra_keys=[None, ["salt"]], session_id="s"),
        stored(b"\x00\xab", medium="CPU_PINNED", cache_salt="x"),
        stored(7, medium="STORAGE", group_idx=3, kv_cache_spec_kind="sliding_window", ownership="fs"),
        removed(7, medium="DISK", group_idx=3),
        removed(-5),
        CLEARED,
    )
    assert found.events == [
        Stored(Tier.HBM, [b"-5", b"18446744073709551615"]),
        Stored(Tier.DRAM, [b"00ab"]),
        Stored(Tier.SSD, [b"7"], 3, False),
        Removed(Tier.SSD, [b"7"], 3),
        Removed(Tier.HBM, [b"-5"]),
        Cleared(),
    ]
    assert (found.elsewhere, found.unknown) == (0, ())


def test_events_of_older_engines_are_arrays() -> None:
    found = decoded(
        ["BlockStored", [1, 2], None, [9, 9], 16, None],
        ["BlockStored", [3], 2, [9, 9], 16, None, "CPU", "lora", ["anything"], {"new": 1}],
        ["BlockRemoved", [1]],
        ["BlockRemoved", [b"\xff"], "GPU"],
        ["AllBlocksCleared"],
    )
    assert found.events == [
        Stored(Tier.HBM, [b"1", b"2"]),
        Stored(Tier.DRAM, [b"3"]),
        Removed(Tier.HBM, [b"1"]),
        Removed(Tier.HBM, [b"ff"]),
        Cleared(),
    ]


def test_places_that_are_no_tier_of_the_node_are_counted() -> None:
    found = decoded(
        stored(1, 2, medium="EXTERNAL"),
        removed(1, medium="EXTERNAL"),
        stored(3, medium="STORAGE", locality="REMOTE"),
        stored(4, medium="cpu", locality="LOCAL"),
        stored(),
        ["BlockStored", [5], None, [], 16, None, "TAPE"],
    )
    assert found.events == [Stored(Tier.DRAM, [b"4"])]
    assert found.elsewhere == 5


def test_events_that_are_not_known_are_named_and_the_others_count() -> None:
    found = decoded({"type": "BlockMoved", "x": 1}, stored(1), ["BlockPinned", [1]])
    assert found.events == [Stored(Tier.HBM, [b"1"])]
    assert found.unknown == ("BlockMoved", "BlockPinned")


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"\xc1",
        b"\x93",
        msgspec.msgpack.encode({"ts": 1.0, "events": []}),
        msgspec.msgpack.encode([1.0]),
        msgspec.msgpack.encode([1.0, [1]]),
        msgspec.msgpack.encode([1.0, [[]]]),
        msgspec.msgpack.encode([1.0, [[7, [1]]]]),
        msgspec.msgpack.encode([1.0, [{"hashes": [1]}]]),
        batch(stored(1) | {"block_hashes": "1"}, at=1.0),
        batch(removed(1) | {"block_hashes": [1.5]}, at=1.0),
        batch(removed(1) | {"medium": 3}, at=1.0),
        batch(["BlockStored"], at=1.0),
        batch(stored(1), at=1.0) + b"\x00",
        b"\xdd\xff\xff\xff\xff",
        b"\x92\x01\x91" + b"\x91" * 100_000 + b"\x01",
    ],
)
def test_what_is_no_batch_is_refused(payload: bytes) -> None:
    with pytest.raises(ProtocolError, match=r"none of KV-cache events"):
        BatchDecoder().decode(payload)


@given(st.binary(max_size=64))
def test_any_bytes_are_a_batch_or_refused(payload: bytes) -> None:
    try:
        found = BatchDecoder().decode(payload)
    except ProtocolError:
        return
    assert isinstance(found, EventBatch)


@given(st.data())
def test_a_batch_that_was_damaged_is_a_batch_or_refused(data: st.DataObject) -> None:
    payload = bytearray(batch(stored(1, b"ab"), removed(2), CLEARED, ["BlockRemoved", [1]], at=1.0))
    for _ in range(data.draw(st.integers(1, 3))):
        payload[data.draw(st.integers(0, len(payload) - 1))] = data.draw(st.integers(0, 255))
    try:
        found = BatchDecoder().decode(bytes(payload))
    except ProtocolError:
        return
    assert isinstance(found, EventBatch)
