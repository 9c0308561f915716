"""The Unix socket at which a process says what it is doing.

One question per connection: a line of JSON (:class:`Question`), at most :data:`QUESTION_BYTES` long.  The answer is a
JSON object, up to the end of the connection.  Only the user of the process can ask: the folder and the socket are that
user's alone, and so is who connects.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import msgspec

from umbp_connectors.debug.desk import State
from umbp_connectors.pool.sharing.sockets import check_peer
from umbp_core.errors import UmbpError

logger = logging.getLogger(__name__)

QUESTION_BYTES = 1024
ANSWER_S = 5.0
"""How long somebody may take to ask, and to read the answer."""

_NAMES = 64


class Question(msgspec.Struct, forbid_unknown_fields=True):
    """What somebody wants to know: with ``stacks``, also where every thread of the process is."""

    stacks: bool = False


def folder_of(user: int | None = None) -> Path:
    """Where the doors of ``user``'s processes are (this one's by default)."""
    return Path(tempfile.gettempdir()) / f"umbp-debug-{os.geteuid() if user is None else user}"


def sweep(folder: Path) -> None:
    """Remove the doors that dead processes left in ``folder``: nobody listens there any more."""
    for path in folder.glob("*.sock"):
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
            sock.setblocking(False)
            try:
                sock.connect(str(path))
            except ConnectionRefusedError:
                path.unlink(missing_ok=True)
            except OSError:  # it is busy, or gone meanwhile
                continue


class DebugDoor:
    """Answers at ``<folder>/<name>.<pid>.sock`` with what ``state`` gives.

    ``state`` is called on the door's thread, for one question at a time.
    """

    def __init__(self, name: str, state: Callable[[], State], folder: Path | None = None) -> None:
        self._name = name
        self._state = state
        self._folder = folder if folder is not None else folder_of()
        self._sock: socket.socket | None = None
        self._thread: threading.Thread | None = None
        self.path: Path | None = None
        """Where the door is; ``None`` while there is none."""

    def open(self) -> bool:
        """Answer from now on.  Where that is not possible it is logged, and false: nothing depends on a door."""
        try:
            self._check_folder()
            sweep(self._folder)
            self._sock, self.path = self._bound()
        except OSError as error:
            logger.info("umbp debug dump cannot ask this process: %s", error)
            return False
        self._thread = threading.Thread(target=self._serve, args=(self._sock,), name="umbp-debug", daemon=True)
        self._thread.start()
        return True

    def close(self) -> None:
        """Answer no more; idempotent."""
        sock, self._sock = self._sock, None
        if sock is None:
            return
        if self.path is not None:
            self.path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            sock.shutdown(socket.SHUT_RDWR)
        if self._thread is not None:
            self._thread.join(ANSWER_S)
        sock.close()
        self.path = None

    def _check_folder(self) -> None:
        self._folder.mkdir(mode=0o700, exist_ok=True)
        found = self._folder.lstat()
        if found.st_uid != os.geteuid() or found.st_mode & 0o077 or self._folder.is_symlink():
            raise PermissionError(f"{self._folder} is open to others, or not this user's")

    def _bound(self) -> tuple[socket.socket, Path]:
        """A listening socket at the first free name: a process may have several of the same.

        It has its name only once it listens, so that nobody takes it for one that a dead process left.
        """
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        new = self._folder / f"{os.getpid()}.{threading.get_ident():x}.new"
        try:
            new.unlink(missing_ok=True)
            sock.bind(str(new))
            new.chmod(0o600)
            sock.listen(4)
            return sock, self._named(new)
        except OSError:
            sock.close()
            raise
        finally:
            new.unlink(missing_ok=True)

    def _named(self, new: Path) -> Path:
        for number in range(_NAMES):
            suffix = f"-{number + 1}" if number else ""
            path = self._folder / f"{self._name}{suffix}.{os.getpid()}.sock"
            with contextlib.suppress(FileExistsError):
                path.hardlink_to(new)
                return path
        raise FileExistsError(f"{self._folder} has {_NAMES} doors of this process already")

    def _serve(self, sock: socket.socket) -> None:
        """Thread: one question after the other."""
        while self._sock is sock:
            try:
                asker, _ = sock.accept()
            except OSError:
                return
            with asker:
                try:
                    asker.settimeout(ANSWER_S)
                    check_peer(asker)
                    asker.sendall(self._answer(_question(asker)))
                except (OSError, UmbpError, msgspec.MsgspecError) as error:
                    logger.debug("a question at %s was not answered: %s", self.path, error)

    def _answer(self, question: Question) -> bytes:
        begin = time.perf_counter()
        try:
            state = dict(self._state())
        except Exception as error:  # noqa: BLE001 - producer boundary: the rest of the answer is given
            state = {"problem": f"{type(error).__name__}: {error}"}
        state = {"door": self._name, "pid": os.getpid(), **state, "seconds": round(time.perf_counter() - begin, 6)}
        if question.stacks:
            state["threads"] = stacks()
        return msgspec.json.encode(state)


def _question(asker: socket.socket) -> Question:
    """The line that was asked; raises ``MsgspecError`` for anything else."""
    line = b""
    while not line.endswith(b"\n"):
        if len(line) > QUESTION_BYTES:
            raise msgspec.ValidationError("the question is too long")
        more = asker.recv(QUESTION_BYTES)
        if not more:
            break
        line += more
    return msgspec.json.decode(line or b"{}", type=Question)


def stacks() -> dict[str, list[str]]:
    """Where every thread of this process is, innermost call last."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    return {
        f"{names.get(ident, 'unknown')} ({ident})": [
            f"{frame.filename}:{frame.lineno} {frame.name}" for frame in traceback.extract_stack(top)
        ]
        for ident, top in sys._current_frames().items()
    }
