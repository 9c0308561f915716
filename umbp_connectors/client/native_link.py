"""One blocking connection to a native door, for one thread at a time."""

from __future__ import annotations

import select
import socket
import ssl
import struct
from contextlib import suppress
from time import monotonic
from typing import TypeVar

from umbp_connectors.client.native_session import (
    Identity,
    NativeAddress,
    NativeSession,
    failure_of,
    garbled,
    unreachable,
)
from umbp_core.errors import InvalidRequest, MasterError
from umbp_core.wire.codec import decode_as
from umbp_core.wire.frames import Frame, FrameType
from umbp_core.wire.messages import Message

M = TypeVar("M", bound=Message)

_READ = 1 << 16
_TIMEVAL = struct.Struct("@ll")
_MICRO = 1_000_000
_SLACK = 0.001
"""Seconds that a deadline may be missed by, to save a call to the kernel."""
_REPLY = int(FrameType.REPLY)


class Refused(Exception):
    """The answer to a request is an error; the connection is fine."""

    def __init__(self, error: MasterError) -> None:
        super().__init__(str(error))
        self.error = error


class NativeLink:
    """A connected socket.  Deadlines are seconds of ``time.monotonic``.

    :meth:`greet` first.  After anything that is raised but :class:`Refused`, only :meth:`close` may be called.
    """

    def __init__(self, sock: socket.socket, address: NativeAddress, identity: Identity) -> None:
        self._used = monotonic()
        self._socket = sock
        self._address = address
        self._session = NativeSession(identity)
        self._by_kernel = not isinstance(sock, ssl.SSLSocket)
        self._armed = 0.0

    def greet(self, deadline: float) -> None:
        """Exchange hellos.  Raises what the master refused us with, ``ProtocolError``, or ``MasterUnavailable``."""
        try:
            self._send(self._session.hello(), deadline)
            while not self._session.greeted(self._receive(deadline)):
                self._arm(deadline)
        except OSError as error:
            raise unreachable(self._address, error) from error

    def ask(self, request: Message, kind: type[M], deadline: float) -> M:
        """The answer to ``request``.

        Raises :class:`Refused` with what the master says instead, ``MasterUnavailable`` when there was no answer in
        time, and ``ProtocolError`` when it was not understood.
        """
        session = self._session
        try:
            frame = session.request(request)
        except InvalidRequest as error:
            raise Refused(error) from None
        try:
            self._send(frame, deadline)
            frames = session.splitter.feed(self._receive(deadline))
            while not frames:
                if session.splitter.error is not None:
                    raise garbled(self._address, f"no answer but this: {session.splitter.error}")
                self._arm(deadline)
                frames = session.splitter.feed(self._receive(deadline))
        except OSError as error:
            raise unreachable(self._address, error) from error
        frame_type, sequence, payload = frames[0]
        if frame_type == _REPLY and sequence == session.sequence and len(frames) == 1:
            reply = decode_as(kind, payload)
            self._used = monotonic()
            return reply
        raise self._failed(frames[0])

    def is_fresh(self, seconds: float) -> bool:
        """Whether it was used less than ``seconds`` ago, or nothing came that nobody asked for: mostly its end."""
        if monotonic() - self._used < seconds:
            return True
        poll = select.poll()
        poll.register(self._socket, select.POLLIN)
        return not poll.poll(0)

    def interrupt(self) -> None:
        """End what another thread does with this connection; it gets ``MasterUnavailable``.  Any thread."""
        try:
            self._socket.shutdown(socket.SHUT_RDWR)
        except OSError:
            return  # it is not connected any more

    def close(self) -> None:
        """End the connection."""
        self._socket.close()

    def _failed(self, answer: Frame) -> Exception:
        """What to raise for something that is not the reply."""
        kind, sequence, payload = answer
        if kind == FrameType.ERROR and sequence in (0, self._session.sequence):
            failure = failure_of(payload)
            return Refused(failure) if sequence else failure
        return garbled(self._address, f"an answer to request {sequence}, not {self._session.sequence}")

    def _send(self, data: bytes, deadline: float) -> None:
        self._arm(deadline)
        try:
            sent = self._socket.send(data)
        except BlockingIOError:  # the kernel's clock is not ours: arming tells whether the time is up
            sent = 0
        if sent < len(data):
            self._send_rest(memoryview(data)[sent:], deadline)

    def _send_rest(self, rest: memoryview, deadline: float) -> None:
        while rest:
            self._arm(deadline)
            with suppress(BlockingIOError):  # as above
                rest = rest[self._socket.send(rest) :]

    def _receive(self, deadline: float) -> bytes:
        """What comes next.  The socket is armed."""
        while True:
            try:
                data = self._socket.recv(_READ)
            except BlockingIOError:  # as above
                self._arm(deadline)
                continue
            if not data:
                raise ConnectionResetError("it closed the connection")
            return data

    def _arm(self, deadline: float) -> None:
        """Make the socket give up at ``deadline``, about.  Raises ``TimeoutError`` when that is over.

        The kernel's own timeouts save two system calls in each direction, and are set only when they change.
        """
        left = deadline - monotonic()
        if left <= 0:
            raise TimeoutError
        if not self._by_kernel:
            self._socket.settimeout(left)
        elif not left / 2 < self._armed < left + _SLACK:
            timeval = _TIMEVAL.pack(*divmod(max(int(left * _MICRO), 1), _MICRO))
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, timeval)
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, timeval)
            self._armed = left


def connect(address: NativeAddress, identity: Identity, deadline: float, tls: ssl.SSLContext | None) -> NativeLink:
    """A connection to ``address``; with ``tls`` a TCP connection is encrypted, and the master's name is checked.

    Raises ``MasterUnavailable``.  To look a name up is the system's matter, and may take longer than ``deadline``.
    """
    try:
        sock = _unix(address, deadline) if isinstance(address, str) else _internet(address, deadline, tls)
    except OSError as error:
        raise unreachable(address, error) from error
    if not isinstance(sock, ssl.SSLSocket):
        sock.setblocking(True)
    return NativeLink(sock, address, identity)


def _unix(path: str, deadline: float) -> socket.socket:
    return _connected(socket.AF_UNIX, path, deadline)


def _internet(address: tuple[str, int], deadline: float, tls: ssl.SSLContext | None) -> socket.socket:
    failure = OSError(f"{address[0]} has no address")
    for family, _, _, _, place in socket.getaddrinfo(*address, type=socket.SOCK_STREAM):
        try:
            sock = _connected(family, place, deadline)
        except OSError as error:
            failure = error
            continue
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        if tls is None:
            return sock
        try:
            return tls.wrap_socket(sock, server_hostname=address[0])
        except OSError:
            sock.close()
            raise
    raise failure


def _connected(family: int, place: object, deadline: float) -> socket.socket:
    left = deadline - monotonic()
    if left <= 0:
        raise TimeoutError
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.settimeout(left)
        sock.connect(place)  # type: ignore[arg-type]
    except OSError:
        sock.close()
        raise
    return sock
