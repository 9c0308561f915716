"""Asking at the doors of live processes."""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from umbp_connectors.debug.door import Question
from umbp_core.errors import UmbpError

ANSWER_BYTES = 256 << 20
"""No answer is taken that is longer."""


class NoAnswer(UmbpError):
    """A living process does not say what it is doing."""


def doors(folder: Path, pid: int | None = None) -> list[Path]:
    """The doors in ``folder``, of process ``pid`` if given; some may be of processes that are gone."""
    return sorted(path for path in folder.glob("*.sock") if pid is None or path.name.endswith(f".{pid}.sock"))


def ask(path: Path, question: Question, timeout_s: float) -> dict[str, Any] | None:
    """What the process behind ``path`` says; ``None`` when it is gone, and then the path is too.

    Raises ``NoAnswer`` when it does not answer in time or not as a door does.
    """
    deadline = time.monotonic() + timeout_s
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
            sock.settimeout(timeout_s)
            sock.connect(str(path))
            sock.sendall(msgspec.json.encode(question) + b"\n")
            return msgspec.json.decode(b"".join(_pieces(sock, deadline)), type=dict[str, Any])
    except (ConnectionRefusedError, FileNotFoundError):
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)
        return None
    except (OSError, msgspec.MsgspecError) as error:
        raise NoAnswer(f"{path} does not answer: {error}; its process may hang outside of Python") from error


def _pieces(sock: socket.socket, deadline: float) -> Iterator[bytes]:
    """The answer as it comes.  Raises ``OSError`` when it is late or too long."""
    room = ANSWER_BYTES
    while room > 0:
        left = deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError("the answer takes too long")
        sock.settimeout(left)
        piece = sock.recv(1 << 20)
        if not piece:
            return
        room -= len(piece)
        yield piece
    raise OSError(f"the answer is longer than {ANSWER_BYTES} bytes")
