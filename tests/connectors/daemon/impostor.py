"""Somebody who listens where a daemon should."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from tests.connectors.daemon.kit import SIZE
from umbp_connectors.daemon import messages
from umbp_connectors.daemon.messages import Welcome
from umbp_connectors.pool.sharing.sockets import FrameSocket
from umbp_core.wire.codes import WireError
from umbp_core.wire.frames import FrameType


class Impostor:
    """Gives every client the same ``answers``, one for each request, and then hears no more of it."""

    def __init__(
        self,
        path: Path,
        answers: Sequence[object],
        pages: int = 4,
        size: int | None = None,
        page_bytes: int = SIZE,
    ) -> None:
        path.parent.mkdir(mode=0o700, exist_ok=True)
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(str(path))
        self._listener.listen()
        self._fd = os.memfd_create("impostor")
        os.ftruncate(self._fd, pages * page_bytes if size is None else size)
        self._welcome = messages.encode(Welcome(b"a" * 16, page_bytes, pages, 4, 60_000, 1))
        self._answers = answers
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        with contextlib.ExitStack() as kept:
            while True:
                try:
                    sock, _ = self._listener.accept()
                except OSError:
                    return
                kept.callback(sock.close)
                threading.Thread(target=self._answer, args=(sock,), daemon=True).start()

    def _answer(self, sock: socket.socket) -> None:
        talk = FrameSocket(sock, (FrameType.HELLO, FrameType.REQUEST), messages.FRAME_BYTES)
        deadline = time.monotonic() + 60
        with contextlib.suppress(OSError, WireError):
            talk.receive(deadline)
            talk.send(FrameType.HELLO, 0, self._welcome, deadline, self._fd)
            for answer in self._answers:
                _, sequence, _ = talk.receive(deadline)
                talk.send(FrameType.REPLY, sequence, messages.encode(answer), deadline)
            talk.receive(deadline)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join(60)
        os.close(self._fd)
