"""For what another thread or process will have done soon."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable


def until(condition: Callable[[], bool]) -> None:
    """Look again and again until ``condition`` holds."""
    pause, deadline = threading.Event(), time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, "it never came to that"
        pause.wait(0.005)
