"""Where a daemon is reached: at its Unix socket, or at a port of the loopback interface with a token."""

from __future__ import annotations

import contextlib
import ipaddress
import socket
import time
from dataclasses import dataclass, field
from pathlib import Path

from umbp_connectors.daemon import knocking, messages
from umbp_connectors.master.native_sockets import reason_of
from umbp_connectors.master.settings import Endpoint, parse_endpoint
from umbp_connectors.pool.sharing.sockets import Acceptor, FrameSocket, check_peer
from umbp_core.errors import ConfigError
from umbp_core.wire.frames import FrameType

_KINDS = (FrameType.HELLO, FrameType.REPLY, FrameType.EVENT, FrameType.ERROR)


@dataclass(frozen=True, slots=True)
class TcpDoor:
    """A port, and the token that both sides know."""

    endpoint: Endpoint
    token: bytes = field(repr=False)

    def __str__(self) -> str:
        return f"tcp://{self.endpoint}"


Door = Path | TcpDoor
"""The path of a Unix socket, or a port."""


def loopback_endpoint(text: str) -> Endpoint:
    """The endpoint that ``text`` names, as numbers.  Raises ``ValueError`` unless only this host reaches it."""
    host, port = parse_endpoint(text.strip().removeprefix("tcp://"))
    with contextlib.suppress(ValueError):
        address = ipaddress.ip_address("127.0.0.1" if host == "localhost" else host)
        if address.is_loopback:
            return Endpoint(str(address), port)
    raise ValueError(
        f"{host} is not the loopback interface, and a daemon is for its own host; give 127.0.0.1:PORT or [::1]:PORT"
    )


def is_missing(door: Door) -> bool:
    """Whether nobody can listen there, because there is no such socket.  Of a port nobody knows before it tries."""
    return isinstance(door, Path) and not door.exists()


def dial(door: Door, deadline: float) -> FrameSocket:
    """A connection to whoever listens at ``door`` and is the same user, or knows the token.

    Raises ``OSError``, ``WireError``, and ``AccessDenied`` when it is somebody else.
    """
    raw = socket.socket(socket.AF_UNIX if isinstance(door, Path) else family_of(door.endpoint), socket.SOCK_STREAM)
    sock = FrameSocket(raw, _KINDS, messages.GREETING_BYTES)
    with contextlib.ExitStack() as undo:
        undo.callback(sock.close)
        raw.settimeout(max(0.001, deadline - time.monotonic()))
        if isinstance(door, Path):
            raw.connect(str(door))
            check_peer(raw)
        else:
            raw.connect(tuple(door.endpoint))
            if raw.getsockname() == raw.getpeername():  # two ends of one socket: the system chose just this port for us
                raise ConnectionRefusedError(f"nobody listens at {door}")
            raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            knocking.knock(sock, door.token, deadline)
        undo.pop_all()
    return sock


class TcpListener(Acceptor):
    """A listening socket at ``endpoint``; with port 0 at any free one."""

    def __init__(self, endpoint: Endpoint) -> None:
        super().__init__()
        self._endpoint = endpoint

    @property
    def endpoint(self) -> Endpoint:
        """Where it listens."""
        return self._endpoint

    def open(self, backlog: int) -> None:
        """Listen.  Raises ``ConfigError`` when that is not possible."""
        sock = socket.socket(family_of(self._endpoint), socket.SOCK_STREAM)
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind(tuple(self._endpoint))
            sock.listen(backlog)
        except OSError as error:
            sock.close()
            raise ConfigError(
                f"daemon_listen {self._endpoint} cannot be listened at: {reason_of(error)}; give another port"
            ) from error
        self._endpoint = Endpoint(self._endpoint.host, sock.getsockname()[1])
        self._listens(sock)

    def accept(self) -> socket.socket | None:
        """See :meth:`Acceptor.accept`."""
        sock = super().accept()
        if sock is not None:
            with contextlib.suppress(OSError):  # whoever it was is gone again
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return sock

    def close(self) -> None:
        """Wake :meth:`accept`, and listen no more; idempotent."""
        self._end()


def family_of(endpoint: Endpoint) -> socket.AddressFamily:
    """What a socket at ``endpoint`` has to be."""
    return socket.AF_INET6 if ":" in endpoint.host else socket.AF_INET
