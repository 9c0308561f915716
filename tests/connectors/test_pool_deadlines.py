"""Calls with a time of their own, over a disk that hangs."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.connectors.disk import Disk
from umbp_connectors.pool import loads
from umbp_connectors.pool.checksums import copy_checksummed
from umbp_connectors.pool.local import GetStatus, LocalPool, LocalPoolConfig, PutStatus
from umbp_core.ids import Identity, RankScope
from umbp_core.testing.fakes import FakeClock
from umbp_core.tiers import Tier

SIZE = 8192
SHORT = 0.05
"""Seconds: for calls that are to run out of time."""
COLD = [b"cold %d" % number for number in range(6)]
WARM = [b"warm %d" % number for number in range(2)]


def _object(key: bytes) -> bytes:
    return (key * SIZE)[:SIZE]


def _buffers(keys: list[bytes]) -> list[bytearray]:
    return [bytearray(SIZE) for _ in keys]


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[Disk]:
    disk = Disk(monkeypatch)
    yield disk
    disk.work()
    disk.wait_free()


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def make(disk: Disk, clock: FakeClock, tmp_path: Path) -> Iterator[Callable[..., LocalPool]]:
    """Opens a pool with ``COLD`` on SSD only and ``WARM`` in DRAM."""
    made: list[LocalPool] = []

    def make(pages: int = 16, **options: object) -> LocalPool:
        for cold in (True, False):
            config = LocalPoolConfig(
                SIZE,
                (16 if cold else pages) * SIZE,
                tmp_path / "ssd",
                (1 << 20) + 40 * (SIZE + 768),
                prefault=False,
                patience_s=0,
                **options,  # type: ignore[arg-type]
            )
            made.append(LocalPool(Identity("model", b"\x11" * 32, RankScope()), config, clock))
            made[-1].open()
            keys = COLD if cold else WARM
            assert made[-1].put(keys, [_object(key) for key in keys]) == [PutStatus.STORED] * len(keys)
            assert made[-1].flush(30)
            if cold:
                made[-1].close()
        return made[-1]

    yield make
    disk.work()
    for pool in made:
        pool.close()


def _check_hits(pool: LocalPool, keys: list[bytes]) -> None:
    buffers = _buffers(keys)
    assert all(status.hit for status in pool.get(keys, buffers, timeout=60))
    assert buffers == [_object(key) for key in keys]


def _stats(pool: LocalPool, tier: Tier) -> tuple[int, int]:
    stats = pool.stats(tier)
    assert stats is not None
    return stats.pinned, stats.reserved


def _remembered() -> int:
    """How many loads anybody still knows of."""
    gc.collect()
    return sum(isinstance(each, loads.Load) for each in gc.get_objects())


def test_no_time_at_all(make: Callable[..., LocalPool]) -> None:
    pool = make()
    assert pool.put([b"new", WARM[0]], [b"data", b"data"], timeout=0) == [PutStatus.TIMED_OUT] * 2
    assert pool.get([*WARM, *COLD], _buffers(WARM + COLD), timeout=0) == [GetStatus.TIMED_OUT] * 8
    assert pool.exists([b"new", *WARM, *COLD]) == [False] + [True] * 8
    counters = pool.counters()
    assert (counters.puts[PutStatus.TIMED_OUT], counters.gets[GetStatus.TIMED_OUT]) == (2, 8)
    assert (_stats(pool, Tier.DRAM), _stats(pool, Tier.SSD)) == ((0, 0), (0, 0))
    _check_hits(pool, WARM + COLD)


@pytest.mark.parametrize("timeout", [None, 60.0])
def test_enough_time(make: Callable[..., LocalPool], timeout: float | None) -> None:
    pool = make()
    assert pool.put([b"new"], [b"data"], timeout=timeout) == [PutStatus.STORED]
    buffers = _buffers(WARM + COLD)
    assert pool.get(WARM + COLD, buffers, timeout=timeout) == [GetStatus.DRAM] * 2 + [GetStatus.SSD] * 6
    assert buffers == [_object(key) for key in WARM + COLD]


def test_a_disk_that_hangs_costs_what_is_on_it_only(make: Callable[..., LocalPool], disk: Disk) -> None:
    pool = make(io_threads=2)
    disk.hang("read", "write")
    buffers = _buffers(WARM + COLD)
    assert pool.get(WARM + COLD, buffers, timeout=SHORT) == [GetStatus.DRAM] * 2 + [GetStatus.TIMED_OUT] * 6
    assert buffers[:2] == [_object(key) for key in WARM]
    disk.wait_held(2)
    for _ in range(3):
        _check_hits(pool, WARM)
    fresh = [b"fresh %d" % number for number in range(4)]
    assert pool.put(fresh, [_object(key) for key in fresh]) == [PutStatus.STORED] * 4
    _check_hits(pool, fresh)


def test_nobody_touches_the_buffers_of_a_call_that_returned(make: Callable[..., LocalPool], disk: Disk) -> None:
    pool = make(io_threads=3)
    disk.hang("read")
    buffers = [np.zeros((2, SIZE // 2 + 64), dtype=np.uint8)[:, : SIZE // 2] for _ in COLD]
    assert pool.get(COLD, buffers, timeout=SHORT) == [GetStatus.TIMED_OUT] * 6
    disk.wait_held(3)
    for buffer in buffers:
        buffer[...] = 0xA5
    disk.work()
    disk.wait_free()
    _check_hits(pool, COLD)
    assert all(np.all(buffer == 0xA5) for buffer in buffers)


def test_buffers_of_a_call_that_returned_can_be_freed(make: Callable[..., LocalPool], disk: Disk) -> None:
    pool = make(io_threads=1)
    disk.hang("read")
    buffers = _buffers(COLD)
    assert pool.get(COLD, buffers, timeout=SHORT) == [GetStatus.TIMED_OUT] * 6
    for buffer in buffers:
        buffer.clear()  # raises BufferError while anybody has a view of it


def test_what_a_late_read_brings_is_kept(make: Callable[..., LocalPool], disk: Disk) -> None:
    pool = make(io_threads=1)
    disk.hang("read")
    assert pool.get(COLD[:1], _buffers(COLD[:1]), timeout=SHORT) == [GetStatus.TIMED_OUT]
    disk.work()
    disk.wait_free()
    _check_hits(pool, COLD)  # behind the late one in the only thread
    assert pool.get(COLD[:1], _buffers(COLD[:1])) == [GetStatus.DRAM]
    assert (_stats(pool, Tier.DRAM), _stats(pool, Tier.SSD)) == ((0, 0), (0, 0))


def test_loads_that_were_given_up_are_not_done(
    make: Callable[..., LocalPool], disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool = make(io_threads=1, ssd_failures=100)
    before = _remembered()
    disk.hang("read")
    for _ in range(5):
        assert pool.get(COLD, _buffers(COLD), timeout=SHORT) == [GetStatus.TIMED_OUT] * 6
    disk.wait_held(1)
    assert _remembered() <= before + 6, "only the call whose read hangs"
    disk.work()
    disk.wait_free()
    _check_hits(pool, COLD[-1:])
    first, others = pool.get(COLD[:1], _buffers(COLD[:1])), pool.get(COLD[1:-1], _buffers(COLD[1:-1]))
    assert (first, others) == ([GetStatus.DRAM], [GetStatus.SSD] * 4), "only the read that hung went on"


def test_the_pools_own_patience_counts_where_a_call_names_no_time(make: Callable[..., LocalPool], disk: Disk) -> None:
    pool = make(ssd_timeout_s=SHORT)
    disk.hang("read")
    assert pool.get(WARM + COLD, _buffers(WARM + COLD)) == [GetStatus.DRAM] * 2 + [GetStatus.TIMED_OUT] * 6


def test_a_disk_that_does_not_answer_is_left_alone_and_tried_again(
    make: Callable[..., LocalPool], disk: Disk, clock: FakeClock
) -> None:
    pool = make(ssd_failures=2, ssd_retry_s=10.0)
    disk.hang("read")
    for turn in range(2):
        assert pool.exists(COLD) == [True] * 6, turn
        assert pool.get(COLD, _buffers(COLD), timeout=SHORT) == [GetStatus.TIMED_OUT] * 6
    assert pool.exists(WARM + COLD) == [True] * 2 + [False] * 6
    assert (pool.count_prefix(COLD), pool.count_prefix(WARM + COLD), pool.count_prefix([])) == (0, 2, 0)
    assert pool.get(WARM + COLD, _buffers(WARM + COLD)) == [GetStatus.DRAM] * 2 + [GetStatus.MISS] * 6
    counters = pool.counters()
    assert (counters.fenced, counters.fenced_loads) == (1, 6)
    clock.advance(10)
    assert pool.exists(COLD) == [True] * 6, "somebody has to try"
    assert pool.get(COLD, _buffers(COLD), timeout=SHORT) == [GetStatus.TIMED_OUT] * 6
    assert pool.exists(COLD) == [False] * 6
    disk.work()
    disk.wait_free()
    assert pool.exists(COLD[4:]) == [False] * 2, "nobody has tried yet, and the late reads were of the others"
    clock.advance(100)
    _check_hits(pool, COLD)
    assert pool.exists(COLD) == [True] * 6
    assert pool.counters().fenced == 2


def test_what_is_behind_the_fence_can_be_put_again(make: Callable[..., LocalPool], disk: Disk) -> None:
    pool = make(ssd_failures=1)
    disk.hang("read")
    assert pool.put(COLD[:1], [_object(COLD[0])]) == [PutStatus.PRESENT]
    assert pool.get(COLD[1:], _buffers(COLD[1:]), timeout=SHORT) == [GetStatus.TIMED_OUT] * 5
    assert pool.put(COLD[:1], [_object(COLD[0])]) == [PutStatus.STORED]
    _check_hits(pool, COLD[:1])


def test_a_slow_disk_is_not_left_alone(make: Callable[..., LocalPool], disk: Disk) -> None:
    pool = make(ssd_failures=1, io_threads=1)
    disk.hang("read")
    statuses: list[GetStatus] = []
    reader = threading.Thread(target=lambda: statuses.extend(pool.get(COLD, _buffers(COLD), timeout=60)))
    reader.start()
    disk.wait_held(1)
    disk.work()
    reader.join(60)
    assert statuses == [GetStatus.SSD] * 6
    assert pool.counters().fenced == 0


def test_one_read_serves_all_who_want_the_object(make: Callable[..., LocalPool], disk: Disk) -> None:
    pool = make(io_threads=4)
    disk.hang("read")
    results: list[tuple[list[GetStatus], bytearray]] = []

    def read() -> None:
        buffer = bytearray(SIZE)
        results.append((pool.get(COLD[:1], [buffer], timeout=60), buffer))

    readers = [threading.Thread(target=read) for _ in range(4)]
    for reader in readers:
        reader.start()
    disk.wait_held(1)
    assert pool.get(COLD[:1], _buffers(COLD[:1]), timeout=SHORT) == [GetStatus.TIMED_OUT], "it leaves in time, too"
    disk.fail_after(1)
    disk.work()
    for reader in readers:
        reader.join(60)
    assert len(results) == 4
    assert all(status.hit and buffer == _object(COLD[0]) for (status,), buffer in results)


def test_a_read_that_ends_badly_after_its_call_forgets_the_object(make: Callable[..., LocalPool], disk: Disk) -> None:
    pool = make(io_threads=1)
    disk.hang("read")
    assert pool.get(COLD[:2], _buffers(COLD[:2]), timeout=SHORT) == [GetStatus.TIMED_OUT] * 2
    disk.wait_held(1)
    disk.fail("read")
    disk.wait_free()
    disk.work()
    _check_hits(pool, COLD[1:])  # behind it in the only thread
    assert pool.exists(COLD) == [False] + [True] * 5


def test_without_room_in_dram_objects_come_all_the_same(make: Callable[..., LocalPool]) -> None:
    pool = make(pages=4, copy_threads=1)
    staged = [pool.stage([b"held %d" % number], [_object(b"held")]) for number in range(4)]
    assert all(stage.statuses == [PutStatus.STORED] for stage in staged)
    for _ in range(2):
        buffers = _buffers(COLD)
        assert pool.get(COLD, buffers, timeout=60) == [GetStatus.SSD] * 6
        assert buffers == [_object(key) for key in COLD]
    for stage in staged:
        stage.discard()


@pytest.mark.parametrize("kind", ["read", "write"])
def test_a_clear_holds_for_what_is_on_its_way(make: Callable[..., LocalPool], disk: Disk, kind: str) -> None:
    pool = make(demote_threads=1)
    disk.hang(kind)
    if kind == "read":
        assert pool.get(COLD[:1], _buffers(COLD[:1]), timeout=SHORT) == [GetStatus.TIMED_OUT]
    else:
        pool.put([b"new"], [_object(b"new")])
    disk.wait_held(1)
    pool.clear()
    disk.work()
    disk.wait_free()
    assert pool.flush(30)
    assert pool.exists([*COLD, *WARM, b"new"]) == [False] * 9
    assert (_stats(pool, Tier.DRAM), _stats(pool, Tier.SSD)) == ((0, 0), (0, 0))


@pytest.mark.parametrize("kind", ["write", "sync"])
def test_a_flush_ends_in_its_time(make: Callable[..., LocalPool], disk: Disk, kind: str) -> None:
    pool = make()
    disk.hang(kind)
    pool.put([b"new"], [_object(b"new")])
    assert not pool.flush(SHORT)
    disk.work()
    assert pool.flush(60)


def test_a_pool_closes_though_its_disk_hangs(
    make: Callable[..., LocalPool], disk: Disk, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("umbp_connectors.pool.ssd._LAST_READ_S", SHORT)
    monkeypatch.setattr("umbp_connectors.pool.demoter._LAST_WRITE_S", SHORT)
    pool = make()
    disk.hang("read", "write")
    pool.put([b"new"], [_object(b"new")])
    assert pool.get(COLD, _buffers(COLD), timeout=SHORT) == [GetStatus.TIMED_OUT] * 6
    pool.close(timeout=SHORT)
    assert "the disk does not answer" in caplog.text
    disk.work()
    disk.wait_free()
    pool.open()
    _check_hits(pool, COLD + WARM)


def test_a_put_with_a_time_on_many_threads_keeps_its_promise(make: Callable[..., LocalPool]) -> None:
    size = 1 << 20
    pool = LocalPool(Identity("m", b"\x11" * 32, RankScope()), LocalPoolConfig(size, 40 * size, copy_threads=4))
    pool.open()
    keys = [b"%d" % number for number in range(32)]
    source = np.random.default_rng(1).integers(0, 256, (32, size), dtype=np.uint8)
    for timeout in (0.0, 0.001, 0.003, 60.0):
        pool.clear()
        statuses = pool.put(keys, list(source), timeout=timeout)
        stored = [status is PutStatus.STORED for status in statuses]
        assert set(statuses) <= {PutStatus.STORED, PutStatus.TIMED_OUT}
        assert pool.exists(keys) == stored
        target = np.zeros_like(source)
        assert [status.hit for status in pool.get(keys, list(target))] == stored
        assert all(np.array_equal(a, b) for a, b, there in zip(source, target, stored, strict=True) if there)
    assert all(stored)
    pool.close()


def test_a_delivery_that_has_begun_is_waited_for(
    make: Callable[..., LocalPool], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The copy into the caller's memory is the one thing that a call waits for beyond its time."""
    pool = make()
    begun, go_on = threading.Event(), threading.Event()

    def slow(*arguments: Any) -> bytes:
        begun.set()
        assert go_on.wait(60)
        return copy_checksummed(*arguments)

    monkeypatch.setattr(loads, "copy_checksummed", slow)
    buffer, statuses = bytearray(SIZE), list[GetStatus]()
    reader = threading.Thread(target=lambda: statuses.extend(pool.get(COLD[:1], [buffer], timeout=SHORT)))
    reader.start()
    assert begun.wait(60)
    reader.join(4 * SHORT)
    assert reader.is_alive()
    go_on.set()
    reader.join(60)
    assert statuses == [GetStatus.SSD]
    assert buffer == _object(COLD[0])
