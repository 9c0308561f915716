"""The daemon's arena, as a client has it mapped."""

from __future__ import annotations

import logging
import mmap
import os
import threading

import numpy as np

from umbp_connectors.daemon.messages import Welcome
from umbp_connectors.pool import machine
from umbp_connectors.pool.buffers import Bytes, address_of
from umbp_core.errors import TierUnavailable

logger = logging.getLogger(__name__)

_SLICE = 32 << 20
"""Bytes per call of what makes pages present here: short enough that closing does not wait."""


class MappedArena:
    """Pages of the daemon's memory, shape (pages, page_bytes), for reading and writing.

    They stay what they are when the daemon ends, for as long as somebody looks at them; nobody else sees them then.
    """

    def __init__(self, fd: int, welcome: Welcome, prefault: bool) -> None:
        """Map ``fd``, which is closed.  Raises ``OSError``, and ``TierUnavailable`` when it is too small."""
        self.name = welcome.arena
        needed = welcome.pages * welcome.page_bytes
        try:
            size = os.fstat(fd).st_size
            if size < needed:
                raise TierUnavailable(f"the daemon's memory has {size} bytes instead of {needed}")
            mapping = mmap.mmap(fd, size, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
        finally:
            os.close(fd)
        self._flat: Bytes = np.frombuffer(mapping, dtype=np.uint8, count=needed)
        self.pages: Bytes = self._flat.reshape(welcome.pages, welcome.page_bytes)
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        if prefault:
            self._thread = threading.Thread(target=self._populate, name="umbp-map", daemon=True)
            self._thread.start()

    def close(self) -> None:
        """Let go; the memory is unmapped when nobody looks at it any more.  Idempotent."""
        self._stop.set()

    def wait_present(self, timeout: float) -> bool:
        """Wait until all pages are present in this process, for at most ``timeout`` seconds."""
        if self._thread is not None:
            self._thread.join(timeout)
            return not self._thread.is_alive()
        return True

    def _populate(self) -> None:
        """Thread: have the system fill in this process's page table, for which the first copies would wait."""
        flat = self._flat
        for start in range(0, flat.nbytes, _SLICE):
            if self._stop.is_set():
                return
            piece = flat[start : start + _SLICE]
            if machine.memory_to_spare() < 4 * piece.nbytes:
                return
            try:
                machine.populate(address_of(piece), piece.nbytes)
            except OSError as error:
                logger.debug("umbp: the daemon's memory is mapped page by page: %s", error)
                return
