"""Listens for clients, serves each connection in a thread, and ends without taking anything from those under way."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from pathlib import Path

from umbp_connectors.daemon.doors import TcpDoor, TcpListener
from umbp_connectors.daemon.keeper import PoolKeeper
from umbp_connectors.daemon.session import Session
from umbp_connectors.master.settings import Endpoint
from umbp_connectors.pool.sharing.sockets import Acceptor, Listener, PathInUse
from umbp_core.errors import ConfigError, StateError, UmbpError
from umbp_core.wire.codes import WireError

logger = logging.getLogger(__name__)

MAX_CONNECTIONS = 512
MAX_STRANGERS = 64
"""Connections over TCP that have not shown the token yet, at most: anybody on this host can open some."""
LEASE_S = 30.0
DRAIN_S = 5.0


class DaemonEnding(ConfigError):
    """The last daemon at this path serves nobody any more, and has not closed its pools yet."""


class DaemonServer:
    """Serves the pools of ``keeper`` at the Unix socket ``path``, which only this user can reach.  Any thread.

    With a ``door``, it serves there, too, whoever knows the token of that.  A loan lasts ``lease_s`` seconds at most.
    Beyond ``max_connections``, others are refused.
    """

    def __init__(
        self,
        keeper: PoolKeeper,
        path: Path,
        lease_s: float = LEASE_S,
        max_connections: int = MAX_CONNECTIONS,
        door: TcpDoor | None = None,
    ) -> None:
        self._keeper = keeper
        self._path = path
        self._listener = Listener(path)
        self._door = door
        self._tcp = TcpListener(door.endpoint) if door is not None else None
        self._lease_s = lease_s
        self._max_connections = max_connections
        self._lock = threading.Lock()
        self._sessions: dict[Session, threading.Thread] = {}
        self._threads: list[threading.Thread] = []
        self._closing = False
        self._idle_since = 0.0

    @property
    def connections(self) -> int:
        """How many are being served."""
        with self._lock:
            return len(self._sessions)

    @property
    def endpoint(self) -> Endpoint | None:
        """Where it listens besides its path, if it does."""
        return self._tcp.endpoint if self._tcp is not None else None

    def open(self) -> None:
        """Listen.

        Raises ``ConfigError`` when the path or port cannot be used or a daemon listens there already, ``DaemonEnding``
        when that will do so no more: it may be tried again then.
        """
        if self._threads:
            raise StateError("this daemon listens already")
        try:
            self._listener.open(min(128, self._max_connections))
        except PathInUse as error:
            if not self._path.exists():
                raise DaemonEnding(
                    f"the last daemon at {self._path} has not ended yet; wait until it has, or give another path"
                ) from error
            raise ConfigError(f"a daemon is running at {self._path} already; use it, or give another path") from error
        with contextlib.ExitStack() as undo:
            undo.callback(self._listener.close)
            if self._tcp is not None:
                self._tcp.open(min(128, self._max_connections))
            undo.pop_all()
        self._idle_since = time.monotonic()
        self._take_from(self._listener, None)
        if self._tcp is not None and self._door is not None:
            self._take_from(self._tcp, TcpDoor(self._tcp.endpoint, self._door.token))

    @property
    def idle_s(self) -> float:
        """For how many seconds nobody used a pool; 0 while somebody does.  Who only asks for an overview is nobody."""
        with self._lock:
            used = any(session.is_attached for session in self._sessions)
            return 0.0 if used else time.monotonic() - self._idle_since

    def close(self, drain_s: float = DRAIN_S) -> None:
        """:meth:`stop`, and let the next daemon listen at the path; idempotent."""
        self.stop(drain_s)
        self._listener.close()

    def stop(self, drain_s: float = DRAIN_S) -> None:
        """Take no more clients, let those that hold something come to its end for so long, end them; idempotent.

        No other daemon can listen at the path before :meth:`close`: what this one's pools have on SSD is theirs still.
        """
        with self._lock:
            self._closing = True
            sessions = dict(self._sessions)
        self._listener.stop()
        if self._tcp is not None:
            self._tcp.close()
        for session in sessions:
            session.drain()
        deadline = time.monotonic() + drain_s
        for thread in sessions.values():
            thread.join(max(0.0, deadline - time.monotonic()))
        for session in sessions:
            session.stop()
        for thread in sessions.values():
            thread.join(1.0)
        acceptors, self._threads = self._threads, []
        for acceptor in acceptors:
            acceptor.join(1.0)

    def _take_from(self, listener: Acceptor, door: TcpDoor | None) -> None:
        thread = threading.Thread(target=self._accept, args=(listener, door), name="umbp-daemon", daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept(self, listener: Acceptor, door: TcpDoor | None) -> None:
        """Thread: a session for every connection."""
        while (sock := listener.accept()) is not None:
            with self._lock:
                strangers = sum(session.is_stranger for session in self._sessions)
                if door is not None and strangers >= MAX_STRANGERS:
                    logger.debug(
                        "umbp: %d clients at %s have shown no token yet; another is sent away", strangers, door
                    )
                    sock.close()
                    continue
                refused = ""
                if self._closing or len(self._sessions) - strangers >= self._max_connections:
                    refused = (
                        "the daemon is stopping" if self._closing else "the daemon has too many connections already"
                    )
                session = Session(self._keeper, sock, self._lease_s, refused, door)
                thread = threading.Thread(target=self._serve, args=(session,), name="umbp-client", daemon=True)
                try:
                    thread.start()
                except RuntimeError as error:  # the system has no more threads
                    logger.warning("umbp: a client cannot be served: %s", error)
                    session.end()
                else:
                    self._sessions[session] = thread

    def _serve(self, session: Session) -> None:
        """Thread: one session until its end."""
        try:
            session.run()
        except (OSError, WireError, UmbpError) as error:
            logger.debug("umbp: a client is gone: %s", error)
        except Exception:  # thread top: what is wrong with one client must not end the daemon for the others
            logger.exception("umbp: a client cannot be served any more")
        finally:
            session.end()
            with self._lock:
                del self._sessions[session]
                if session.is_attached:
                    self._idle_since = time.monotonic()
