"""Threads that share the copies of one batch with the thread that called."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from itertools import pairwise
from typing import TypeVar

from umbp_connectors.cpus import Apart
from umbp_connectors.pool.rows import Views, count_stretches, sizes_of

Status = TypeVar("Status")

_SHARE_BYTES = 1 << 20
"""From about here a second thread pays off."""
_SHARED_COPY_BYTES = 192 << 10
"""Copies that are smaller on average are left to one thread: several would wait for each other's GIL after each."""


class CopyShares:
    """``threads`` threads for copies, of which the caller is one.  Any number of threads may call at once."""

    def __init__(self, threads: int) -> None:
        self._threads = threads
        self._apart = Apart(frozenset(os.sched_getaffinity(0)))
        self._copies = ThreadPoolExecutor(max(1, threads - 1), "umbp-copy")

    def run(self, views: Views, work: Callable[[int, int], list[Status]]) -> list[Status]:
        """``work`` on ranges that together are the whole batch, one range per thread; their results in order.

        The caller takes over the ranges that nobody has begun when it is through with its own.
        """
        count = len(views)
        nbytes = sum(sizes_of(views))
        worth_sharing = nbytes >= _SHARED_COPY_BYTES * count_stretches(views)
        shares = max(1, min(self._threads, nbytes // _SHARE_BYTES, count)) if worth_sharing else 1
        bounds = [count * share // shares for share in range(shares + 1)]
        helped = self._apart.from_here(work) if shares > 1 else work
        others = [((start, stop), self._copies.submit(helped, start, stop)) for start, stop in pairwise(bounds[1:])]
        try:
            results = work(0, bounds[1])
            for bound, other in others:
                results += work(*bound) if other.cancel() else other.result()
        finally:
            wait([other for _, other in others if not other.cancel()])
        return results

    def close(self, wait_for_them: bool) -> None:
        """End the threads; with ``wait_for_them``, when they are done."""
        self._copies.shutdown(wait=wait_for_them)
