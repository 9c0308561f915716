"""How a daemon's port is configured, and what is refused before anything listens."""

from __future__ import annotations

import socket
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from tests.connectors.commands import umbp
from tests.connectors.daemon.conftest import TOKEN, Daemon
from tests.connectors.daemon.kit import IDENTITY, put
from umbp_connectors.config_model import UmbpConfig
from umbp_connectors.daemon.client import DaemonPool
from umbp_connectors.daemon.doors import TcpDoor, loopback_endpoint
from umbp_connectors.daemon.making import pool_maker
from umbp_connectors.daemon.settings import door_of
from umbp_connectors.master.settings import Endpoint
from umbp_core.errors import ConfigError

Serve = Callable[..., tuple[Daemon, TcpDoor]]
Join = Callable[..., DaemonPool]


@pytest.mark.parametrize("address", ["0.0.0.0:5600", "10.0.0.7:5600", "[::]:5600", "example.org:5600", "127.evil:1"])
@pytest.mark.parametrize("key", ["daemon_listen", "daemon_address"])
def test_only_the_loopback_interface(key: str, address: str) -> None:
    with pytest.raises(ValueError, match=r"give 127\.0\.0\.1:PORT"):
        UmbpConfig(**{key: address})


def test_ways_to_write_an_address() -> None:
    for text in ("127.0.0.1:5600", "localhost:5600", " tcp://127.0.0.1:5600 "):
        assert loopback_endpoint(text) == Endpoint("127.0.0.1", 5600)
    assert loopback_endpoint("[::1]:5600") == Endpoint("::1", 5600)
    assert str(TcpDoor(Endpoint("::1", 5600), b"t")) == "tcp://[::1]:5600"


def test_configurations_that_cannot_be(token_file: Path, start: Callable[..., Daemon], serve: Serve) -> None:
    at = {"mode": "daemon", "daemon_address": "127.0.0.1:5600"}
    with pytest.raises(ConfigError, match="needs a token"):
        door_of(UmbpConfig(**at))
    with pytest.raises(ConfigError, match="needs a token"):
        start(daemon_listen="127.0.0.1:0")
    with pytest.raises(ConfigError, match="daemon_auto_start starts a daemon at its Unix socket"):
        pool_maker(UmbpConfig(**at, daemon_token=TOKEN, daemon_auto_start=True))
    with_file = UmbpConfig(**at, daemon_token_file=token_file)
    assert door_of(with_file) == TcpDoor(Endpoint("127.0.0.1", 5600), TOKEN.encode())
    token_file.chmod(0o640)
    with pytest.raises(ConfigError, match="chmod 600 it"):
        door_of(with_file)
    token_file.unlink()
    with pytest.raises(ConfigError, match="cannot be read"):
        door_of(with_file)


def test_a_port_that_is_taken_leaves_the_socket_free(start: Callable[..., Daemon], path: Path) -> None:
    busy = pytest.raises(ConfigError, match="another process listens there; give another port")
    with socket.create_server(("127.0.0.1", 0)) as taken, busy:
        start(daemon_listen=f"127.0.0.1:{taken.getsockname()[1]}", daemon_token=TOKEN)
    assert not path.exists()
    start()


def test_the_command_line(
    serve: Serve,
    join: Join,
    token_file: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    _, door = serve()
    put(join(door), range(3))
    at, secret = ["--address", str(door.endpoint)], ["--token-file", str(token_file)]
    run = partial(umbp, monkeypatch, capsys)
    monkeypatch.setenv("COLUMNS", "300")
    code, said = run("daemon", "--status", *at, *secret)
    assert (code, f"at {door}: 1 pool(s)" in said) == (0, True)
    assert run("daemon", "--status", *at)[0] == 2
    code, said = run("daemon", "--listen", "0.0.0.0:5600", *secret)
    assert (code, "is not the loopback interface" in said) == (2, True)
    code, said = run("daemon", "--listen", "127.0.0.1:5600")
    assert (code, "daemon_listen needs a token" in said) == (2, True)
    monkeypatch.setenv("UMBP_DAEMON_ADDRESS", str(door.endpoint))
    monkeypatch.setenv("UMBP_DAEMON_TOKEN_FILE", str(token_file))
    code, said = run("pool", "ls", "--tier", "dram")
    assert (code, said.count(IDENTITY.namespace)) == (0, 3)
