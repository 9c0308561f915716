"""Placements: where something lies, as a bit mask over cells.

A **cell** is one node's one tier for one life: from the first report until the tier is cleared.  Every cell has a
number, and a placement is an ``int`` with the bits of the cells that hold the thing.  Nodes and tiers are stored once
per cell, and things that lie in the same places share one ``int``.

Clearing a whole tier only takes its bit out of :attr:`Placements.live`, which every reader applies.  So it takes effect
at once, whatever the number of things in it; their masks are cleaned later, at leisure, and only then is the number
given to another cell.  What is reported meanwhile goes to a new cell with another bit, which the cleaning cannot hit.

A tier is any ``int``: the wire's enumeration is open.  No I/O, no threads, no clock.  One thread at a time.
"""

from __future__ import annotations

import heapq
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

_MAX_INTERNED = 1 << 16
"""Masks that are kept for sharing.  Masks are compared by value, so forgetting them costs memory only."""
_TIDY_STEPS = 4
"""Log entries that are looked at per row that is taken out of a roster."""
_LAST = 1 << 31


def preference(tier: int) -> int:
    """Sort key, fastest tier first; tiers that we have no name for after those that we have, ``UNKNOWN`` last."""
    return tier if tier > 0 else _LAST - tier


@dataclass(frozen=True, slots=True)
class IndexStats:
    """Counts of an index."""

    nodes: int
    """Nodes that hold something."""
    cells: int
    """Tiers of nodes in memory, those that a sweep has still to free included; a mask is as many bits long."""
    keys: int
    """Different hashes or keys in memory, those that a sweep has still to free included."""
    entries: int
    """(node, tier, key) triples."""
    backlog: int
    """Entries that a sweep has still to look at."""


class Cell:
    """One node's one tier for one life."""

    __slots__ = ("bit", "life", "node", "number", "tier")

    def __init__(self, number: int, node: str, tier: int) -> None:
        self.life = 0
        """Different for every cell that there ever was, from 1 on; set when it gets its number."""
        self.number = number
        self.bit = 1 << number
        self.node = node
        self.tier = tier


C = TypeVar("C", bound=Cell)


class Placements(Generic[C]):
    """The cells, and the masks over them.  ``make`` constructs a cell from its number, node and tier."""

    def __init__(self, make: Callable[[int, str, int], C]) -> None:
        self._make = make
        self._nodes: dict[str, dict[int, C]] = {}
        self._numbers: dict[int, C] = {}
        self._free: list[int] = []
        self._interned: dict[int, int] = {}
        self._lives = 0
        self.live = 0
        """The bits of all cells that count; to be applied to every mask that is read."""
        self.revision = 0
        """Grows whenever a mask comes to mean other cells."""

    def __len__(self) -> int:
        """Cells that have a number: they count, are prepared, or are retired and not released yet."""
        return len(self._numbers)

    def nodes(self) -> list[str]:
        """The nodes that have a cell, in the order in which they came."""
        return list(self._nodes)

    def cell(self, node: str, tier: int) -> C | None:
        """The cell of ``tier`` on ``node``, if there is one."""
        cells = self._nodes.get(node)
        return None if cells is None else cells.get(tier)

    def cells(self, node: str) -> list[C]:
        """All cells of ``node``, the fastest tier first."""
        return list(self._nodes.get(node, {}).values())

    def open(self, node: str, tier: int) -> C:
        """The cell of ``tier`` on ``node``; a new, empty one when there is none."""
        cell = self.cell(node, tier)
        if cell is None:
            cell = self.prepare(node, tier)
            self.admit(cell)
        return cell

    def prepare(self, node: str, tier: int) -> C:
        """A new cell that does not count yet: it is to be filled, then admitted or released."""
        number = heapq.heappop(self._free) if self._free else len(self._numbers)
        cell = self._numbers[number] = self._make(number, node, int(tier))
        self._lives += 1
        cell.life = self._lives
        return cell

    def admit(self, cell: C) -> None:
        """Let a prepared ``cell`` count.  Its node must have no other cell of this tier."""
        cells = self._nodes.get(cell.node, {}) | {cell.tier: cell}
        self._nodes[cell.node] = {tier: cells[tier] for tier in sorted(cells, key=preference)}
        self.live |= cell.bit
        self.revision += 1

    def retire(self, cell: C) -> None:
        """``cell`` counts no more.  Masks may still hold its bit until it is released."""
        cells = self._nodes[cell.node]
        del cells[cell.tier]
        if not cells:
            del self._nodes[cell.node]
        self.live &= ~cell.bit
        self.revision += 1

    def release(self, cell: C) -> None:
        """Give the number of a retired ``cell`` back, when no mask holds its bit any more."""
        del self._numbers[cell.number]
        heapq.heappush(self._free, cell.number)

    def is_live(self, cell: C) -> bool:
        """Whether ``cell`` still counts."""
        return self.cell(cell.node, cell.tier) is cell

    def members(self, mask: int) -> list[C]:
        """The cells in ``mask`` that count, in no order that means anything."""
        numbers = self._numbers
        cells = []
        mask &= self.live
        while mask:
            number = mask.bit_length() - 1
            cells.append(numbers[number])
            mask ^= 1 << number
        return cells

    def intern(self, mask: int) -> int:
        """``mask``, as an object that other things in the same places share."""
        if len(self._interned) >= _MAX_INTERNED:
            self._interned.clear()
        return self._interned.setdefault(mask, mask)


class Roster:
    """The rows that a cell holds, in about five bytes each; an order that means nothing.

    A log of row numbers, each at most once, and the set of those in it that were taken out again.  Every removal looks
    at a few entries of the log and forgets what it finds removed, so the log is never much longer than needed and no
    call has to rewrite it.
    """

    __slots__ = ("_cursor", "_log", "_stale")

    def __init__(self) -> None:
        self._log = array("I")
        self._stale: set[int] = set()
        self._cursor = 0

    def __len__(self) -> int:
        """Rows."""
        return len(self._log) - len(self._stale)

    @property
    def log_length(self) -> int:
        """Entries of the log; what :meth:`take` has still to hand out."""
        return len(self._log)

    def add(self, rows: list[int]) -> None:
        """Add ``rows``, each of which is named once and is not in the roster."""
        back = self._stale.intersection(rows)
        if back:
            self._stale -= back
            rows = [row for row in rows if row not in back]
        self._log.fromlist(rows)

    def remove(self, rows: Sequence[int]) -> None:
        """Take ``rows`` out, each of which is named once and is in the roster."""
        self._stale.update(rows)
        self._tidy(_TIDY_STEPS * len(rows))

    def copy(self) -> array[int]:
        """The rows, and some that were taken out: the reader has to check.  Cheap: four bytes per row are copied."""
        return self._log[:]

    def page(self, end: int, limit: int) -> tuple[array[int], int]:
        """Up to ``limit`` entries of the log before entry ``end``, or its last ones (0), and where they begin.

        Read towards the front: rows only ever move there, so none is missed.  The reader has to check.
        """
        end = min(end, len(self._log)) if end > 0 else len(self._log)
        start = max(0, end - limit)
        return self._log[start:end], start

    def take(self, limit: int) -> array[int]:
        """Take up to ``limit`` entries from the log, rows or not: the reader has to check.

        Only for a roster that nothing is added to or removed from any more.
        """
        taken = self._log[-limit:]
        del self._log[-limit:]
        return taken

    def _tidy(self, steps: int) -> None:
        """Look at the next ``steps`` entries of the log, and fill the places of removed rows from its end."""
        log, stale = self._log, self._stale
        start = self._cursor if self._cursor < len(log) else 0
        end = min(start + steps, len(log))
        part = log[start:end]
        found = stale.intersection(part)
        self._cursor = end - len(found)
        if found:
            stale -= found
            kept = array("I", [row for row in part if row not in found])
            tail = max(end, len(log) - len(found))
            kept += log[tail:]
            del log[tail:]
            log[start:end] = kept
