"""On which processors copying threads run: beside each other, not in turns on the same one.

Linux likes to run a thread where the one that woke it runs.  Two threads that are to share a copy of a few
milliseconds then spend it in turns on one processor while another is idle: measured on two virtual ones, two threads
copied no faster than one (12 GB/s), and 16 GB/s once they were kept apart.  Whatever cannot be set is left as it is.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import threading
from collections.abc import Callable
from typing import ParamSpec, TypeVar

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")


def take_share(index: int, count: int) -> None:
    """Keep the calling thread to every ``count``-th of its processors, from number ``index`` on.

    So ``count`` threads never share one.  Changes nothing where there are fewer processors than threads.
    """
    allowed = sorted(os.sched_getaffinity(0))
    if 1 < count <= len(allowed):
        with contextlib.suppress(OSError):  # a container may have lost processors meanwhile
            os.sched_setaffinity(0, allowed[index::count])


class Apart:
    """Runs work of helping threads on processors that the thread they help is not on.

    For threads that do nothing else.  ``allowed`` are the processors of the process.
    """

    def __init__(self, allowed: frozenset[int]) -> None:
        self._allowed = allowed
        self._current = ctypes.CDLL(None).sched_getcpu
        self._helper = threading.local()

    def from_here(self, work: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
        """``work``, to be run by a helper of the calling thread."""
        if len(self._allowed) < 2:
            return work
        taken = int(self._current())

        def run(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
            self._leave(taken)
            return work(*args, **kwargs)

        return run

    def _leave(self, taken: int) -> None:
        left = self._helper.__dict__
        if left.get("taken") != taken:
            left["taken"] = taken
            with contextlib.suppress(OSError):
                os.sched_setaffinity(0, self._allowed - {taken})
