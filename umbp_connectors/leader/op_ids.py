"""Fresh op ids: unique over processes and restarts, and cheap, since a busy engine needs several per step."""

from __future__ import annotations

import itertools
import uuid


class OpIds:
    """Calls give op ids: 64 random bits of this object, then a counter, both in hex."""

    def __init__(self) -> None:
        self._prefix = uuid.uuid4().hex[:16]
        self._numbers = itertools.count(1)

    def __call__(self) -> str:
        """An id that was never given out."""
        return f"{self._prefix}{next(self._numbers):016x}"
