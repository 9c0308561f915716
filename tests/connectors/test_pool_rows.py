"""Objects that are rows of one array: what is copied together arrives as if it had been copied one by one."""

from __future__ import annotations

import gc
import mmap
import threading
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.connectors.pool_memory import memory_of
from umbp_connectors.pool import copies, rows
from umbp_connectors.pool.buffers import PIECE_BYTES
from umbp_connectors.pool.local import GetStatus, LocalPool, LocalPoolConfig, PutStatus
from umbp_connectors.pool.rows import ObjectRows, stretches, views_of
from umbp_connectors.pool.shares import CopyShares
from umbp_core.ids import Identity, RankScope

IDENTITY = Identity("model", b"\x11" * 32, RankScope())
SIZE = 256 << 10
COUNT = 24

Maker = Callable[..., LocalPool]


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Maker]:
    made: list[LocalPool] = []

    def make(pages: int = 2 * COUNT, **options: object) -> LocalPool:
        config = LocalPoolConfig(SIZE, pages * SIZE, patience_s=0, prefault=False, **options)  # type: ignore[arg-type]
        made.append(LocalPool(IDENTITY, config))
        made[-1].open()
        return made[-1]

    yield make
    for pool in made:
        pool.close()


def _keys(count: int = COUNT) -> list[bytes]:
    return [b"%032d" % number for number in range(count)]


def _whole(count: int = COUNT) -> np.ndarray:
    """K and V of each page far apart, as in a host pool."""
    values = np.random.default_rng(3).integers(0, 256, (2, count, SIZE // 2), dtype=np.uint8)
    return values.transpose(1, 0, 2)


def _orders() -> dict[str, list[int]]:
    shuffled = np.random.default_rng(5).permutation(COUNT).tolist()
    gaps = [*range(5), *range(9, 15), *range(20, COUNT)]
    return {"neighbours": list(range(COUNT)), "backwards": list(range(COUNT))[::-1], "shuffled": shuffled, "gaps": gaps}


@pytest.mark.parametrize("order", list(_orders()))
@pytest.mark.parametrize("threads", [1, 2])
def test_rows_come_back_in_whatever_order_they_lie(make: Maker, order: str, threads: int) -> None:
    pool = make(copy_threads=threads)
    numbers, whole = _orders()[order], _whole()
    keys = _keys(len(numbers))
    assert pool.put(keys, ObjectRows(whole, numbers)) == [PutStatus.STORED] * len(keys)
    flat = [np.zeros(SIZE, dtype=np.uint8) for _ in keys]
    assert pool.get(keys, flat) == [GetStatus.DRAM] * len(keys)
    assert [buffer.tobytes() for buffer in flat] == [whole[number].tobytes() for number in numbers]
    back = np.zeros((2, COUNT, SIZE // 2), dtype=np.uint8).transpose(1, 0, 2)
    assert pool.get(keys, ObjectRows(back, numbers)) == [GetStatus.DRAM] * len(keys)
    expected = np.zeros_like(back)
    expected[numbers] = whole[numbers]
    assert np.array_equal(back, expected), "rows that nobody asked for were written"


def test_neighbours_are_copied_together(make: Maker, monkeypatch: pytest.MonkeyPatch) -> None:
    copied: list[int] = []
    copy = rows.copy_rows_in

    def counted(object_keys: list[bytes], *arrays: np.ndarray) -> list[bytes]:
        copied.append(len(object_keys))
        return copy(object_keys, *arrays)

    monkeypatch.setattr(copies, "copy_rows_in", counted)
    pool = make(copy_threads=1)
    count = COUNT - 1
    pool.put(_keys(count), ObjectRows(_whole(), range(count)))
    most = PIECE_BYTES // SIZE
    assert copied == [most] * (count // most) + [count % most]


@given(
    st.lists(st.tuples(st.integers(0, 9), st.none() | st.integers(0, 9)), max_size=30),
    st.integers(1, 5),
    st.booleans(),
)
def test_what_is_copied_together_lies_together_and_is_as_much_as_may_be(
    places: list[tuple[int, int | None]], most: int, alone: bool
) -> None:
    """One after the other: an object belongs to the range before it wherever that can take it."""
    numbers, pages = [number for number, _ in places], [page for _, page in places]
    whole = np.zeros((10, 8), dtype=np.uint8)
    expected: list[list[int]] = []
    for index, (number, page) in enumerate(places):
        last = places[index - 1] if index else (None, None)
        follows = None not in (page, *last) and (number, page) == (last[0] + 1, last[1] + 1)  # type: ignore[operator]
        if page is not None and follows and not alone and len(expected[-1]) < most:
            expected[-1].append(index)
        elif page is not None:
            expected.append([index])
    views = views_of([whole[number] for number in numbers] if alone else ObjectRows(whole, numbers))
    found = stretches(views, pages, most)
    assert [list(range(*each)) for each in found] == expected


def test_rows_that_are_large_are_copied_one_by_one(make: Maker) -> None:
    size = 2 << 20
    config = LocalPoolConfig(size, 4 * size, patience_s=0, prefault=False, copy_threads=2)
    pool = LocalPool(IDENTITY, config)
    pool.open()
    whole = np.random.default_rng(2).integers(0, 256, (2, 4, size // 2), dtype=np.uint8).transpose(1, 0, 2)
    keys = _keys(4)
    assert pool.put(keys, ObjectRows(whole, range(4))) == [PutStatus.STORED] * 4
    back = np.zeros((2, 4, size // 2), dtype=np.uint8).transpose(1, 0, 2)
    assert pool.get(keys, ObjectRows(back, range(4))) == [GetStatus.DRAM] * 4
    assert np.array_equal(back, whole)
    assert stretches(views_of(ObjectRows(whole, range(4))), range(4), 8) == [(n, n + 1) for n in range(4)]
    pool.close()


def _lists() -> dict[str, tuple[list[np.ndarray], bool]]:
    """Small buffers of which the first half differs from the second, and whether they are rows of one array."""
    whole = np.random.default_rng(8).integers(0, 256, (8, 4096), dtype=np.uint8)
    apart = np.random.default_rng(9).integers(0, 256, (8, 2, 4096), dtype=np.uint8)
    several = [np.random.default_rng(n).integers(0, 256, 4096, dtype=np.uint8) for n in range(8)]
    sealed = whole.copy()[:]
    ends = [*whole[:4], *(row[:100] for row in whole[4:])]
    locked = list(sealed)
    locked[5].flags.writeable = False
    sealed_whole = whole.copy()
    sealed_whole.flags.writeable = False
    return {
        "neighbours": (list(whole), True),
        "all but the last": ([*whole[:7], whole[0]], False),
        "backwards": (list(whole[::-1]), False),
        "with gaps": (list(apart[:, 0]), False),
        "of several arrays": (several, False),
        "of several sizes": (ends, False),
        "one for reading only": (locked, False),
        "all for reading only": (list(sealed_whole), True),
        "a single one": ([whole[3]], False),
        "of a size that needs no rows": (list(np.zeros((3, 192 << 10), np.uint8)), False),
        "empty": (list(np.zeros((3, 0), np.uint8)), False),
        "none": ([], False),
    }


@pytest.mark.parametrize("name", list(_lists()))
def test_small_buffers_that_lie_side_by_side_count_as_rows(name: str) -> None:
    buffers, as_rows = _lists()[name]
    views = views_of(buffers)
    assert isinstance(views, rows.RowViews) is as_rows
    assert len(views) == len(buffers)
    whole = [np.asarray(view).tobytes() for view in views]
    assert whole == [buffer.tobytes() for buffer in buffers]


def test_small_buffers_that_are_far_apart_are_found_out_at_once() -> None:
    """What lies between them does not count: a list of all its addresses would have no room in memory."""
    whole = np.frombuffer(mmap.mmap(-1, 4 << 30), np.uint8)
    views = views_of([whole[:1], whole[-1:]])
    assert isinstance(views, list)
    assert [view.nbytes for view in views] == [1, 1]


def test_small_buffers_in_steps_are_refused() -> None:
    with pytest.raises(ValueError, match="not contiguous"):
        views_of(list(np.zeros((8, 4096), np.uint8)[:, ::2]))


def test_rows_out_of_a_list_keep_their_memory_and_can_be_written_if_the_buffers_can(make: Maker) -> None:
    pool, keys = make(), _keys(8)
    made = np.random.default_rng(4).integers(0, 256, (8, 4096), dtype=np.uint8)
    expected = made.copy()
    views = views_of(list(made))
    memory = weakref.ref(made)
    del made
    gc.collect()
    assert memory() is not None, "the rows lie in memory that is gone"
    assert [np.asarray(view).tobytes() for view in views] == [row.tobytes() for row in expected]
    assert pool.put(keys, list(expected)) == [PutStatus.STORED] * 8
    back = np.zeros((9, 4096), dtype=np.uint8)
    assert pool.get(keys, list(back[:8])) == [GetStatus.DRAM] * 8
    assert np.array_equal(back[:8], expected)
    assert not back[8].any()
    back.flags.writeable = False
    with pytest.raises(ValueError, match="can be written"):
        pool.get(keys, list(back[:8]))


def test_a_bad_page_among_neighbours_is_the_only_one_that_is_missing(make: Maker) -> None:
    pool = make(copy_threads=1)
    keys, whole = _keys(), _whole()
    pool.put(keys, ObjectRows(whole, range(COUNT)))
    _damage(pool, keys[5])
    back = np.zeros_like(whole)
    statuses = pool.get(keys, ObjectRows(back, range(COUNT)))
    assert statuses == [GetStatus.CORRUPT if key == keys[5] else GetStatus.DRAM for key in keys]
    good = [number for number in range(COUNT) if number != 5]
    assert np.array_equal(back[good], whole[good])
    assert pool.exists([keys[4], keys[5], keys[6]]) == [True, False, True]


def test_a_bad_page_among_neighbours_comes_from_ssd(make: Maker, tmp_path: Path) -> None:
    pool = make(copy_threads=1, ssd_dir=tmp_path / "ssd", ssd_capacity=64 << 20)
    keys, whole = _keys(8), _whole(8)
    pool.put(keys, ObjectRows(whole, range(8)))
    assert pool.flush(60)
    _damage(pool, keys[2])
    back = np.zeros_like(whole)
    statuses = pool.get(keys, ObjectRows(back, range(8)))
    assert statuses == [GetStatus.SSD if key == keys[2] else GetStatus.DRAM for key in keys]
    assert np.array_equal(back, whole)


def test_rows_that_are_there_already_part_the_neighbours(make: Maker) -> None:
    pool = make()
    keys, whole = _keys(8), _whole(8)
    pool.put([keys[3]], ObjectRows(whole, [3]))
    statuses = pool.put(keys, ObjectRows(whole, range(8)))
    assert statuses == [PutStatus.PRESENT if key == keys[3] else PutStatus.STORED for key in keys]
    back = np.zeros_like(whole)
    assert pool.get([*keys[:5], b"other", *keys[5:7]], ObjectRows(back, range(8))) == [
        *[GetStatus.DRAM] * 5,
        GetStatus.MISS,
        *[GetStatus.DRAM] * 2,
    ]
    assert np.array_equal(back[[0, 1, 2, 3, 4, 6, 7]], whole[:7])


def test_staged_rows_can_be_read_when_they_are_published(make: Maker) -> None:
    pool = make()
    keys, whole = _keys(), _whole()
    staged = pool.stage(keys, ObjectRows(whole, range(COUNT)))
    assert pool.exists(keys) == [False] * COUNT
    assert staged.publish()
    back = np.zeros_like(whole)
    assert pool.get(keys, ObjectRows(back, range(COUNT))) == [GetStatus.DRAM] * COUNT
    assert np.array_equal(back, whole)


def test_smaller_rows_than_a_page_take_their_bytes_only(make: Maker) -> None:
    pool = make(copy_threads=1)
    keys = _keys(4)
    whole = np.random.default_rng(1).integers(0, 256, (4, 3, 1000), dtype=np.uint8)
    assert pool.put(keys, ObjectRows(whole, range(4))) == [PutStatus.STORED] * 4
    back = np.zeros((5, 3, 1000), dtype=np.uint8)
    assert pool.get(keys, ObjectRows(back, range(4))) == [GetStatus.DRAM] * 4
    assert np.array_equal(back[:4], whole)
    assert not back[4].any()
    assert pool.get(keys, ObjectRows(_whole(4), range(4))) == [GetStatus.SIZE_MISMATCH] * 4


def test_rows_that_do_not_exist_or_do_not_lie_in_place_are_refused(make: Maker) -> None:
    pool = make()
    whole = _whole(4)
    with pytest.raises(ValueError, match="rows 2 to 4 of an array that has 4"):
        pool.put(_keys(3), ObjectRows(whole, [2, 3, 4]))
    with pytest.raises(ValueError, match="rows -1 to 0"):
        pool.get(_keys(2), ObjectRows(whole, [-1, 0]))
    with pytest.raises(ValueError, match="last axis is contiguous"):
        pool.put(_keys(1), ObjectRows(whole.view(np.uint16), [0]))
    with pytest.raises(ValueError, match="last axis is contiguous"):
        pool.put(_keys(1), ObjectRows(whole[:, :, ::2], [0]))
    whole.flags.writeable = False
    with pytest.raises(ValueError, match="can be written"):
        pool.get(_keys(1), ObjectRows(whole, [0]))
    assert pool.put(_keys(0), ObjectRows(whole, [])) == []


def _damage(pool: LocalPool, key: bytes) -> None:
    """Flip a bit of the copy in DRAM, through the memory that the pool offers to other processes."""
    loan = pool.lend([key])
    memory_of(pool)[loan.objects[0].page, 100] ^= 1
    loan.release()


def test_a_call_that_gets_no_thread_copies_alone_and_touches_nothing_later(
    make: Maker, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    pool, keys, whole = make(copy_threads=2), _keys(), _whole()
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        assert pool.put(keys, ObjectRows(whole, list(range(COUNT)))) == [PutStatus.STORED] * COUNT
        first = np.zeros((COUNT, SIZE), np.uint8)
        assert pool.get(keys, list(first)) == [GetStatus.DRAM] * COUNT
    assert np.array_equal(first.reshape(whole.shape), whole)
    first[:] = 7
    again = np.zeros_like(first)
    for _ in range(3):
        assert pool.get(keys, list(again)) == [GetStatus.DRAM] * COUNT
    assert np.array_equal(again, whole.reshape(COUNT, SIZE))
    assert np.all(first == 7), "the memory of a call that is over is the caller's again"


def test_what_a_helping_thread_raises_is_raised(make: Maker, monkeypatch: pytest.MonkeyPatch) -> None:
    mine = threading.current_thread()

    def copy(*arguments: object) -> bytes:
        if threading.current_thread() is not mine:
            helps.set()
            raise MemoryError("of a helper")
        assert helps.wait(60)
        return bytes(16)

    helps = threading.Event()
    pool = make(copy_threads=2)
    monkeypatch.setattr(copies, "copy_checksummed", copy)
    with pytest.raises(MemoryError, match="of a helper"):
        pool.put(_keys(), [bytes(SIZE)] * COUNT)


def test_what_nobody_copied_is_neither_stored_nor_a_hit(make: Maker, monkeypatch: pytest.MonkeyPatch) -> None:
    pool, keys, whole = make(), _keys(), _whole()
    with monkeypatch.context() as patch:
        patch.setattr(CopyShares, "run", lambda *arguments: None)
        assert pool.put(keys, ObjectRows(whole, range(COUNT))) == [PutStatus.TIMED_OUT] * COUNT
    assert pool.exists(keys) == [False] * COUNT
    assert pool.put(keys, ObjectRows(whole, range(COUNT))) == [PutStatus.STORED] * COUNT
    monkeypatch.setattr(CopyShares, "run", lambda *arguments: None)
    assert not any(status.hit for status in pool.get(keys, ObjectRows(np.zeros_like(whole), range(COUNT))))
