"""A few threads that run small tasks, most urgent first."""

from __future__ import annotations

import itertools
import logging
import queue
import threading
import time
from collections.abc import Callable
from typing import Protocol

from umbp_connectors.cpus import take_share

logger = logging.getLogger(__name__)

_STOP_PRIORITY = -1


class TaskQueue(Protocol):
    """Takes tasks, for threads that run them some time."""

    def put(self, priority: float, task: Callable[[], None], /) -> None:
        """Queue a task; smaller ``priority`` first.  Any thread; never blocks."""
        ...


class Lanes:
    """``count`` daemon threads over one priority queue; with ``apart``, never two of them on one processor.

    They are daemons of our own, and not an executor's, because an executor's threads are joined when the
    interpreter exits: one read that hangs in a dead disk would then hang the engine's exit.
    """

    def __init__(self, name: str, count: int, apart: bool = False) -> None:
        self._name = name
        self._count = count
        self._apart = apart
        self._tasks: queue.PriorityQueue[tuple[float, int, Callable[[], None] | None]] = queue.PriorityQueue()
        self._sequence = itertools.count()
        self._threads: list[threading.Thread] = []

    def start(self) -> None:
        """Start the threads."""
        for number in range(self._count):
            thread = threading.Thread(target=self._run, args=(number,), name=f"umbp-{self._name}-{number}", daemon=True)
            self._threads.append(thread)
            thread.start()

    def put(self, priority: float, task: Callable[[], None]) -> None:
        """Queue a task; smaller ``priority`` first, then in order.  Any thread; never blocks."""
        self._tasks.put((priority, next(self._sequence), task))

    def stop(self) -> None:
        """Let every thread end after the task it is in; tasks that are still queued do not run."""
        for _ in self._threads:
            self._tasks.put((_STOP_PRIORITY, next(self._sequence), None))

    def join(self, timeout: float) -> bool:
        """Wait for the threads after :meth:`stop`; False when one is still in a task after ``timeout`` seconds."""
        end = time.monotonic() + timeout
        for thread in self._threads:
            thread.join(max(0.0, end - time.monotonic()))
        return not any(thread.is_alive() for thread in self._threads)

    def _run(self, number: int) -> None:
        if self._apart:
            take_share(number, self._count)
        while (task := self._tasks.get()[2]) is not None:
            try:
                task()
            except Exception:  # thread top: a bug in one task must not take the others' thread away
                logger.exception("a task of %s failed outside of its op, which counts as lost", self._name)
            del task  # whoever is not queued again is gone, and not only when the next one comes
