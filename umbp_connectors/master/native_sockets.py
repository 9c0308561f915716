"""Unix sockets in the file system: taken over from the dead, never from the living."""

from __future__ import annotations

import errno
import socket
import stat
from pathlib import Path

from umbp_core.errors import ConfigError

_PROBE_SECONDS = 1.0


def bind_unix(path: Path) -> socket.socket:
    """A socket that is bound to ``path``, for this user only, and does not listen yet.

    What a dead process left there is removed.  Raises ``ConfigError`` when a living one listens there, or when the path
    cannot be used.
    """
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        _clear(path)
        sock.bind(str(path))
        path.chmod(0o600)
    except OSError as error:
        sock.close()
        raise ConfigError(
            f"the native protocol cannot listen on {path}: {reason_of(error)}; give another path"
        ) from error
    except ConfigError:
        sock.close()
        raise
    sock.setblocking(False)
    return sock


def inode_of(path: Path) -> int:
    """What tells a socket from one that somebody else put in its place later; 0 when there is none."""
    try:
        return path.stat().st_ino
    except FileNotFoundError:
        return 0


def unbind_unix(path: Path, inode: int) -> None:
    """Remove ``path``, if it is still the socket that had ``inode``."""
    if inode_of(path) == inode:
        path.unlink(missing_ok=True)


def reason_of(error: OSError) -> str:
    """In words; asyncio hides the system's own in a long sentence."""
    if error.errno == errno.EADDRINUSE:
        return "another process listens there"
    return error.strerror or str(error)


def _clear(path: Path) -> None:
    """Remove a socket that nobody listens on."""
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise ConfigError(f"{path} is not a socket; give a path for the native protocol where nothing is")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(_PROBE_SECONDS)
        try:
            probe.connect(str(path))
        except (ConnectionRefusedError, FileNotFoundError):
            path.unlink(missing_ok=True)
            return
    raise ConfigError(f"another process listens on {path}; stop it, or give another path")
