"""The block index: which node holds which key on which tier, and how large it is.  Fed by heartbeats, used for routing.

A projection of what the nodes' directories own.  Nodes send numbered bundles of changes, or say everything in a full
sync; the index applies each bundle once and in order, acknowledges replays, and asks for a full sync after a gap or
after it dropped what a node had said (law L11).

To drop a node takes effect at once and in constant time, and a full sync is filled in beside the old content and
replaces it at one stroke, so that readers see one or the other (see ``placements``).  :meth:`BlockIndex.sweep` frees
memory later.

Time is whatever monotonic seconds the caller passes.  No I/O, no threads, no clock.  One thread at a time.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from umbp_core.index_gate import SequenceGate, Verdict
from umbp_core.journal import Bundle, Delta
from umbp_core.placements import Cell, IndexStats, Placements, preference

SLICE = 2048
"""Blocks of a slice of a sweep: about a millisecond."""
_PURGES = 2
"""Ended leases that are forgotten per key that is routed."""
_NO_INCARNATION = 0
"""Heartbeats have none: a registration begins a new life."""


class BlockCell(Cell):
    """A cell of the index: size and last use of its blocks, the least recently used first; the sum of the sizes."""

    __slots__ = ("blocks", "nbytes")

    def __init__(self, number: int, node: str, tier: int) -> None:
        super().__init__(number, node, tier)
        self.blocks: dict[bytes, tuple[int, float]] = {}
        self.nbytes = 0

    def put(self, key: bytes, size: int, now: float) -> bool:
        """Add ``key``, used now, or give it another size; whether it is new."""
        held = self.blocks.get(key)
        known, used = (0, now) if held is None else held
        self.nbytes += size - known
        self.blocks[key] = (size, used)
        return held is None

    def drop(self, key: bytes) -> None:
        """Take ``key``, which is here, out."""
        self.nbytes -= self.blocks.pop(key)[0]

    def touch(self, key: bytes, now: float) -> None:
        """``key``, which is here, is used now."""
        self.blocks[key] = (self.blocks.pop(key)[0], now)

    def location(self, key: bytes) -> Location:
        """The copy of ``key``, which is here."""
        return Location(self.node, self.tier, self.blocks[key][0])


class Location(NamedTuple):
    """A copy of a block."""

    node: str
    tier: int
    size: int


class TierUse(NamedTuple):
    """What a node holds on a tier."""

    blocks: int
    nbytes: int


class Victim(NamedTuple):
    """A block that may be evicted from a tier of a node; ``used`` is when it was last routed to, or added."""

    key: bytes
    size: int
    used: float


@dataclass(frozen=True, slots=True)
class HeartbeatAck:
    """The answer to a heartbeat: all bundles up to ``acked`` are applied."""

    acked: int
    request_full_sync: bool


class FullSync:
    """Everything that one node holds, while it is being taken in.  Made and used by ``BlockIndex`` only."""

    __slots__ = ("cells", "node")

    def __init__(self, node: str) -> None:
        self.node = node
        self.cells: dict[int, BlockCell] = {}


class BlockIndex:
    """``key`` to its copies.  A tier is any ``int``, see ``Tier``."""

    def __init__(self) -> None:
        self._placements: Placements[BlockCell] = Placements(BlockCell)
        self._masks: dict[bytes, int] = {}
        self._gates: dict[str, SequenceGate] = {}
        self._syncs: dict[str, FullSync] = {}
        self._leases: dict[bytes, float] = {}
        self._lease_order: deque[tuple[float, bytes]] = deque()
        self._backlog: deque[BlockCell] = deque()

    def register(self, node: str) -> int:
        """``node`` begins a life: what an earlier one said is dropped, its next bundle is number 1.

        Returns how many copies are gone.
        """
        gone = self.forget(node)
        self._gates[node] = SequenceGate()
        return gone

    def expire(self, node: str) -> int:
        """Drop what ``node`` said; if it comes back it has to begin with a full sync.

        Returns how many copies are gone.  Constant time.  Call :meth:`sweep` until it returns 0 afterwards.
        """
        if node in self._gates:
            self._gates[node].forget()
        return self._clear(node)

    def forget(self, node: str) -> int:
        """Drop all that is known of ``node``; like :meth:`expire`."""
        self._gates.pop(node, None)
        return self._clear(node)

    def apply(self, node: str, bundles: Sequence[Bundle], now: float) -> HeartbeatAck:
        """Apply ``bundles`` of ``node`` in order, up to the first gap.

        Without bundles it only says where we are.  A node that is not registered is asked for a full sync.
        """
        gate = self._gates.get(node)
        if gate is None:
            return HeartbeatAck(0, request_full_sync=True)
        for bundle in bundles:
            verdict = gate.examine(_NO_INCARNATION, bundle.seq)
            if verdict is Verdict.GAP:
                return HeartbeatAck(gate.acked, request_full_sync=True)
            if verdict is Verdict.APPLY:
                self.change(node, bundle.deltas, now)
                gate.resume(bundle.seq)
        return HeartbeatAck(gate.acked, request_full_sync=not gate.synced)

    def examine(self, node: str, seq: int) -> Verdict:
        """What :meth:`apply` would do with bundle ``seq`` of ``node``.

        For bundles that are too large to be applied in one go: when it is ``APPLY``, the caller passes all deltas to
        :meth:`change` and then the bundle without them to :meth:`apply`.  If it does not come so far, the bundle is
        not acknowledged, and will be sent again: no harm is done.
        """
        gate = self._gates.get(node)
        return Verdict.GAP if gate is None else gate.examine(_NO_INCARNATION, seq)

    def change(self, node: str, deltas: Iterable[Delta], now: float) -> None:
        """Apply some of the deltas of a bundle."""
        for delta in deltas:
            self._apply(node, delta, now)

    def begin_full_sync(self, node: str) -> FullSync:
        """Begin to take in everything that ``node`` holds; nothing of it is seen before :meth:`commit`.

        It is void as soon as the node is registered, expired or forgotten, or begins another one; an owner that gives
        up does one of these.
        """
        self._abandon(node)
        sync = self._syncs[node] = FullSync(node)
        return sync

    def stage(self, sync: FullSync, deltas: Iterable[Delta], now: float) -> None:
        """Add some of the blocks of ``sync``, the least recently used first.  Removals in it mean nothing.

        Does nothing when ``sync`` is void.
        """
        if self._syncs.get(sync.node) is not sync:
            return
        for key, tier, size in deltas:
            if size is not None:
                cell = sync.cells.get(tier)
                if cell is None:
                    cell = sync.cells[tier] = self._placements.prepare(sync.node, tier)
                if cell.put(key, size, now):
                    self._mark(key, cell.bit)

    def commit(self, sync: FullSync, baseline: int) -> HeartbeatAck | None:
        """What was staged is what the node holds; its next bundle is ``baseline + 1``.

        Takes constant time, and replaces the old content at one stroke.  ``None``, with nothing changed, when ``sync``
        is void.
        """
        if self._syncs.get(sync.node) is not sync:
            return None
        del self._syncs[sync.node]
        self._clear(sync.node)
        for cell in sync.cells.values():
            self._placements.admit(cell)
        self._gates.setdefault(sync.node, SequenceGate()).resume(baseline)
        return HeartbeatAck(baseline, request_full_sync=False)

    def locations(self, key: bytes) -> list[Location]:
        """The copies of ``key``, fastest tier first."""
        return [cell.location(key) for cell in self._cells_in(self._masks.get(key, 0))]

    def exists(self, keys: Iterable[bytes]) -> list[bool]:
        """For each of ``keys`` whether there is a copy of it."""
        masks, live = self._masks, self._placements.live
        return [masks.get(key, 0) & live != 0 for key in keys]

    def route(
        self, keys: Sequence[bytes], now: float, lease: float, exclude: Collection[str] = ()
    ) -> list[list[Location]]:
        """For each of ``keys`` its copies on nodes that are not excluded, fastest tier first.

        A key with such a copy is being used: it is leased for ``lease`` seconds, and all of its copies become the most
        recently used ones.
        """
        self._purge_leases(now, _PURGES * len(keys))
        found = []
        cells_in: dict[int, list[BlockCell]] = {}
        for key in keys:
            mask = self._masks.get(key, 0)
            cells = cells_in.get(mask)
            if cells is None:
                cells = cells_in[mask] = self._cells_in(mask)
            places = [cell.location(key) for cell in cells if cell.node not in exclude]
            if places:
                self._lease(key, now + lease)
                for cell in cells:
                    cell.touch(key, now)
            found.append(places)
        return found

    def is_leased(self, key: bytes, now: float) -> bool:
        """Whether a lease on ``key`` ends after ``now``."""
        until = self._leases.get(key)
        return until is not None and until > now

    def victims(self, node: str, tier: int, now: float) -> Iterator[Victim]:
        """The blocks of ``tier`` on ``node`` that are not leased, the least recently used first.

        Lazy; not to be continued after a change of the index.
        """
        cell = self._placements.cell(node, tier)
        if cell is not None:
            for key, (size, used) in cell.blocks.items():
                if not self.is_leased(key, now):
                    yield Victim(key, size, used)

    def nodes(self) -> list[str]:
        """The nodes that hold something, in the order in which they came."""
        return self._placements.nodes()

    def use(self, node: str) -> dict[int, TierUse]:
        """What ``node`` holds on each tier, fastest first; tiers without anything are left out."""
        return {cell.tier: TierUse(len(cell.blocks), cell.nbytes) for cell in self._placements.cells(node)}

    def stats(self) -> IndexStats:
        """Counts of the whole index.  In proportion to the number of nodes."""
        nodes = self.nodes()
        entries = sum(use.blocks for node in nodes for use in self.use(node).values())
        return IndexStats(len(nodes), len(self._placements), len(self._masks), entries, self._left())

    def blocks(self, node: str, tier: int, slice_blocks: int = SLICE) -> Iterator[list[tuple[bytes, int]]]:
        """The keys of ``tier`` on ``node`` with their sizes, in slices; the index may change between two of them.

        Yields what was there at the call and still is, the least recently used at the call first.  The call copies a
        reference per block.
        """
        cell = self._placements.cell(node, tier)
        return iter(()) if cell is None else self._read(cell, list(cell.blocks), slice_blocks)

    def sweep(self, limit: int = SLICE) -> int:
        """Clean up at most ``limit`` copies of what was dropped; returns how many are left, 0 when none.

        No answer of the index depends on when, or whether, this is called.
        """
        while self._backlog and limit > 0:
            cell = self._backlog[0]
            for key in [cell.blocks.popitem()[0] for _ in range(min(limit, len(cell.blocks)))]:
                self._unmark(key, cell.bit)
                limit -= 1
            if not cell.blocks:
                self._placements.release(self._backlog.popleft())
        return self._left()

    def _left(self) -> int:
        return sum(len(cell.blocks) for cell in self._backlog)

    def _read(self, cell: BlockCell, keys: Sequence[bytes], size: int) -> Iterator[list[tuple[bytes, int]]]:
        blocks = cell.blocks
        for start in range(0, len(keys), size):
            if not self._placements.is_live(cell):
                break
            yield [(key, blocks[key][0]) for key in keys[start : start + size] if key in blocks]

    def _apply(self, node: str, delta: Delta, now: float) -> None:
        key, tier, size = delta
        if size is not None:
            cell = self._placements.open(node, tier)
            if cell.put(key, size, now):
                self._mark(key, cell.bit)
            return
        known = self._placements.cell(node, tier)
        if known is not None and key in known.blocks:
            known.drop(key)
            self._unmark(key, known.bit)
            if not known.blocks:
                self._placements.retire(known)
                self._placements.release(known)

    def _mark(self, key: bytes, bit: int) -> None:
        self._masks[key] = self._placements.intern(self._masks.get(key, 0) | bit)

    def _unmark(self, key: bytes, bit: int) -> None:
        mask = self._masks[key] & ~bit
        if mask:
            self._masks[key] = self._placements.intern(mask)
        else:
            del self._masks[key]

    def _cells_in(self, mask: int) -> list[BlockCell]:
        """The cells in ``mask`` that count, fastest tier first."""
        cells = self._placements.members(mask)
        cells.sort(key=lambda cell: (preference(cell.tier), cell.number))
        return cells

    def _lease(self, key: bytes, until: float) -> None:
        known = self._leases.get(key)
        if known is None or until > known:
            self._leases[key] = until
            self._lease_order.append((until, key))

    def _purge_leases(self, now: float, steps: int) -> None:
        """Forget some of the leases that have ended; they count for nothing anyway."""
        order = self._lease_order
        while order and order[0][0] <= now and steps > 0:
            steps -= 1
            until, key = order.popleft()
            if self._leases[key] == until:
                del self._leases[key]

    def _clear(self, node: str) -> int:
        self._abandon(node)
        cells = self._placements.cells(node)
        for cell in cells:
            self._placements.retire(cell)
        self._backlog.extend(cells)
        return sum(len(cell.blocks) for cell in cells)

    def _abandon(self, node: str) -> None:
        sync = self._syncs.pop(node, None)
        if sync is not None:
            self._backlog.extend(sync.cells.values())
