"""Page-locking an arena for a GPU, in the background and in slices.

Locking hundreds of GiB takes minutes; an engine must not wait for it.  Copies from and to memory that is
not locked yet are right, only slower.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from typing import Protocol

_log = logging.getLogger(__name__)

MAX_SLICE_BYTES = 16 << 30
"""No slice is larger: the driver blocks other work of the process while it locks one."""


class HostRegistrar(Protocol):
    """The driver's two calls; each returns 0 or an error code."""

    def register(self, address: int, nbytes: int) -> int:
        """Lock the pages of a range and make them known to the device."""
        ...

    def unregister(self, address: int) -> int:
        """Undo :meth:`register` of the range that starts at ``address``."""
        ...


def slices(nbytes: int, slice_bytes: int) -> Iterator[tuple[int, int]]:
    """(start, length) of the slices of ``nbytes`` bytes; the last one may be shorter."""
    for start in range(0, nbytes, slice_bytes):
        yield start, min(slice_bytes, nbytes - start)


class ArenaPinner:
    """Locks ``nbytes`` bytes at ``address`` slice by slice in a daemon thread of its own.

    A slice that cannot be locked ends the work with one warning; what is locked stays locked until
    :meth:`close`.
    """

    def __init__(self, registrar: HostRegistrar, address: int, nbytes: int, slice_bytes: int) -> None:
        self._registrar = registrar
        self._address = address
        self._nbytes = nbytes
        self._slice_bytes = slice_bytes
        self._stop = threading.Event()
        self._starting = threading.Lock()
        self._thread: threading.Thread | None = None
        self._pinned: list[int] = []
        self._pinned_bytes = 0

    @property
    def pinned_bytes(self) -> int:
        """Bytes locked so far."""
        return self._pinned_bytes

    def start(self) -> None:
        """Begin locking; returns at once.  Idempotent, any thread."""
        with self._starting:
            if self._thread is None and not self._stop.is_set():
                self._thread = threading.Thread(target=self._run, name="umbp-pin-arena", daemon=True)
                self._thread.start()

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until the thread has ended; false when it still works after ``timeout`` seconds."""
        if self._thread is None:
            return True
        self._thread.join(timeout)
        return not self._thread.is_alive()

    def close(self) -> None:
        """Stop after the slice under way and unlock everything.  Idempotent."""
        with self._starting:
            self._stop.set()
        self.wait()
        while self._pinned:
            error = self._registrar.unregister(self._pinned.pop())
            if error:
                _log.warning("unlocking a slice of the arena failed with driver error %d", error)
        self._pinned_bytes = 0

    def _run(self) -> None:
        for start, length in slices(self._nbytes, self._slice_bytes):
            if self._stop.is_set():
                return
            error = self._registrar.register(self._address + start, length)
            if error:
                _log.warning(
                    "locking the arena for the GPU stopped after %d of %d bytes with driver error %d; copies of the "
                    "rest are slower. Raise the locked-memory limit (ulimit -l) or make the DRAM tier smaller.",
                    start,
                    self._nbytes,
                    error,
                )
                return
            self._pinned.append(self._address + start)
            self._pinned_bytes = start + length
