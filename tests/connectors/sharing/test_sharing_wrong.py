"""What the two sides of a shared pool do with bytes that they do not understand."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.connectors.sharing.conftest import pinned
from tests.connectors.sharing.processes import IDENTITY, PAGES, SIZE, key_of, object_of
from tests.connectors.talking import talk
from tests.connectors.waiting import until
from umbp_connectors.pool.checksums import object_checksum
from umbp_connectors.pool.local import GetStatus, LocalPool
from umbp_connectors.pool.sharing import SharedPoolReader, SharedPoolServer, messages
from umbp_connectors.pool.sharing.messages import Borrow, Done, Found, Greeting, Lent, Lookup, Place, Welcome
from umbp_core.wire.frames import FrameType, encode_frame

Share = Callable[..., tuple[LocalPool, SharedPoolServer]]
HELLO = encode_frame(
    FrameType.HELLO, 0, 0, messages.encode(Greeting(messages.REVISION, IDENTITY.digest, wants_arena=False))
)


def _request(payload: bytes) -> bytes:
    return encode_frame(FrameType.REQUEST, 0, 1, payload)


def test_every_bound_of_a_request_is_kept(share: Share, path: Path, reader: SharedPoolReader) -> None:
    pool, server = share(2, max_readers=16)
    welcome = talk(path, HELLO)
    for payload in (
        b"",
        b"\xc1",
        messages.encode([99, []]),
        messages.encode(Lookup([b"k"] * (messages.KEYS + 1), False)),
        messages.encode(Lookup([b"k" * (messages.KEY_BYTES + 1)], False)),
        messages.encode(Lookup([b""], False)),
        messages.encode(Borrow([b"k"] * (messages.LOAN_OBJECTS + 1), 1)),
        messages.encode(Borrow([b"k"], messages.TIMEOUT_MS + 1)),
        messages.encode(Borrow([b"k"], -1)),
        messages.encode([5, ["text"], 1]),
    ):
        assert talk(path, HELLO, _request(payload)) == welcome, payload
    for frame in (
        b"GET / HTTP/1.1\r\n\r\n" * 9,
        encode_frame(FrameType.REQUEST, 7, 1, b""),
        encode_frame(FrameType.EVENT, 0, 1, b""),
        encode_frame(FrameType.REQUEST, 0, 1, b"")[:32] + (messages.FRAME_BYTES + 1).to_bytes(4, "little") + bytes(4),
        HELLO,
    ):
        assert talk(path, HELLO, frame) == welcome
    for hello in (
        encode_frame(FrameType.HELLO, 0, 0, bytes(messages.GREETING_BYTES + 1)),
        encode_frame(FrameType.HELLO, 0, 0, b"\x00"),
        HELLO[:-1],
    ):
        assert talk(path, hello) == b""
    until(lambda: server.readers == 0)
    assert reader.exists([key_of(1)]) == [True]
    assert pinned(pool) == 0


def test_another_revision_is_told_why(share: Share, path: Path) -> None:
    share(1)
    greeting = messages.encode(Greeting(messages.REVISION + 1, IDENTITY.digest, wants_arena=False))
    assert b"run the same version" in talk(path, encode_frame(FrameType.HELLO, 0, 0, greeting))


def test_a_process_of_another_user_is_not_even_answered(
    share: Share, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    share(1)
    assert talk(path, HELLO)
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    assert talk(path, HELLO) == b""


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.binary(max_size=120), max_size=4), st.booleans())
def test_any_bytes_leave_the_server_working(share_once: Path, parts: list[bytes], greets: bool) -> None:
    talk(share_once, *([HELLO] if greets else []), *parts)
    reader = SharedPoolReader(share_once, IDENTITY, timeout_s=30)
    assert reader.exists([key_of(0), b"none"]) == [True, False]
    reader.close()


@pytest.fixture
def share_once(share: Share, path: Path) -> Path:
    if not path.exists():
        share(1, max_readers=16)
    return path


class _Impostor:
    """Listens where a server should, and answers what a test wants."""

    def __init__(self, path: Path, welcome: bytes, answer: bytes, fd: int | None) -> None:
        path.parent.mkdir(mode=0o700, exist_ok=True)
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(str(path))
        self._listener.listen()
        self._talk = (welcome, answer, fd)
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        welcome, answer, fd = self._talk
        while True:
            try:
                sock, _ = self._listener.accept()
            except OSError:
                return
            with sock, contextlib.suppress(OSError):
                sock.settimeout(60)
                sock.recv(65536)
                if fd is None:
                    sock.sendall(welcome)
                else:
                    socket.send_fds(sock, [welcome], [fd])
                sock.recv(65536)
                sock.sendall(answer)
                sock.recv(65536)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join(60)


@pytest.fixture
def memory() -> Iterator[int]:
    fd = os.memfd_create("test", os.MFD_CLOEXEC)
    os.ftruncate(fd, PAGES * SIZE)
    os.pwrite(fd, object_of(0), 0)
    yield fd
    os.close(fd)


GOOD = messages.encode(Welcome(SIZE, PAGES, 8))


def _reply(message: msgspec.Struct | bytes, sequence: int = 1, kind: FrameType = FrameType.REPLY) -> bytes:
    payload = message if isinstance(message, bytes) else messages.encode(message)
    return encode_frame(kind, 0, sequence, payload)


@pytest.mark.parametrize(
    ("welcome", "with_memory", "answer"),
    [
        (GOOD, False, b""),
        (GOOD, True, _reply(Lent([]))),
        (GOOD, True, _reply(Lent([Place(1, 0, SIZE, bytes(16))] * 2))),
        (GOOD, True, _reply(Lent([Place(1, PAGES, SIZE, bytes(16))]))),
        (GOOD, True, _reply(Lent([Place(1, 0, SIZE + 1, bytes(16))]))),
        (GOOD, True, _reply(Lent([Place(0, 0, 0, b"")]), sequence=2)),
        (GOOD, True, _reply(Lent([Place(0, 0, 0, b"")]), kind=FrameType.ERROR)),
        (GOOD, True, _reply(Found(1, b"\x01"))),
        (GOOD, True, _reply(messages.encode([6, [[1, -1, SIZE, bytes(16)]]]))),
        (GOOD, True, _reply(messages.encode([6, [[9, 0, SIZE, bytes(16)]]]))),
        (GOOD, True, _reply(b"\xc1")),
        (GOOD, True, b"not a frame at all, but long enough for the header of one"),
        (messages.encode(Welcome(SIZE, PAGES * 2, 8)), True, b""),
        (messages.encode(Welcome(1 << 40, 1 << 40, 8)), True, b""),
        (messages.encode([2, 0, 0, 0]), True, b""),
        (messages.encode(Done()), True, b""),
    ],
)
def test_a_wrong_answer_is_a_miss(path: Path, memory: int, welcome: bytes, with_memory: bool, answer: bytes) -> None:
    impostor = _Impostor(
        path, encode_frame(FrameType.HELLO, 0, 0, welcome), answer, os.dup(memory) if with_memory else None
    )
    reader = SharedPoolReader(path, IDENTITY, timeout_s=30)
    buffer = bytearray(SIZE)
    assert reader.get([key_of(0)], [buffer]) == [GetStatus.MISS]
    assert reader.failed == 1
    assert buffer == bytes(SIZE)
    reader.close()
    impostor.close()


def test_right_bytes_with_a_wrong_checksum_are_not_a_hit(path: Path, memory: int) -> None:
    answer = _reply(Lent([Place(1, 0, SIZE, bytes(16))])) + _reply(Done(), sequence=2)
    impostor = _Impostor(path, encode_frame(FrameType.HELLO, 0, 0, GOOD), answer, os.dup(memory))
    reader = SharedPoolReader(path, IDENTITY, timeout_s=30)
    assert reader.get([key_of(0)], [bytearray(SIZE)]) == [GetStatus.CORRUPT]
    reader.close()
    impostor.close()


@pytest.mark.parametrize("answer", [Found(2, b"\x01"), Found(1, b"\x01\x01"), Found(1, b"")])
def test_a_wrong_answer_to_a_lookup_is_a_miss(path: Path, answer: Found) -> None:
    impostor = _Impostor(path, encode_frame(FrameType.HELLO, 0, 0, GOOD), _reply(answer), None)
    reader = SharedPoolReader(path, IDENTITY, timeout_s=30)
    assert reader.exists([key_of(0)]) == [False]
    assert reader.failed == 1
    reader.close()
    impostor.close()


def test_what_keeps_a_connection_from_being_taken_is_waited_out(
    share: Share, reader: SharedPoolReader, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("umbp_connectors.pool.sharing.sockets._RETRY_S", 0.01)
    reasons = [OSError(errno.EMFILE, "Too many open files")] * 3
    accept = socket.socket.accept

    def without_descriptors(sock: socket.socket) -> tuple[socket.socket, object]:
        if reasons:
            raise reasons.pop()
        return accept(sock)

    monkeypatch.setattr(socket.socket, "accept", without_descriptors)
    _, server = share(1)
    assert reader.exists([key_of(0)]) == [True]
    assert reasons == []
    assert [record.message for record in caplog.records].count(
        "no reader of the shared pool can be taken for now: [Errno 24] Too many open files"
    ) == 1
    server.close(60)
    assert "umbp-share" not in {thread.name for thread in threading.enumerate()}


def test_a_reader_that_gets_no_thread_costs_no_other_reader(
    share: Share, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, server = share(1)
    start = threading.Thread.start

    def without_threads(thread: threading.Thread) -> None:
        if thread.name == "umbp-share-reader":
            raise RuntimeError("can't start new thread")
        start(thread)

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", without_threads)
        assert talk(path, HELLO) == b""
        until(lambda: server.readers == 0)
    assert talk(path, HELLO) != b""


def test_descriptors_that_nobody_asked_for_are_not_kept(share: Share, path: Path) -> None:
    _, server = share(1)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.settimeout(60)
        sock.connect(str(path))
        sock.sendall(HELLO)
        assert sock.recv(65536)
        socket.send_fds(sock, [_request(messages.encode(Lookup([key_of(0)], False)))], [sock.fileno()])
        assert sock.recv(65536)
    until(lambda: server.readers == 0)  # with a copy of the reader's end it would never see that this is closed


def test_a_frame_that_does_not_end_is_not_waited_for(share: Share, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("umbp_connectors.pool.sharing.sockets._REST_S", 0.05)
    _, server = share(1)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.settimeout(60)
        sock.connect(str(path))
        sock.sendall(HELLO)
        assert sock.recv(65536)
        began = time.monotonic()
        sock.sendall(_request(b"")[:20])
        assert sock.recv(65536) == b""
        assert time.monotonic() - began < 30
    until(lambda: server.readers == 0)


@pytest.mark.parametrize(("uid", "status"), [(os.geteuid(), GetStatus.DRAM), (12345, GetStatus.MISS)])
def test_a_server_of_another_user_is_not_believed(
    path: Path, memory: int, monkeypatch: pytest.MonkeyPatch, uid: int, status: GetStatus
) -> None:
    checksum = object_checksum(IDENTITY.digest + key_of(0), object_of(0))
    answer = _reply(Lent([Place(1, 0, SIZE, checksum)]))
    impostor = _Impostor(path, encode_frame(FrameType.HELLO, 0, 0, GOOD), answer, os.dup(memory))
    monkeypatch.setattr(os, "geteuid", lambda: uid)
    reader = SharedPoolReader(path, IDENTITY, timeout_s=30)
    assert reader.get([key_of(0)], [bytearray(SIZE)]) == [status]
    reader.close()
    impostor.close()
