"""Times and ends: who does not greet, read or finish is let go; a stop lets go of everybody, in order."""

from __future__ import annotations

import asyncio
import socket
import ssl
import stat
import threading
from pathlib import Path

import msgspec
import pytest

from tests.connectors.waiting import until
from tests.master.client.fake_network import FakeClock
from tests.master.native.harness import DEADLINE, DRAM, INCARNATION, Master, RawClient, client, hashes_of
from umbp_connectors.client.native_async import NativeAsyncClient
from umbp_connectors.master import native_connection, native_server
from umbp_connectors.master.native_limits import NativeLimits
from umbp_connectors.master.native_server import NativeServer
from umbp_core.errors import ConfigError, MasterUnavailable
from umbp_core.master.model import Registration
from umbp_core.wire.codes import ErrorCode
from umbp_core.wire.frames import FrameType, encode_frame
from umbp_core.wire.hashes import pack_hashes

CERTS = Path(__file__).resolve().parents[1] / "certs"
LIST_NODES, WATCH, LIST_BLOCKS = 34, 36, 35


def let_go(raw: RawClient) -> str:
    """What the server says before it closes."""
    kind, sequence, payload = raw.receive()
    assert (kind, sequence, payload[1]) == (FrameType.ERROR, 0, ErrorCode.UNAVAILABLE)
    assert raw.at_end()
    return str(payload[2])


def door(running: Master, tmp_path: Path, **limits: float) -> str:
    path = tmp_path / "strict"
    running.serve(path, limits=NativeLimits(check_interval=0.01, **limits))  # type: ignore[arg-type]
    return str(path)


def test_who_does_not_greet_is_let_go(running: Master, tmp_path: Path) -> None:
    with RawClient(door(running, tmp_path, hello_timeout=0.05)) as raw:
        assert "did not greet" in let_go(raw)


def test_who_does_not_finish_a_frame_is_let_go(running: Master, tmp_path: Path) -> None:
    with RawClient(door(running, tmp_path, frame_timeout=0.05)) as raw:
        raw.greet()
        raw.send(encode_frame(FrameType.REQUEST, raw.session, 1, bytes(100))[:60])
        assert "began and did not end" in let_go(raw)


def test_who_drips_a_frame_is_let_go(running: Master, tmp_path: Path) -> None:
    with RawClient(door(running, tmp_path, frame_timeout=0.05)) as raw:
        raw.greet()
        frame = encode_frame(FrameType.REQUEST, raw.session, 1, bytes(1 << 20))
        gone = threading.Event()

        def drip() -> None:
            for at in range(len(frame)):
                if gone.wait(0.005):
                    return
                try:
                    raw.socket.send(frame[at : at + 1])
                except OSError:
                    return

        thread = threading.Thread(target=drip)
        thread.start()
        assert "began and did not end" in let_go(raw)
        gone.set()
        thread.join(DEADLINE)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> FakeClock:
    """The one that the doors look at."""
    made = FakeClock()
    monkeypatch.setattr(native_server, "monotonic", made)
    monkeypatch.setattr(native_connection, "monotonic", made)
    return made


def test_who_is_idle_is_let_go_but_not_who_watches(running: Master, tmp_path: Path, clock: FakeClock) -> None:
    path = door(running, tmp_path, idle_timeout=5.0, watch_interval=0.03)
    with RawClient(path) as idle, RawClient(path) as watching:
        idle.greet()
        watching.greet()
        watching.request(WATCH, INCARNATION, 0)
        assert watching.receive()[0] == FrameType.EVENT
        clock.now += 5.1
        assert "was idle" in let_go(idle)
        for _ in range(5):
            assert watching.receive()[0] == FrameType.EVENT


def test_a_client_comes_back_by_itself_after_it_was_idle(
    running: Master, tmp_path: Path, clock: FakeClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("umbp_connectors.client.native_blocking._FRESH", 0.0)
    path = door(running, tmp_path, idle_timeout=5.0)
    with client(path) as it:
        it.open(DEADLINE)
        assert running.servers[0].connections == 1
        clock.now += 5.1
        until(lambda: running.servers[0].connections == 0)
        assert it.list_nodes(DEADLINE) == []


def test_who_does_not_read_is_let_go(running: Master, tmp_path: Path) -> None:
    path = door(running, tmp_path, write_timeout=0.05, write_buffer=1 << 16)
    with client(path) as it, RawClient(path) as raw:
        it.register(Registration("n"), DEADLINE)
        it.report("n", hashes_of(*range(10**18, 10**18 + 4000)), DRAM, DEADLINE)
        raw.greet()
        page = msgspec.msgpack.encode([LIST_BLOCKS, "n", DRAM, 0, 4000])
        requests = b"".join(encode_frame(FrameType.REQUEST, raw.session, number, page) for number in range(10_000))
        with pytest.raises(OSError, match=r"pipe|reset"):  # the server has had enough of it
            raw.send(requests)
        assert it.list_nodes(DEADLINE)


def test_one_turn_is_short_and_the_rest_comes_later(running: Master, tmp_path: Path) -> None:
    path = tmp_path / "hasty"
    running.serve(path, limits=NativeLimits(turn=0.0))
    with RawClient(str(path)) as raw:
        raw.greet()
        lookup = msgspec.msgpack.encode([16, pack_hashes([b"k"])])
        raw.send(b"".join(encode_frame(FrameType.REQUEST, raw.session, number, lookup) for number in range(1, 500)))
        assert [raw.receive()[1] for _ in range(1, 500)] == list(range(1, 500))


def test_a_stop_answers_what_is_under_way_and_lets_go_of_the_rest(running: Master, tmp_path: Path) -> None:
    path = tmp_path / "ends"
    server, _ = running.serve(path)
    hashes = hashes_of(*range(300_000))
    with RawClient(str(path)) as busy, RawClient(str(path)) as idle, RawClient(str(path)) as watching:
        for raw in (busy, idle, watching):
            raw.greet()
        assert busy.ask(11, "n")[0] == FrameType.REPLY
        watch = watching.request(WATCH, INCARNATION, 0)
        assert watching.ask(LIST_NODES)[0] == FrameType.REPLY
        frame = encode_frame(
            FrameType.REQUEST, busy.session, 9, msgspec.msgpack.encode([17, "n", DRAM, pack_hashes(hashes)])
        )
        received: list[object] = []
        thread = threading.Thread(target=lambda: received.append(busy.receive()[:2]))
        thread.start()
        stopping = running.begin(stopped_when_busy(server))
        busy.send(frame)
        stopping.result(DEADLINE)
        thread.join(DEADLINE)
        assert received == [(FrameType.REPLY, 9)]
        assert busy.at_end()
        assert "stops" in let_go(idle)
        kind, sequence, _ = watching.receive()
        while (kind, sequence) == (FrameType.EVENT, watch):
            kind, sequence, _ = watching.receive()
        assert (kind, sequence) == (FrameType.ERROR, 0)
    assert not path.exists()
    with pytest.raises(FileNotFoundError):
        RawClient(str(path))


async def until_busy(server: NativeServer) -> None:
    """Until a connection works on something large."""
    while not any(connection._task for connection in server._connections):  # noqa: ASYNC110 - nobody else would tell
        await asyncio.sleep(0)


async def stopped_when_busy(server: NativeServer) -> None:
    """In one turn of the loop: the request must not end in between, for then the client hears why it is let go."""
    await until_busy(server)
    await server.stop(DEADLINE)


def test_a_stop_does_not_wait_longer_than_it_may(running: Master, tmp_path: Path) -> None:
    path = tmp_path / "stuck"
    server, _ = running.serve(path)

    async def never(*_: object) -> None:
        await asyncio.get_running_loop().create_future()

    running.service.report = never  # type: ignore[method-assign, assignment]
    with RawClient(str(path)) as raw:
        raw.greet()
        raw.request(17, "n", DRAM, pack_hashes([b"h"]))
        running.run(until_busy(server))
        running.run(server.stop(0.05))
        assert raw.at_end()
    assert server.connections == 0


def test_a_socket_of_the_dead_is_taken_over_and_one_of_the_living_is_not(running: Master, tmp_path: Path) -> None:
    path = tmp_path / "door"
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as dead:
        dead.bind(str(path))
    running.serve(path)
    with client(str(path)) as it:
        assert it.list_nodes(DEADLINE) == []
        with pytest.raises(ConfigError, match="another process listens"):
            running.serve(path)
        assert it.list_nodes(DEADLINE) == []
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_what_is_no_socket_is_left_alone(running: Master, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("precious")
    with pytest.raises(ConfigError, match="not a socket"):
        running.serve(path)
    assert path.read_text() == "precious"
    with pytest.raises(ConfigError, match="another path"):
        running.serve(tmp_path / "no" / "folder")


def test_a_socket_that_somebody_else_put_there_is_not_removed(running: Master, tmp_path: Path) -> None:
    path = tmp_path / "door"
    server, _ = running.serve(path)
    path.unlink()
    path.write_text("somebody else's")
    running.run(server.stop(DEADLINE))
    assert path.read_text() == "somebody else's"


def test_a_port_that_is_taken_is_said_so(running: Master) -> None:
    _, port = running.serve()

    async def again() -> None:
        await NativeServer(running.service, running.observer).listen_tcp("127.0.0.1", port)

    with pytest.raises(ConfigError, match="another process listens there"):
        running.run(again())


# Python 3.10 warns of its own part of a connection whose handshake fails; the server is never given that.
@pytest.mark.filterwarnings("ignore:unclosed transport <asyncio.sslproto:ResourceWarning")
def test_tls(running: Master) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(CERTS / "server.pem", CERTS / "server.key")
    _, port = running.serve(tls=context)
    trusting = ssl.create_default_context(cafile=CERTS / "ca.pem")
    hashes = hashes_of(*range(2000))
    with client(("127.0.0.1", port), tls=trusting) as it:
        it.register(Registration("n"), DEADLINE)
        for _ in range(3):
            it.report("n", hashes, DRAM, DEADLINE)
            assert it.match(hashes, False, DEADLINE)[0].tiers == {DRAM: hashes}

    async def work() -> None:
        it = NativeAsyncClient(("127.0.0.1", port), tls=trusting)
        assert (await it.match(hashes, False, DEADLINE))[0].tiers == {DRAM: hashes}
        it.close()

    asyncio.run(asyncio.wait_for(work(), DEADLINE))
    with client(("127.0.0.1", port), tls=ssl.create_default_context()) as it, pytest.raises(MasterUnavailable):
        it.open(DEADLINE)
    with client(("127.0.0.1", port)) as it, pytest.raises(MasterUnavailable):
        it.open(0.5)
