"""A folder that becomes read-only, disappears, or is full: the pool goes on, and a restart serves what verifies."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import shutil
import sqlite3
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.connectors.disk import Disk, FullDisk
from tests.connectors.waiting import until
from umbp_connectors.pool import local
from umbp_connectors.pool.local import GetStatus, LocalPool, LocalPoolConfig, PutStatus
from umbp_connectors.pool.slab import SlabFile
from umbp_core.errors import TierUnavailable
from umbp_core.ids import Identity, RankScope
from umbp_core.testing.fakes import FakeClock
from umbp_core.tiers import Tier

SIZE = 8192
KEYS = [b"key %d" % number for number in range(12)]
Maker = Callable[..., LocalPool]


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def make(tmp_path: Path, clock: FakeClock, monkeypatch: pytest.MonkeyPatch) -> Iterator[Maker]:
    made: list[LocalPool] = []
    monkeypatch.setattr(local, "_FORGET_S", 60.0)

    def make(pages: int = 4, **options: object) -> LocalPool:
        sizes = (SIZE, pages * SIZE, tmp_path / "ssd", (1 << 20) + 30 * (SIZE + 768))
        config = LocalPoolConfig(*sizes, prefault=False, patience_s=0, **options)  # type: ignore[arg-type]
        made.append(LocalPool(Identity("model", b"\x11" * 32, RankScope()), config, clock))
        made[-1].open()
        return made[-1]

    yield make
    for pool in made:
        pool.close()


def object_of(key: bytes) -> bytes:
    return (key * SIZE)[:SIZE]


def fill(pool: LocalPool, keys: list[bytes]) -> None:
    for start in range(0, len(keys), 4):
        part = keys[start : start + 4]
        assert pool.put(part, [object_of(key) for key in part]) == [PutStatus.STORED] * len(part)
        assert pool.flush(30)


def read(pool: LocalPool, keys: list[bytes]) -> list[GetStatus]:
    buffers = [bytearray(SIZE) for _ in keys]
    statuses = pool.get(keys, buffers)
    assert all(buffer == object_of(key) for key, buffer, s in zip(keys, buffers, statuses, strict=True) if s.hit)
    return statuses


def test_a_folder_that_disappears_costs_nothing_until_the_restart(make: Maker, tmp_path: Path) -> None:
    pool = make()
    fill(pool, KEYS[:8])
    shutil.rmtree(tmp_path / "ssd")
    assert all(status.hit for status in read(pool, KEYS[:8]))
    fill(pool, KEYS[8:])
    assert all(status.hit for status in read(pool, KEYS))
    pool.close()
    pool = make()
    assert pool.stats(Tier.SSD) is not None
    assert read(pool, KEYS) == [GetStatus.MISS] * 12
    fill(pool, KEYS)
    assert all(status.hit for status in read(pool, KEYS))


def test_what_was_cleared_is_not_found_after_a_kill(make: Maker, tmp_path: Path) -> None:
    pool = make()
    fill(pool, KEYS)
    assert pool.clear() > 12
    shutil.copytree(tmp_path / "ssd", tmp_path / "killed")  # what a kill would leave behind, here and now
    pool.close()
    shutil.rmtree(tmp_path / "ssd")
    shutil.move(tmp_path / "killed", tmp_path / "ssd")
    assert read(make(), KEYS) == [GetStatus.MISS] * 12


def test_a_disk_that_does_not_take_the_clearing_is_told_of(make: Maker, monkeypatch: pytest.MonkeyPatch) -> None:
    pool = make()
    fill(pool, KEYS)
    with monkeypatch.context() as patch:
        FullDisk(patch).full = True
        with pytest.raises(TierUnavailable, match="did not take"):
            pool.clear()
        assert read(pool, KEYS) == [GetStatus.MISS] * 12
    assert pool.clear() == 0, "now it does"
    pool.close()
    assert read(make(), KEYS) == [GetStatus.MISS] * 12


def test_what_is_on_an_ssd_that_is_off_cannot_be_cleared(make: Maker) -> None:
    first = make()
    fill(first, KEYS)
    second = make()
    fill(second, KEYS[:4])
    with pytest.raises(TierUnavailable, match="was not forgotten"):
        second.clear()
    assert read(second, KEYS) == [GetStatus.MISS] * 12


def test_an_ssd_that_never_was_has_nothing_to_clear(make: Maker, tmp_path: Path) -> None:
    (tmp_path / "ssd").write_bytes(b"no folder")
    pool = make()
    assert pool.put(KEYS[:2], [object_of(key) for key in KEYS[:2]]) == [PutStatus.STORED] * 2
    assert pool.stats(Tier.SSD) is None
    assert pool.clear() == 2


def test_a_flush_that_leaves_something_behind_says_so(make: Maker, monkeypatch: pytest.MonkeyPatch) -> None:
    pool = make()
    with monkeypatch.context() as patch:
        Disk(patch).fail("write", number=errno.EIO)
        assert pool.put(KEYS[:4], [object_of(key) for key in KEYS[:4]]) == [PutStatus.STORED] * 4
        assert not pool.flush(30)
        assert pool.flush(30), "nothing else was lost since"


def test_a_damaged_catalogue_costs_no_object_that_it_still_tells_of(
    make: Maker, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pool = make()
    fill(pool, KEYS)
    pool.close()
    (catalogue,) = (tmp_path / "ssd").rglob("catalogue-*.sqlite")
    with contextlib.closing(sqlite3.connect(catalogue)) as connection:
        ((root,),) = connection.execute("SELECT rootpage FROM sqlite_master WHERE name LIKE '%objects_2'").fetchall()
    with catalogue.open("r+b") as file:
        file.seek((root - 1) * 4096)
        file.write(bytes(4096))
    with caplog.at_level(logging.WARNING):
        assert read(make(), KEYS) == [GetStatus.SSD] * 12
    assert "the SSD tier starts with the 12 objects" in caplog.text


@pytest.mark.parametrize("number", [errno.EROFS, errno.ENOSPC, errno.EIO])
def test_a_disk_that_takes_nothing_more_still_gives(
    make: Maker, monkeypatch: pytest.MonkeyPatch, number: int, clock: FakeClock
) -> None:
    pool = make()
    fill(pool, KEYS[:8])
    with monkeypatch.context() as patch:
        Disk(patch).fail("write", "sync", number=number)
        assert pool.put(KEYS[8:], [object_of(key) for key in KEYS[8:]]) == [PutStatus.STORED] * 4
        pool.flush(30)
        assert read(pool, KEYS[8:]) == [GetStatus.DRAM] * 4
        assert read(pool, KEYS[:4]) == [GetStatus.SSD] * 4
    pool.close()
    assert read(make(), KEYS[:8]) == [GetStatus.SSD] * 8


def test_a_flush_says_that_the_disk_did_not_sync(make: Maker, monkeypatch: pytest.MonkeyPatch) -> None:
    pool = make(durability="relaxed")
    with monkeypatch.context() as patch:
        Disk(patch).fail("sync", number=errno.EIO)
        assert pool.put(KEYS[:1], [object_of(KEYS[0])]) == [PutStatus.STORED]
        assert not pool.flush(30)
    assert pool.flush(30)


def test_a_flush_says_that_a_sync_in_the_background_failed(
    make: Maker, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The system says so once, to whoever syncs first: here that is nobody who waits."""
    pool = make(durability="batched")
    other = pool.flush_mark()
    with monkeypatch.context() as patch, caplog.at_level(logging.WARNING):
        Disk(patch).fail("sync", number=errno.EIO)
        assert pool.put(KEYS[:1], [object_of(KEYS[0])]) == [PutStatus.STORED]
        until(lambda: "may not survive a power failure" in caplog.text)
    later = pool.flush_mark()
    assert [pool.flush(30) for _ in range(2)] == [False, True]
    assert [pool.flush(30, other) for _ in range(2)] == [False, True], "everybody is told"
    assert [pool.flush(30, later) for _ in range(2)] == [False, True], "nobody knew it then"
    assert pool.flush(30, pool.flush_mark())


@pytest.mark.parametrize("kind", ["write", "sync"])
def test_each_who_flushes_is_told_what_the_disk_refused(
    make: Maker, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    pool = make(durability="relaxed")
    other = pool.flush_mark()
    with monkeypatch.context() as patch:
        Disk(patch).fail(kind, number=errno.EIO)
        assert pool.put(KEYS[:1], [object_of(KEYS[0])]) == [PutStatus.STORED]
        assert not pool.flush(30)
    assert pool.flush(30, pool.flush_mark()), "what was lost before it came is not its own"
    assert [pool.flush(30, other) for _ in range(2)] == [False, True]
    assert pool.flush(30)


def test_a_start_on_a_read_only_file_system_goes_on_without_it(
    make: Maker, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    fill(make(), KEYS[:4])
    real = os.open

    def refusing(path: Any, flags: int, *rest: int, **options: Any) -> int:
        if str(path).startswith(str(tmp_path)) and flags & (os.O_RDWR | os.O_WRONLY | os.O_CREAT):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        return real(path, flags, *rest, **options)

    with monkeypatch.context() as patch, caplog.at_level(logging.WARNING):
        patch.setattr(os, "open", refusing)
        pool = make()
        assert pool.stats(Tier.SSD) is None
        assert pool.put(KEYS[4:8], [object_of(key) for key in KEYS[4:8]]) == [PutStatus.STORED] * 4
        assert pool.flush(1)
    assert caplog.text.count("the SSD tier is off") == 1


def test_a_reader_beside_the_writer_sees_what_is_written(make: Maker, tmp_path: Path) -> None:
    pool = make()
    fill(pool, KEYS[:4])
    (path,) = tmp_path.rglob("slab-*.bin")
    reader = SlabFile(path, SIZE, 4)
    reader.open(read_only=True)
    whole = bytearray(4 * SIZE)
    for slot in range(4):
        reader.read_into(slot, memoryview(whole)[slot * SIZE : (slot + 1) * SIZE])
    assert sorted(bytes(whole[at : at + SIZE]) for at in range(0, 4 * SIZE, SIZE)) == sorted(map(object_of, KEYS[:4]))
    reader.close()


def test_threads_that_work_while_the_disk_comes_and_goes(
    make: Maker, monkeypatch: pytest.MonkeyPatch, clock: FakeClock
) -> None:
    """Whatever the disk does, a hit is right and nobody sees an exception."""
    pool = make(pages=8, ssd_retry_s=0.001)
    disk = Disk(monkeypatch)
    problems: list[object] = []
    stop = threading.Event()

    def work(offset: int) -> None:
        turn = 0
        while not stop.is_set():
            keys = [b"%d of %d" % (turn % 30 + step, offset) for step in range(3)]
            turn += 1
            pool.put(keys, [object_of(key) for key in keys], timeout=10)
            buffers = [bytearray(SIZE) for _ in keys]
            statuses = pool.get(keys, buffers, timeout=10)
            triples = zip(keys, buffers, statuses, strict=True)
            problems.extend(key for key, buffer, status in triples if status.hit and buffer != object_of(key))

    threads = [threading.Thread(target=work, args=(offset,)) for offset in range(3)]
    for thread in threads:
        thread.start()
    pause = threading.Event()
    for number in (errno.EIO, errno.ENOSPC, errno.EROFS) * 3:
        disk.fail("read", "write", number=number)
        pause.wait(0.05)
        clock.advance(100)
        disk.work()
        pause.wait(0.05)
    stop.set()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads)
    assert problems == []
    clock.advance(100)
    pool.flush(30)  # says what was lost meanwhile
    fill(pool, KEYS[:4])
    assert set(KEYS[:4]) <= set(pool.holdings()[Tier.SSD]), "it is used again"


def test_several_transfers_are_in_flight_at_once(make: Maker, monkeypatch: pytest.MonkeyPatch) -> None:
    pool = make(pages=8, io_threads=5, demote_threads=3)
    disk = Disk(monkeypatch)
    disk.hang("write")
    assert pool.put(KEYS[:6], [object_of(key) for key in KEYS[:6]]) == [PutStatus.STORED] * 6
    disk.wait_held(3)
    disk.work()
    assert pool.flush(30)
    fill(pool, KEYS[6:10])
    fill(pool, [b"other %d" % number for number in range(8)])
    disk.hang("read")
    reader = threading.Thread(target=read, args=(pool, KEYS[:8]))
    reader.start()
    disk.wait_held(5)
    disk.work()
    reader.join(30)
    assert not reader.is_alive()
    assert read(pool, KEYS[:1])[0].hit


@pytest.mark.parametrize("forget", [LocalPool.clear, lambda pool: pool.evict(KEYS[:1])], ids=["clear", "evict"])
def test_what_is_stored_again_while_it_is_written_comes_to_ssd(
    make: Maker, monkeypatch: pytest.MonkeyPatch, forget: Callable[[LocalPool], int]
) -> None:
    pool = make(demote_threads=2)
    disk = Disk(monkeypatch)
    disk.hang("write")
    assert pool.put(KEYS[:1], [object_of(KEYS[0])]) == [PutStatus.STORED]
    disk.wait_held(1)
    assert forget(pool) == 1
    assert pool.put(KEYS[:2], [object_of(key) for key in KEYS[:2]]) == [PutStatus.STORED] * 2
    disk.wait_held(2)
    disk.work()
    assert pool.flush(30)
    assert sorted(pool.holdings()[Tier.SSD]) == KEYS[:2]
    pool.close()
    assert read(make(), KEYS[:2]) == [GetStatus.SSD] * 2
