"""Which pool gets how much of a daemon's memory, and which one goes for another."""

from __future__ import annotations

import contextlib
import random
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from tests.connectors.daemon.conftest import Daemon
from tests.connectors.daemon.kit import IDENTITY, SIZE, client_of, get, key_of, object_of, put
from tests.connectors.gate import Gate
from tests.connectors.waiting import until
from umbp_connectors.daemon.client import DaemonPool
from umbp_connectors.pool.local import LocalPool
from umbp_connectors.pool.outcomes import GetStatus, PutStatus
from umbp_core.errors import TierUnavailable
from umbp_core.ids import Identity, RankScope
from umbp_core.tiers import Tier

Start = Callable[..., Daemon]
Connect = Callable[..., DaemonPool]


def _other(name: str) -> Identity:
    return replace(IDENTITY, namespace=name)


def _pages(pool: DaemonPool) -> int:
    stats = pool.stats(Tier.DRAM)
    return 0 if stats is None else stats.total_pages


def test_a_pool_gets_what_is_left(start: Start, connect: Connect, caplog: pytest.LogCaptureFixture) -> None:
    start(dram_capacity=10 * SIZE)
    first, second, third = connect(_other("1"), pages=6), connect(_other("2"), pages=6), connect(_other("3"), pages=6)
    assert (_pages(first), _pages(second), _pages(third)) == (6, 4, 0)
    assert "that is what is left" in caplog.text
    assert put(third, [1]) == [PutStatus.NO_ROOM]
    assert "give the daemon a larger dram_capacity" in caplog.text
    assert _pages(connect(_other("1"), pages=1)) == 6, "a pool keeps the size that it was opened with"


def test_a_pool_that_nobody_uses_makes_room(start: Start, connect: Connect) -> None:
    daemon = start(dram_capacity=10 * SIZE)
    old, older = connect(_other("old"), pages=5), connect(_other("older"), pages=5)
    put(old, range(3))
    put(older, range(3))
    older.close()
    until(lambda: sum(kept.is_idle for kept in daemon.keeper.pools()) == 1)
    old.close()
    until(lambda: daemon.server.connections == 0)
    new = connect(_other("new"), pages=4)
    assert _pages(new) == 4
    assert get(connect(_other("old"), pages=5), range(3)) == [GetStatus.DRAM] * 3, "the other one had to go"
    assert {kept.namespace for kept in daemon.keeper.pools()} == {"old", "new"}


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    """The closing of pools of the namespace "old" waits here."""
    closing = LocalPool.close
    gate = Gate(closing, only=lambda pool, *_: pool.identity.namespace == "old")
    monkeypatch.setattr(LocalPool, "close", lambda pool, *timeout: gate(pool, *timeout))
    yield gate
    gate.open()


def test_a_pool_waits_for_the_one_whose_place_it_takes(
    start: Start, connect: Connect, held: Gate, tmp_path: Path
) -> None:
    ssd = {"ssd_dir": tmp_path / "ssd", "ssd_capacity": 16 << 20, "ssd_engines": 4}
    daemon = start(dram_capacity=10 * SIZE, **ssd)
    old = connect(_other("old"), pages=6)
    put(old, range(3))
    old.close()
    until(lambda: daemon.server.connections == 0)
    with ThreadPoolExecutor(1) as threads:
        first = threads.submit(connect, _other("new"), pages=8)
        held.wait_until_held()
        others = [connect(_other("new"), pages=8, timeout_s=0.3), connect(_other("old"), pages=1, timeout_s=0.3)]
        assert [_pages(pool) for pool in others] == [0, 0], "the memory and the folder are not free yet"
        assert _pages(connect(_other("another"), pages=1)) == 1, "its memory is"
        assert [kept.namespace for kept in daemon.keeper.pools()] == ["another"]
        assert not first.done()
        held.open()
        assert _pages(first.result()) == 8
    until(lambda: [_pages(pool) for pool in others] == [8, 1])
    until(lambda: all(pool.stats(Tier.SSD) is not None for pool in (first.result(), others[1])))  # each has its folder
    assert [get(others[1], [number], timeout=30) for number in range(3)] == [[GetStatus.SSD]] * 3


@pytest.mark.parametrize(
    ("before", "after", "kept"),
    [
        ([(0, 1)], (0, 1), 0),
        ([(0, 2), (1, 2)], (0, 1), 0),
        ([(0, 2), (1, 2)], (1, 2), 1),
    ],
    ids=["another layout", "less ranks", "another layout of a rank"],
)
def test_a_pool_that_nobody_uses_makes_room_on_ssd(
    start: Start, connect: Connect, tmp_path: Path, before: list[tuple[int, int]], after: tuple[int, int], kept: int
) -> None:
    daemon = start(dram_capacity=100 * SIZE, ssd_dir=tmp_path / "ssd", ssd_capacity=16 << 20)
    for rank, ranks in before:
        scope = RankScope(tp_rank=rank, tp_size=ranks)
        old = connect(replace(IDENTITY, rank=scope), rank=rank, ranks=ranks, pages=6)
        put(old, range(3))
        old.close()
    until(lambda: daemon.server.connections == 0)
    rank, ranks = after
    new = connect(Identity(IDENTITY.namespace, b"\x22" * 32, RankScope()), rank=rank, ranks=ranks, pages=6)
    assert len(daemon.keeper.pools()) == kept + 1
    put(new, range(3))
    assert new.flush(30)
    used = new.stats(Tier.SSD)
    assert used is not None
    assert used.objects == 3
    files = [path.stat().st_size for path in (tmp_path / "ssd").rglob("*") if path.is_file()]
    assert sum(files) <= 16 << 20, "together they keep to the capacity"


def test_memory_that_is_not_free_yet_is_waited_for(start: Start, connect: Connect, held: Gate) -> None:
    daemon = start(dram_capacity=10 * SIZE)
    connect(_other("old"), pages=8).close()
    until(lambda: daemon.server.connections == 0)
    with ThreadPoolExecutor(1) as threads:
        first = threads.submit(connect, _other("new"), pages=3)
        held.wait_until_held()
        other = connect(_other("another"), pages=7, timeout_s=0.3)
        assert (_pages(other), daemon.keeper.pools()) == (0, [])
        held.open()
        first.result()
    until(lambda: _pages(other) == 7)


def test_a_daemon_does_not_end_before_what_is_being_closed(start: Start, connect: Connect, held: Gate) -> None:
    daemon = start(dram_capacity=10 * SIZE)
    connect(_other("old"), pages=8).close()
    until(lambda: daemon.server.connections == 0)
    (old,) = daemon.keeper.pools()
    with ThreadPoolExecutor(2) as threads:
        first = threads.submit(connect, _other("new"), pages=8)
        held.wait_until_held()
        ending = threads.submit(lambda: (daemon.keeper.close(10), old.is_closed))
        until(lambda: put(connect(_other("another"), pages=1, timeout_s=0.3), [1]) == [PutStatus.NO_ROOM])
        assert not ending.done()
        held.open()
        assert ending.result()[1]
        assert put(first.result(), [1]) == [PutStatus.NO_ROOM], "nothing is opened any more"
    assert daemon.keeper.pools() == []


def test_pools_that_come_and_go_at_once_have_never_more_than_there_is(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    keeper, mapped, most, lock = start(dram_capacity=10 * SIZE).keeper, Counter[str](), [0], threading.Lock()
    opening, closing = LocalPool.open, LocalPool.close

    def open_(pool: LocalPool) -> None:
        with lock:
            mapped[pool.identity.namespace] += pool._config.dram_bytes
            most.append(mapped.total())
        opening(pool)

    def close(pool: LocalPool, *timeout: float) -> None:
        was_open = pool._parts is not None
        closing(pool, *timeout)
        with lock:
            mapped[pool.identity.namespace] -= was_open * pool._config.dram_bytes

    monkeypatch.setattr(LocalPool, "open", open_)
    monkeypatch.setattr(LocalPool, "close", close)

    def come_and_go(seed: int) -> None:
        dice = random.Random(seed)
        for _ in range(100):
            wanted = client_of(Path("nowhere"), _other(str(dice.randrange(5))), pages=dice.randrange(2, 8))._greeting
            with contextlib.suppress(TierUnavailable), keeper.attached(wanted) as (kept, _):
                assert kept.is_open

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(come_and_go, range(4)))
    assert max(most) <= 10 * SIZE


def test_a_namespace_has_a_quota(start: Start, connect: Connect) -> None:
    daemon = start(dram_capacity=20 * SIZE, daemon_quota=6 * SIZE)
    one, two = (connect(replace(IDENTITY, layout=bytes([number]) * 32), pages=4) for number in (1, 2))
    assert (_pages(one), _pages(two)) == (4, 2)
    assert _pages(connect(_other("another"), pages=9)) == 6
    two.close()
    one.close()
    until(lambda: sum(kept.is_idle for kept in daemon.keeper.pools()) == 2)
    assert _pages(connect(replace(IDENTITY, layout=b"\x03" * 32), pages=6)) == 6


def test_layouts_of_one_identity_have_one_size(start: Start, connect: Connect) -> None:
    start()
    first = connect()
    put(first, [1])
    second = DaemonPool(IDENTITY, replace(first._config, object_bytes=3 * SIZE))
    second.open()
    assert second.put([key_of(2)], [object_of(2)]) == [PutStatus.NO_ROOM]
    second.close()
    assert get(first, [1]) == [GetStatus.DRAM]


def test_a_pool_that_cannot_be_opened_is_tried_again(
    start: Start, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    daemon = start()
    opening = LocalPool.open

    def refuse(pool: LocalPool) -> None:
        raise TierUnavailable("no memory today")

    with monkeypatch.context() as patch:
        patch.setattr(LocalPool, "open", refuse)
        pool = connect()
        assert put(pool, [1]) == [PutStatus.NO_ROOM]
        assert daemon.keeper.pools() == []
    assert LocalPool.open is opening
    until(lambda: put(pool, [1]) == [PutStatus.STORED])


def test_a_closed_keeper_opens_nothing(start: Start, connect: Connect) -> None:
    daemon = start()
    daemon.keeper.close(1)
    daemon.keeper.close(1)
    assert put(connect(), [1]) == [PutStatus.NO_ROOM]


def test_a_graceful_end_lets_a_grant_come_to_its_end(start: Start, connect: Connect) -> None:
    daemon, pool = start(), connect()
    staged = pool.stage([key_of(1)], [object_of(1)])
    ending = threading.Thread(target=lambda: daemon.server.close(120.0))
    ending.start()
    until(lambda: not daemon.server._path.exists())
    assert staged.publish()
    ending.join(60)
    assert not ending.is_alive(), "it ends when nobody holds anything any more"
    (kept,) = daemon.keeper.pools()
    assert kept.pool.exists([key_of(1)]) == [True]
    with contextlib.suppress(OSError):
        pool.close()
