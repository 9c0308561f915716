"""Each client of a daemon hears itself what the disk refused, also when another one was told before."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from tests.connectors.daemon.conftest import Daemon
from tests.connectors.daemon.engine import soon
from tests.connectors.daemon.kit import client_of, put
from tests.connectors.daemon.test_kept import GREETING
from tests.connectors.disk import Disk
from tests.connectors.waiting import until
from umbp_connectors.daemon import kept
from umbp_connectors.daemon.client import DaemonPool
from umbp_connectors.daemon.link import attach
from umbp_connectors.pool.outcomes import PutStatus

SSD = {"ssd_capacity": 8 << 20, "ssd_durability": "relaxed"}


@pytest.mark.parametrize("kind", ["write", "sync"])
def test_a_flush_tells_each_client(
    start: Callable[..., Daemon],
    connect: Callable[..., DaemonPool],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
) -> None:
    start(ssd_dir=tmp_path / "ssd", **SSD)
    storing, other = connect(), connect()
    assert put(other, [1]) == [PutStatus.STORED]
    assert other.flush(30)
    with monkeypatch.context() as patch:
        Disk(patch).fail(kind)
        assert put(storing, [2]) == [PutStatus.STORED]
        assert not other.flush(30)
    assert not storing.flush(30), "its object is not on the device, whoever was told before"
    assert storing.flush(30)
    assert other.flush(30)
    assert connect().flush(30), "what was lost before it came is not its own"


@pytest.mark.parametrize(("remembered", "told"), [(2, True), (1, False)])
def test_a_client_whose_connections_broke_is_told(
    start: Callable[..., Daemon],
    path: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    remembered: int,
    told: bool,
) -> None:
    """Of those that left, the daemon remembers some."""
    monkeypatch.setattr(kept, "_REMEMBERED", remembered)
    daemon = start(ssd_dir=tmp_path / "ssd", **SSD)
    with closing(client_of(path)) as storing, monkeypatch.context() as patch:
        attach(path, GREETING, None, False, soon()).close()
        until(lambda: daemon.server.connections == 0)
        storing.open()
        Disk(patch).fail("write")
        assert put(storing, [2]) == [PutStatus.STORED]
        assert not storing.flush(30)
    until(lambda: daemon.server.connections == 0)  # only then the daemon knows that this one left as well
    with closing(attach(path, GREETING, None, False, soon())) as link:
        assert link.flush(20, soon()) is not told
        assert link.flush(20, soon())


@pytest.mark.parametrize("way", ["put", "stage"])
def test_what_a_daemon_took_with_it_is_told_once(
    start: Callable[..., Daemon], connect: Callable[..., DaemonPool], tmp_path: Path, way: str
) -> None:
    """It may have ended before it wrote; who stored nothing is told nothing."""
    daemon = start(ssd_dir=tmp_path / "ssd", **SSD)
    storing, other = connect(), connect()
    if way == "put":
        assert put(storing, [1]) == [PutStatus.STORED]
    else:
        assert storing.stage([b"staged"], [bytes(8)]).publish()
    daemon.close()
    assert not storing.flush(1), "nobody answers"
    start(ssd_dir=tmp_path / "ssd", **SSD)
    until(lambda: other.flush(5))
    assert not storing.flush(5), "nobody knows"
    assert storing.flush(5)
    assert put(storing, [2]) == [PutStatus.STORED]
    assert storing.flush(30), "all of it is this daemon's"


def test_without_ssd_nothing_was_promised(start: Callable[..., Daemon], connect: Callable[..., DaemonPool]) -> None:
    daemon = start()
    storing = connect()
    assert put(storing, [1]) == [PutStatus.STORED]
    daemon.close()
    start()
    until(lambda: storing.flush(5))
