"""Lets other processes of this user read a pool in place."""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
from pathlib import Path

from umbp_connectors.pool.lending import LentObject, Loan
from umbp_connectors.pool.local import LocalPool
from umbp_connectors.pool.sharing import messages
from umbp_connectors.pool.sharing.messages import (
    Borrow,
    Done,
    Doubt,
    Found,
    Greeting,
    Lent,
    Lookup,
    Place,
    Refusal,
    Welcome,
)
from umbp_connectors.pool.sharing.sockets import FrameSocket, Listener, check_peer
from umbp_core.errors import AccessDenied, StateError
from umbp_core.wire.codes import WireError
from umbp_core.wire.frames import FrameType

logger = logging.getLogger(__name__)

_TALK_S = 5.0
"""How long a reader may take to greet, and to read an answer."""
_NUMBER = {status: number for number, status in enumerate(messages.STATUSES)}


class SharedPoolServer:
    """Serves the open ``pool`` at the Unix socket ``path``, to processes of the same user.

    The socket has mode 0600 and its folder must be the user's own.  Readers map the arena read-only; what they are lent
    is pinned until they return it, their connection ends (as it does when they die), or ``lease_s`` seconds are over.
    Up to ``max_readers`` connections, each served by a thread, never pin more than half of the arena.
    """

    def __init__(
        self, pool: LocalPool, path: str | os.PathLike[str], max_readers: int = 16, lease_s: float = 10.0
    ) -> None:
        self._pool = pool
        self._listener = Listener(Path(path))
        self._max_readers = max_readers
        self._lease_s = lease_s
        self._lock = threading.Lock()
        self._sessions: dict[_Session, threading.Thread] = {}
        self._thread: threading.Thread | None = None
        self._closing = False

    @property
    def readers(self) -> int:
        """Connections that are being served."""
        with self._lock:
            return len(self._sessions)

    def open(self) -> None:
        """Listen.  Raises ``ConfigError`` when the path cannot be used, ``StateError`` when the pool is closed."""
        if self._thread is not None:
            raise StateError("this pool is shared already")
        offer = self._pool.arena_offer()
        objects = max(1, min(messages.LOAN_OBJECTS, offer.pages // (2 * self._max_readers)))
        self._listener.open(self._max_readers)
        self._closing = False
        welcome = Welcome(offer.page_bytes, offer.pages, objects)
        self._thread = threading.Thread(target=self._accept, args=(welcome,), name="umbp-share", daemon=True)
        self._thread.start()

    def close(self, timeout: float = 5.0) -> None:
        """Stop serving, end all loans; idempotent.  Before the pool is closed."""
        with self._lock:
            self._closing = True
            sessions = dict(self._sessions)
        self._listener.close()
        for session in sessions:
            session.stop()
        deadline = time.monotonic() + timeout
        for thread in (self._thread, *sessions.values()):
            if thread is not None:
                thread.join(max(0.0, deadline - time.monotonic()))
        self._thread = None

    def _accept(self, welcome: Welcome) -> None:
        """Thread: one session for every connection."""
        while (sock := self._listener.accept()) is not None:
            session = _Session(self._pool, sock, welcome, self._lease_s)
            thread = threading.Thread(target=self._serve, args=(session,), name="umbp-share-reader", daemon=True)
            with self._lock:
                session.refused = self._closing or len(self._sessions) >= self._max_readers
                try:
                    thread.start()
                except RuntimeError as error:  # the system has no more threads
                    logger.warning("a reader of the shared pool cannot be served: %s", error)
                    session.end()
                else:
                    self._sessions[session] = thread

    def _serve(self, session: _Session) -> None:
        """Thread: one session until its end."""
        try:
            session.run()
        except (OSError, WireError, AccessDenied, StateError) as error:
            logger.debug("a reader of the shared pool is gone: %s", error)
        except Exception:  # thread top: what is wrong with one reader must not end the sharing with the others
            logger.exception("a reader of the shared pool cannot be served any more")
        finally:
            session.end()
            with self._lock:
                del self._sessions[session]


class _Session:
    """One reader's connection."""

    def __init__(self, pool: LocalPool, sock: socket.socket, welcome: Welcome, lease_s: float) -> None:
        self._pool = pool
        self._raw = sock
        self._socket = FrameSocket(sock, (FrameType.HELLO, FrameType.REQUEST), messages.GREETING_BYTES)
        self._welcome = welcome
        self._lease_s = lease_s
        self._loan: Loan | None = None
        self.refused = False

    def stop(self) -> None:
        """Wake the session's thread for its end.  Any thread."""
        self._socket.shut()

    def end(self) -> None:
        """Take the loan back and close the connection."""
        self._return()
        self._socket.close()

    def run(self) -> None:
        """Serve until the reader ends.  Raises when the connection is of no use any more."""
        check_peer(self._raw)
        if not self._greet():
            return
        self._socket.allow(messages.FRAME_BYTES)
        while True:
            kind, sequence, payload = self._next()
            self._return()
            if kind != FrameType.REQUEST:
                return
            request = messages.decode_request(payload)
            if not isinstance(request, Done):
                answer = messages.encode(self._answer(request))
                self._socket.send(FrameType.REPLY, sequence, answer, time.monotonic() + _TALK_S)

    def _next(self) -> tuple[int, int, memoryview]:
        """The next frame; the loan ends when it does not come in time."""
        if self._loan is not None:
            try:
                return self._socket.receive(time.monotonic() + self._lease_s)
            except TimeoutError:
                logger.warning("a reader of the shared pool keeps what it was lent for too long; its lease has ended")
                self._return()
        return self._socket.receive(None)

    def _return(self) -> None:
        loan, self._loan = self._loan, None
        if loan is not None:
            loan.release()

    def _greet(self) -> bool:
        deadline = time.monotonic() + _TALK_S
        _, sequence, payload = self._socket.receive(deadline)
        greeting = messages.decode_as(Greeting, payload)
        problem = self._problem(greeting)
        if problem:
            self._socket.send(FrameType.ERROR, sequence, messages.encode(Refusal(problem)), deadline)
            return False
        answer = messages.encode(self._welcome)
        if not greeting.wants_arena:
            self._socket.send(FrameType.HELLO, sequence, answer, deadline)
            return True
        # Opened anew, for a descriptor with which nobody can write.
        fd = os.open(f"/proc/self/fd/{self._pool.arena_offer().fd}", os.O_RDONLY | os.O_CLOEXEC)
        try:
            self._socket.send(FrameType.HELLO, sequence, answer, deadline, fd)
        finally:
            os.close(fd)
        return True

    def _problem(self, greeting: Greeting) -> str:
        if self.refused:
            return "there are too many readers already; raise max_readers"
        if greeting.revision != messages.REVISION:
            return f"revision {messages.REVISION} is spoken here, not {greeting.revision}; run the same version"
        if greeting.identity != self._pool.identity.digest:
            return "another model, layout or rank is shared here; give the path of your own"
        return ""

    def _answer(self, request: Lookup | Borrow | Doubt) -> Found | Lent | Done:
        if isinstance(request, Lookup):
            return self._look_up(request)
        if isinstance(request, Doubt):
            self._pool.check(request.keys)
            return Done()
        keys = request.keys[: self._welcome.loan_objects]
        self._loan = self._pool.lend(keys, request.timeout_ms / 1000)
        return Lent([_place(lent) for lent in self._loan.objects])

    def _look_up(self, request: Lookup) -> Found:
        if request.prefix:
            return Found(self._pool.count_prefix(request.keys), b"")
        there = bytes(self._pool.exists(request.keys))
        return Found((there + b"\x00").index(0), there)


def _place(lent: LentObject) -> Place:
    return Place(_NUMBER[lent.status], lent.page, lent.nbytes, lent.checksum)
