"""Snapshots of what one thread owns, taken for another one."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping

State = Mapping[str, object]
"""Plain data: strings, numbers, lists and mappings of these."""

_TRIES = 100


class SnapshotDesk:
    """Has ``make`` called by the thread that owns what it looks at, or, where that one does not come, by who asks.

    The owner calls :meth:`serve` where nothing is half done.  An owner that is idle or hangs does not come; after
    ``patience_s`` seconds its data is read from outside, where every value is right and two of them may be of different
    moments.  ``make`` only reads.
    """

    def __init__(self, make: Callable[[], State], patience_s: float = 0.5) -> None:
        self._make = make
        self._patience_s = patience_s
        self._asking = threading.Lock()
        self._made = threading.Event()
        self._state: State = {}
        self.asked = False
        """Whether somebody waits for a snapshot; worth a look before :meth:`serve` is called."""

    def serve(self) -> None:
        """Make the snapshot that somebody waits for.  The owner's thread."""
        if self.asked:
            self.asked = False
            self._state = self._make()
            self._made.set()

    def take(self) -> State:
        """A snapshot, and under ``taken`` who made it.  Any thread but the owner's.

        Raises ``RuntimeError`` when the data changes faster than it can be read.
        """
        with self._asking:
            self._made.clear()
            self.asked = True
            if self._made.wait(self._patience_s):
                return {"taken": "between two steps", **self._state}
            self.asked = False
            return {"taken": "from outside: no step came", **self._read()}

    def _read(self) -> State:
        for _ in range(_TRIES):
            try:
                return self._make()
            except RuntimeError:  # a mapping grew while it was being read
                continue
        raise RuntimeError("what was to be read changed all the time; ask again")
