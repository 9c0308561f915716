"""For what another thread or process will have done soon."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

PATIENCE = 60.0


def eventually(holds: Callable[[], bool], seconds: float = PATIENCE) -> bool:
    """Look again and again whether something holds, for so many seconds at most."""
    pause, end = threading.Event(), time.monotonic() + seconds
    while not holds():
        if time.monotonic() > end:
            return False
        pause.wait(0.005)
    return True


def until(condition: Callable[[], bool]) -> None:
    """Look again and again until ``condition`` holds."""
    assert eventually(condition), "it never came to that"
