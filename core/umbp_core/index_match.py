"""What a router asks the index: who holds these hashes on which tier, and how long a prefix each node can use.

Both questions work on the masks of the hashes (see ``placements``), of which a query has few different ones: what
follows from a mask is worked out once.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import compress, groupby
from operator import attrgetter
from typing import NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from umbp_core.placements import Cell, Placements

C = TypeVar("C", bound=Cell)

_tier_of = attrgetter("tier")

_CODES = 256
"""Different masks that one byte can name."""


@dataclass(frozen=True, slots=True)
class NodeMatch:
    """What one node holds of a query."""

    node: str
    tiers: dict[int, list[bytes]]
    """Tier to hashes in the order of the query, each as often as the query names it.

    Tiers come by number, as on the wire: ``UNKNOWN`` first, then by speed.  Lists with the same content may be one
    object, also across nodes, so that an encoder can work once per list; nobody may change them.
    """
    matched: int = field(default=0, compare=False)
    """Positions of the query that the node holds, on whatever tier: :meth:`distinct` where no hash is named twice."""

    def distinct(self) -> int:
        """How many different hashes of the query the node holds, on whatever tier."""
        return len(set().union(*self.tiers.values()))


class PositionMatch(NamedTuple):
    """What one node holds of a query, by positions instead of hashes."""

    node: str
    tiers: dict[int, bytes]
    """Tier to a bitmap over the query: bit ``i % 8`` of byte ``i // 8`` (the lowest bit first) stands for hash ``i``.

    Tiers come by number, as on the wire.  Bitmaps with the same content may be one object.
    """

    def matched(self) -> int:
        """How many positions of the query the node holds, on whatever tier."""
        held = 0
        for bitmap in self.tiers.values():
            held |= int.from_bytes(bitmap, "little")
        return held.bit_count()


class TierRun(NamedTuple):
    """Blocks in a row that a node would take from one tier."""

    tier: int
    length: int


@dataclass(slots=True)
class PrefixMatch:
    """The longest prefix of a query that one node can use."""

    node: str
    length: int = 0
    """Blocks from the first of the query on without a gap; at least 1."""
    runs: list[TierRun] = field(default_factory=list)
    """Where they would be taken from; neighbours differ in tier and the lengths add up to ``length``."""
    cost: float = 0.0
    """The sum of the weights of the tiers of the blocks; 0 without weights."""


def group_matches(hashes: Sequence[bytes], masks: Sequence[int], placements: Placements[C]) -> list[NodeMatch]:
    """Who holds which of ``hashes``, whose masks are ``masks``; the nodes in the order in which they came."""
    distinct = set(masks)
    present = 0
    for mask in distinct:
        present |= mask
    cells = placements.members(present)
    if not cells:
        return []
    fill = _fill_by_code if len(distinct) <= _CODES else _fill_by_bits
    buckets = fill(hashes, masks, list(distinct), cells)
    by_node: dict[str, dict[int, list[bytes]]] = {}
    bits: dict[str, int] = {}
    for cell in sorted(cells, key=_tier_of):
        by_node.setdefault(cell.node, {})[cell.tier] = buckets[cell.number]
        bits[cell.node] = bits.get(cell.node, 0) | cell.bit
    nodes = list(by_node) if len(by_node) == 1 else [node for node in placements.nodes() if node in by_node]
    counts = Counter(masks) if len(cells) > len(nodes) else {}
    return [NodeMatch(node, by_node[node], _matched(by_node[node], bits[node], counts)) for node in nodes]


def _matched(tiers: Mapping[int, Sequence[bytes]], bits: int, counts: Mapping[int, int]) -> int:
    """How many positions have one of ``bits``; ``counts`` says how many have each mask, and is used for several."""
    if len(tiers) == 1:
        return sum(map(len, tiers.values()))
    return sum(count for mask, count in counts.items() if mask & bits)


def match_positions(masks: Sequence[int], placements: Placements[C]) -> list[PositionMatch]:
    """Who holds which positions of a query, whose masks are ``masks``; the nodes in no order that means anything."""
    if masks.count(masks[0]) == len(masks):  # compares identities first, and equal masks are mostly one object
        cells = placements.members(masks[0])
        everything = ((1 << len(masks)) - 1).to_bytes((len(masks) + 7) // 8, "little")
        if len(cells) == 1:
            return [PositionMatch(cells[0].node, {cells[0].tier: everything})]
        bitmaps = {cell.number: everything for cell in cells}
    else:
        distinct = list(set(masks))
        present = 0
        for mask in distinct:
            present |= mask
        cells = placements.members(present)
        pack = _pack_by_code if len(distinct) <= _CODES else _pack_by_bits
        bitmaps = pack(masks, distinct, cells) if cells else {}
    by_node: dict[str, dict[int, bytes]] = {}
    if len(cells) > 1:
        cells.sort(key=_tier_of)
    for cell in cells:
        by_node.setdefault(cell.node, {})[cell.tier] = bitmaps[cell.number]
    return [PositionMatch(node, tiers) for node, tiers in by_node.items()]


def _pack_by_code(masks: Sequence[int], distinct: Sequence[int], cells: Sequence[Cell]) -> dict[int, bytes]:
    """The bitmaps of ``cells``: every mask gets a one-byte code; a cell is a table of the codes that have its bit."""
    code_of = {mask: code for code, mask in enumerate(distinct)}
    codes = bytes(map(code_of.__getitem__, masks))
    packed: dict[bytes, bytes] = {}
    bitmaps = {}
    for cell in cells:
        bit = cell.bit
        table = bytes([mask & bit != 0 for mask in distinct])
        if table not in packed:
            column = np.frombuffer(codes.translate(table.ljust(_CODES, b"\0")), dtype=np.uint8)
            packed[table] = np.packbits(column, bitorder="little").tobytes()
        bitmaps[cell.number] = packed[table]
    return bitmaps


def _pack_by_bits(masks: Sequence[int], distinct: Sequence[int], cells: Sequence[Cell]) -> dict[int, bytes]:
    """The same with very many different masks."""
    columns = _columns(masks, distinct)
    return {cell.number: np.packbits(columns[cell.number], bitorder="little").tobytes() for cell in cells}


def _columns(masks: Sequence[int], distinct: Sequence[int]) -> NDArray[np.uint8]:
    """All masks as a matrix of bits: row ``n`` says which of them have bit ``n``."""
    width = (max(map(int.bit_length, distinct)) + 7) // 8
    packed = b"".join([mask.to_bytes(width, "little") for mask in masks])
    rows = np.frombuffer(packed, dtype=np.uint8).reshape(len(masks), width)
    return np.ascontiguousarray(np.unpackbits(rows, axis=1, bitorder="little").T)


def _fill_by_code(
    hashes: Sequence[bytes], masks: Sequence[int], distinct: list[int], cells: Sequence[Cell]
) -> dict[int, list[bytes]]:
    """Every mask gets a one-byte code; a cell is a table of the codes that have its bit, and equal tables share."""
    if len(distinct) == 1:
        everything = list(hashes)
        return {cell.number: everything for cell in cells}
    code_of = {mask: code for code, mask in enumerate(distinct)}
    codes = bytes(map(code_of.__getitem__, masks))
    lists: dict[bytes, list[bytes]] = {}
    buckets = {}
    for cell in cells:
        bit = cell.bit
        table = bytes([mask & bit != 0 for mask in distinct])
        if table not in lists:
            lists[table] = list(compress(hashes, codes.translate(table.ljust(_CODES, b"\0"))))
        buckets[cell.number] = lists[table]
    return buckets


def _fill_by_bits(
    hashes: Sequence[bytes], masks: Sequence[int], distinct: list[int], cells: Sequence[Cell]
) -> dict[int, list[bytes]]:
    """With very many masks, all of them are laid out as a matrix of bits, of which a cell is a column."""
    columns = _columns(masks, distinct)
    lists: dict[bytes, list[bytes]] = {}
    buckets = {}
    for cell in cells:
        column = columns[cell.number].tobytes()
        if column not in lists:
            lists[column] = list(compress(hashes, column))
        buckets[cell.number] = lists[column]
    return buckets


class PrefixQuery:
    """One run of ``match_prefix``: nodes are looked at only where their part of the mask changes."""

    def __init__(self, placements: Placements[C], weights: Mapping[int, float] | None) -> None:
        self._members: Callable[[int], list[C]] = placements.members
        self._cells: Callable[[str], list[C]] = placements.cells
        self._weights = weights
        self._choices: dict[str, list[tuple[int, int]]] = {}
        self._node_masks: dict[str, int] = {}
        self._open: dict[str, tuple[int, int]] = {}
        self._results: dict[str, PrefixMatch] = {}

    def run(self, masks: Iterable[int]) -> list[PrefixMatch]:
        """The matches for blocks with ``masks``, which are read only as far as some node goes; longest first."""
        position = 0
        before = relevant = 0
        for mask, group in groupby(masks):
            if position == 0:
                relevant = self._begin(mask)
            else:
                relevant = self._advance(mask & relevant, before, position, relevant)
            if not self._open:
                break
            before = mask & relevant
            position += len(list(group))
        for node in list(self._open):
            self._end_run(node, position)
        return sorted(self._results.values(), key=lambda match: (-match.length, match.cost, match.node))

    def _begin(self, mask: int) -> int:
        """Start with the nodes that can use the first block; returns the bits of their cells."""
        relevant = 0
        for node in {cell.node for cell in self._members(mask)}:
            choice = self._choose(node, mask)
            if choice is not None:
                self._results[node] = PrefixMatch(node)
                self._open[node] = (choice, 0)
                relevant |= self._node_masks[node]
        return relevant

    def _advance(self, mask: int, before: int, position: int, relevant: int) -> int:
        """Go on with ``mask`` from block ``position`` on; returns the bits of the nodes that still can."""
        for node in {cell.node for cell in self._members(mask ^ before)}:
            choice = self._choose(node, mask)
            if choice is None:
                self._end_run(node, position)
                relevant &= ~self._node_masks[node]
            elif self._open[node][0] != choice:
                self._end_run(node, position)
                self._open[node] = (choice, position)
        return relevant

    def _choose(self, node: str, mask: int) -> int | None:
        """The tier of ``node`` in ``mask`` that is used: the cheapest, or without weights the fastest."""
        choices = self._choices.get(node)
        if choices is None:
            choices = self._choices[node] = self._order(node)
        for bit, tier in choices:
            if mask & bit:
                return tier
        return None

    def _order(self, node: str) -> list[tuple[int, int]]:
        cells = self._cells(node)
        if self._weights is not None:
            weights = self._weights
            cells = sorted((cell for cell in cells if cell.tier in weights), key=lambda cell: weights[cell.tier])
        self._node_masks[node] = sum(cell.bit for cell in cells)
        return [(cell.bit, cell.tier) for cell in cells]

    def _end_run(self, node: str, position: int) -> None:
        tier, since = self._open.pop(node)
        match = self._results[node]
        length = position - since
        match.length = position
        match.runs.append(TierRun(tier, length))
        if self._weights is not None:
            match.cost += self._weights[tier] * length
