"""The daemon's port on the loopback interface: who gets in, what it costs not to, and the memory named there."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import random
import socket
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.connectors.daemon.conftest import TOKEN, Daemon
from tests.connectors.daemon.engine import Engine, soon
from tests.connectors.daemon.kit import IDENTITY, SIZE, client_of, get, key_of, object_of, put
from tests.connectors.daemon.processes import Process, daemon
from tests.connectors.daemon.told import Told, truth
from tests.connectors.waiting import until
from umbp_connectors.daemon import knocking, messages, server, session
from umbp_connectors.daemon.client import DaemonPool
from umbp_connectors.daemon.doors import TcpDoor
from umbp_connectors.daemon.follower import PoolFollower
from umbp_connectors.daemon.link import inspect, list_objects, manage
from umbp_connectors.daemon.listing import ListObjects
from umbp_connectors.daemon.messages import Inspect, NamedMemory
from umbp_connectors.master.settings import Endpoint
from umbp_connectors.pool.outcomes import GetStatus, PutStatus
from umbp_connectors.pool.sharing.sockets import FrameSocket
from umbp_core.errors import AccessDenied
from umbp_core.tiers import Tier
from umbp_core.wire.frames import FrameType, encode_frame

Serve = Callable[..., tuple[Daemon, TcpDoor]]
Join = Callable[..., DaemonPool]


def _talk(door: TcpDoor, *parts: bytes, ends: bool = False) -> bytes:
    """Say ``parts`` to the port, and nothing more if that ``ends`` it; hear until it hangs up."""
    answer = b""
    with socket.create_connection(tuple(door.endpoint), 60) as sock, contextlib.suppress(ConnectionError):
        for part in parts:
            sock.sendall(part)
        if ends:
            with contextlib.suppress(OSError):  # it has hung up already
                sock.shutdown(socket.SHUT_WR)
        while more := sock.recv(65536):
            answer += more
    return answer


def _wrong(door: TcpDoor) -> TcpDoor:
    return dataclasses.replace(door, token=b"another-one")


def test_what_is_stored_over_tcp_is_that_of_the_unix_socket(serve: Serve, join: Join, path: Path) -> None:
    daemon, door = serve()
    over_tcp, over_unix = join(door, prefault=True), join(path)
    assert put(over_tcp, range(20)) == [PutStatus.STORED] * 20
    assert get(over_unix, range(20)) == [GetStatus.DRAM] * 20
    assert put(over_unix, range(20, 30)) == [PutStatus.STORED] * 10
    assert get(over_tcp, range(32)) == [GetStatus.DRAM] * 30 + [GetStatus.MISS] * 2
    assert over_tcp.wait_prefaulted(30)
    assert over_tcp.failed == over_unix.failed == 0
    assert len(daemon.keeper.pools()) == 1
    over_tcp.close()
    until(lambda: daemon.pinned() == 0)


def test_an_engine_with_ranks_over_tcp(serve: Serve, closing: contextlib.ExitStack) -> None:
    _, door = serve()
    engine = Engine(door, ranks=2)
    closing.callback(engine.close)
    engine.open()
    stored = {number: object_of(number, 2 * SIZE) for number in range(3)}
    assert engine.store(engine.take(3), stored) == [PutStatus.STORED] * 3
    engine.leader.connect(soon())
    assert engine.fetch(range(4)) == stored


def test_a_follower_and_the_questions_from_outside(
    serve: Serve, join: Join, closing: contextlib.ExitStack, tmp_path: Path
) -> None:
    daemon, door = serve(ssd_dir=tmp_path / "ssd", ssd_capacity=16 << 20)
    pool = join(door)
    put(pool, range(4))
    told = Told()
    follower = PoolFollower(door, IDENTITY.digest, told)
    closing.callback(follower.close)
    follower.open()
    until(lambda: len(told.held[Tier.DRAM]) == 4)
    put(pool, range(4, 8))
    assert pool.flush(30)
    until(lambda: told.held == truth(daemon))
    assert [view.identity for view in inspect(door, soon()).pools] == [IDENTITY.digest.hex()]
    assert list_objects(door, ListObjects(messages.REVISION, int(Tier.DRAM)), soon()).found == 8
    with contextlib.closing(manage(door, IDENTITY.digest, tmp_path / "ssd", soon())) as link:
        assert link.evict([key_of(1)], soon()) == 1
    until(lambda: key_of(1) not in told.held[Tier.DRAM])
    assert get(pool, [0, 1]) == [GetStatus.DRAM, GetStatus.MISS]


def test_a_wrong_token_is_refused_once_and_costs_misses(
    serve: Serve, join: Join, caplog: pytest.LogCaptureFixture
) -> None:
    daemon, door = serve()
    with pytest.raises(AccessDenied, match="the token is wrong; give daemon_token_file"):
        inspect(_wrong(door), soon())
    until(lambda: daemon.server.connections == 0)
    refused = [record for record in caplog.records if "is refused" in record.message]
    assert [record.levelno for record in refused] == [logging.WARNING]
    pool = join(_wrong(door))
    assert put(pool, [1]) == [PutStatus.NO_ROOM]
    assert get(pool, [1]) == [GetStatus.MISS]
    assert caplog.text.count("which costs hits") == 1
    assert TOKEN not in caplog.text
    assert "another-one" not in caplog.text
    assert repr(door) == repr(_wrong(door))
    assert daemon.keeper.pools() == []
    until(lambda: daemon.server.connections == 0)


def test_who_shows_no_token_gets_one_sentence_and_no_memory(serve: Serve, join: Join) -> None:
    daemon, door = serve()
    greeting = client_of(door)._greeting
    for first in (messages.encode(greeting), messages.encode(Inspect(messages.REVISION)), b"", b"\xc1", b"x" * 8000):
        answer = _talk(door, encode_frame(FrameType.HELLO, 0, 0, first))
        assert b"no token was shown" in answer
        assert len(answer) < 300
    assert daemon.keeper.pools() == []
    pool = join(door)
    assert put(pool, [1]) == [PutStatus.STORED]


@pytest.fixture
def once(serve: Serve) -> tuple[Daemon, TcpDoor]:
    return serve()


@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.binary(max_size=120), max_size=3), st.booleans())
def test_any_bytes_open_no_pool(once: tuple[Daemon, TcpDoor], parts: list[bytes], framed: bool) -> None:
    daemon, door = once
    said = [encode_frame(FrameType.HELLO, 0, 0, part) for part in parts] if framed else parts
    assert len(_talk(door, *said, ends=True)) < 300
    assert daemon.keeper.pools() == []
    assert inspect(door, soon()).pools == []


def test_what_was_overheard_opens_no_other_connection(serve: Serve) -> None:
    _, door = serve()
    heard: list[bytes] = []
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def relay() -> None:
            with listener.accept()[0] as client, socket.create_connection(tuple(door.endpoint), 60) as beyond:
                client.settimeout(60)
                client.sendall(beyond.recv(4096))
                for _ in range(2):
                    heard.append(client.recv(4096))
                    beyond.sendall(heard[-1])
                    client.sendall(beyond.recv(4096))

        thread = threading.Thread(target=relay)
        thread.start()
        assert inspect(TcpDoor(Endpoint(*listener.getsockname()[:2]), door.token), soon()).pools == []
        thread.join(60)
    assert b"the token is wrong" in _talk(door, heard[0])


def test_a_first_frame_that_is_too_long_or_never_whole(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "TALK_S", 0.2)
    daemon, door = serve()
    whole = encode_frame(FrameType.HELLO, 0, 0, bytes(messages.GREETING_BYTES + 1))
    challenge = len(encode_frame(FrameType.HELLO, 0, 0, messages.encode(knocking.Challenge(1, bytes(32)))))
    for said in ((whole,), (whole[:41],), (whole[:30],), (b"GET / HTTP/1.1\r\n\r\n" * 9,), ()):
        assert len(_talk(door, *said)) <= challenge, said
    until(lambda: daemon.server.connections == 0)


def test_strangers_take_no_place_of_others(
    serve: Serve, join: Join, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "MAX_STRANGERS", 2)
    daemon, door = serve(max_connections=6)
    known = join(door)
    assert put(known, [0]) == [PutStatus.STORED]
    assert get(known, [0]) == [GetStatus.DRAM]
    with contextlib.ExitStack() as strangers:
        socks = [strangers.enter_context(socket.create_connection(tuple(door.endpoint), 60)) for _ in range(2)]
        until(lambda: daemon.server.connections == 5)
        assert _talk(door) == b"", "there is no room for another stranger"
        other = join(path)
        assert put(other, [1]) == [PutStatus.STORED]
        assert put(known, [2]) == [PutStatus.STORED]
        assert get(known, [1, 2]) == [GetStatus.DRAM] * 2
        daemon.close()
        assert [len(sock.recv(4096)) > 0 and sock.recv(4096) for sock in socks] == [b""] * 2, "they are sent away"


def test_whoever_took_the_port_learns_no_token_and_gets_no_greeting(join: Join) -> None:
    heard: list[bytes] = []
    with socket.create_server(("127.0.0.1", 0)) as listener:
        door = TcpDoor(Endpoint(*listener.getsockname()[:2]), TOKEN.encode())

        def impostor() -> None:
            sock, _ = listener.accept()
            talk = FrameSocket(sock, (FrameType.HELLO,), messages.FRAME_BYTES)
            talk.send(FrameType.HELLO, 0, messages.encode(knocking.Challenge(1, bytes(32))), soon())
            heard.append(bytes(talk.receive(soon())[2]))
            talk.send(FrameType.HELLO, 0, messages.encode(knocking.Opened(bytes(32))), soon())
            with contextlib.suppress(ConnectionError):
                heard.append(bytes(talk.receive(soon())[2]))
            talk.close()

        thread = threading.Thread(target=impostor)
        thread.start()
        with pytest.raises(AccessDenied, match="does not know the token"):
            inspect(door, soon())
        thread.join(60)
    assert len(heard) == 1
    assert TOKEN.encode() not in heard[0]


@pytest.mark.parametrize("what", ["another file", "nothing", "no file"])
def test_memory_that_cannot_be_opened_costs_misses_and_one_warning(
    serve: Serve, join: Join, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, what: str
) -> None:
    _, door = serve()
    read, write = os.pipe()
    found = os.fstat(read)
    named = {
        "another file": NamedMemory(0, 1, 1),
        "nothing": NamedMemory(1 << 30, 1, 1),
        "no file": NamedMemory(read, found.st_dev, found.st_ino),
    }[what]
    with monkeypatch.context() as patch:
        patch.setattr(session, "name_memory", lambda fd: named)
        pool = join(door)
        assert put(pool, [1]) == [PutStatus.NO_ROOM]
        assert get(pool, [1]) == [GetStatus.MISS]
    os.close(read)
    os.close(write)
    (warning,) = [record.message for record in caplog.records if record.levelno >= logging.WARNING]
    assert "has to run as the daemon's user and in its PID namespace; else use daemon_socket" in warning
    until(lambda: put(pool, [1]) == [PutStatus.STORED])


def test_memory_of_another_user_is_not_mapped(serve: Serve, join: Join, monkeypatch: pytest.MonkeyPatch) -> None:
    _, door = serve()
    with monkeypatch.context() as patch:
        patch.setattr(os, "geteuid", lambda: 12345)
        pool = join(door)
        assert put(pool, [1]) == [PutStatus.NO_ROOM]


def test_a_daemon_that_is_killed_and_started_again(join: Join, path: Path, token_file: Path, tmp_path: Path) -> None:
    door = TcpDoor(Endpoint("127.0.0.1", _free_port()), TOKEN.encode())
    options = ("--listen", str(door.endpoint), "--token-file", str(token_file), "--dram-capacity", "2MiB")
    disk = ("--ssd-dir", str(tmp_path / "ssd"), "--ssd-capacity", "16MiB")
    with contextlib.ExitStack() as ending:
        first = daemon(path, *options, *disk)
        ending.callback(_kill, first)
        assert str(door) in first.first_line
        pool = join(door)
        assert put(pool, range(8)) == [PutStatus.STORED] * 8
        assert pool.flush(30)
        first.kill()
        assert get(pool, range(8)) == [GetStatus.MISS] * 8
        second = daemon(path, *options, *disk)
        ending.callback(_kill, second)
        until(lambda: get(pool, range(8)) == [GetStatus.DRAM] * 8)
        assert put(pool, range(8, 12)) == [PutStatus.STORED] * 4
        pool.close()
        second.terminate()


def _kill(process: Process) -> None:
    if process.process.poll() is None:
        process.kill()


def _free_port() -> int:
    """A port that the system gives nobody by itself, so that it is free again when its daemon was killed."""
    while True:
        port = random.randrange(20_000, 30_000)
        with socket.socket() as sock, contextlib.suppress(OSError):
            sock.bind(("127.0.0.1", port))
            return port
