"""Copies of a running engine that a test can stop."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from umbp_connectors.transfer.engine import TransferEngine
from umbp_core.errors import TransferError
from umbp_core.ops import Direction

PATIENCE = 200.0
CALLS = {
    "gather": Direction.STORE,
    "gather_band": Direction.STORE,
    "scatter": Direction.LOAD,
    "scatter_band": Direction.LOAD,
}


class CopyGate:
    """Stands before the device copies of ``engine``."""

    def __init__(self, engine: TransferEngine) -> None:
        self._copier = engine._tools.copier
        self._open = {direction: threading.Event() for direction in Direction}
        self.open()
        for name, direction in CALLS.items():
            setattr(self._copier, name, self._passing(getattr(self._copier, name), direction))

    def _passing(self, copy: Callable[..., None], direction: Direction) -> Callable[..., None]:
        def wait_and_copy(*arguments: Any) -> None:
            if not self._open[direction].wait(PATIENCE):
                raise TransferError(f"the test never let {direction.name} go on")
            copy(*arguments)

        return wait_and_copy

    def hold(self, direction: Direction) -> None:
        """Let no copy of ``direction`` begin."""
        self._open[direction].clear()

    def open(self) -> None:
        """Let all go on."""
        for event in self._open.values():
            event.set()

    def remove(self) -> None:
        """As if there had never been a gate."""
        self.open()
        for name in CALLS:
            delattr(self._copier, name)
