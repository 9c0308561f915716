"""A disk that does not answer is left alone, and tried again."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest

from tests.connectors.deadlines.kit import COLD, SHORT, SIZE, WARM, buffers_for, check_hits, late, object_of
from tests.connectors.disk import Disk
from umbp_connectors.pool import loads
from umbp_connectors.pool.local import GetStatus, LocalPool, PutStatus
from umbp_core.testing.fakes import FakeClock


def test_a_disk_that_does_not_answer_is_left_alone_and_tried_again(
    make: Callable[..., LocalPool], disk: Disk, clock: FakeClock
) -> None:
    pool = make(ssd_failures=2, ssd_retry_s=10.0)
    disk.hang("read")
    for turn in range(2):
        assert pool.exists(COLD) == [True] * 6, turn
        with late(disk, 4):
            assert pool.get(COLD, buffers_for(COLD), timeout=SHORT) == [GetStatus.TIMED_OUT] * 6
    assert pool.exists(WARM + COLD) == [True] * 2 + [False] * 6
    assert (pool.count_prefix(COLD), pool.count_prefix(WARM + COLD), pool.count_prefix([])) == (0, 2, 0)
    assert pool.get(WARM + COLD, buffers_for(WARM + COLD)) == [GetStatus.DRAM] * 2 + [GetStatus.MISS] * 6
    counters = pool.counters()
    assert (counters.fenced, counters.fenced_loads) == (1, 6)
    clock.advance(10)
    assert pool.exists(COLD) == [True] * 6, "somebody has to try"
    with late(disk, 4):
        assert pool.get(COLD, buffers_for(COLD), timeout=SHORT) == [GetStatus.TIMED_OUT] * 6
    assert pool.exists(COLD) == [False] * 6
    disk.work()
    disk.wait_free()
    assert pool.exists(COLD[4:]) == [False] * 2, "nobody has tried yet, and the late reads were of the others"
    clock.advance(100)
    check_hits(pool, COLD)
    assert pool.exists(COLD) == [True] * 6
    assert pool.counters().fenced == 2


def test_what_is_behind_the_fence_can_be_put_again(make: Callable[..., LocalPool], disk: Disk) -> None:
    pool = make(ssd_failures=1)
    disk.hang("read")
    assert pool.put(COLD[:1], [object_of(COLD[0])]) == [PutStatus.PRESENT]
    with late(disk):
        assert pool.get(COLD[1:], buffers_for(COLD[1:]), timeout=SHORT) == [GetStatus.TIMED_OUT] * 5
    assert pool.put(COLD[:1], [object_of(COLD[0])]) == [PutStatus.STORED]
    check_hits(pool, COLD[:1])


def test_a_slow_disk_is_not_left_alone(make: Callable[..., LocalPool], disk: Disk) -> None:
    pool = make(ssd_failures=1, io_threads=1)
    disk.hang("read")
    statuses: list[GetStatus] = []
    reader = threading.Thread(target=lambda: statuses.extend(pool.get(COLD, buffers_for(COLD), timeout=60)))
    reader.start()
    disk.wait_held(1)
    disk.work()
    reader.join(60)
    assert statuses == [GetStatus.SSD] * 6
    assert pool.counters().fenced == 0


def test_failures_count_in_a_row_only(make: Callable[..., LocalPool], disk: Disk) -> None:
    pool = make(ssd_failures=2, io_threads=1)
    for key in (COLD[0], COLD[2], COLD[4]):
        disk.hang("read")
        with late(disk):
            assert pool.get([key], [bytearray(SIZE)], timeout=SHORT) == [GetStatus.TIMED_OUT]
        disk.work()
        disk.wait_free()
        check_hits(pool, [COLD[COLD.index(key) + 1]])
    assert pool.counters().fenced == 0


def test_calls_without_patience_say_nothing_about_the_disk(
    make: Callable[..., LocalPool], disk: Disk, clock: FakeClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool = make(ssd_failures=1, ssd_retry_s=10.0)
    disk.hang("read")
    with monkeypatch.context() as patch:
        patch.setattr(loads, "_FAIR_S", 1e6)
        assert pool.get(COLD, buffers_for(COLD), timeout=SHORT) == [GetStatus.TIMED_OUT] * 6
        assert (pool.exists(COLD), pool.counters().fenced) == ([True] * 6, 0)
    with late(disk):
        assert pool.get(COLD, buffers_for(COLD), timeout=SHORT) == [GetStatus.TIMED_OUT] * 6
    assert pool.counters().fenced == 1
    clock.advance(10)
    with monkeypatch.context() as patch:
        patch.setattr(loads, "_FAIR_S", 1e6)
        with late(disk):
            assert pool.get(COLD, buffers_for(COLD), timeout=SHORT) == [GetStatus.TIMED_OUT] * 6
    assert pool.counters().fenced == 2, "but a trial that fails has failed"
