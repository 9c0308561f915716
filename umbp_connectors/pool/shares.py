"""Threads that share the copies of one batch with the thread that called."""

from __future__ import annotations

import contextlib
import os
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from umbp_connectors.cpus import Apart
from umbp_connectors.pool.buffers import PIECE_BYTES
from umbp_connectors.pool.rows import ALONE_BYTES, RowViews, Views, sizes_of, stretches

_SHARE_BYTES = 1 << 20
"""From about here a second thread pays off."""


class CopyShares:
    """``threads`` threads for copies, of which the caller is one.  Any number of threads may call at once.

    Where there are no more threads to be had, the caller does more, or all.
    """

    def __init__(self, threads: int) -> None:
        self._threads = threads
        self._apart = Apart(frozenset(os.sched_getaffinity(0)))
        self._copies = ThreadPoolExecutor(max(1, threads - 1), "umbp-copy")

    def run(self, views: Views, pages: Sequence[int | None], work: Callable[[int, int], None]) -> None:
        """``work`` on ranges that together are the objects that have a page: see :func:`stretches`.

        Each thread takes the next range that nobody has begun, so that all end at about the same time.  None is at
        work when the call ends, however it does.
        """
        nbytes = sum(sizes_of(views))
        threads = max(1, min(self._threads, nbytes // _SHARE_BYTES))
        ranges = stretches(views, pages, _most(views, threads))
        if threads < 2 or len(ranges) < 2 or nbytes < ALONE_BYTES * len(ranges):
            for start, stop in ranges:
                work(start, stop)
            return
        turns = _Turns(ranges, work)
        helping = self._apart.from_here(turns.help)
        others: list[Future[None]] = []
        try:
            with contextlib.suppress(RuntimeError):  # the system has no more threads, or these are ended
                others += (self._copies.submit(helping) for _ in range(min(threads, len(ranges)) - 1))
            turns.take()
        finally:
            turns.end()
        for other in others:
            if not other.cancel():
                other.result()

    def close(self, wait_for_them: bool) -> None:
        """End the threads; with ``wait_for_them``, when they are done."""
        self._copies.shutdown(wait=wait_for_them)


def _most(views: Views, threads: int) -> int:
    """How many objects are copied in one go, at most: about a piece, and so that all ``threads`` have as much to do."""
    if not isinstance(views, RowViews):
        return 1
    turns = -(-len(views) // (threads * max(1, PIECE_BYTES // max(1, views.nbytes_each))))
    return -(-len(views) // (threads * turns)) if turns else 1


class _Turns:
    """The ranges of one call, which its thread and others take in turns until the call is over."""

    def __init__(self, ranges: Sequence[tuple[int, int]], work: Callable[[int, int], None]) -> None:
        self._waiting = deque(ranges)
        self._work = work
        self._changed = threading.Condition()
        self._helpers = 0
        self._over = False

    def take(self) -> None:
        """Do what nobody has begun."""
        while self._waiting:
            try:
                start, stop = self._waiting.popleft()
            except IndexError:  # another thread was faster
                return
            self._work(start, stop)

    def help(self) -> None:
        """Thread: the same, unless the call is over by now."""
        with self._changed:
            if self._over:
                return
            self._helpers += 1
        try:
            self.take()
        finally:
            with self._changed:
                self._helpers -= 1
                self._changed.notify_all()

    def end(self) -> None:
        """Wait for those who help, and let nobody begin any more, not even who was called and never came."""
        self._waiting.clear()
        with self._changed:
            self._over = True
            self._changed.wait_for(lambda: not self._helpers)
