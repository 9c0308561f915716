"""Calls with a time of their own, over a disk that hangs."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tests.connectors.deadlines.kit import COLD, SHORT, SIZE, WARM, buffers_for, check_hits, held, late, object_of
from tests.connectors.disk import Disk
from tests.connectors.gate import Gate
from tests.connectors.waiting import until
from umbp_connectors.pool import batches, copies, loads, local
from umbp_connectors.pool.catalogue import Catalogue
from umbp_connectors.pool.checksums import copy_checksummed
from umbp_connectors.pool.local import GetStatus, LocalPool, LocalPoolConfig, PutStatus
from umbp_core.ids import Identity, RankScope
from umbp_core.testing.fakes import FakeClock
from umbp_core.tiers import Tier


def _remembered() -> int:
    """How many loads anybody still knows of."""
    gc.collect()
    return sum(isinstance(each, loads.Load) for each in gc.get_objects())


def test_no_time_at_all(make: Callable[..., LocalPool]) -> None:
    pool = make()
    assert pool.put([b"new", WARM[0]], [b"data", b"data"], timeout=0) == [PutStatus.TIMED_OUT] * 2
    assert pool.get([*WARM, *COLD], buffers_for(WARM + COLD), timeout=0) == [GetStatus.TIMED_OUT] * 8
    assert pool.exists([b"new", *WARM, *COLD]) == [False] + [True] * 8
    counters = pool.counters()
    assert (counters.puts[PutStatus.TIMED_OUT], counters.gets[GetStatus.TIMED_OUT]) == (2, 8)
    assert (held(pool, Tier.DRAM), held(pool, Tier.SSD)) == ((0, 0), (0, 0))
    check_hits(pool, WARM + COLD)


@pytest.mark.parametrize("timeout", [None, 60.0])
def test_enough_time(make: Callable[..., LocalPool], timeout: float | None) -> None:
    pool = make()
    assert pool.put([b"new"], [b"data"], timeout=timeout) == [PutStatus.STORED]
    buffers = buffers_for(WARM + COLD)
    assert pool.get(WARM + COLD, buffers, timeout=timeout) == [GetStatus.DRAM] * 2 + [GetStatus.SSD] * 6
    assert buffers == [object_of(key) for key in WARM + COLD]


def test_a_disk_that_hangs_costs_what_is_on_it_only(make: Callable[..., LocalPool], disk: Disk) -> None:
    pool = make(io_threads=2)
    disk.hang("read", "write")
    buffers = buffers_for(WARM + COLD)
    with late(disk, 2):
        assert pool.get(WARM + COLD, buffers, timeout=SHORT) == [GetStatus.DRAM] * 2 + [GetStatus.TIMED_OUT] * 6
    assert buffers[:2] == [object_of(key) for key in WARM]
    for _ in range(3):
        check_hits(pool, WARM)
    fresh = [b"fresh %d" % number for number in range(4)]
    assert pool.put(fresh, [object_of(key) for key in fresh]) == [PutStatus.STORED] * 4
    check_hits(pool, fresh)


def test_nobody_touches_the_buffers_of_a_call_that_returned(make: Callable[..., LocalPool], disk: Disk) -> None:
    pool = make(io_threads=3)
    disk.hang("read")
    buffers = [np.zeros((2, SIZE // 2 + 64), dtype=np.uint8)[:, : SIZE // 2] for _ in COLD]
    with late(disk, 3):
        assert pool.get(COLD, buffers, timeout=SHORT) == [GetStatus.TIMED_OUT] * 6
    for buffer in buffers:
        buffer[...] = 0xA5
    disk.work()
    disk.wait_free()
    check_hits(pool, COLD)
    assert all(np.all(buffer == 0xA5) for buffer in buffers)


def test_buffers_of_a_call_that_returned_can_be_freed(make: Callable[..., LocalPool], disk: Disk) -> None:
    pool = make(io_threads=1)
    disk.hang("read")
    buffers = buffers_for(COLD)
    with late(disk):
        assert pool.get(COLD, buffers, timeout=SHORT) == [GetStatus.TIMED_OUT] * 6
    for buffer in buffers:
        buffer.clear()  # raises BufferError while anybody has a view of it


def test_what_a_late_read_brings_is_kept(make: Callable[..., LocalPool], disk: Disk) -> None:
    pool = make(io_threads=1)
    disk.hang("read")
    with late(disk):
        assert pool.get(COLD[:1], buffers_for(COLD[:1]), timeout=SHORT) == [GetStatus.TIMED_OUT]
    disk.work()
    disk.wait_free()
    check_hits(pool, COLD)  # behind the late one in the only thread
    assert pool.get(COLD[:1], buffers_for(COLD[:1])) == [GetStatus.DRAM]
    assert (held(pool, Tier.DRAM), held(pool, Tier.SSD)) == ((0, 0), (0, 0))


def test_loads_that_were_given_up_are_not_done(
    make: Callable[..., LocalPool], disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool = make(io_threads=1, ssd_failures=100)
    before = _remembered()
    disk.hang("read")
    with late(disk):
        for _ in range(5):
            assert pool.get(COLD, buffers_for(COLD), timeout=SHORT) == [GetStatus.TIMED_OUT] * 6
    assert _remembered() <= before + 6, "only the call whose read hangs"
    disk.work()
    disk.wait_free()
    check_hits(pool, COLD[-1:])
    run = len(COLD) - 2  # read in one go: a quarter of the pages
    statuses = pool.get(COLD[:-1], buffers_for(COLD[:-1]))
    assert statuses == [GetStatus.DRAM] * run + [GetStatus.SSD], "only the read that hung went on"


def test_the_pools_own_patience_counts_where_a_call_names_no_time(make: Callable[..., LocalPool], disk: Disk) -> None:
    pool = make(ssd_timeout_s=SHORT)
    disk.hang("read")
    assert pool.get(WARM + COLD, buffers_for(WARM + COLD)) == [GetStatus.DRAM] * 2 + [GetStatus.TIMED_OUT] * 6


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
    assert pool.get(COLD[:1], buffers_for(COLD[:1]), timeout=SHORT) == [GetStatus.TIMED_OUT], "it leaves in time, too"
    disk.fail_after(1)
    disk.work()
    for reader in readers:
        reader.join(60)
    assert len(results) == 4
    assert all(status.hit and buffer == object_of(COLD[0]) for (status,), buffer in results)


def test_a_read_that_ends_badly_after_its_call_forgets_the_object(make: Callable[..., LocalPool], disk: Disk) -> None:
    pool = make(io_threads=1)
    disk.hang("read")
    with late(disk):
        assert pool.get(COLD[:1], buffers_for(COLD[:1]), timeout=SHORT) == [GetStatus.TIMED_OUT]
    disk.fail("read")
    disk.wait_free()
    disk.work()
    check_hits(pool, COLD[1:])  # behind it in the only thread
    assert pool.exists(COLD) == [False] + [True] * 5


def test_without_room_in_dram_objects_come_all_the_same(make: Callable[..., LocalPool]) -> None:
    pool = make(pages=4, copy_threads=1)
    staged = [pool.stage([b"held %d" % number], [object_of(b"held")]) for number in range(4)]
    assert all(stage.statuses == [PutStatus.STORED] for stage in staged)
    for _ in range(2):
        buffers = buffers_for(COLD)
        assert pool.get(COLD, buffers, timeout=60) == [GetStatus.SSD] * 6
        assert buffers == [object_of(key) for key in COLD]
    for stage in staged:
        stage.discard()


@pytest.mark.parametrize("kind", ["read", "write"])
def test_a_clear_holds_for_what_is_on_its_way(make: Callable[..., LocalPool], disk: Disk, kind: str) -> None:
    pool = make(demote_threads=1)
    disk.hang(kind)
    if kind == "read":
        with late(disk):
            assert pool.get(COLD[:1], buffers_for(COLD[:1]), timeout=SHORT) == [GetStatus.TIMED_OUT]
    else:
        pool.put([b"new"], [object_of(b"new")])
        disk.wait_held(1)
    pool.clear()
    disk.work()
    disk.wait_free()
    assert pool.flush(30)
    assert pool.exists([*COLD, *WARM, b"new"]) == [False] * 9
    until(lambda: (held(pool, Tier.DRAM), held(pool, Tier.SSD)) == ((0, 0), (0, 0)))  # also what read late
    assert pool.exists([*COLD, *WARM, b"new"]) == [False] * 9


@pytest.mark.parametrize("kind", ["write", "sync"])
def test_a_flush_ends_in_its_time(make: Callable[..., LocalPool], disk: Disk, kind: str) -> None:
    pool = make()
    disk.hang(kind)
    pool.put([b"new"], [object_of(b"new")])
    assert not pool.flush(SHORT)
    disk.work()
    assert pool.flush(60)


def test_a_pool_closes_though_its_disk_hangs(
    make: Callable[..., LocalPool], disk: Disk, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("umbp_connectors.pool.ssd._LAST_READ_S", SHORT)
    monkeypatch.setattr("umbp_connectors.pool.demoter._LAST_WRITE_S", SHORT)
    close = Catalogue.close
    monkeypatch.setattr(Catalogue, "close", lambda catalogue, timeout: close(catalogue, 60))  # that disk works
    pool = make()
    disk.hang("read", "write")
    pool.put([b"new"], [object_of(b"new")])
    disk.wait_held(1)
    with late(disk, 2):
        assert pool.get(COLD, buffers_for(COLD), timeout=SHORT) == [GetStatus.TIMED_OUT] * 6
    pool.close(timeout=SHORT)
    assert "the disk does not answer" in caplog.text
    disk.work()
    disk.wait_free()
    pool.open()
    check_hits(pool, COLD + WARM)


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
    pool, gate, begun = make(), Gate(copy_checksummed), threading.Event()
    finish = loads.LoadBatch.finish
    monkeypatch.setattr(loads, "copy_checksummed", gate)
    monkeypatch.setattr(loads.LoadBatch, "finish", lambda *arguments: begun.wait(60) and finish(*arguments))
    monkeypatch.setattr(batches, "_is_over", lambda deadline: False)
    buffer, statuses = bytearray(SIZE), list[GetStatus]()
    reader = threading.Thread(target=lambda: statuses.extend(pool.get(COLD[:1], [buffer], timeout=SHORT)))
    reader.start()
    gate.wait_until_held()
    begun.set()  # only now the call looks at its time
    reader.join(4 * SHORT)
    assert reader.is_alive()
    gate.open()
    reader.join(60)
    assert statuses == [GetStatus.SSD]
    assert buffer == object_of(COLD[0])


def test_an_object_that_goes_before_its_load_begins_is_a_miss(make: Callable[..., LocalPool], disk: Disk) -> None:
    pool = make(io_threads=1)
    disk.hang("read")
    with late(disk):
        assert pool.get(COLD[:1], buffers_for(COLD[:1]), timeout=SHORT) == [GetStatus.TIMED_OUT]
    statuses: list[GetStatus] = []
    reader = threading.Thread(target=lambda: statuses.extend(pool.get(COLD[1:3], buffers_for(COLD[1:3]), timeout=60)))
    reader.start()
    until(lambda: held(pool, Tier.SSD)[0] == 3)  # the one that hangs, and those two behind it
    pool.clear()
    disk.work()
    reader.join(60)
    assert statuses == [GetStatus.MISS] * 2


def test_the_time_is_looked_at_before_each_object(
    make: Callable[..., LocalPool], monkeypatch: pytest.MonkeyPatch
) -> None:
    pool, now = make(copy_threads=1), FakeClock()

    def slow(*arguments: Any) -> bytes:
        now.advance(2.0)
        return copy_checksummed(*arguments)

    for module in (local, batches):
        monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=now))
    monkeypatch.setattr(copies, "copy_checksummed", slow)
    assert pool.get(WARM, buffers_for(WARM), timeout=1.0) == [GetStatus.DRAM, GetStatus.TIMED_OUT]
    statuses = pool.put([b"a", b"b", b"c"], [b"data"] * 3, timeout=1.0)
    assert statuses == [PutStatus.STORED, PutStatus.TIMED_OUT, PutStatus.TIMED_OUT]
    assert pool.exists([b"a", b"b", b"c"]) == [True, False, False]
    assert held(pool, Tier.DRAM) == (0, 0)
