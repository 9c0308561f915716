"""The daemon's arena, as a client has it mapped."""

from __future__ import annotations

import logging
import mmap
import os
import stat
import threading
from pathlib import Path

import numpy as np

from umbp_connectors.daemon.messages import NamedMemory, Welcome
from umbp_connectors.pool import machine
from umbp_connectors.pool.buffers import Bytes, address_of
from umbp_core.errors import TierUnavailable

logger = logging.getLogger(__name__)

_SLICE = 32 << 20
"""Bytes per call of what makes pages present here: short enough that closing does not wait."""


def name_memory(fd: int) -> NamedMemory:
    """How a client that cannot be handed ``fd``, of this process, finds it."""
    found = os.fstat(fd)
    return NamedMemory(fd, found.st_dev, found.st_ino)


def open_memory(pid: int, memory: NamedMemory) -> int:
    """A descriptor of the ``memory`` that process ``pid`` has, for :class:`MappedArena`.

    The system opens it for processes of the same user only.  Raises ``TierUnavailable`` when it cannot be opened, or
    when it is not what was named: in another PID namespace, or by now, that may be any other process.
    """
    path = Path(f"/proc/{pid}/fd/{memory.fd}")
    advice = "a client over TCP has to run as the daemon's user and in its PID namespace; else use daemon_socket"
    try:
        _check_memory(path.stat(), memory, path, advice)  # before it is opened, which not every file takes well
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    except OSError as error:
        raise TierUnavailable(f"the daemon's memory {path} cannot be opened ({error.strerror}): {advice}") from error
    try:
        _check_memory(os.fstat(fd), memory, path, advice)
    except TierUnavailable:
        os.close(fd)
        raise
    return fd


def _check_memory(found: os.stat_result, memory: NamedMemory, path: Path, advice: str) -> None:
    same = (found.st_dev, found.st_ino) == (memory.device, memory.inode)
    if not (same and stat.S_ISREG(found.st_mode)):
        raise TierUnavailable(f"{path} is not the daemon's memory: {advice}")
    if found.st_uid != os.geteuid():
        raise TierUnavailable(f"the daemon's memory {path} belongs to user {found.st_uid}: {advice}")


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
