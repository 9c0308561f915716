"""A master's native door on a loop in a thread of its own, and a client that may say anything."""

from __future__ import annotations

import asyncio
import random
import socket
import struct
import threading
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from umbp_connectors.client.native_blocking import NativeBlockingClient
from umbp_connectors.master.native_server import NativeServer
from umbp_connectors.master.service import MasterService
from umbp_core.master.model import ClientRecord, MasterSettings, NodeInfo
from umbp_core.master.state import MasterState
from umbp_core.wire.frames import FrameType, encode_frame

T = TypeVar("T")
DEADLINE = 60.0
"""Seconds after which a test has failed."""
HBM, DRAM, SSD = 1, 2, 3
INCARNATION = 77
HEADER = struct.Struct("<4sIIQiQII")


class Recorder:
    """A ``MasterObserver`` that keeps the calls it was told of."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, str, str]] = []
        self.metrics: list[tuple[str, tuple[str, ...], list[Any]]] = []

    def call_finished(self, protocol: str, call: str, code: str, seconds: float) -> None:
        assert 0 <= seconds < DEADLINE
        self.calls.append((protocol, call, code))

    def metrics_reported(self, node: str, tags: Any, samples: Any) -> None:
        self.metrics.append((node, tuple(tags), list(samples)))

    def node_changed(self, info: NodeInfo) -> None:
        """Not what is tested here."""

    def _ignore(self, *_args: object) -> None:
        """Not what is tested here."""

    reported = revoked = matched = node_gone = heartbeat = routed = _ignore


class NoStore:
    """A ``ClientStore`` that forgets."""

    def load(self) -> list[ClientRecord]:
        return []

    def catch_up(self, take: Callable[[list[ClientRecord]], None]) -> None:
        """There is never anything."""

    def save(self, record: ClientRecord) -> None:
        """Forget it."""

    def delete(self, node_id: str) -> None:
        """It is forgotten."""

    def close(self) -> None:
        """Nothing is open."""


class Master:
    """A running master; methods are for the thread of the test."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self.now = 1000.0
        self.observer = Recorder()
        self.state = MasterState(MasterSettings(), random.Random(1), INCARNATION)
        self.service = MasterService(self.state, clock=lambda: self.now, store=NoStore(), observer=self.observer)
        self.servers: list[NativeServer] = []

    def begin(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        """Do ``work`` on the master's loop."""
        return asyncio.run_coroutine_threadsafe(work, self.loop)

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """The result of ``work``, done on the master's loop."""
        return self.begin(work).result(DEADLINE)

    def serve(self, path: Path | None = None, **options: Any) -> tuple[NativeServer, int]:
        """A door at ``path``, or at a port of this machine."""

        async def listen() -> tuple[NativeServer, int]:
            server = NativeServer(self.service, self.observer, **options)
            self.servers.append(server)
            if path is None:
                return server, await server.listen_tcp("127.0.0.1", 0)
            await server.listen_unix(path)
            return server, 0

        return self.run(listen())

    def stop(self) -> None:
        """Stop every door."""
        for server in self.servers:
            self.run(server.stop(DEADLINE))
        self.servers.clear()


@contextmanager
def master(loop: asyncio.AbstractEventLoop) -> Iterator[Master]:
    """A master on ``loop`` that ends with the block."""
    thread = threading.Thread(target=loop.run_forever, name="master")
    thread.start()
    try:
        it = Master(loop)
        yield it
        it.stop()
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join(DEADLINE)
        assert not thread.is_alive()
        loop.run_until_complete(loop.shutdown_asyncgens())
        loop.close()


def exactly(sock: socket.socket, count: int) -> bytes:
    """The next ``count`` bytes.  Raises ``EOFError`` when the other side closes before."""
    data = b""
    while len(data) < count:
        part = sock.recv(count - len(data))
        if not part:
            raise EOFError(f"the other side closed after {len(data)} of {count} bytes")
        data += part
    return data


def drain(sock: socket.socket) -> None:
    """Take all that the other side says, until it closes."""
    with suppress(ConnectionResetError):
        while sock.recv(1 << 16):
            pass


class RawClient:
    """A socket on which anything may be said."""

    def __init__(self, address: str | tuple[str, int]) -> None:
        family = socket.AF_UNIX if isinstance(address, str) else socket.AF_INET
        self.socket = socket.socket(family, socket.SOCK_STREAM)
        self.socket.settimeout(DEADLINE)
        try:
            self.socket.connect(address)
        except OSError:
            self.socket.close()
            raise
        self.session = 0
        self.sequence = 0

    def __enter__(self) -> RawClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()

    def greet(self, token: bytes = b"", max_frame: int = 1 << 24) -> list[Any]:
        """The server's welcome; its session counts from now on."""
        self.send(encode_frame(FrameType.HELLO, 0, 0, msgspec.msgpack.encode([1, 1, "test", "", token, max_frame])))
        kind, sequence, payload = self.receive()
        assert (kind, sequence) == (FrameType.HELLO, 0), payload
        self.session = payload[2]
        return payload  # type: ignore[no-any-return]

    def send(self, data: bytes) -> None:
        """Anything."""
        self.socket.sendall(data)

    def request(self, *fields: Any) -> int:
        """A request; returns its number."""
        return self.payload(msgspec.msgpack.encode(fields))

    def payload(self, payload: bytes) -> int:
        """The same with a payload that may be anything."""
        self.sequence += 1
        self.send(encode_frame(FrameType.REQUEST, self.session, self.sequence, payload))
        return self.sequence

    def ask(self, *fields: Any) -> tuple[int, list[Any]]:
        """Type and fields of the answer to a request."""
        number = self.request(*fields)
        kind, sequence, payload = self.receive()
        assert sequence == number
        return kind, payload

    def receive(self) -> tuple[int, int, list[Any]]:
        """Type, sequence and fields of the next frame."""
        data = self.receive_bytes()
        header = HEADER.unpack(data[:40])
        return header[2], header[5], msgspec.msgpack.decode(data[40:])

    def receive_bytes(self) -> bytes:
        """The next frame as it is."""
        header = exactly(self.socket, 40)
        return header + exactly(self.socket, HEADER.unpack(header)[6])

    def at_end(self) -> bool:
        """Whether the server has closed, with nothing more said."""
        try:
            return self.socket.recv(1) == b""
        except ConnectionResetError:
            return True

    def drain(self) -> None:
        """Take all that the server says, until it closes."""
        drain(self.socket)


class FakeMaster:
    """A master that does what a test says: one function per connection that comes, in their order."""

    def __init__(self, path: Path, *scripts: Callable[[RawServerEnd], None]) -> None:
        self.address = str(path)
        self.failures: list[BaseException] = []
        self._scripts = scripts
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.settimeout(DEADLINE)
        self._listener.bind(self.address)
        self._listener.listen()
        self._thread = threading.Thread(target=self._run, name="fake master")

    def __enter__(self) -> FakeMaster:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.join(DEADLINE)
        self._listener.close()
        assert self.failures == []
        assert not self._thread.is_alive()

    def _run(self) -> None:
        for script in self._scripts:
            connection, _ = self._listener.accept()
            connection.settimeout(DEADLINE)
            try:
                with RawServerEnd(connection) as end:
                    script(end)
            except BaseException as error:  # noqa: BLE001 - the test that waits for the thread fails with it
                self.failures.append(error)


class RawServerEnd:
    """The server's end of a connection on which anything may be said."""

    SESSION = 5

    def __init__(self, connection: socket.socket) -> None:
        self.socket = connection

    def __enter__(self) -> RawServerEnd:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()

    def welcome(self) -> list[Any]:
        """Take a client's hello, which is returned, and answer it."""
        kind, _, hello = self.receive()
        assert kind == FrameType.HELLO
        self.send(FrameType.HELLO, 0, [2, 1, self.SESSION, 1 << 24, "fake"], session=0)
        return hello

    def send(self, kind: FrameType, sequence: int, fields: list[Any], session: int = SESSION) -> None:
        """A frame."""
        self.socket.sendall(encode_frame(kind, session, sequence, msgspec.msgpack.encode(fields)))

    def receive(self) -> tuple[int, int, list[Any]]:
        """Type, sequence and fields of the next frame."""
        header = HEADER.unpack(exactly(self.socket, 40))
        return header[2], header[5], msgspec.msgpack.decode(exactly(self.socket, header[6]))

    def until_closed(self) -> None:
        """Read until the client has closed."""
        drain(self.socket)


@contextmanager
def client(address: str | tuple[str, int], **options: Any) -> Iterator[NativeBlockingClient]:
    """A blocking client that is closed with the block."""
    it = NativeBlockingClient(address, **options)
    try:
        yield it
    finally:
        it.close()


def hashes_of(*numbers: int) -> list[bytes]:
    """Hashes as an engine publishes them."""
    return [str(number).encode() for number in numbers]
