"""Tiers of either kind as numbered cells of bytes, and a process that writes to one until it is killed."""

from __future__ import annotations

import random
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Protocol

import pytest

from umbp_core.ports import DramTier, SsdTier

CELL = 8192
CELLS = 5
PATIENCE_S = 60.0
"""Seconds that anything here may take; it takes far less."""


def pattern(cell: int, generation: int, nbytes: int) -> bytes:
    """Bytes that say where and when they were written."""
    word = b"%d/%d;" % (cell, generation)
    return (word * (nbytes // len(word) + 1))[:nbytes]


class Cells(Protocol):
    """A tier of either kind, as numbered cells of bytes."""

    def read(self, cell: int, nbytes: int) -> bytes:
        """The first bytes of a cell."""
        ...

    def write(self, cell: int, data: bytes) -> None:
        """Change the first bytes of a cell."""
        ...

    def close(self) -> None:
        """Close the tier."""
        ...


def write_until_killed(opener: Callable[[int, int], SsdTier], told: Connection, first: int) -> None:
    """Process: write one slot after the other, and tell before each which one and after it that it is written."""
    tier = opener(CELL, CELLS)
    chance = random.Random(first)
    generation = first
    while True:
        cell = chance.randrange(CELLS)
        told.send((cell, None))
        tier.slab.write_from(cell, pattern(cell, generation, CELL))
        told.send((cell, generation))
        generation += 1


class PageCells:
    """The pages of a DRAM tier as :class:`Cells`."""

    def __init__(self, tier: DramTier) -> None:
        self._tier = tier

    def read(self, cell: int, nbytes: int) -> bytes:
        """The first bytes of a cell."""
        return self._tier.page(cell, nbytes).tobytes()

    def write(self, cell: int, data: bytes) -> None:
        """Change the first bytes of a cell."""
        self._tier.page(cell, len(data))[:] = data

    def close(self) -> None:
        """Close the tier."""
        self._tier.close()


class SlotCells:
    """The slots of an SSD tier as :class:`Cells`."""

    def __init__(self, tier: SsdTier) -> None:
        self._tier = tier

    def read(self, cell: int, nbytes: int) -> bytes:
        """The first bytes of a cell."""
        buffer = bytearray(nbytes)
        self._tier.slab.read_into(cell, buffer)
        return bytes(buffer)

    def write(self, cell: int, data: bytes) -> None:
        """Change the first bytes of a cell."""
        self._tier.slab.write_from(cell, data)

    def close(self) -> None:
        """Close the tier."""
        self._tier.close()


def receive(here: Connection, written: int | None, known: dict[int, int]) -> int | None:
    """Hear of so many writes, or of all until the end; the slot of a write that had begun and was not told to end."""
    begun: int | None = None
    try:
        while written is None or written > 0:
            if not here.poll(PATIENCE_S):
                pytest.fail("the writer says nothing")
            cell, generation = here.recv()
            begun = cell if generation is None else None
            if generation is not None:
                known[cell] = generation
                written = None if written is None else written - 1
    except EOFError:
        pass
    return begun
