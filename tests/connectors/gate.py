"""For calls that a test holds up in the middle."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

_PATIENCE = 60.0


class Gate:
    """Takes the place of ``real``: who comes there waits until a test opens it.

    With ``only``, those calls alone wait of whose arguments it is true.
    """

    def __init__(self, real: Callable[..., Any] = lambda *_: None, only: Callable[..., bool] = lambda *_: True) -> None:
        self._real = real
        self._only = only
        self._opened = threading.Event()
        self._arrived = threading.Semaphore(0)

    def __call__(self, *arguments: Any) -> Any:
        if self._only(*arguments):
            self._arrived.release()
            assert self._opened.wait(_PATIENCE), "a test forgot to open the gate"
        return self._real(*arguments)

    def wait_until_held(self, count: int = 1) -> None:
        """Until ``count`` more calls wait."""
        for _ in range(count):
            assert self._arrived.acquire(timeout=_PATIENCE), "nobody came to the gate"

    def open(self) -> None:
        """Let all pass, now and later."""
        self._opened.set()
