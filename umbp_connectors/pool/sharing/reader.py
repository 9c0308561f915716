"""Reads a pool that another process of this user owns."""

from __future__ import annotations

import contextlib
import logging
import os
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from umbp_connectors.pool.buffers import ScatteredTarget, View, as_view, is_writeable
from umbp_connectors.pool.checksums import copy_checksummed
from umbp_connectors.pool.outcomes import GetStatus
from umbp_connectors.pool.sharing import messages
from umbp_connectors.pool.sharing.link import Link, connect
from umbp_connectors.pool.sharing.messages import Place
from umbp_core.breaker import Backoff, Breaker
from umbp_core.errors import StateError, UmbpError
from umbp_core.ids import Identity

logger = logging.getLogger(__name__)


class SharedPoolReader:
    """``get``, ``exists`` and ``count_prefix`` of the pool that a :class:`SharedPoolServer` shares at ``path``.

    Bytes are copied by the calling thread out of the server's own memory, which is mapped read-only, and verified here.
    A server that is missing, dead, hanging or another pool's costs misses: every call ends within ``timeout`` seconds
    (``timeout_s`` unless it names its own), and after ``failures`` calls in a row that were not answered, only one now
    and then is tried.  The reader connects by itself, again after a restart of the server.  Any thread; lookups do not
    wait for reads.
    """

    def __init__(
        self, path: str | os.PathLike[str], identity: Identity, timeout_s: float = 5.0, failures: int = 3
    ) -> None:
        self._prefix = identity.digest
        self._timeout_s = timeout_s
        self._breaker = Breaker(random.random, Backoff(), failures)
        self._lock = threading.Lock()
        self._closed = False
        self._lookups = _Channel(Path(path), self._prefix, wants_arena=False)
        self._loans = _Channel(Path(path), self._prefix, wants_arena=True)
        self._failed = 0
        self._warned = ""
        self.gets: Counter[GetStatus] = Counter()

    @property
    def failed(self) -> int:
        """Calls that the server did not answer, or not in time."""
        return self._failed

    def exists(self, keys: Sequence[bytes], timeout: float | None = None) -> list[bool]:
        """Which of ``keys`` can be read now.  Raises ``StateError`` when closed."""
        deadline = self._deadline(timeout)
        there: list[bool] = []

        def ask(link: Link) -> None:
            for start in range(0, len(keys), messages.KEYS):
                found = link.look_up(keys[start : start + messages.KEYS], False, deadline)
                there.extend(map(bool, found.there))

        self._call(self._lookups, deadline, ask)
        return there + [False] * (len(keys) - len(there))

    def count_prefix(self, keys: Sequence[bytes], timeout: float | None = None) -> int:
        """How many of ``keys``, from the first on and without a gap, can be read now."""
        deadline = self._deadline(timeout)
        count = 0

        def ask(link: Link) -> None:
            nonlocal count
            while count < len(keys):
                part = keys[count : count + messages.KEYS]
                found = link.look_up(part, True, deadline)
                count += found.prefix
                if found.prefix < len(part):
                    return

        self._call(self._lookups, deadline, ask)
        return count

    def get(
        self, keys: Sequence[bytes], buffers: Sequence[ScatteredTarget], timeout: float | None = None
    ) -> list[GetStatus]:
        """Fill ``buffers[i]``, whose size must be the object's, with the object under ``keys[i]``, for all ``i``.

        What is not there after ``timeout`` seconds is ``TIMED_OUT``; a server that cannot be asked makes misses.
        Raises ``StateError`` when closed, ``ValueError`` when the arguments do not match.
        """
        deadline = self._deadline(timeout)
        views = [as_view(buffer) for buffer in buffers]
        if len(keys) != len(views) or not all(map(is_writeable, views)):
            raise ValueError(f"{len(keys)} keys need as many buffers that can be written, got {len(views)}")
        statuses: list[GetStatus] = []
        self._call(self._loans, deadline, lambda link: self._read(link, keys, views, deadline, statuses))
        rest = GetStatus.TIMED_OUT if time.monotonic() >= deadline else GetStatus.MISS
        statuses += [rest] * (len(keys) - len(statuses))
        with self._lock:
            self.gets.update(statuses)
        return statuses

    def close(self) -> None:
        """End the connections, after the calls under way; idempotent."""
        self._closed = True
        self._lookups.close()
        self._loans.close()

    def _deadline(self, timeout: float | None) -> float:
        if self._closed:
            raise StateError("this reader of a shared pool is closed")
        return time.monotonic() + (self._timeout_s if timeout is None else timeout)

    def _read(
        self, link: Link, keys: Sequence[bytes], views: Sequence[View], deadline: float, statuses: list[GetStatus]
    ) -> None:
        """Loan by loan, append to ``statuses`` what becomes of each key."""
        for start in range(0, len(keys), link.loan_objects):
            part = slice(start, start + link.loan_objects)
            lent = link.borrow(keys[part], deadline)
            bad: list[bytes] = []
            for key, view, place in zip(keys[part], views[part], lent.places, strict=True):
                late = time.monotonic() >= deadline
                status = GetStatus.TIMED_OUT if late else self._deliver(link, key, view, place)
                statuses.append(status)
                if status is GetStatus.CORRUPT:
                    bad.append(key)
            if bad:
                link.doubt(bad, deadline)
            else:
                link.give_back(deadline)

    def _deliver(self, link: Link, key: bytes, view: View, place: Place) -> GetStatus:
        status = messages.STATUSES[place.status]
        if not status.hit:
            return status
        if place.nbytes != view.nbytes:
            return GetStatus.SIZE_MISMATCH
        found = copy_checksummed(self._prefix + key, view, link.page(place.page, place.nbytes))
        return status if found == place.checksum else GetStatus.CORRUPT

    def _call(self, channel: _Channel, deadline: float, work: Callable[[Link], None]) -> None:
        """``work`` with a link, if there is one to be had in time; what it did not do is a miss."""
        if time.monotonic() >= deadline:
            return
        with self._lock:
            permit = self._breaker.attempt(time.monotonic())
        if permit is None:
            return
        try:
            with channel.link(deadline) as link:
                work(link)
        except _Busy:
            return
        except (OSError, UmbpError) as error:
            self._note_failure(permit, error)
            return
        with self._lock:
            self._breaker.succeeded(permit)

    def _note_failure(self, permit: int, error: Exception) -> None:
        text = str(error)
        with self._lock:
            self._failed += 1
            self._breaker.failed(permit, time.monotonic())
            first, self._warned = text != self._warned, text
        if first:
            logger.warning("a shared pool does not answer, which costs hits: %s", text)


class _Busy(Exception):
    """Other calls had the link for the whole time of this one."""


class _Channel:
    """A link that is made when it is needed, one call at a time."""

    def __init__(self, path: Path, identity: bytes, wants_arena: bool) -> None:
        self._path = path
        self._identity = identity
        self._wants_arena = wants_arena
        self._lock = threading.Lock()
        self._link: Link | None = None

    @contextlib.contextmanager
    def link(self, deadline: float) -> Iterator[Link]:
        """The link, closed when the caller's work with it fails.  Raises ``_Busy``, and as ``connect`` does."""
        if not self._lock.acquire(timeout=max(0.0, deadline - time.monotonic())):
            raise _Busy
        with contextlib.ExitStack() as undo:
            undo.callback(self._lock.release)
            with contextlib.ExitStack() as broken:
                broken.callback(self._drop)
                if self._link is None:
                    self._link = connect(self._path, self._identity, self._wants_arena, deadline)
                yield self._link
                broken.pop_all()

    def close(self) -> None:
        """Close the link, when nobody uses it any more."""
        with self._lock:
            self._drop()

    def _drop(self) -> None:
        link, self._link = self._link, None
        if link is not None:
            link.close()
