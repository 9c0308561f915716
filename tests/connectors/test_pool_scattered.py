"""Objects in several places: arrays with gaps, tuples of segments, both ways."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from umbp_connectors.pool.buffers import PIECE_BYTES, Pieces, as_view
from umbp_connectors.pool.checksums import copy_checksummed, object_checksum
from umbp_connectors.pool.local import GetStatus, LocalPool, LocalPoolConfig, PutStatus
from umbp_core.errors import StateError
from umbp_core.ids import Identity, RankScope

IDENTITY = Identity("model", b"\x11" * 32, RankScope())
SIZE = 2 << 20


@pytest.fixture(scope="module")
def pool() -> Iterator[LocalPool]:
    pool = LocalPool(IDENTITY, LocalPoolConfig(SIZE, 8 * SIZE, prefault=False))
    pool.open()
    yield pool
    pool.close()


def _random(*shape: int) -> np.ndarray:
    return np.random.default_rng(sum(shape)).integers(0, 256, shape, dtype=np.uint8)


def _strided(shape: tuple[int, ...], gaps: tuple[int, ...]) -> np.ndarray:
    """An array of ``shape`` whose axes lie ``gaps`` elements further apart than they need to."""
    whole = _random(*(length + gap for length, gap in zip(shape, gaps, strict=True)))
    return whole[tuple(slice(length) for length in shape)]


@pytest.mark.parametrize(
    ("shape", "gaps"),
    [
        ((2, 131072), (0, 512)),
        ((2, 5), (0, 3)),
        ((4, 16, 1024), (0, 3, 0)),
        ((4, 16, 1024), (0, 0, 7)),
        ((3, 2, 20000), (1, 1, 0)),
        ((2, 3, 4, 5, 6), (1, 2, 3, 4, 5)),
        ((1, 7, 1, 9), (2, 0, 3, 1)),
        ((2, 700, 1025), (0, 1, 1)),
        ((40, 3, 16384), (0, 1, 0)),
    ],
)
def test_arrays_with_gaps_are_their_bytes_in_order(
    pool: LocalPool, shape: tuple[int, ...], gaps: tuple[int, ...]
) -> None:
    key = repr((shape, gaps)).encode()
    source = _strided(shape, gaps)
    assert pool.put([key], [source]) == [PutStatus.STORED]
    flat = np.zeros(source.size, dtype=np.uint8)
    assert pool.get([key], [flat]) == [GetStatus.DRAM]
    assert flat.tobytes() == source.tobytes()
    around = np.full(tuple(length + gap for length, gap in zip(shape, gaps, strict=True)), 77, dtype=np.uint8)
    target = around[tuple(slice(length) for length in shape)]
    assert pool.get([key], [target]) == [GetStatus.DRAM]
    assert np.array_equal(target, source)
    target[...] = 77
    assert np.all(around == 77), "what lies between was not written"


@pytest.mark.parametrize("dtype", [np.float32, np.int64, np.uint16])
def test_elements_of_any_type(pool: LocalPool, dtype: type) -> None:
    key = np.dtype(dtype).name.encode()
    source = np.arange(2 * 30 * 40).reshape(2, 30, 40).astype(dtype)[:, 3:9]
    target = np.zeros((2, 30, 40), dtype=dtype)[:, 3:9]
    assert pool.put([key], [source]) == [PutStatus.STORED]
    assert pool.get([key], [target]) == [GetStatus.DRAM]
    assert np.array_equal(source, target)


def test_tuples_are_one_object(pool: LocalPool) -> None:
    keys, values = _random(2, 4096), _strided((3, 500), (0, 24))
    assert pool.put([b"tuple"], [(keys, b"between", values)]) == [PutStatus.STORED]
    whole = bytearray(8192 + 7 + 1500)
    assert pool.get([b"tuple"], [whole]) == [GetStatus.DRAM]
    assert whole == keys.tobytes() + b"between" + values.tobytes()
    targets = (bytearray(5000), np.zeros((2, 40), dtype=np.uint8)[:, :20], bytearray(len(whole) - 5040))
    assert pool.get([b"tuple"], [targets]) == [GetStatus.DRAM]
    assert bytes(targets[0]) + targets[1].tobytes() + bytes(targets[2]) == whole


def test_sizes_are_those_of_all_segments(pool: LocalPool) -> None:
    half = bytes(SIZE // 2)
    statuses = pool.put([b"empty", b"much", b"full"], [(), (half, half, b"x"), (half, half)])
    assert statuses == [PutStatus.TOO_LARGE, PutStatus.TOO_LARGE, PutStatus.STORED]
    assert pool.get([b"full"], [(bytearray(SIZE // 2),)]) == [GetStatus.SIZE_MISMATCH]


def test_what_cannot_be_taken_in_place_is_refused(pool: LocalPool) -> None:
    with pytest.raises(ValueError, match="not contiguous"):
        pool.put([b"k"], [_random(4, 8)[:, ::2]])
    with pytest.raises(ValueError, match="not contiguous"):
        pool.put([b"k"], [(b"fine", _random(4, 8).T)])
    with pytest.raises(ValueError, match="can be written"):
        pool.get([b"k"], [(bytearray(4), b"read")])
    with pytest.raises(ValueError, match="as many buffers"):
        pool.get([b"k"], [bytearray(4), bytearray(4)])


def test_pieces_go_to_and_from_pages_only() -> None:
    pieces = Pieces([np.zeros(4, dtype=np.uint8)])
    with pytest.raises(StateError, match="not to other pieces"):
        copy_checksummed(b"key", pieces, pieces)


@settings(deadline=None)
@given(st.data())
def test_any_view_of_any_array(data: st.DataObject) -> None:
    shape = data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=5))
    if data.draw(st.booleans(), label="long rows"):
        shape[-1] += data.draw(st.sampled_from([16 << 10, (16 << 10) - 4, PIECE_BYTES]))
    gaps = [data.draw(st.integers(0, 2)) for _ in shape]
    source = _strided(tuple(shape), tuple(gaps))
    page = np.zeros(source.size, dtype=np.uint8)
    checksum = copy_checksummed(b"key", page, as_view(source))
    assert page.tobytes() == source.tobytes()
    assert checksum == object_checksum(b"key", page)
    view = np.zeros([length + gap for length, gap in zip(shape, gaps, strict=True)], dtype=np.uint8)
    target = view[tuple(slice(length) for length in shape)]
    assert copy_checksummed(b"key", as_view(target), page) == checksum
    assert np.array_equal(target, source)
