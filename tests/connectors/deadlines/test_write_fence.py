"""A disk that refuses writes is left alone and tried again, and `strict` says what is not on the device."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable

import pytest

from tests.connectors.deadlines.kit import SHORT, WARM, check_hits, object_of
from tests.connectors.disk import Disk
from umbp_connectors.pool.local import GetStatus, LocalPool, PutStatus
from umbp_core.testing.fakes import FakeClock
from umbp_core.tiers import Tier

FIRST, SECOND, THIRD, FOURTH = [[b"%s %d" % (name, number) for number in range(4)] for name in (b"a", b"b", b"c", b"d")]


def put(pool: LocalPool, keys: list[bytes]) -> list[PutStatus]:
    return pool.put(keys, [object_of(key) for key in keys])


def on_ssd(pool: LocalPool) -> set[bytes]:
    return set(pool.holdings()[Tier.SSD])


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EIO])
def test_a_disk_that_refuses_is_left_alone_and_tried_again(
    make: Callable[..., LocalPool], disk: Disk, clock: FakeClock, number: int
) -> None:
    pool = make(ssd_retry_s=10.0, demote_threads=1)
    before = on_ssd(pool)
    disk.fail("write", number=number)
    assert put(pool, FIRST) == [PutStatus.STORED] * 4
    assert not pool.flush(30), "it says so, and does not wait for a disk that refuses"
    tried = pool.counters().demotions_failed
    assert tried == (3 if number == errno.EIO else 1)
    assert pool.counters().demotions_dropped == 4 - tried
    assert put(pool, SECOND) == [PutStatus.STORED] * 4
    assert pool.counters().demotions_dropped == 8 - tried, "it is left alone"
    check_hits(pool, FIRST + SECOND)
    clock.advance(10)
    assert put(pool, THIRD[:1]) == [PutStatus.STORED]
    assert not pool.flush(30)
    assert pool.counters().demotions_failed == tried + 1, "one write tries"
    disk.work()
    clock.advance(100)
    assert put(pool, FOURTH) == [PutStatus.STORED] * 4
    assert pool.flush(30)
    assert on_ssd(pool) - before == set(FOURTH)


def test_what_comes_while_one_write_tries_waits_for_its_end(
    make: Callable[..., LocalPool], disk: Disk, clock: FakeClock
) -> None:
    pool = make(ssd_retry_s=10.0, demote_threads=3)
    before = on_ssd(pool)
    disk.fail("write", number=errno.ENOSPC)
    put(pool, FIRST)
    assert not pool.flush(30)
    dropped = pool.counters().demotions_dropped
    disk.work()
    disk.hang("write")
    clock.advance(10)
    assert put(pool, SECOND) == [PutStatus.STORED] * 4
    disk.wait_held(1)
    assert not pool.flush(SHORT)
    assert pool.counters().demotions_dropped == dropped
    disk.work()
    assert pool.flush(30), "nothing was lost"
    assert on_ssd(pool) - before == set(SECOND)


def test_what_waits_for_a_write_that_tries_is_dropped_when_it_fails(
    make: Callable[..., LocalPool], disk: Disk, clock: FakeClock
) -> None:
    pool = make(ssd_retry_s=10.0, demote_threads=3)
    disk.fail("write", number=errno.ENOSPC)
    put(pool, FIRST)
    assert not pool.flush(30)
    before = pool.counters()
    disk.hang("write")
    clock.advance(10)
    put(pool, SECOND)
    disk.wait_held(1)
    disk.fail("write", number=errno.ENOSPC)
    assert not pool.flush(30)
    after = pool.counters()
    assert (after.demotions_failed, after.demotions_dropped) == (
        before.demotions_failed + 1,
        before.demotions_dropped + 3,
    )


def test_strict_says_what_is_not_on_the_device(make: Callable[..., LocalPool], disk: Disk, clock: FakeClock) -> None:
    pool = make(durability="strict", ssd_retry_s=10.0, demote_threads=1)
    assert put(pool, FIRST) == [PutStatus.STORED] * 4
    assert set(FIRST) <= on_ssd(pool)
    disk.fail("write", number=errno.ENOSPC)
    assert put(pool, SECOND) == [PutStatus.VOLATILE] * 4
    assert all(status.kept for status in put(pool, SECOND))
    check_hits(pool, SECOND)
    disk.work()
    clock.advance(100)
    assert put(pool, THIRD) == [PutStatus.STORED] * 4


def test_strict_ends_in_its_time(make: Callable[..., LocalPool], disk: Disk) -> None:
    pool = make(durability="strict")
    disk.hang("write")
    statuses = pool.put(FIRST, [object_of(key) for key in FIRST], timeout=SHORT)
    assert set(statuses) <= {PutStatus.VOLATILE, PutStatus.TIMED_OUT}
    disk.work()
    disk.wait_free()
    assert all(status is not GetStatus.CORRUPT for status in pool.get(WARM, [bytearray(8192) for _ in WARM]))


@pytest.mark.parametrize(("durability", "flags"), [("strict", {os.RWF_DSYNC}), ("batched", {0}), ("relaxed", {0})])
def test_strict_writes_are_durable_when_they_return(
    make: Callable[..., LocalPool], monkeypatch: pytest.MonkeyPatch, durability: str, flags: set[int]
) -> None:
    pool = make(durability=durability)
    seen: set[int] = set()
    real = os.pwritev

    def spied(fd: int, views: list[memoryview], offset: int, mode: int = 0) -> int:
        seen.add(mode)
        return real(fd, views, offset, mode)

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwritev", spied)
        put(pool, FIRST)
        assert pool.flush(30)
    assert seen == flags
