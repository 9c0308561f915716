"""Follows what a pool of the daemon holds, in an engine that tells others of it."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence

from umbp_connectors.daemon.doors import Door
from umbp_connectors.daemon.heard import HeardPool
from umbp_connectors.daemon.link import NewsLink, follow
from umbp_connectors.pool.books import PoolObserver
from umbp_core.directory import Change
from umbp_core.errors import UmbpError

logger = logging.getLogger(__name__)

_CONNECT_S = 2.0
SILENT_S = 5.0
"""A daemon that says nothing for so long does not answer."""
_FIRST_PAUSE_S = 0.1
_LONGEST_PAUSE_S = 1.0
"""How long a daemon that has no such pool, or is not there, is left alone; at first, and in the end."""


class PoolFollower:
    """Tells ``observer`` what happens in the pool with this ``digest`` of an identity, of the daemon at ``door``.

    The observer is called as by a pool of this process, in a thread of the follower's and under a lock of its own.  It
    is told changes only, the first listing and the end of a daemon included: without one, nothing is there.
    ``attach`` is called before each attempt to follow, with its deadline, to have the daemon open the pool: only its
    clients do that.  Any thread.
    """

    def __init__(
        self, door: Door, digest: bytes, observer: PoolObserver, attach: Callable[[float], object] | None = None
    ) -> None:
        self._door = door
        self._digest = digest
        self._observer = observer
        self._attach = attach or _nothing
        self._lock = threading.Lock()
        self._heard = HeardPool()
        self._ending = threading.Event()
        self._link: NewsLink | None = None
        self._pause_s = _FIRST_PAUSE_S
        self._thread = threading.Thread(target=self._run, name="umbp-follow", daemon=True)

    def open(self) -> None:
        """Start.  Never waits."""
        self._thread.start()

    def call_observer(self) -> None:
        """Call the observer with no changes, so that it can say what it put off."""
        with self._lock:
            self._tell(())

    def close(self, timeout: float = 1.0) -> None:
        """End; what was told stays told.  Waits for the thread for at most ``timeout`` seconds.  Idempotent."""
        self._ending.set()
        with self._lock:
            link = self._link
        if link is not None:
            link.shut()
        if self._thread.is_alive():
            self._thread.join(timeout)

    def _run(self) -> None:
        """Thread: follow, again and again."""
        try:
            while not self._ending.is_set():
                try:
                    self._follow()
                except (OSError, UmbpError) as error:
                    logger.debug("umbp: what the daemon holds cannot be followed: %s", error)
                self._ending.wait(self._pause_s)
                self._pause_s = min(2 * self._pause_s, _LONGEST_PAUSE_S)
        except Exception:  # thread top: the engine goes on, and nothing is told of the daemon any more
            logger.exception("umbp: what the daemon holds is not followed any more")

    def _follow(self) -> None:
        """Listen to one connection until it ends, which raises."""
        deadline = time.monotonic() + _CONNECT_S
        self._attach(deadline)
        link = follow(self._door, self._digest, deadline)
        with self._lock:
            self._link = link
        try:
            while not self._ending.is_set():
                news = link.receive(time.monotonic() + SILENT_S)
                self._pause_s = _FIRST_PAUSE_S
                with self._lock:
                    self._tell(self._heard.take(news))
        finally:
            with self._lock:
                self._link = None
                if not self._ending.is_set():
                    self._tell(self._heard.lose())
            link.close()

    def _tell(self, changes: Sequence[Change]) -> None:
        """With the lock held."""
        self._observer.changed(changes, self._heard.holdings)


def _nothing(deadline: float) -> None:
    """Others have the pool opened."""
