"""A door and the desk behind it: what one part of an engine shows of itself."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from umbp_connectors.debug.desk import SnapshotDesk, State
from umbp_connectors.debug.door import DebugDoor


class Window:
    """Shows at a door called ``name`` what ``state`` gives, made where possible between two steps of the owner.

    The owner looks at :attr:`asked` once per step, which costs nothing, and calls :meth:`serve` when it is set.
    """

    def __init__(self, name: str, state: Callable[[], State], folder: Path | None = None) -> None:
        self._desk = SnapshotDesk(state)
        self._door = DebugDoor(name, self._desk.take, folder)

    @property
    def asked(self) -> bool:
        """Whether somebody waits for a snapshot."""
        return self._desk.asked

    @property
    def path(self) -> Path | None:
        """Where the door is; ``None`` while it is closed."""
        return self._door.path

    def serve(self) -> None:
        """Make the snapshot.  The owner's thread, between two steps."""
        self._desk.serve()

    def open(self) -> bool:
        """Open the door; false, with a line in the log, where that is not possible."""
        return self._door.open()

    def close(self) -> None:
        """Close the door; idempotent."""
        self._door.close()
