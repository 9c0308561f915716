"""A shared pool through its two doors: what a reader gets, and when it gets nothing."""

from __future__ import annotations

import mmap
import os
import socket
import stat
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.connectors.deadlines.kit import late
from tests.connectors.disk import Disk
from tests.connectors.later import pass_time
from tests.connectors.sharing.conftest import pinned
from tests.connectors.sharing.processes import IDENTITY, SIZE, key_of, object_of
from tests.connectors.waiting import PATIENCE, until
from umbp_connectors.pool.checksums import copy_checksummed
from umbp_connectors.pool.local import GetStatus, LocalPool, PutStatus
from umbp_connectors.pool.sharing import SharedPoolReader, SharedPoolServer, link, messages
from umbp_connectors.pool.sharing import reader as readers
from umbp_connectors.pool.sharing.link import Link, connect
from umbp_core.errors import ConfigError, StateError
from umbp_core.ids import Identity, RankScope
from umbp_core.tiers import Tier
from umbp_core.wire.frames import FrameType, encode_frame

Share = Callable[..., tuple[LocalPool, SharedPoolServer]]


def _get(reader: SharedPoolReader, numbers: list[int], timeout: float | None = None) -> list[GetStatus]:
    """Read, and compare what are hits."""
    buffers = [bytearray(SIZE) for _ in numbers]
    statuses = reader.get([key_of(number) for number in numbers], buffers, timeout)
    for number, buffer, status in zip(numbers, buffers, statuses, strict=True):
        assert not status.hit or buffer == object_of(number)
    return statuses


def _connect(path: Path) -> Link:
    return connect(path, IDENTITY.digest, wants_arena=True, deadline=time.monotonic() + 30)


def test_a_reader_gets_what_is_in_dram(share: Share, reader: SharedPoolReader) -> None:
    pool, _ = share(8)
    keys = [key_of(number) for number in range(10)]
    assert reader.exists(keys) == [True] * 8 + [False] * 2
    assert reader.count_prefix(keys) == 8
    assert reader.count_prefix(keys[9:]) == reader.count_prefix([]) == 0
    assert _get(reader, list(range(10))) == [GetStatus.DRAM] * 8 + [GetStatus.MISS] * 2
    assert _get(reader, []) == []
    until(lambda: pinned(pool) == 0)
    pool.put([key_of(9)], [object_of(9)])
    assert _get(reader, [9]) == [GetStatus.DRAM]
    assert reader.gets == {GetStatus.DRAM: 9, GetStatus.MISS: 2}
    assert reader.failed == 0


def test_more_objects_than_one_loan_holds(share: Share, reader: SharedPoolReader) -> None:
    share(50, max_readers=16)  # two objects to a loan
    assert _get(reader, list(range(60))) == [GetStatus.DRAM] * 50 + [GetStatus.MISS] * 10


def test_scattered_buffers_and_sizes(share: Share, reader: SharedPoolReader) -> None:
    share(2)
    rows = np.zeros((2, SIZE // 2 + 32), dtype=np.uint8)
    statuses = reader.get([key_of(0), key_of(1)], [rows[:, : SIZE // 2], bytearray(SIZE - 1)])
    assert statuses == [GetStatus.DRAM, GetStatus.SIZE_MISMATCH]
    assert rows[:, : SIZE // 2].tobytes() == object_of(0)
    assert not rows[:, SIZE // 2 :].any()
    with pytest.raises(ValueError, match="can be written"):
        reader.get([key_of(0)], [bytes(SIZE)])
    with pytest.raises(ValueError, match="as many buffers"):
        reader.get([key_of(0)], [])


def test_what_is_on_ssd_is_brought_to_dram_first(share: Share, reader: SharedPoolReader, tmp_path: Path) -> None:
    pool, _ = share(10, ssd=tmp_path / "ssd", pages=16)
    assert pool.flush(30)
    pool.put([b"other %d" % number for number in range(16)], [bytes(SIZE)] * 16)
    assert pool.flush(30)
    assert reader.count_prefix([key_of(number) for number in range(10)]) == 10
    assert _get(reader, list(range(4))) == [GetStatus.SSD] * 4
    assert _get(reader, list(range(4))) == [GetStatus.DRAM] * 4
    until(lambda: pinned(pool) == 0)
    ssd = pool.stats(Tier.SSD)
    assert ssd is not None
    assert ssd.pinned == 0


def test_a_disk_that_hangs_costs_what_is_on_it_only(
    share: Share, reader: SharedPoolReader, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = Disk(monkeypatch)
    pool, _ = share(2, ssd=tmp_path / "ssd", pages=16)
    assert pool.flush(30)
    pool.put([b"other %d" % number for number in range(16)], [bytes(SIZE)] * 16)
    pool.put([key_of(2)], [object_of(2)])
    assert pool.flush(30)
    disk.hang("read")
    with monkeypatch.context() as patch, late(disk):
        patch.setattr(link, "_SERVERS_PART", 0.01)  # of the time, so that the rest is enough for all else
        assert _get(reader, [0, 2], timeout=30) == [GetStatus.TIMED_OUT, GetStatus.DRAM]
    assert reader.failed == 0, "the server answered"
    disk.work()
    until(lambda: key_of(0) in pool.holdings()[Tier.DRAM])  # what the late read brings is kept
    assert _get(reader, [0, 1, 2]) == [GetStatus.DRAM, GetStatus.SSD, GetStatus.DRAM]


def test_no_time_at_all(share: Share, path: Path) -> None:
    share(2)
    reader = SharedPoolReader(path, IDENTITY, failures=100)
    assert _get(reader, [0, 1], timeout=0) == [GetStatus.TIMED_OUT] * 2
    assert reader.exists([key_of(0)], timeout=0) == [False]
    assert reader.count_prefix([key_of(0)], timeout=0) == 0
    assert reader.failed == 0, "which is nobody's fault"
    assert _get(reader, [0, 1], timeout=30) == [GetStatus.DRAM] * 2
    reader.close()


def test_bytes_that_changed_are_not_delivered_and_the_owner_forgets_them(
    share: Share, reader: SharedPoolReader
) -> None:
    pool, _ = share(3)
    pool._opened().arena.array[1, 7] ^= 1
    statuses = _get(reader, [0, 1, 2])
    assert sorted(status.value for status in statuses) == ["corrupt", "dram", "dram"]
    bad = statuses.index(GetStatus.CORRUPT)
    assert pool.exists([key_of(number) for number in range(3)]) == [number != bad for number in range(3)]
    assert _get(reader, [bad]) == [GetStatus.MISS]
    assert pool.put([key_of(bad)], [object_of(bad)]) == [PutStatus.STORED]
    assert _get(reader, [bad]) == [GetStatus.DRAM]


def test_a_reader_cannot_write_to_the_pool(share: Share, path: Path) -> None:
    share(1)
    link = _connect(path)
    assert not link.page(0, SIZE).flags.writeable
    link.close()
    greeting = messages.encode(messages.Greeting(messages.REVISION, IDENTITY.digest, wants_arena=True))
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.settimeout(60)
        sock.connect(str(path))
        sock.sendall(encode_frame(FrameType.HELLO, 0, 0, greeting))
        _, (fd,), _, _ = socket.recv_fds(sock, 65536, 2)
    with pytest.raises(PermissionError):
        mmap.mmap(fd, SIZE, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
    with pytest.raises(OSError, match="argument"):
        os.ftruncate(fd, 0)
    os.close(fd)


def test_a_loan_ends_with_its_lease(share: Share, path: Path, caplog: pytest.LogCaptureFixture) -> None:
    pool, _ = share(4, lease_s=0.05)
    link = _connect(path)
    assert len(link.borrow([key_of(0), key_of(1)], time.monotonic() + 30).places) == 2
    until(lambda: pinned(pool) == 0)
    assert "lease has ended" in caplog.text
    assert link.look_up([key_of(0)], False, time.monotonic() + 30).prefix == 1, "the connection goes on"
    link.close()


def test_a_loan_ends_with_the_next_request_and_with_the_connection(share: Share, path: Path) -> None:
    pool, server = share(4)
    link = _connect(path)
    link.borrow([key_of(0), key_of(1)], time.monotonic() + 30)
    assert pinned(pool) == 2
    link.borrow([key_of(2)], time.monotonic() + 30)
    assert pinned(pool) == 1
    link.close()
    until(lambda: pinned(pool) == 0)
    until(lambda: server.readers == 0)


def test_what_is_lent_is_not_evicted(share: Share, path: Path) -> None:
    pool, _ = share(8, pages=8, max_readers=1)
    link = _connect(path)
    lent = link.borrow([key_of(number) for number in range(4)], time.monotonic() + 30)
    for number in range(100, 140):
        pool.put([key_of(number)], [object_of(number)])
    for number, place in enumerate(lent.places):
        assert link.page(place.page, place.nbytes).tobytes() == object_of(number)
    link.close()


def test_another_pools_server_is_not_read(share: Share, path: Path, caplog: pytest.LogCaptureFixture) -> None:
    share(1)
    reader = SharedPoolReader(path, Identity("another", b"\x11" * 32, RankScope()), timeout_s=30.0)
    assert _get(reader, [0]) == [GetStatus.MISS]
    assert reader.exists([key_of(0)]) == [False]
    assert caplog.text.count("another model, layout or rank is shared here") == 1
    reader.close()


def test_too_many_readers_are_turned_away(share: Share, path: Path, caplog: pytest.LogCaptureFixture) -> None:
    _, server = share(1, max_readers=1)
    first, second = (SharedPoolReader(path, IDENTITY, timeout_s=30.0, failures=100) for _ in range(2))
    assert _get(first, [0]) == [GetStatus.DRAM]
    assert _get(second, [0]) == [GetStatus.MISS]
    assert "raise max_readers" in caplog.text
    first.close()
    until(lambda: server.readers == 0)
    assert _get(second, [0]) == [GetStatus.DRAM]
    second.close()


def test_only_this_user_can_reach_it(share: Share, path: Path, tmp_path: Path) -> None:
    pool, _ = share(1)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    (tmp_path / "open").mkdir(mode=0o755)
    with pytest.raises(ConfigError, match="entered by others"):
        SharedPoolServer(pool, tmp_path / "open" / "pool.sock").open()


def test_a_process_of_another_user_is_turned_away(
    share: Share, reader: SharedPoolReader, monkeypatch: pytest.MonkeyPatch
) -> None:
    share(1)
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    assert _get(reader, [0]) == [GetStatus.MISS]
    assert reader.failed == 1


def test_a_path_has_one_server(share: Share, path: Path, tmp_path: Path) -> None:
    pool, server = share(1)
    with pytest.raises(ConfigError, match="another process shares its pool"):
        SharedPoolServer(pool, path).open()
    with pytest.raises(StateError, match="shared already"):
        server.open()
    (path.parent / "file").write_text("mine")
    with pytest.raises(ConfigError, match="not a socket"):
        SharedPoolServer(pool, path.parent / "file").open()
    assert (path.parent / "file").read_text() == "mine"
    with pytest.raises(ConfigError, match="another path"):
        SharedPoolServer(pool, path.parent / ("long" * 40)).open()
    with pytest.raises(ConfigError, match="another path"):
        SharedPoolServer(pool, tmp_path / "no" / "such" / "folder").open()


def test_a_server_that_comes_later_or_again_is_found(share: Share, path: Path, reader: SharedPoolReader) -> None:
    assert _get(reader, [0]) == [GetStatus.MISS]
    _, server = share(1)
    assert _get(reader, [0]) == [GetStatus.DRAM]
    server.close()
    server.close()
    assert not path.exists()
    assert _get(reader, [0]) == [GetStatus.MISS]
    server.open()
    assert _get(reader, [0]) == [GetStatus.DRAM]


def test_a_pool_that_is_closed_is_a_miss(share: Share, reader: SharedPoolReader) -> None:
    pool, server = share(1)
    assert _get(reader, [0]) == [GetStatus.DRAM]
    pool.close()
    assert _get(reader, [0]) == [GetStatus.MISS]
    server.close()
    with pytest.raises(StateError, match="not open"):
        server.open()


def test_a_closed_reader_says_so(path: Path) -> None:
    reader = SharedPoolReader(path, IDENTITY)
    reader.close()
    reader.close()
    for call in (
        lambda: reader.exists([key_of(0)]),
        lambda: reader.count_prefix([key_of(0)]),
        lambda: reader.get([key_of(0)], [bytearray(1)]),
    ):
        with pytest.raises(StateError, match="closed"):
            call()


def test_a_server_that_is_missing_is_asked_now_and_then_only(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    reader = SharedPoolReader(path, IDENTITY, failures=2)
    for _ in range(20):
        assert reader.exists([key_of(0)]) == [False]
    assert 2 <= reader.failed < 20
    assert len(caplog.records) == 1
    reader.close()


def test_readers_beside_a_busy_writer_never_see_wrong_bytes(share: Share, path: Path, tmp_path: Path) -> None:
    pool, _ = share(10, ssd=tmp_path / "ssd", pages=24, max_readers=4)
    stop = threading.Event()
    hits: list[GetStatus] = []
    wrong: list[int] = []

    def read(seed: int) -> None:
        reader = SharedPoolReader(path, IDENTITY, timeout_s=30)
        order, turns, end = np.random.default_rng(seed), 0, time.monotonic() + PATIENCE
        while turns < 60 or (not {GetStatus.DRAM, GetStatus.SSD} <= set(hits) and time.monotonic() < end):
            turns += 1
            numbers = order.choice(60, 5, replace=False).tolist()
            buffers = [bytearray(SIZE) for _ in numbers]
            for number, buffer, status in zip(
                numbers, buffers, reader.get([key_of(number) for number in numbers], buffers), strict=True
            ):
                hits.append(status)
                if (status.hit and buffer != object_of(number)) or status is GetStatus.CORRUPT:
                    wrong.append(number)
        reader.close()

    def write() -> None:
        number = 0
        while not stop.is_set():
            number = (number + 7) % 60
            pool.put([key_of(number)], [object_of(number)])

    writer = threading.Thread(target=write)
    readers = [threading.Thread(target=read, args=(seed,)) for seed in range(2)]
    for thread in (writer, *readers):
        thread.start()
    for thread in readers:
        thread.join(120)
    stop.set()
    writer.join(60)
    assert not wrong
    assert len(hits) >= 600
    assert {GetStatus.DRAM, GetStatus.SSD} <= set(hits)
    until(lambda: pinned(pool) == 0)


def test_the_time_is_looked_at_before_each_object(
    share: Share, reader: SharedPoolReader, monkeypatch: pytest.MonkeyPatch
) -> None:
    share(2)
    with monkeypatch.context() as patch:

        def slow(*arguments: Any) -> bytes:
            pass_time(patch, 100.0, readers)
            return copy_checksummed(*arguments)

        assert _get(reader, [0, 1]) == [GetStatus.DRAM] * 2
        patch.setattr(readers, "copy_checksummed", slow)
        assert _get(reader, [0, 1], timeout=50) == [GetStatus.DRAM, GetStatus.TIMED_OUT]
    assert _get(reader, [0, 1]) == [GetStatus.DRAM] * 2
