"""Who gets to run while others work: only whoever is let, because the interpreter takes the GIL from nobody."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

NEVER_S = 60.0
ATTEMPTS = 100


class Bystander:
    """A thread that counts how often it gets to run, which is only when the others let go of the GIL."""

    def __init__(self) -> None:
        self.turns = 0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        while not self._over.wait(0.0002):
            self.turns += 1

    @contextmanager
    def watching(self) -> Iterator[Bystander]:
        interval = sys.getswitchinterval()
        sys.setswitchinterval(NEVER_S)  # before it waits for the GIL: a wait that has begun keeps its interval
        try:
            self._thread.start()
            yield self
        finally:
            sys.setswitchinterval(interval)
            self._over.set()
            self._thread.join(NEVER_S)

    def runs_during(self, work: Callable[[], object]) -> bool:
        """Whether it got a turn inside of ``work``; on a machine that others use too, after a few attempts."""
        for _ in range(ATTEMPTS):
            before = self.turns
            work()
            if self.turns > before:
                return True
        return False
