"""Unix sockets of one user, with frames, descriptors and deadlines."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import socket
import stat
import struct
import threading
import time
from collections import deque
from pathlib import Path

from umbp_connectors.pool.locks import FolderInUse, FolderLock
from umbp_core.errors import AccessDenied, ConfigError, TierUnavailable
from umbp_core.wire.frames import Frame, FrameSplitter, FrameType, encode_frame

logger = logging.getLogger(__name__)

_RECV_BYTES = 256 << 10
_CREDENTIALS = struct.Struct("3i")
_REST_S = 5.0
"""How long the rest of a frame may take, once its first bytes are here."""
_RETRY_S = 0.2
"""How long a listener rests when the system has nothing left for another connection."""


class FrameSocket:
    """Frames over a connected socket; descriptors over a Unix one only.  One thread at a time.

    Raises ``OSError`` (``TimeoutError`` at a deadline) and ``WireError``; the connection is of no use then.
    """

    def __init__(self, sock: socket.socket, kinds: tuple[FrameType, ...], max_payload: int) -> None:
        self._sock = sock
        self._splitter = FrameSplitter(kinds, max_payload)
        self._frames: deque[Frame] = deque()
        self._fds: list[int] = []

    def allow(self, max_payload: int) -> None:
        """Take frames of this size from now on."""
        self._splitter.max_payload = max_payload

    def send(self, kind: FrameType, sequence: int, payload: bytes, deadline: float, fd: int | None = None) -> None:
        """Send one frame, with a descriptor if given."""
        data = memoryview(encode_frame(kind, 0, sequence, payload))
        sent = 0
        if fd is not None:
            self._sock.settimeout(_left(deadline))
            sent = socket.send_fds(self._sock, [data], [fd])
        while sent < len(data):
            self._sock.settimeout(_left(deadline))
            sent += self._sock.send(data[sent:])

    def receive(self, deadline: float | None, with_fd: bool = False) -> Frame:
        """The next frame; waits for its first byte until ``deadline``, or for ever.

        A descriptor that comes with it is kept for :meth:`take_fd` if ``with_fd``, and dropped by the system otherwise.
        """
        while not self._frames:
            if self._splitter.error is not None:
                raise self._splitter.error
            if self._splitter.partial:
                deadline = min(deadline or float("inf"), time.monotonic() + _REST_S)
            self._sock.settimeout(None if deadline is None else _left(deadline))
            data, fds, _, _ = socket.recv_fds(self._sock, _RECV_BYTES, int(with_fd), socket.MSG_CMSG_CLOEXEC)
            self._fds += fds
            if not data:
                raise ConnectionResetError("the other side has ended")
            self._frames += self._splitter.feed(data)
        return self._frames.popleft()

    def take_fd(self) -> int | None:
        """The descriptor that came with what was received; it is the caller's from now on."""
        return self._fds.pop() if self._fds else None

    def close(self) -> None:
        """Close the socket and what came over it; idempotent."""
        for fd in self._fds:
            os.close(fd)
        self._fds.clear()
        self._sock.close()

    def shut(self) -> None:
        """Wake whoever waits on it, from another thread."""
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)


def check_peer(sock: socket.socket) -> None:
    """Raises ``AccessDenied`` unless the other side is a process of this user."""
    _, uid, _ = _CREDENTIALS.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size))
    if uid != os.geteuid():
        raise AccessDenied(f"the process at the other end belongs to user {uid}, not to {os.geteuid()}")


class PathInUse(ConfigError):
    """A living process listens there, or did and holds the path still."""


class Acceptor:
    """Takes connections of a listening socket until it is closed."""

    def __init__(self) -> None:
        self._sock: socket.socket | None = None
        self._closed = threading.Event()

    def accept(self) -> socket.socket | None:
        """The next connection; ``None`` once it is closed.

        What keeps one from being taken, as that no descriptor is free, is waited out.
        """
        told = False
        while (sock := self._sock) is not None:
            try:
                return sock.accept()[0]
            except OSError as error:
                if self._sock is None:
                    break
                if not told:
                    logger.warning("no reader of the shared pool can be taken for now: %s", error)
                    told = True
                self._closed.wait(_RETRY_S)
        return None

    def _listens(self, sock: socket.socket) -> None:
        """Take those of ``sock`` from now on."""
        self._closed.clear()
        self._sock = sock

    def _end(self) -> bool:
        """Wake :meth:`accept` and close the socket; false when that was done before."""
        sock, self._sock = self._sock, None
        if sock is None:
            return False
        self._closed.set()
        with contextlib.suppress(OSError):
            sock.shutdown(socket.SHUT_RDWR)
        sock.close()
        return True


class Listener(Acceptor):
    """A listening socket at ``path`` that only this user can reach."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._path = path
        self._lock = FolderLock(path.parent, f"{path.name}.lock")

    def open(self, backlog: int) -> None:
        """Make the folder if it is missing, take over what a dead process left at the path, and listen.

        Raises ``PathInUse`` when a living process listens there or has not let go of the path yet, ``ConfigError`` when
        the folder is open to others or the path cannot be used.
        """
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._check_folder()
            self._lock.acquire()
            self._clear()
            sock.bind(str(self._path))
            self._path.chmod(0o600)
            sock.listen(backlog)
        except FolderInUse as error:
            sock.close()
            raise PathInUse(f"another process shares its pool at {self._path}; give another path") from error
        except (OSError, TierUnavailable, ConfigError) as error:
            sock.close()
            self._lock.release()
            if isinstance(error, ConfigError):
                raise
            raise ConfigError(f"a pool cannot be shared at {self._path}: {error}; give another path") from error
        self._listens(sock)

    def stop(self) -> None:
        """Wake :meth:`accept`, and listen no more; nobody else can listen at the path yet.  Idempotent."""
        if self._end():
            self._path.unlink(missing_ok=True)

    def close(self) -> None:
        """The same, and let the path go; idempotent."""
        self.stop()
        self._lock.release()

    def _check_folder(self) -> None:
        folder = self._path.parent
        folder.mkdir(mode=0o700, exist_ok=True)
        found = folder.stat()
        if found.st_uid != os.geteuid() or found.st_mode & 0o077:
            raise ConfigError(
                f"{folder} can be entered by others, who could then read what is shared there; "
                "give a folder of this user's own (mode 0700)"
            )

    def _clear(self) -> None:
        if self._path.exists() and not stat.S_ISSOCK(self._path.stat().st_mode):
            raise ConfigError(f"{self._path} is not a socket; give a path where nothing is")
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
            sock.setblocking(False)  # who has no time for one more listens all the same
            if sock.connect_ex(str(self._path)) in (0, errno.EAGAIN):  # its lock was removed, as who tidies /tmp does
                raise PathInUse(f"another process shares its pool at {self._path}; give another path")
        self._path.unlink(missing_ok=True)


def _left(deadline: float) -> float:
    """Seconds until ``deadline``; raises ``TimeoutError`` when there are none."""
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError("the time of this call is over")
    return left
