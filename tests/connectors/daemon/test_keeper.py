"""Which pool gets how much of a daemon's memory, and which one goes for another."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from dataclasses import replace

import pytest

from tests.connectors.daemon.conftest import Daemon
from tests.connectors.daemon.kit import IDENTITY, SIZE, get, key_of, object_of, put
from tests.connectors.waiting import until
from umbp_connectors.daemon.client import DaemonPool
from umbp_connectors.pool.local import LocalPool
from umbp_connectors.pool.outcomes import GetStatus, PutStatus
from umbp_core.errors import TierUnavailable
from umbp_core.ids import Identity
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
    ending = threading.Thread(target=lambda: daemon.server.close(30.0))
    ending.start()
    until(lambda: not daemon.server._path.exists())
    assert staged.publish()
    ending.join(20)
    assert not ending.is_alive(), "it ends when nobody holds anything any more"
    (kept,) = daemon.keeper.pools()
    assert kept.pool.exists([key_of(1)]) == [True]
    with contextlib.suppress(OSError):
        pool.close()
