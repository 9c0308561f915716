"""Packed lists of hashes: every mode, every bound (law L10)."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from umbp_core.errors import InvalidRequest, ProtocolError
from umbp_core.wire import bounds
from umbp_core.wire.hashes import (
    EMPTY,
    PART,
    Packing,
    count_hashes,
    pack_hashes,
    unpack_hashes,
    unpack_in_parts,
    view_hashes,
)

HASHES = st.one_of(
    st.lists(st.binary(max_size=40), max_size=300),
    st.lists(st.integers(0, 2**63).map(lambda number: str(number).encode()), max_size=300),
    st.lists(st.binary(min_size=32, max_size=32), max_size=300),
)


def packed(mode: int, count: int, parameter: int, data: bytes = b"") -> bytes:
    return struct.pack("<BII", mode, count, parameter) + data


@given(HASHES)
def test_what_is_packed_comes_back(hashes: list[bytes]) -> None:
    blob = pack_hashes(hashes)
    assert unpack_hashes(blob) == hashes
    assert list(view_hashes(blob)) == hashes
    assert count_hashes(blob) == len(view_hashes(blob)) == len(hashes)
    assert [one for part in unpack_in_parts(blob) for one in part] == hashes


@pytest.mark.parametrize(
    ("hashes", "mode"),
    [
        ([], Packing.LENGTHS),
        ([b""], Packing.SEPARATED),
        ([b"1", b"22", b""], Packing.SEPARATED),
        ([b"\0a", b"bb"], Packing.FIXED),
        ([b"\0a", b"b"], Packing.LENGTHS),
        ([b"\0" * 7], Packing.FIXED),
    ],
)
def test_the_mode_that_fits(hashes: list[bytes], mode: Packing) -> None:
    blob = pack_hashes(hashes)
    assert blob[0] == mode
    assert unpack_hashes(blob) == hashes


def test_modes_byte_for_byte() -> None:
    assert pack_hashes([]) == EMPTY == bytes(9)
    assert pack_hashes([b"12", b"345"]) == packed(2, 2, 0, b"12\x00345")
    assert pack_hashes([b"\0\1", b"\2\3"]) == packed(1, 2, 2, b"\0\1\2\3")
    assert pack_hashes([b"\0", b"ab"]) == packed(0, 2, 0, b"\1\0\2\0" + b"\0ab")


def test_any_separator_is_understood() -> None:
    assert unpack_hashes(packed(2, 3, ord(","), b"a,,bc")) == [b"a", b"", b"bc"]


@pytest.mark.parametrize("count", [1, 255, 256, 257, 1000])
@pytest.mark.parametrize("width", [1, 16, 32])
def test_fixed_widths_of_any_count(count: int, width: int) -> None:
    hashes = [bytes([0, *number.to_bytes(2, "big")]).ljust(width, b"\7")[:width] for number in range(count)]
    assert unpack_hashes(packed(1, count, width, b"".join(hashes))) == hashes


@pytest.mark.parametrize(
    ("hashes", "mode"),
    [
        ([b"%d" % n for n in range(3 * PART + 1)], Packing.SEPARATED),
        ([b""] * (20 * PART), Packing.SEPARATED),
        ([b"\0%015d" % n for n in range(2 * PART)], Packing.FIXED),
        ([b"\0" * (n % 7) for n in range(PART + 1)], Packing.LENGTHS),
        ([b"\0" * (n % 7) for n in range(4 * PART)], Packing.LENGTHS),
    ],
)
def test_a_long_list_comes_in_parts(hashes: list[bytes], mode: Packing) -> None:
    blob = pack_hashes(hashes)
    assert blob[0] == mode
    parts = list(unpack_in_parts(blob))
    assert [one for part in parts for one in part] == hashes
    assert len(parts) > 1
    assert max(map(len, parts)) <= PART


WRONG = {
    "nothing": b"",
    "half a head": bytes(8),
    "an unknown mode": packed(3, 0, 0),
    "lengths with a parameter": packed(0, 0, 1),
    "lengths that end early": packed(0, 4, 0, b"\1\0"),
    "less than its lengths": packed(0, 2, 0, b"\1\0\5\0" + b"abc"),
    "more than its lengths": packed(0, 1, 0, b"\1\0" + b"abc"),
    "bytes behind an empty list": packed(0, 0, 0, b"x"),
    "an empty list of a width": packed(1, 0, 4),
    "a width of 0": packed(1, 3, 0),
    "a width above the bound": packed(1, 1, bounds.HASH_BYTES + 1, bytes(bounds.HASH_BYTES + 1)),
    "less than its width": packed(1, 2, 4, b"1234567"),
    "more than its width": packed(1, 2, 4, b"123456789"),
    "an empty list of separators": packed(2, 0, 0),
    "no byte as a separator": packed(2, 1, 256, b"a"),
    "too few separators": packed(2, 3, 0, b"a\0b"),
    "too many separators": packed(2, 2, 0, b"a\0b\0c"),
    "too few separators of many": packed(2, 7, 0, b"a\0b\0c\0d\0e\0f"),
    "too many separators of many": packed(2, 5, 0, b"a\0b\0c\0d\0e\0f"),
    "no byte between many": packed(2, 6, 256, b"a\0b\0c\0d\0e\0f"),
    "a hash above the bound": packed(2, 2, 0, b"a\0" + b"b" * (bounds.HASH_BYTES + 1)),
    "more than the bound of a list": packed(2, bounds.HASHES + 1, 0, bytes(bounds.HASHES)),
    "a count that would fill the memory": packed(2, 0xFFFFFFFF, 0, b"abc"),
    "a count of lengths that would": packed(0, 0xFFFFFFFF, 0, b"abc"),
    "a count of widths that would": packed(1, 0xFFFFFFFF, 0xFFFFFFFF, b"abc"),
}


@pytest.mark.parametrize("blob", WRONG.values(), ids=WRONG)
def test_what_is_wrong_is_refused(blob: bytes) -> None:
    with pytest.raises(ProtocolError):
        unpack_hashes(blob)
    with pytest.raises(ProtocolError):
        view_hashes(blob)
    with pytest.raises(ProtocolError):
        list(unpack_in_parts(blob))


def test_long_lists_that_are_wrong_are_refused_in_parts_too() -> None:
    for blob in (
        packed(2, PART + 1, 0, bytes(PART + 1)),
        packed(1, PART + 1, 3, bytes(3 * PART)),
        packed(2, PART + 1, 999, bytes(PART)),
        packed(2, PART + 1, 1, b"\1" * PART + b"x" * (bounds.HASH_BYTES + 1)),
        packed(0, PART + 1, 0, bytes(2 * PART + 1)),
        packed(0, PART + 1, 0, bytes(2 * PART + 3)),
        packed(0, PART + 1, 0, bytes(2 * PART) + b"\2\0" + b"x"),
    ):
        with pytest.raises(ProtocolError):
            list(unpack_in_parts(blob))


def test_the_reader_may_ask_for_less() -> None:
    blob = pack_hashes([b"1", b"2", b"3"])
    assert unpack_hashes(blob, 3) == [b"1", b"2", b"3"]
    with pytest.raises(ProtocolError, match="above the bound of 2"):
        unpack_hashes(blob, 2)


@pytest.mark.parametrize("length", [10, 100])
def test_a_view_refuses_as_early_as_a_list(length: int) -> None:
    hashes = [b"%0*d" % (length, number) for number in range(100)]
    assert list(view_hashes(pack_hashes(hashes), 100)) == hashes
    with pytest.raises(ProtocolError, match="above the bound of 99"):
        view_hashes(pack_hashes(hashes), 99)


def test_too_much_is_not_packed() -> None:
    with pytest.raises(InvalidRequest, match="above the bound"):
        pack_hashes([b""] * (bounds.HASHES + 1))
    with pytest.raises(InvalidRequest, match="longer than"):
        pack_hashes([b"a", b"b" * (bounds.HASH_BYTES + 1)])
    assert unpack_hashes(pack_hashes([b"\0" * bounds.HASH_BYTES, b"a"]))[0] == b"\0" * bounds.HASH_BYTES


@given(st.binary(max_size=200))
def test_garbage_is_refused_or_understood(blob: bytes) -> None:
    try:
        hashes = unpack_hashes(blob)
    except ProtocolError:
        return
    assert len(hashes) == count_hashes(blob)
    assert unpack_hashes(pack_hashes(hashes)) == hashes
