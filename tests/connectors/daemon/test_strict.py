"""Durability `strict` through a daemon: a put says what is on the device, waits for nothing else, and ends in time."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.connectors.daemon.conftest import Daemon
from tests.connectors.daemon.kit import PAGES, SIZE, get, key_of, put
from tests.connectors.disk import Disk
from umbp_connectors.daemon import link
from umbp_connectors.daemon.client import DaemonPool
from umbp_connectors.pool.outcomes import GetStatus, PutStatus

Start = Callable[..., Daemon]
Connect = Callable[..., DaemonPool]

FIRST, SECOND = range(4), range(4, 8)


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[Disk]:
    with Disk(monkeypatch) as disk:
        yield disk


@pytest.fixture
def serve(start: Start, tmp_path: Path) -> Callable[[str], Daemon]:
    """Starts a daemon with an SSD tier of this durability."""

    def serve(durability: str) -> Daemon:
        ssd = {"ssd_dir": tmp_path / "ssd", "ssd_capacity": (1 << 20) + 4 * PAGES * SIZE}
        return start(ssd_durability=durability, **ssd)

    return serve


def test_what_is_stored_survives_the_daemon(serve: Callable[[str], Daemon], connect: Connect, disk: Disk) -> None:
    daemon = serve("strict")
    pool = connect()
    assert put(pool, FIRST) == [PutStatus.STORED] * 4
    disk.fail("write")  # from here on nothing gets there
    daemon.close()
    disk.work()
    serve("strict")
    assert get(connect(), FIRST) == [GetStatus.SSD] * 4


def test_what_the_device_refuses_is_volatile(serve: Callable[[str], Daemon], connect: Connect, disk: Disk) -> None:
    serve("strict")
    pool = connect()
    assert put(pool, FIRST) == [PutStatus.STORED] * 4
    disk.fail("write")
    assert put(pool, range(8)) == [PutStatus.PRESENT] * 4 + [PutStatus.VOLATILE] * 4
    assert get(pool, range(8)) == [GetStatus.DRAM] * 8


def test_a_device_that_hangs_costs_the_call_its_time_and_nobody_else_any(
    serve: Callable[[str], Daemon], connect: Connect, disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    serve("strict")
    pool = connect()
    assert put(pool, FIRST) == [PutStatus.STORED] * 4
    disk.hang("write")
    monkeypatch.setattr(link, "_DAEMONS_PART", 0.01)  # of the time, so that the rest is enough for all else
    began = time.monotonic()
    assert put(pool, SECOND, 50.0) == [PutStatus.VOLATILE] * 4
    assert time.monotonic() - began < 40
    assert pool.exists([key_of(n) for n in range(8)]) == [True] * 8
    assert get(pool, range(8)) == [GetStatus.DRAM] * 8


def test_a_daemon_that_goes_meanwhile_has_secured_nothing(
    serve: Callable[[str], Daemon], connect: Connect, disk: Disk
) -> None:
    daemon = serve("strict")
    pool = connect()
    assert put(pool, FIRST) == [PutStatus.STORED] * 4
    disk.hang("write")

    def stop() -> None:
        disk.wait_held(1)
        daemon.server.close(0.0)

    stopping = threading.Thread(target=stop)
    stopping.start()
    # Nothing was published where the daemon went before it could say so.
    assert set(put(pool, SECOND, 60.0)) <= {PutStatus.VOLATILE, PutStatus.NO_ROOM}
    stopping.join()


@pytest.mark.parametrize("durability", ["batched", "relaxed"])
def test_otherwise_a_put_does_not_wait(
    serve: Callable[[str], Daemon], connect: Connect, disk: Disk, durability: str
) -> None:
    serve(durability)
    pool = connect()
    disk.hang("write")
    assert put(pool, FIRST) == [PutStatus.STORED] * 4


def test_without_an_ssd_tier_there_is_nothing_to_wait_for(start: Start, connect: Connect) -> None:
    start(ssd_durability="strict")
    assert put(connect(), FIRST) == [PutStatus.STORED] * 4
