"""What one part of a node can say about one tier."""

from __future__ import annotations

import enum
from collections.abc import Sequence
from typing import NamedTuple


class WordKind(enum.Enum):
    """How a word changes what its source has on its tier."""

    ADD = "add"
    REMOVE = "remove"
    CLEAR = "clear"
    """Nothing is there any more; ``hashes`` is empty."""
    REPLACE = "replace"
    """Exactly ``hashes`` are there, whatever was said before."""


class Word(NamedTuple):
    """``hashes`` are in the form in which the engine publishes them (see ``docs/reporting.md``)."""

    kind: WordKind
    tier: int
    hashes: Sequence[bytes] = ()
