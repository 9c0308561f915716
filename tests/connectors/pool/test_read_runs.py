"""Neighbours come from SSD in one read, each verified and given back by itself, while others are copied."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing
from pathlib import Path

import numpy as np
import pytest

from tests.connectors.disk import Disk
from umbp_connectors.pool import loads
from umbp_connectors.pool.local import GetStatus, LocalPool, LocalPoolConfig, PutStatus
from umbp_core.ids import Identity, RankScope

SIZE = 8192
KEYS = [b"object %02d" % number for number in range(32)]

Maker = Callable[..., LocalPool]


def object_of(key: bytes) -> bytes:
    return np.random.default_rng(list(key)).bytes(SIZE)


def read(pool: LocalPool, keys: Sequence[bytes]) -> list[GetStatus]:
    """What became of each; what came is right."""
    buffers = [bytearray(SIZE) for _ in keys]
    statuses = pool.get(keys, buffers)
    for key, buffer, status in zip(keys, buffers, statuses, strict=True):
        assert not status.hit or buffer == object_of(key)
    return statuses


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Maker]:
    """Opens a pool that has all ``KEYS`` on SSD only, in neighbouring slots."""
    with ExitStack() as stack:

        def make(pages: int = 64, **options: object) -> LocalPool:
            def opened(**more: object) -> LocalPool:
                config = LocalPoolConfig(
                    SIZE, pages * SIZE, tmp_path / "ssd", 2 << 20, prefault=False, **{**options, **more}
                )
                pool = LocalPool(Identity("model", b"\x11" * 32, RankScope()), config)
                pool.open()
                return pool

            with closing(opened(demote_threads=1)) as pool:
                for key in KEYS:
                    assert pool.put([key], [object_of(key)]) == [PutStatus.STORED]
                    assert pool.flush(30)
            pool = opened()
            stack.enter_context(closing(pool))
            return pool

        yield make


def test_neighbours_are_read_in_one_go(make: Maker, monkeypatch: pytest.MonkeyPatch) -> None:
    pool, real = make(io_threads=2), os.preadv
    runs: list[int] = []

    def noted(fd: int, views: Sequence[memoryview], offset: int) -> int:
        runs.append(len(views))
        return real(fd, views, offset)

    monkeypatch.setattr(os, "preadv", noted)
    assert read(pool, KEYS[::-1]) == [GetStatus.SSD] * len(KEYS)
    assert runs == [8] * 4, "an eighth of the pages, in the order of the slots"
    assert read(pool, KEYS) == [GetStatus.DRAM] * len(KEYS)


def test_small_batches_are_divided_among_the_threads(make: Maker, monkeypatch: pytest.MonkeyPatch) -> None:
    pool = make(io_threads=4)
    with Disk(monkeypatch) as disk:
        disk.hang("read")
        reader = threading.Thread(target=read, args=(pool, KEYS[:8]))
        reader.start()
        disk.wait_held(4)
        disk.work()
        reader.join(60)
    assert read(pool, KEYS[:8]) == [GetStatus.DRAM] * 8


@pytest.mark.parametrize("bad", [0, 3, 7])
def test_a_sector_that_cannot_be_read_costs_its_object(make: Maker, monkeypatch: pytest.MonkeyPatch, bad: int) -> None:
    pool, real = make(io_threads=2), os.preadv

    def broken(fd: int, views: Sequence[memoryview], offset: int) -> int:
        if offset <= bad * SIZE < offset + sum(view.nbytes for view in views):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(fd, views, offset)

    monkeypatch.setattr(os, "preadv", broken)
    statuses = read(pool, KEYS)
    assert [number for number, status in enumerate(statuses) if status is not GetStatus.SSD] == [bad]
    assert statuses[bad] is GetStatus.CORRUPT
    assert pool.exists(KEYS) == [number != bad for number in range(len(KEYS))]


def test_a_flipped_bit_costs_its_object(make: Maker, tmp_path: Path) -> None:
    pool, flipped = make(io_threads=2), 5
    slab = max((path for path in tmp_path.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    with slab.open("r+b") as file:
        whole = file.read()
        place = whole.index(object_of(KEYS[flipped])) + SIZE // 2
        file.seek(place)
        file.write(bytes([whole[place] ^ 1]))
    statuses = read(pool, KEYS)
    assert statuses == [GetStatus.CORRUPT if n == flipped else GetStatus.SSD for n in range(len(KEYS))]


def test_no_more_reads_at_once_than_configured(make: Maker, monkeypatch: pytest.MonkeyPatch) -> None:
    """The threads beside copy; they never make the disk's queue deeper."""
    pool = make(io_threads=2, copy_threads=3, ssd_timeout_s=60.0)
    with Disk(monkeypatch) as disk:
        disk.hang("read")
        reader = threading.Thread(target=read, args=(pool, KEYS))
        reader.start()
        disk.wait_held(2)
        assert not disk.holds(3, 0.2)
        disk.work()
        reader.join(60)
    assert not reader.is_alive()


def test_the_disk_does_not_wait_for_copies(make: Maker, monkeypatch: pytest.MonkeyPatch) -> None:
    """With one read at a time, the second begins while the first object is on its way to the caller."""
    pool = make(pages=4, io_threads=1, copy_threads=1)
    real, copy = os.preadv, loads.copy_checksummed
    reads, seen, second = [0], [False], threading.Event()

    def noted(fd: int, views: Sequence[memoryview], offset: int) -> int:
        reads[0] += 1
        if reads[0] == 2:
            second.set()
        return real(fd, views, offset)

    def slow(prefix: bytes, target: object, source: object) -> bytes:
        seen[0] = second.wait(30)
        return copy(prefix, target, source)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "preadv", noted)
    monkeypatch.setattr(loads, "copy_checksummed", slow)
    assert read(pool, KEYS[:2]) == [GetStatus.SSD] * 2
    assert (seen[0], reads[0]) == (True, 2)
