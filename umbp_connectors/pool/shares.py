"""Threads that share the copies of one batch with the thread that called."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from itertools import pairwise
from typing import TypeVar

from umbp_connectors.cpus import Apart
from umbp_connectors.pool.rows import Views, count_stretches, sizes_of

Status = TypeVar("Status")

_SHARE_BYTES = 1 << 20
"""From about here a second thread pays off."""
_RANGE_BYTES = 8 << 20
"""What a thread takes at once, at least, where there is enough to do for all: several copies in one go each."""
_RANGES = 4
"""Ranges for each thread, at most."""
_SHARED_COPY_BYTES = 192 << 10
"""Copies that are smaller on average are left to one thread: several would wait for each other's GIL after each."""


class CopyShares:
    """``threads`` threads for copies, of which the caller is one.  Any number of threads may call at once."""

    def __init__(self, threads: int) -> None:
        self._threads = threads
        self._apart = Apart(frozenset(os.sched_getaffinity(0)))
        self._copies = ThreadPoolExecutor(max(1, threads - 1), "umbp-copy")

    def run(self, views: Views, work: Callable[[int, int], list[Status]]) -> list[Status]:
        """``work`` on ranges that together are the whole batch; their results in order.

        Each thread takes the next range that nobody has begun, so that all end at about the same time.
        """
        ranges = self._ranges(views)
        if len(ranges) == 1:
            return work(0, len(views))
        waiting = deque(ranges)
        results: dict[int, list[Status]] = {}

        def take_turns() -> None:
            for start, stop in _taken_from(waiting):
                results[start] = work(start, stop)

        helping = self._apart.from_here(take_turns)
        others = [self._copies.submit(helping) for _ in range(min(self._threads, len(ranges)) - 1)]
        try:
            take_turns()
        finally:
            begun = [other for other in others if not other.cancel()]
            wait(begun)
        for other in begun:
            other.result()
        return [status for start, _ in ranges for status in results[start]]

    def _ranges(self, views: Views) -> list[tuple[int, int]]:
        count = len(views)
        nbytes = sum(sizes_of(views))
        if self._threads < 2 or nbytes < _SHARED_COPY_BYTES * count_stretches(views):
            return [(0, count)]
        shares = min(self._threads, nbytes // _SHARE_BYTES)
        wanted = max(1, min(count, max(shares, min(_RANGES * shares, nbytes // _RANGE_BYTES))))
        return list(pairwise(count * number // wanted for number in range(wanted + 1)))

    def close(self, wait_for_them: bool) -> None:
        """End the threads; with ``wait_for_them``, when they are done."""
        self._copies.shutdown(wait=wait_for_them)


def _taken_from(waiting: deque[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    while True:
        try:
            yield waiting.popleft()
        except IndexError:
            return
