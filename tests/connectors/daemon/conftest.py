"""Daemons in the process of the test, and their clients."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.connectors.daemon.kit import PAGES, SIZE, client_of
from umbp_connectors.config_model import UmbpConfig
from umbp_connectors.daemon import client, follower
from umbp_connectors.daemon.client import DaemonPool
from umbp_connectors.daemon.doors import Door, TcpDoor
from umbp_connectors.daemon.keeper import PoolKeeper
from umbp_connectors.daemon.server import DaemonServer
from umbp_connectors.daemon.settings import served_door
from umbp_connectors.plugins import create_manager
from umbp_connectors.pool import local
from umbp_connectors.pool.books import PoolObserver
from umbp_core.eviction import LruPolicy
from umbp_core.ids import Identity
from umbp_core.tiers import Tier

TOKEN = "a-token-that-nobody-guesses"


class Daemon:
    """One daemon without a process of its own."""

    def __init__(self, path: Path, lease_s: float = 60.0, max_connections: int = 64, **config: object) -> None:
        values = {"dram_capacity": 4 * PAGES * SIZE, "dram_prefault": False, **config}
        whole = UmbpConfig(**values)
        self.keeper = PoolKeeper(whole, LruPolicy, create_manager(whole, entries=[]).ssd_gate_maker())
        self.server = DaemonServer(self.keeper, path, lease_s, max_connections, served_door(whole))
        self.server.open()

    def pinned(self) -> int:
        """How many objects in DRAM are pinned or being written, in all pools."""
        fills = [kept.pool.stats(Tier.DRAM) for kept in self.keeper.pools()]
        return sum(fill.pinned + fill.reserved for fill in fills if fill is not None)

    def close(self) -> None:
        self.server.stop(0.5)
        self.keeper.close(60)
        self.server.close(0)


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers that a busy machine gives late count all the same, where a call names no time of its own."""
    monkeypatch.setattr(client, "_LOOKUP_S", 60.0)
    monkeypatch.setattr(follower, "SILENT_S", 60.0)
    monkeypatch.setattr(local, "_FORGET_S", 60.0)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Where the daemon listens."""
    return tmp_path / "run" / "daemon.sock"


@pytest.fixture
def closing() -> Iterator[contextlib.ExitStack]:
    """What is closed when the test ends, the last first."""
    with contextlib.ExitStack() as closing:
        yield closing


@pytest.fixture
def start(path: Path, closing: contextlib.ExitStack) -> Callable[..., Daemon]:
    """Starts a daemon."""

    def start(**options: object) -> Daemon:
        daemon = Daemon(path, **options)  # type: ignore[arg-type]
        closing.callback(daemon.close)
        return daemon

    return start


@pytest.fixture
def connect(path: Path, closing: contextlib.ExitStack) -> Callable[..., DaemonPool]:
    """Opens a client."""

    def connect(*identity: Identity, observer: PoolObserver | None = None, **options: object) -> DaemonPool:
        pool = client_of(path, *identity, **options)  # type: ignore[arg-type]
        if observer is not None:
            pool.observe(observer)
        pool.open()
        closing.callback(pool.close)
        return pool

    return connect


@pytest.fixture
def serve(start: Callable[..., Daemon]) -> Callable[..., tuple[Daemon, TcpDoor]]:
    """Starts a daemon with a port; the way to it comes with it."""

    def serve(**options: object) -> tuple[Daemon, TcpDoor]:
        daemon = start(daemon_listen="127.0.0.1:0", daemon_token=TOKEN, **options)
        assert daemon.server.endpoint is not None
        return daemon, TcpDoor(daemon.server.endpoint, TOKEN.encode())

    return serve


@pytest.fixture
def join(closing: contextlib.ExitStack) -> Callable[..., DaemonPool]:
    """Opens a client at a door."""

    def join(door: Door, **options: object) -> DaemonPool:
        pool = client_of(door, **options)  # type: ignore[arg-type]
        pool.open()
        closing.callback(pool.close)
        return pool

    return join


@pytest.fixture
def token_file(tmp_path: Path) -> Path:
    """A file that holds the token, for its owner only."""
    path = tmp_path / "token"
    path.write_text(TOKEN + "\n", encoding="utf-8")
    path.chmod(0o600)
    return path
