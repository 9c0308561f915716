"""TEST-ONLY plug-in of SGLang: the pool's SSD tier misbehaves as a file says, while a real server runs.

The file is named by ``BAD_DISK``; it holds one word: ``good``, ``slow``, ``down`` (every transfer fails), ``full``
(every write fails) or ``stuck`` (nothing ends until the word changes).
"""

from __future__ import annotations

import errno
import functools
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

SLOW_S = 0.05
_never = threading.Event()


def register() -> None:
    """Entry point of ``sglang.srt.plugins``."""
    if "BAD_DISK" not in os.environ:
        return
    from umbp_connectors.pool.slab import SlabFile

    disk = Path(os.environ["BAD_DISK"])
    for name, writes in (("read_into", False), ("read_run", False), ("write_from", True), ("write_run", True)):
        setattr(SlabFile, name, _misbehaving(getattr(SlabFile, name), disk, writes))


def _misbehaving(original: Callable[..., Any], disk: Path, writes: bool) -> Callable[..., Any]:
    @functools.wraps(original)
    def transfer(slab: Any, slot: int, memory: Any) -> Any:
        state = disk.read_text()
        while state == "stuck":
            _never.wait(SLOW_S)
            state = disk.read_text()
        if state == "slow":
            _never.wait(SLOW_S)
        elif state == "down":
            raise slab._typed(OSError(errno.EIO, os.strerror(errno.EIO)), "the transfer")
        elif state == "full" and writes:
            raise slab._typed(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), "the transfer")
        return original(slab, slot, memory)

    return transfer
