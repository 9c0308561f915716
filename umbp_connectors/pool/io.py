"""The threads that wait for the disk, so that nobody else has to."""

from __future__ import annotations

import mmap
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from typing import Protocol

import numpy as np

from umbp_connectors.pool.buffers import Bytes


class Turn:
    """A thread's turn at the disk.  ``left`` is called when it ends."""

    def __init__(self, page_bytes: int, left: Callable[[], None]) -> None:
        self._page_bytes = page_bytes
        self._left = left
        self._spare: Bytes | None = None
        self._at_disk = False

    def begin(self) -> None:
        """The next job has its turn."""
        self._at_disk = True

    def spare(self) -> Bytes:
        """A page-aligned buffer of one page, the thread's own, until the job ends."""
        if self._spare is None:
            self._spare = np.frombuffer(mmap.mmap(-1, self._page_bytes), dtype=np.uint8)
        return self._spare

    def leave(self) -> None:
        """The job is through with the disk, and goes on beside the one that has its turn now; idempotent."""
        if self._at_disk:
            self._at_disk = False
            self._left()


class Job(Protocol):
    """Something that may take as long as the disk likes."""

    def run(self, turn: Turn) -> None:
        """Do it; its end is the end of its ``turn`` at the latest."""
        ...

    def fail(self, error: Exception) -> None:
        """``run`` raised what it should not have."""
        ...


class Task:
    """A call whose caller waits for a while only."""

    def __init__(self, work: Callable[[], None]) -> None:
        self._work = work
        self._ended = threading.Event()
        self._error: Exception | None = None

    def run(self, turn: Turn) -> None:
        """Make the call."""
        del turn
        self._work()
        self._ended.set()

    def fail(self, error: Exception) -> None:
        """The call raised ``error``."""
        self._error = error
        self._ended.set()

    def wait(self, timeout: float) -> bool:
        """Wait for at most ``timeout`` seconds; whether the call has ended.  Raises what it raised."""
        ended = self._ended.wait(timeout)
        if self._error is not None:
            raise self._error
        return ended


class IoThreads:
    """A fixed number of threads for jobs, first come first served: ``at_disk`` at the disk at once, ``beside`` more.

    Those have as many jobs as there may be at the disk, while others copy what they read.  A thread that the disk does
    not let go is lost for that long, and no other takes its turn: a disk that hangs costs these threads at most.  They
    are daemons, so that it cannot keep the process from ending either.
    """

    def __init__(self, at_disk: int, beside: int, page_bytes: int, name: str) -> None:
        self.at_disk = at_disk
        self._page_bytes = page_bytes
        self._changed = threading.Condition()
        self._queue: deque[Job] = deque()
        self._turns = at_disk
        """How many more jobs may be at the disk."""
        self._closing = False
        self._threads = [
            threading.Thread(target=self._work, name=f"{name}-{number}", daemon=True)
            for number in range(at_disk + beside)
        ]

    def start(self) -> None:
        """Start the threads."""
        for thread in self._threads:
            thread.start()

    def submit(self, jobs: Iterable[Job]) -> None:
        """Queue ``jobs``.  Does not wait."""
        with self._changed:
            before = len(self._queue)
            self._queue.extend(jobs)
            self._changed.notify(len(self._queue) - before)

    def withdraw(self, jobs: Iterable[Job]) -> None:
        """Take those of ``jobs`` that have not begun out of the queue again."""
        gone = set(map(id, jobs))
        with self._changed:
            self._queue = deque(job for job in self._queue if id(job) not in gone)

    def close(self, timeout: float) -> None:
        """Drop what is queued and end the threads; whom the disk holds for ``timeout`` seconds is left behind."""
        deadline = time.monotonic() + timeout
        with self._changed:
            self._closing = True
            self._queue.clear()
            self._changed.notify_all()
        for thread in self._threads:
            if thread.ident is not None:
                thread.join(max(0.0, deadline - time.monotonic()))

    def _work(self) -> None:
        """Thread: one job after the other until closed."""
        turn = Turn(self._page_bytes, self._left)
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closing or (self._queue and self._turns))
                if self._closing:
                    return
                job = self._queue.popleft()
                self._turns -= 1
            turn.begin()
            try:
                job.run(turn)
            except Exception as error:  # noqa: BLE001 - op boundary: who waits for it is told, the thread lives
                job.fail(error)
            finally:
                turn.leave()
            del job

    def _left(self) -> None:
        """A turn has ended."""
        with self._changed:
            self._turns += 1
            if self._queue:
                self._changed.notify()
