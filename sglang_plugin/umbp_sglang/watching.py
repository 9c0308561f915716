"""Counts calls and what the pools say of themselves, so that no call waits for a pool that is elsewhere."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable

from umbp_core.ports import Clock
from umbp_sglang.doors import Door
from umbp_sglang.pools import Moved, StorePool
from umbp_sglang.stats import StoreStats

_WATCH_S = 1.0
"""How often the pools are asked how full they are, at most."""


class PoolWatch:
    """Tells ``stats`` of calls at ``pools()``, and, in a thread of its own, what these say of themselves.

    They are asked after calls only, and behind ``door``.  Any thread.
    """

    def __init__(self, stats: StoreStats, pools: Callable[[], list[StorePool]], door: Door, clock: Clock) -> None:
        self._stats = stats
        self._pools = pools
        self._door = door
        self._clock = clock
        self._lock = threading.Lock()
        self._wanted = threading.Event()
        self._thread: threading.Thread | None = None
        self._last = -math.inf
        self._closed = False

    def counted(self, direction: str, pool: StorePool, work: Callable[[], Moved]) -> Callable[[], Moved]:
        """``work``, which moves pages of ``pool``, counted."""

        def run() -> Moved:
            started = self._clock()
            moved = work()
            self._stats.moved(direction, pool.name, moved, pool.page_bytes, self._clock() - started)
            self.called(moved.late)
            return moved

        return run

    def called(self, late: bool = False) -> None:
        """A call ended.  Count what nobody answered, and have the pools asked soon, unless the call was ``late``."""
        for pool in self._pools():
            unanswered = pool.take_unanswered()
            if unanswered:
                self._stats.degraded("unanswered", unanswered)
        now = self._clock()
        with self._lock:
            if late or self._closed or now - self._last < _WATCH_S:
                return
            self._last = now
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="umbp-watch", daemon=True)
                self._thread.start()
        self._wanted.set()

    def close(self) -> None:
        """Ask the pools no more; waits for those that are being asked.  Idempotent."""
        with self._lock:
            self._closed = True
            thread = self._thread
        self._wanted.set()
        if thread is not None:
            thread.join()

    def _run(self) -> None:
        while True:
            self._wanted.wait()
            self._wanted.clear()
            if self._closed:
                return
            self._door.answer(lambda: self._stats.watch(self._pools()), None)
