"""The external KV index: which hash lies on which tiers of which nodes.

Nodes report what they hold and revoke what they lose; the index owns nothing and promises nothing about bytes.  It is
*additive*: a report adds one tier to what is known of a hash on a node, a revoke takes one away, and a hash without any
is forgotten.

To clear a tier or a node takes effect at once and in constant time (see ``placements``); :meth:`ExternalKvIndex.sweep`
then frees the memory in slices, between which anything else may be called.  Every other call costs time in proportion
to what it is given, whatever the index holds.

A hash is bytes: what the wire carries, not interpreted.  A tier is any ``int``, see ``Tier``.  Time is whatever
monotonic seconds the caller passes.  No I/O, no threads, no clock; one thread at a time, iterators included.
"""

from __future__ import annotations

from array import array
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, compress, repeat
from operator import not_
from typing import NamedTuple

from umbp_core.hits import HitCounters
from umbp_core.index_feed import Change, ChangeFeed, ChangeKind
from umbp_core.index_match import (
    NodeMatch,
    PositionMatch,
    PrefixMatch,
    PrefixQuery,
    TierRun,
    group_matches,
    match_positions,
)
from umbp_core.index_reader import NOWHERE, MaskReader
from umbp_core.joined import JoinedHashes
from umbp_core.placements import Cell, IndexStats, Placements, Roster

__all__ = [
    "Explanation",
    "ExternalKvIndex",
    "IndexSlice",
    "IndexStats",
    "NodeMatch",
    "PositionMatch",
    "PrefixMatch",
    "Snapshot",
    "TierRun",
]

SLICE = 2048
"""Hashes of a slice of a sweep or an enumeration: about a millisecond, and still few when the machine is busy."""


class HashCell(Cell):
    """A cell of the index: the rows of the hashes that it holds."""

    __slots__ = ("roster",)

    def __init__(self, number: int, node: str, tier: int) -> None:
        super().__init__(number, node, tier)
        self.roster = Roster()


class IndexSlice(NamedTuple):
    """Some of the hashes that a tier of a node holds."""

    node: str
    tier: int
    hashes: list[bytes]


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The content of the index at one moment, to be read in slices.

    A slice holds what was there at the moment of the snapshot and still is when the slice is read.  Together with the
    changes of the feed after ``cursor`` that is the whole truth, however much happens between two slices.
    """

    incarnation: int
    cursor: int
    slices: Iterator[IndexSlice]


@dataclass(frozen=True, slots=True)
class Explanation:
    """Why a hash can, or cannot, be used on a node."""

    tiers: list[int]
    """Where it is now, fastest first."""
    changes: list[Change]
    """The last change of each tier that concerned it, the latest first; without one it was never reported, or longer
    ago than the feed goes back."""


class ExternalKvIndex:
    """(node, hash) to tiers, with counters of the hashes that were asked for.

    ``feed``, where one is given, is told of every change.  ``hits`` may be used, and has to be collected, by the owner.
    """

    def __init__(self, feed: ChangeFeed | None = None, hits: HitCounters | None = None) -> None:
        self.feed = feed
        self.hits = HitCounters() if hits is None else hits
        self._placements: Placements[HashCell] = Placements(HashCell)
        self._rows: dict[bytes, int] = {}
        self._keys: list[bytes] = [b""]
        self._masks: list[int] = [0]
        self._reader = MaskReader(self._rows, self._keys, self._masks)
        self.places_of: Callable[[Sequence[bytes]], Sequence[int]] = self._reader.read
        """Where each of some hashes lies: equal numbers mean the same tiers of the same nodes, and as long as
        ``revision`` stays they mean the same as before.  To be given to ``match_places`` before anything changes."""
        self._free = array("I")
        self._backlog: deque[HashCell] = deque()

    def report(self, node: str, hashes: Sequence[bytes], tier: int, now: float = 0.0) -> int:
        """``node`` holds ``hashes`` on ``tier``, whatever else it holds; returns how many entries are new."""
        if not hashes:
            return 0
        cell = self._placements.open(node, tier)
        rows = list(map(self._rows.get, hashes, repeat(NOWHERE)))
        added = self._join(cell, rows)
        if NOWHERE in rows:
            fresh = list(dict.fromkeys(compress(hashes, map(not_, rows))))
            added += self._insert(fresh, self._placements.intern(cell.bit))
        cell.roster.add(added)
        self._tell(ChangeKind.REPORTED, cell, added, now)
        return len(added)

    def revoke(self, node: str, hashes: Sequence[bytes], tier: int, now: float = 0.0) -> int:
        """``node`` does not hold ``hashes`` on ``tier`` any more; returns how many entries are gone.

        What is not known is ignored.
        """
        cell = self._placements.cell(node, tier)
        if cell is None:
            return 0
        masks, without = self._masks, self._without(cell.bit)
        gone = []
        for row in map(self._rows.get, hashes, repeat(NOWHERE)):
            mask = masks[row]
            if mask & cell.bit:
                masks[row] = without[mask]
                gone.append(row)
        self._tell(ChangeKind.REVOKED, cell, gone, now)
        cell.roster.remove(gone)
        self._free_rows(gone)
        if not cell.roster:
            self._placements.retire(cell)
            self._placements.release(cell)
        return len(gone)

    def clear_tier(self, node: str, tier: int, now: float = 0.0, reason: str = "revoked") -> int:
        """``node`` holds nothing on ``tier`` any more; returns how many entries are gone.

        Constant time.  Call :meth:`sweep` until it returns 0 afterwards, to free the memory.
        """
        cell = self._placements.cell(node, tier)
        if cell is None:
            return 0
        if self.feed is not None:
            self.feed.append(ChangeKind.CLEARED, node, cell.tier, (), now, reason)
        self._placements.retire(cell)
        self._backlog.append(cell)
        return len(cell.roster)

    def clear_node(self, node: str, now: float = 0.0, reason: str = "revoked") -> int:
        """``node`` holds nothing any more; like :meth:`clear_tier` for all of its tiers."""
        return sum(self.clear_tier(node, cell.tier, now, reason) for cell in self._placements.cells(node))

    def sweep(self, limit: int = SLICE) -> int:
        """Clean up at most ``limit`` entries of what was cleared; returns how many are left, 0 when none.

        No answer of the index depends on when, or whether, this is called.
        """
        masks = self._masks
        while self._backlog and limit > 0:
            cell = self._backlog[0]
            rows = cell.roster.take(limit)
            without = self._without(cell.bit)
            touched = []
            for row in rows:
                mask = masks[row]
                if mask & cell.bit:
                    masks[row] = without[mask]
                    touched.append(row)
            self._free_rows(touched)
            limit -= len(rows)
            if not cell.roster.log_length:
                self._placements.release(self._backlog.popleft())
        return sum(cell.roster.log_length for cell in self._backlog)

    def match(self, hashes: Sequence[bytes], count_as_hit: bool = False, now: float = 0.0) -> list[NodeMatch]:
        """Who holds which of ``hashes``, in the order of the query; nodes that hold none are left out.

        A hash that the query names twice is answered twice.  ``count_as_hit`` counts each hash that any node holds
        once.
        """
        places = self.places_of(hashes)
        if count_as_hit:
            self.count_hits(hashes, places, now)
        return group_matches(hashes, places, self._placements)

    def match_positions(
        self, hashes: Sequence[bytes], count_as_hit: bool = False, now: float = 0.0
    ) -> list[PositionMatch]:
        """Who holds which positions of ``hashes``, without repeating them; nodes that hold none are left out.

        Everything else is as in :meth:`match`.
        """
        places = self.places_of(hashes)
        if count_as_hit:
            self.count_hits(hashes, places, now)
        return self.match_places(places)

    @property
    def revision(self) -> int:
        """Grows whenever a number of ``places_of`` comes to mean something else."""
        return self._placements.revision

    def match_places(self, places: Sequence[int]) -> list[PositionMatch]:
        """The answer of :meth:`match_positions` for hashes that lie at ``places``, see ``places_of``."""
        return match_positions(places, self._placements) if places else []

    def count_hits(self, hashes: Sequence[bytes], places: Sequence[int], now: float) -> None:
        """Count each of ``hashes``, which lie at ``places``, that any node holds once, as a match that counts does."""
        live = self._placements.live
        if not places or places.count(places[0]) != len(places):
            held = {mask for mask in set(places) if mask & live}
            self.hits.record(compress(hashes, map(held.__contains__, places)), now)
        elif places[0] & live:
            if isinstance(hashes, JoinedHashes) and hashes.row:
                self.hits.record_rows(hashes.apart(), hashes.row, now)
            else:
                self.hits.record(hashes, now)

    def match_prefix(self, hashes: Sequence[bytes], weights: Mapping[int, float] | None = None) -> list[PrefixMatch]:
        """The longest prefix of ``hashes``, the hashes of a chain of blocks, that each node can use; longest first.

        A block is usable on a node that holds it on any tier, and is taken from the fastest.  With ``weights``, the
        cost of a block per tier, it is taken from the cheapest tier (the fastest of those), and a tier without a
        weight is not used.  Nodes that cannot use the first block are left out.  Counts no hits.
        """
        return PrefixQuery(self._placements, weights).run(chain.from_iterable(self._reader.runs(hashes)))

    def tiers_of(self, node: str, key: bytes) -> list[int]:
        """The tiers on which ``node`` holds ``key``, fastest first."""
        mask = self._masks[self._rows.get(key, NOWHERE)]
        return [cell.tier for cell in self._placements.cells(node) if mask & cell.bit]

    def life(self, node: str, tier: int) -> int:
        """A number that changes when ``tier`` of ``node`` is cleared or becomes empty; 0 while it is.

        Who asks in parts learns from it that earlier answers are void.
        """
        cell = self._placements.cell(node, tier)
        return 0 if cell is None else cell.life

    def explain(self, node: str, key: bytes) -> Explanation:
        """Why ``key`` can, or cannot, be used on ``node``.  Looks through the whole feed: a question for people."""
        changes = [] if self.feed is None else self.feed.latest_of(node, key)
        return Explanation(self.tiers_of(node, key), changes)

    def nodes(self) -> list[str]:
        """The nodes that hold something, in the order in which they came."""
        return self._placements.nodes()

    def counts(self, node: str) -> dict[int, int]:
        """How many hashes ``node`` holds on each tier, fastest first; tiers without any are left out."""
        return {cell.tier: len(cell.roster) for cell in self._placements.cells(node)}

    def count_distinct(self, node: str) -> int:
        """How many different hashes ``node`` holds, on whatever tier.  In proportion to what it holds."""
        cells, masks = self._placements.cells(node), self._masks
        counted, total = 0, 0
        for cell in cells:
            bits = cell.bit | counted
            total += sum(masks[row] & bits == cell.bit for row in cell.roster.copy())
            counted |= cell.bit
        return total

    def stats(self) -> IndexStats:
        """Counts of the whole index.  In proportion to the number of nodes."""
        nodes = self.nodes()
        entries = sum(sum(self.counts(node).values()) for node in nodes)
        backlog = sum(cell.roster.log_length for cell in self._backlog)
        return IndexStats(len(nodes), len(self._placements), len(self._rows), entries, backlog)

    def blocks(self, node: str, tier: int, slice_hashes: int = SLICE) -> Iterator[list[bytes]]:
        """The hashes that ``node`` holds on ``tier``, in slices; the index may change between two of them.

        Yields what was there at the call and still is; ends when the tier is cleared.  What was revoked and reported
        again in between may come twice.
        """
        cell = self._placements.cell(node, tier)
        cells = [] if cell is None else [(cell, cell.roster.copy())]
        return (part.hashes for part in self._read(cells, slice_hashes))

    def page(self, node: str, tier: int, cursor: int = 0, limit: int = SLICE) -> tuple[list[bytes], int]:
        """Up to ``limit`` of the hashes that ``node`` holds on ``tier``, and the cursor of the next page, 0 at the end.

        Cursor 0 begins.  What is there at the first page and still there at the last comes at least once, whatever
        changes between two pages.  Nothing is kept for the reader.
        """
        cell = self._placements.cell(node, tier)
        if cell is None:
            return [], 0
        masks, keys = self._masks, self._keys
        rows, rest = cell.roster.page(cursor, limit)
        return [keys[row] for row in rows if masks[row] & cell.bit], rest

    def snapshot(self, slice_hashes: int = SLICE) -> Snapshot:
        """Everything that the index holds, in slices.  The call itself copies four bytes per entry."""
        cells = [(cell, cell.roster.copy()) for node in self.nodes() for cell in self._placements.cells(node)]
        incarnation, cursor = (0, 0) if self.feed is None else (self.feed.incarnation, self.feed.cursor)
        return Snapshot(incarnation, cursor, self._read(cells, slice_hashes))

    def _join(self, cell: HashCell, rows: Sequence[int]) -> list[int]:
        """Put those of ``rows`` that are somewhere, but not in ``cell``, there; returns them."""
        masks, bit, intern = self._masks, cell.bit, self._placements.intern
        grown = _Remap(lambda mask: intern(mask | bit))
        added = []
        for row in filter(None, rows):
            mask = masks[row]
            if not mask & bit:
                masks[row] = grown[mask]
                added.append(row)
        return added

    def _insert(self, fresh: Sequence[bytes], mask: int) -> list[int]:
        """New rows for ``fresh``, with ``mask``."""
        reused = self._free[-len(fresh) :].tolist()
        del self._free[len(self._free) - len(reused) :]
        self.hits.forget_rows(reused)
        for row, key in zip(reused, fresh, strict=False):
            self._keys[row] = key
            self._masks[row] = mask
        start = len(self._keys)
        self._keys += fresh[len(reused) :]
        self._masks += repeat(mask, len(fresh) - len(reused))
        rows = [*reused, *range(start, len(self._keys))]
        self._rows.update(zip(fresh, rows, strict=True))
        return rows

    def _without(self, bit: int) -> _Remap:
        intern = self._placements.intern
        return _Remap(lambda mask: intern(mask & ~bit))

    def _free_rows(self, rows: Sequence[int]) -> None:
        """Give those of ``rows`` back that are in no cell any more."""
        keys, masks = self._keys, self._masks
        for row in rows:
            if not masks[row]:
                del self._rows[keys[row]]
                keys[row] = b""
                masks[row] = 0
                self._free.append(row)

    def _tell(self, kind: ChangeKind, cell: HashCell, rows: Sequence[int], now: float) -> None:
        if self.feed is not None and rows:
            keys = self._keys
            self.feed.append(kind, cell.node, cell.tier, [keys[row] for row in rows], now)

    def _read(self, cells: Sequence[tuple[HashCell, array[int]]], size: int) -> Iterator[IndexSlice]:
        keys, masks = self._keys, self._masks
        for cell, rows in cells:
            for start in range(0, len(rows), size):
                if not self._placements.is_live(cell):
                    break
                part = [keys[row] for row in rows[start : start + size] if masks[row] & cell.bit]
                if part:
                    yield IndexSlice(cell.node, cell.tier, part)


class _Remap(dict[int, int]):
    """Masks to what becomes of them, worked out once per mask."""

    def __init__(self, change: Callable[[int], int]) -> None:
        super().__init__()
        self._change = change

    def __missing__(self, mask: int) -> int:
        new = self[mask] = self._change(mask)
        return new
