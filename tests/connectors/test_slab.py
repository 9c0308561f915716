"""The slab file: real files, real errors."""

from __future__ import annotations

import errno
import mmap
import os
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from tests.connectors.gate import Gate
from umbp_connectors.pool.arena import Arena
from umbp_connectors.pool.slab import SlabFile
from umbp_core.errors import StateError, TierUnavailable, TransferError

SLOT = 8192


@pytest.fixture(params=[True, False], ids=["direct", "buffered"])
def slab(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[SlabFile]:
    slab = SlabFile(tmp_path / "slab.bin", SLOT, 16, direct_io=request.param)
    slab.open()
    yield slab
    slab.close()


@pytest.fixture
def arena() -> Iterator[Arena]:
    arena = Arena(SLOT, 4)
    arena.open()
    yield arena
    arena.close()


def _random(nbytes: int, seed: int = 0) -> bytes:
    return np.random.default_rng(seed).integers(0, 256, nbytes, dtype=np.uint8).tobytes()


def test_the_space_is_taken_at_once_and_exactly(slab: SlabFile) -> None:
    found = slab.path.stat()
    assert found.st_size == slab.nbytes == 16 * SLOT
    assert found.st_blocks * 512 >= slab.nbytes
    assert found.st_mode & 0o777 == 0o600


def test_pages_go_in_and_come_out(slab: SlabFile, arena: Arena) -> None:
    for slot in (0, 7, 15):
        arena.page(0)[:] = _random(SLOT, slot)
        slab.write_from(slot, arena.page(0))
    for slot in (15, 0, 7):
        slab.read_into(slot, arena.page(1))
        assert bytes(arena.page(1)) == _random(SLOT, slot)
    assert slab.path.stat().st_size == slab.nbytes


@pytest.mark.parametrize("nbytes", [1, 511, 512, 4095, 4096, 4097, SLOT - 1, SLOT])
def test_any_length_and_alignment(slab: SlabFile, nbytes: int) -> None:
    data = _random(nbytes, nbytes)
    slab.write_from(3, data)
    target = bytearray(nbytes + 1)
    slab.read_into(3, memoryview(target)[1:])
    assert target[1:] == data
    assert slab.path.stat().st_size == slab.nbytes


def test_neighbours_are_left_alone(slab: SlabFile) -> None:
    for slot in range(3):
        slab.write_from(slot, bytes([slot + 1]) * SLOT)
    slab.write_from(1, b"x")
    for slot in (0, 2):
        target = bytearray(SLOT)
        slab.read_into(slot, target)
        assert target == bytes([slot + 1]) * SLOT


@pytest.mark.parametrize("slot", [-1, 16])
def test_slots_that_do_not_exist(slab: SlabFile, slot: int) -> None:
    with pytest.raises(StateError, match="outside"):
        slab.read_into(slot, bytearray(8))
    with pytest.raises(StateError, match="outside"):
        slab.write_from(slot, b"data")


def test_more_than_a_slot_is_refused(slab: SlabFile) -> None:
    with pytest.raises(StateError, match="outside"):
        slab.write_from(0, bytes(SLOT + 1))
    with pytest.raises(StateError, match="read-only"):
        slab.read_into(0, bytes(8))


@pytest.mark.parametrize("geometry", [(4095, 1), (0, 1), (4096, 0)])
def test_geometry_is_checked(tmp_path: Path, geometry: tuple[int, int]) -> None:
    with pytest.raises(StateError, match="multiple of 4096"):
        SlabFile(tmp_path / "slab.bin", *geometry)


def test_reopening_keeps_the_content(slab: SlabFile) -> None:
    slab.write_from(5, b"kept")
    slab.sync()
    slab.close()
    slab.close()
    with pytest.raises(StateError, match="not open"):
        slab.read_into(5, bytearray(4))
    slab.open()
    target = bytearray(4)
    slab.read_into(5, target)
    assert target == b"kept"


@pytest.mark.parametrize("slots", [4, 40])
def test_another_capacity_keeps_what_fits(slab: SlabFile, slots: int) -> None:
    slab.write_from(3, b"kept")
    slab.close()
    other = SlabFile(slab.path, SLOT, slots)
    other.open()
    target = bytearray(4)
    other.read_into(3, target)
    assert target == b"kept"
    assert slab.path.stat().st_size == slots * SLOT
    other.close()


def test_read_only(slab: SlabFile) -> None:
    slab.write_from(1, b"data")
    reader = SlabFile(slab.path, SLOT, 16)
    reader.open(read_only=True)
    target = bytearray(4)
    reader.read_into(1, target)
    assert target == b"data"
    with pytest.raises(TransferError):
        reader.write_from(1, b"nope")
    reader.close()
    longer = SlabFile(slab.path, SLOT, 17)
    with pytest.raises(TierUnavailable, match="instead of"):
        longer.open(read_only=True)


@pytest.mark.statement("connector", 55)
def test_a_full_disk_is_one_sentence_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(fd: int, offset: int, length: int) -> None:
        os.pwrite(fd, b"\0", length // 2)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    path = tmp_path / "slab.bin"
    with pytest.raises(TierUnavailable, match=r"No space left on device.*set a smaller SSD capacity"):
        SlabFile(path, SLOT, 100).open()
    assert not path.exists()


def test_a_disk_too_full_to_grow_keeps_the_old_file(slab: SlabFile, monkeypatch: pytest.MonkeyPatch) -> None:
    slab.write_from(3, b"kept")
    slab.close()

    def full(fd: int, offset: int, length: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(TierUnavailable):
        SlabFile(slab.path, SLOT, 1000).open()
    assert slab.path.stat().st_size == 16 * SLOT


def test_a_file_size_limit_is_the_same_as_a_full_disk(tmp_path: Path) -> None:
    script = """
        import resource, sys
        from umbp_connectors.pool.slab import SlabFile
        from umbp_core.errors import TierUnavailable
        resource.setrlimit(resource.RLIMIT_FSIZE, (65536, 65536))
        try:
            SlabFile(sys.argv[1], 8192, 100).open()
        except TierUnavailable as error:
            print(error)
    """
    path = tmp_path / "slab.bin"
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(part for part in sys.path if part)}
    command = [sys.executable, "-c", textwrap.dedent(script), str(path)]
    done = subprocess.run(command, check=True, timeout=60, env=env, capture_output=True, text=True)
    assert "File too large" in done.stdout
    assert "set a smaller SSD capacity" in done.stdout
    assert not path.exists()


@pytest.mark.parametrize("kind", ["folder", "link", "fifo", "missing"])
def test_what_is_not_a_plain_file_is_refused(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "slab.bin"
    if kind == "folder":
        path.mkdir()
    elif kind == "link":
        (tmp_path / "target").write_bytes(b"precious")
        path.symlink_to(tmp_path / "target")
    elif kind == "fifo":
        os.mkfifo(path)
    else:
        path = tmp_path / "nowhere" / "slab.bin"
    with pytest.raises(TierUnavailable):
        SlabFile(path, SLOT, 4).open()
    if kind == "link":
        assert (tmp_path / "target").read_bytes() == b"precious"


def test_a_file_that_was_shortened_is_a_transfer_error(slab: SlabFile) -> None:
    os.truncate(slab.path, 4 * SLOT)
    with pytest.raises(TransferError, match="shortened"):
        slab.read_into(9, bytearray(100))


@pytest.mark.parametrize(
    ("number", "kind"), [(errno.EIO, TransferError), (errno.ENOSPC, TierUnavailable), (errno.EROFS, TierUnavailable)]
)
@pytest.mark.statement("connector", 55)
def test_errors_of_the_disk_are_typed(
    slab: SlabFile, monkeypatch: pytest.MonkeyPatch, number: int, kind: type[Exception]
) -> None:
    def broken(*_: object) -> int:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "pwritev", broken)
    monkeypatch.setattr(os, "preadv", broken)
    monkeypatch.setattr(os, "fdatasync", broken)
    for action in (
        lambda: slab.write_from(2, b"data"),
        lambda: slab.read_into(2, bytearray(4)),
        slab.sync,
    ):
        with pytest.raises(kind, match=str(slab.path)):
            action()


@pytest.mark.statement("connector", 55)
def test_short_transfers_are_continued(slab: SlabFile, arena: Arena, monkeypatch: pytest.MonkeyPatch) -> None:
    read, write = os.preadv, os.pwritev
    step = 4096 if slab.direct else 1000
    calls = []

    def little(real: object, fd: int, views: list[memoryview], offset: int, *flags: int) -> int:
        calls.append(offset)
        return real(fd, [views[0][:step]], offset, *flags)  # type: ignore[operator]

    monkeypatch.setattr(os, "pwritev", lambda *arguments: little(write, *arguments))
    monkeypatch.setattr(os, "preadv", lambda *arguments: little(read, *arguments))
    arena.page(0)[:] = _random(SLOT)
    slab.write_from(2, arena.page(0))
    slab.read_into(2, arena.page(1))
    assert bytes(arena.page(1)) == _random(SLOT)
    assert len(calls) == 2 * -(-SLOT // step)


@pytest.mark.parametrize("most", [1 << 30, 3 * SLOT, 2 * SLOT + 4096, 4096])
def test_neighbours_are_written_in_one_go(
    slab: SlabFile, arena: Arena, monkeypatch: pytest.MonkeyPatch, most: int
) -> None:
    """Also when the disk takes less of it at once."""
    calls: list[int] = []
    real = os.pwritev

    def short(fd: int, views: list[memoryview], offset: int, flags: int) -> int:
        calls.append(len(views))
        whole = b"".join(views)[:most]
        buffer = mmap.mmap(-1, len(whole))
        buffer[:] = whole
        return real(fd, [memoryview(buffer)], offset, flags)

    for page, number in enumerate((3, 1, 0, 2)):
        arena.page(page)[:] = _random(SLOT, number)
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwritev", short)
        slab.write_run(12, [arena.page(2), arena.page(1), arena.page(3), arena.page(0)])
    assert calls[0] == 4
    assert len(calls) == 1 or most < 4 * SLOT
    found = bytearray(SLOT)
    for number in range(4):
        slab.read_into(12 + number, found)
        assert found == _random(SLOT, number)


@pytest.mark.parametrize("most", [1 << 30, 3 * SLOT, 2 * SLOT + 4096, 4096])
def test_neighbours_are_read_in_one_go(
    slab: SlabFile, arena: Arena, monkeypatch: pytest.MonkeyPatch, most: int
) -> None:
    """Also when the disk gives less of it at once."""
    calls: list[int] = []
    real = os.preadv

    def short(fd: int, views: list[memoryview], offset: int) -> int:
        calls.append(len(views))
        buffer = mmap.mmap(-1, min(most, sum(view.nbytes for view in views)))
        count = real(fd, [memoryview(buffer)], offset)
        left = memoryview(buffer)[:count]
        for view in views:
            part = left[: view.nbytes]
            view[: part.nbytes] = part
            left = left[part.nbytes :]
        return count

    for number in range(4):
        slab.write_from(12 + number, _random(SLOT, number))
    with monkeypatch.context() as patch:
        patch.setattr(os, "preadv", short)
        slab.read_run(12, [arena.page(page) for page in (2, 1, 3, 0)])
    assert calls[0] == 4
    assert len(calls) == 1 or most < 4 * SLOT
    for page, number in ((2, 0), (1, 1), (3, 2), (0, 3)):
        assert bytes(arena.page(page)) == _random(SLOT, number)


def test_a_run_of_slots_is_full_and_exists(slab: SlabFile) -> None:
    whole = bytes(SLOT)
    slab.write_run(3, [whole])
    slab.write_run(14, [_random(SLOT, 1), _random(SLOT, 2)])
    found = bytearray(SLOT)
    slab.read_into(15, found)
    assert found == _random(SLOT, 2), "memory that lies anywhere"
    for slot, views in ((13, [whole] * 4), (-1, [whole] * 2), (0, [whole, whole[1:]]), (0, [whole, whole + b"x"])):
        with pytest.raises(StateError):
            slab.write_run(slot, views)
        with pytest.raises(StateError):
            slab.read_run(slot, [bytearray(view) for view in views])
    slab.read_into(15, found)
    assert found == _random(SLOT, 2)
    pair = [bytearray(SLOT), bytearray(SLOT)]
    slab.read_run(14, pair)
    assert pair == [_random(SLOT, 1), _random(SLOT, 2)], "memory that lies anywhere"
    with pytest.raises(StateError):
        slab.read_run(14, [bytes(SLOT), bytes(SLOT)])


def test_direct_io_that_stops_in_the_middle_of_a_sector(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slab = SlabFile(tmp_path / "slab.bin", SLOT, 4)
    slab.open()
    assert slab.direct, "the tests need a file system with direct I/O"
    monkeypatch.setattr(os, "preadv", lambda *_: 100)
    with pytest.raises(TransferError, match="100 of 4096"):
        slab.read_into(0, bytearray(4096))
    slab.close()


@pytest.mark.statement("connector", 55)
def test_a_file_system_without_direct_io(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = os.open

    def no_direct(path: object, flags: int, mode: int = 0o777) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return opened(path, flags, mode)  # type: ignore[call-overload]

    monkeypatch.setattr(os, "open", no_direct)
    slab = SlabFile(tmp_path / "slab.bin", SLOT, 4)
    slab.open()
    assert not slab.direct
    slab.write_from(0, b"data")
    target = bytearray(4)
    slab.read_into(0, target)
    assert target == b"data"
    slab.close()


def test_probing_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "slab.bin"
    path.write_bytes(_random(2 * SLOT))
    slab = SlabFile(path, SLOT, 2)
    slab.open()
    slab.close()
    assert path.read_bytes() == _random(2 * SLOT)


def test_close_waits_for_transfers_and_refuses_new_ones(slab: SlabFile, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(os.preadv)
    monkeypatch.setattr(os, "preadv", gate)
    target = bytearray(8)
    reader = threading.Thread(target=slab.read_into, args=(0, target))
    reader.start()
    gate.wait_until_held()
    waiting, wait_for = threading.Event(), slab._guard.wait_for

    def announce(condition: Callable[[], bool], timeout: float) -> bool:
        waiting.set()
        return wait_for(condition, timeout)

    monkeypatch.setattr(slab._guard, "wait_for", announce)
    closer = threading.Thread(target=slab.close, args=(60,))
    closer.start()
    assert waiting.wait(60)
    with pytest.raises(StateError, match="not open"):
        slab.read_into(1, bytearray(8))
    assert closer.is_alive()
    gate.open()
    reader.join(60)
    closer.join(60)
    assert not reader.is_alive()
    assert not closer.is_alive()


def test_a_disk_that_does_not_answer_does_not_hold_up_a_close(
    slab: SlabFile, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    gate = Gate(os.preadv)
    monkeypatch.setattr(os, "preadv", gate)
    reader = threading.Thread(target=slab.read_into, args=(0, bytearray(8)))
    reader.start()
    gate.wait_until_held()
    slab.close(timeout=0)
    assert "the disk does not answer" in caplog.text
    gate.open()
    reader.join(60)
    slab.close()
    with pytest.raises(StateError, match="not open"):
        slab.sync()


def test_many_threads_at_once(slab: SlabFile) -> None:
    failures: list[int] = []

    def work(slot: int) -> None:
        target = bytearray(SLOT - 7)
        for turn in range(20):
            data = _random(SLOT - 7, slot * 100 + turn)
            slab.write_from(slot, data)
            slab.read_into(slot, target)
            if target != data:
                failures.append(slot)

    threads = [threading.Thread(target=work, args=(slot,)) for slot in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not failures
