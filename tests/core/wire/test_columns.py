"""Columns, bitmaps and tables of nodes."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from umbp_core.errors import InvalidRequest, ProtocolError
from umbp_core.wire import bounds
from umbp_core.wire.columns import (
    WIDTHS,
    full_bitmap,
    pack_bitmap,
    pack_column,
    select,
    unpack_bitmap,
    unpack_column,
    unpack_floats,
)
from umbp_core.wire.hashes import pack_hashes
from umbp_core.wire.names import NodeTable, check_refs, pack_names, read_table, unpack_names


@given(st.lists(st.integers(0, 2**64 - 1)))
def test_numbers_come_back(values: list[int]) -> None:
    blob = pack_column("Q", values)
    assert list(unpack_column("Q", blob, len(values))) == values
    assert blob == b"".join(value.to_bytes(8, "little") for value in values)


@given(st.lists(st.integers(-(2**31), 2**31 - 1)))
def test_signed_numbers_come_back(values: list[int]) -> None:
    blob = pack_column("i", values)
    assert list(unpack_column("i", blob, len(values))) == values
    assert blob == b"".join(value.to_bytes(4, "little", signed=True) for value in values)


@given(st.lists(st.floats(allow_nan=False)))
def test_floats_come_back(values: list[float]) -> None:
    assert list(unpack_floats(pack_column("d", values), len(values))) == values


@pytest.mark.parametrize(("code", "value"), [("Q", 2**64), ("Q", -1), ("i", 2**31), ("I", -1), ("H", 65536)])
def test_numbers_that_do_not_fit_are_refused(code: str, value: int) -> None:
    with pytest.raises(InvalidRequest, match=f"its {8 * WIDTHS[code]} bits"):
        pack_column(code, [1, value])


@pytest.mark.parametrize("nbytes", [0, 15, 17, 24])
def test_columns_of_the_wrong_length_are_refused(nbytes: int) -> None:
    with pytest.raises(ProtocolError, match="column of 2"):
        unpack_column("Q", bytes(nbytes), 2)
    with pytest.raises(ProtocolError, match="column of 2"):
        unpack_floats(bytes(nbytes), 2)


@given(st.lists(st.booleans()))
def test_bitmaps_come_back(flags: list[bool]) -> None:
    bitmap = pack_bitmap(flags)
    assert list(unpack_bitmap(bitmap, len(flags))) == flags
    assert int.from_bytes(bitmap, "little") == sum(1 << at for at, flag in enumerate(flags) if flag)
    assert select(range(len(flags)), bitmap) == [at for at, flag in enumerate(flags) if flag]
    assert (bitmap == full_bitmap(len(flags))) == all(flags)


@pytest.mark.parametrize(("bitmap", "count"), [(b"", 1), (b"\1\1", 8), (b"\x20", 5), (b"\1", 0), (b"\xff\xff", 15)])
def test_bitmaps_of_something_else_are_refused(bitmap: bytes, count: int) -> None:
    with pytest.raises(ProtocolError, match="no bitmap"):
        unpack_bitmap(bitmap, count)
    with pytest.raises(ProtocolError, match="no bitmap"):
        select(range(count), bitmap)


@given(st.lists(st.text(max_size=20)))
def test_names_come_back(names: list[str]) -> None:
    assert unpack_names(pack_names(tuple(names))) == tuple(names)


def test_large_tables_come_back_too() -> None:
    names = tuple(f"node-{number}" for number in range(10_000))
    assert unpack_names(pack_names(names)) == names


def test_names_are_text_of_a_bounded_length() -> None:
    with pytest.raises(ProtocolError, match="UTF-8"):
        unpack_names(pack_hashes([b"\xff\xfe"]))
    with pytest.raises(ProtocolError, match="longer than"):
        unpack_names(b"\2\1" + bytes(7) + b"x" * (bounds.HASH_BYTES + 1))
    with pytest.raises(ProtocolError, match="above the bound"):
        unpack_names(pack_hashes([b""] * (bounds.LIST + 1)))


def test_a_table_names_each_node_once() -> None:
    table = NodeTable()
    assert [table.ref("b", "1"), table.ref("a", "2"), table.ref("b", "1")] == [1, 2, 1]
    assert read_table(table.nodes, table.addresses) == (("b", "1"), ("a", "2"))


def test_tables_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ProtocolError, match="2 nodes and 1 addresses"):
        read_table(pack_names(("a", "b")), pack_names(("1",)))
    check_refs([0, 1, 2], ["a", "b"])
    with pytest.raises(ProtocolError, match="not among the 2"):
        check_refs([1, 3], ["a", "b"])
