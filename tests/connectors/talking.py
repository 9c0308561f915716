"""What somebody says to a Unix socket who speaks no protocol."""

from __future__ import annotations

import contextlib
import socket
from pathlib import Path


def talk(path: Path, *parts: bytes) -> bytes:
    """Say ``parts`` and return all that is answered."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.settimeout(60)
        sock.connect(str(path))
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            for part in parts:
                sock.sendall(part)
            sock.shutdown(socket.SHUT_WR)
        answer = b""
        with contextlib.suppress(ConnectionResetError):
            while more := sock.recv(65536):
                answer += more
        return answer
