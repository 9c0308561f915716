"""Objects that one thread writes to SSD together: refused, cleared or left behind in the middle, alone or all."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Sequence

import pytest

from tests.connectors.deadlines.kit import check_hits, held, object_of
from tests.connectors.disk import Disk
from umbp_connectors.pool.local import LocalPool, PutStatus
from umbp_core.testing.fakes import FakeClock
from umbp_core.tiers import Tier

KEYS = [b"key %d" % number for number in range(8)]
MORE = [b"more %d" % number for number in range(40)]
Maker = Callable[..., LocalPool]


@pytest.fixture
def pool(make: Maker) -> LocalPool:
    """One thread that writes up to four objects together, and 40 slots."""
    return make(demote_threads=1, ssd_retry_s=10.0)


def put(pool: LocalPool, keys: list[bytes]) -> None:
    assert pool.put(keys, [object_of(key) for key in keys]) == [PutStatus.STORED] * len(keys)


def on_ssd(pool: LocalPool, keys: list[bytes]) -> list[bytes]:
    there = set(pool.holdings()[Tier.SSD])
    return [key for key in keys if key in there]


def put_held(pool: LocalPool, disk: Disk) -> None:
    """All of ``KEYS`` wait in a thread for the disk, or in its queue."""
    disk.hang("write")
    put(pool, KEYS)
    disk.wait_held(1)


def test_several_are_pinned_and_reserved_at_once(pool: LocalPool, disk: Disk) -> None:
    put_held(pool, disk)
    pinned, _ = held(pool, Tier.DRAM)
    _, reserved = held(pool, Tier.SSD)
    assert pinned == reserved > 1
    assert pinned <= 4, "a quarter of the pages at most"
    disk.work()
    assert pool.flush(30)
    assert on_ssd(pool, KEYS) == KEYS
    assert (held(pool, Tier.DRAM), held(pool, Tier.SSD)) == ((0, 0), (0, 0))


def test_what_was_written_before_the_disk_refused_counts(pool: LocalPool, disk: Disk) -> None:
    put_held(pool, disk)
    disk.fail_after(1, "write")
    disk.work()
    assert not pool.flush(30)
    assert on_ssd(pool, KEYS) == KEYS[:4], "the first four go in one write; the others are tried one by one"
    counters = pool.counters()
    assert (counters.demotions_failed, counters.demotions_dropped) == (3, 1)
    assert (held(pool, Tier.DRAM), held(pool, Tier.SSD)) == ((0, 0), (0, 0))
    check_hits(pool, KEYS)


def test_an_object_that_the_disk_refuses_costs_no_neighbour(
    pool: LocalPool, disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = os.pwritev
    bad = object_of(KEYS[1])

    def picky(fd: int, views: Sequence[memoryview], *rest: int) -> int:
        if any(bytes(view) == bad for view in views):
            raise OSError(errno.EIO, "a bad sector")
        return write(fd, views, *rest)

    disk.hang("write")
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwritev", picky)
        put(pool, KEYS)
        disk.work()
        assert not pool.flush(30)
    assert on_ssd(pool, KEYS) == [KEYS[0], *KEYS[2:]]
    assert pool.counters().demotions_failed == 1
    check_hits(pool, KEYS)


def test_what_is_cleared_in_the_middle_does_not_come_back(pool: LocalPool, disk: Disk) -> None:
    put_held(pool, disk)
    pool.clear()
    put(pool, KEYS[6:])
    disk.work()
    assert pool.flush(30)
    assert pool.exists(KEYS) == [False] * 6 + [True] * 2
    assert on_ssd(pool, KEYS) == KEYS[6:]
    assert (held(pool, Tier.DRAM), held(pool, Tier.SSD)) == ((0, 0), (0, 0))


def test_what_is_evicted_by_name_in_the_middle_does_not_come_back(pool: LocalPool, disk: Disk) -> None:
    put_held(pool, disk)
    going = [KEYS[0], KEYS[7], b"unknown"]
    assert pool.evict(going) == 2
    put(pool, KEYS[7:])
    disk.work()
    assert pool.flush(30)
    assert on_ssd(pool, KEYS) == KEYS[1:]
    assert pool.exists(KEYS[:1]) == [False]
    assert pool.evict(KEYS) == 7
    assert pool.exists(KEYS) == [False] * 8
    assert (held(pool, Tier.DRAM), held(pool, Tier.SSD)) == ((0, 0), (0, 0))


def test_a_write_that_tries_the_disk_evicts_for_itself_alone(pool: LocalPool, disk: Disk, clock: FakeClock) -> None:
    for start in range(0, 40, 8):
        put(pool, MORE[start : start + 8])
        assert pool.flush(30)
    stats = pool.stats(Tier.SSD)
    assert stats is not None
    assert stats.free_pages == 0, "whoever comes now evicts"
    disk.fail("write", number=errno.ENOSPC)
    put(pool, KEYS[:1])
    assert not pool.flush(30)
    left = set(pool.holdings()[Tier.SSD])
    assert len(left) == 39
    clock.advance(100)
    put(pool, KEYS[1:])
    assert not pool.flush(30)
    assert pool.counters().demotions_failed == 2
    assert set(pool.holdings()[Tier.SSD]) == left, "there was a slot for one"
