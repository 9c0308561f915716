"""For calls that a test holds up in the middle."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any


class Gate:
    """Takes the place of ``real``: who comes there waits until a test opens it."""

    def __init__(self, real: Callable[..., Any]) -> None:
        self._real = real
        self._reached = threading.Event()
        self._opened = threading.Event()

    def __call__(self, *arguments: Any) -> Any:
        self._reached.set()
        assert self._opened.wait(60), "a test forgot to open the gate"
        return self._real(*arguments)

    def wait_reached(self) -> None:
        """Until somebody is there."""
        assert self._reached.wait(60), "nobody came to the gate"

    def open(self) -> None:
        """Let everybody through, from now on."""
        self._opened.set()
