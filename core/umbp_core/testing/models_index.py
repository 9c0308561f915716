"""Plain models of the external KV index, its hit counters and the block index.

They promise the same as the real parts, with sets, lists and loops over everything instead of masks and cells.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from umbp_core.block_index import Location, TierUse
from umbp_core.index_feed import Change, ChangeKind
from umbp_core.index_gate import Action, ActionKind, Batch
from umbp_core.index_match import TierRun
from umbp_core.journal import Delta, Journal
from umbp_core.placements import preference

Entries = set[tuple[str, int, bytes]]
"""(node, tier, hash)"""


def follow(entries: Entries, change: Change) -> Entries:
    """What a reader of the feed makes of a change."""
    if change.kind is ChangeKind.CLEARED:
        return {entry for entry in entries if entry[:2] != (change.node, change.tier)}
    named = {(change.node, change.tier, key) for key in change.hashes}
    return entries | named if change.kind is ChangeKind.REPORTED else entries - named


@dataclass
class IndexModel:
    """Who holds what, as a set of (node, tier, hash)."""

    held: Entries = field(default_factory=set)
    order: list[str] = field(default_factory=list)
    """The nodes that hold something, in the order in which they came."""

    def _settle(self) -> None:
        holding = {node for node, _, _ in self.held}
        self.order = [node for node in self.order if node in holding]

    def report(self, node: str, hashes: Sequence[bytes], tier: int) -> int:
        """Add them; how many are new."""
        new = {(node, tier, key) for key in hashes} - self.held
        self.held |= new
        if new and node not in self.order:
            self.order.append(node)
        return len(new)

    def revoke(self, node: str, hashes: Sequence[bytes], tier: int) -> int:
        """Take them away; how many were there."""
        gone = {(node, tier, key) for key in hashes} & self.held
        self.held -= gone
        self._settle()
        return len(gone)

    def clear(self, node: str, tier: int | None = None) -> int:
        """Take everything of the tier, or of the node, away."""
        gone = {entry for entry in self.held if entry[0] == node and tier in (None, entry[1])}
        self.held -= gone
        self._settle()
        return len(gone)

    def tiers(self, node: str) -> list[int]:
        """The tiers on which ``node`` holds something, fastest first."""
        return sorted({tier for name, tier, _ in self.held if name == node}, key=preference)

    def hashes(self, node: str, tier: int) -> set[bytes]:
        """What ``node`` holds on ``tier``."""
        return {key for name, where, key in self.held if (name, where) == (node, tier)}

    def match(self, hashes: Sequence[bytes]) -> list[tuple[str, list[tuple[int, list[bytes]]]]]:
        """Node by node and tier by tier in the order of the wire, what they hold of the query."""
        answer = []
        for node in self.order:
            tiers = []
            for tier in sorted(self.tiers(node)):
                found = [key for key in hashes if (node, tier, key) in self.held]
                if found:
                    tiers.append((tier, found))
            if tiers:
                answer.append((node, tiers))
        return answer

    def prefix(
        self, hashes: Sequence[bytes], weights: Mapping[int, float] | None
    ) -> dict[str, tuple[int, list[TierRun], float]]:
        """Per node the length, the runs and the cost of its longest usable prefix."""
        answer = {}
        for node in self.order:
            chosen: list[int] = []
            for key in hashes:
                usable = [tier for tier in self.tiers(node) if (node, tier, key) in self.held]
                if weights is not None:
                    usable = sorted((tier for tier in usable if tier in weights), key=weights.__getitem__)
                if not usable:
                    break
                chosen.append(usable[0])
            if chosen:
                cost = 0.0 if weights is None else sum(weights[tier] for tier in chosen)
                answer[node] = (len(chosen), runs_of(chosen), cost)
        return answer


def runs_of(tiers: Sequence[int]) -> list[TierRun]:
    """Equal neighbours counted together."""
    runs: list[TierRun] = []
    for tier in tiers:
        if runs and runs[-1].tier == tier:
            runs[-1] = TierRun(tier, runs[-1].length + 1)
        else:
            runs.append(TierRun(tier, 1))
    return runs


@dataclass
class HitModel:
    """Counters with the time of the last hit."""

    ttl: float
    hits: dict[bytes, tuple[int, float]] = field(default_factory=dict)

    def record(self, hashes: Sequence[bytes], now: float) -> None:
        """Once per hash."""
        for key in set(hashes):
            self.hits[key] = (self.hits.get(key, (0, now))[0] + 1, now)

    def collect(self, now: float) -> int:
        """Forget the old ones; how many."""
        fresh = {key: hit for key, hit in self.hits.items() if hit[1] > now - self.ttl}
        gone = len(self.hits) - len(fresh)
        self.hits = fresh
        return gone


@dataclass
class Copy:
    """One key in one tier of one node."""

    key: bytes
    size: int
    used: float


@dataclass
class BlockModel:
    """The copies of each (node, tier) as a list, the least recently used first; sequences and leases as numbers."""

    cells: dict[tuple[str, int], list[Copy]] = field(default_factory=dict)
    acked: dict[str, int] = field(default_factory=dict)
    """Of the nodes that are registered."""
    lost: set[str] = field(default_factory=set)
    """The nodes that owe a full sync."""
    leases: dict[bytes, float] = field(default_factory=dict)

    def find(self, node: str, tier: int, key: bytes) -> Copy | None:
        """The copy, if there is one."""
        return next((copy for copy in self.cells.get((node, tier), []) if copy.key == key), None)

    def put(self, node: str, delta: Delta, now: float) -> None:
        """Apply one change."""
        known = self.find(node, delta.tier, delta.key)
        cell = self.cells.setdefault((node, delta.tier), [])
        if delta.size is None:
            if known is not None:
                cell.remove(known)
        elif known is not None:
            known.size = delta.size
        else:
            cell.append(Copy(delta.key, delta.size, now))
        if not cell:
            del self.cells[node, delta.tier]

    def clear(self, node: str) -> int:
        """Drop all of ``node``."""
        gone = [place for place in self.cells if place[0] == node]
        return sum(len(self.cells.pop(place)) for place in gone)

    def heartbeat(self, node: str, bundles: Sequence[tuple[int, Sequence[Delta]]], now: float) -> tuple[int, bool]:
        """Apply what comes in order; the last number that was applied and whether a full sync is asked for."""
        if node not in self.acked:
            return 0, True
        for seq, deltas in bundles:
            if node in self.lost or seq > self.acked[node] + 1:
                return self.acked[node], True
            if seq == self.acked[node] + 1:
                self.acked[node] = seq
                for delta in deltas:
                    self.put(node, delta, now)
        return self.acked[node], node in self.lost

    def full_sync(self, node: str, staged: Sequence[tuple[Delta, float]], baseline: int) -> None:
        """Replace all of ``node``."""
        self.clear(node)
        for delta, now in staged:
            if delta.size is not None:
                self.put(node, delta, now)
        self.acked[node] = baseline
        self.lost.discard(node)

    def locations(self, key: bytes, exclude: Collection[str] = ()) -> set[Location]:
        """All copies of ``key``."""
        return {
            Location(node, tier, copy.size)
            for (node, tier), cell in self.cells.items()
            for copy in cell
            if copy.key == key and node not in exclude
        }

    def route(self, key: bytes, now: float, lease: float, exclude: Collection[str]) -> set[Location]:
        """The copies that may be used; if there are any, the key is used and leased."""
        found = self.locations(key, exclude)
        if found:
            self.leases[key] = max(now + lease, self.leases.get(key, 0.0))
            for (node, tier), cell in self.cells.items():
                copy = self.find(node, tier, key)
                if copy is not None:
                    copy.used = now
                    cell.remove(copy)
                    cell.append(copy)
        return found

    def use(self, node: str) -> dict[int, TierUse]:
        """Blocks and bytes of each tier."""
        return {
            tier: TierUse(len(cell), sum(copy.size for copy in cell))
            for (name, tier), cell in self.cells.items()
            if name == node
        }


@dataclass
class TellingNode:
    """A node with nothing but a journal and what is true of its tiers."""

    journal: Journal
    truth: dict[tuple[bytes, int], int] = field(default_factory=dict)

    def change(self, deltas: Sequence[Delta]) -> None:
        """The tiers change, and the journal is told."""
        for key, tier, size in deltas:
            if size is None:
                self.truth.pop((key, tier), None)
            else:
                self.truth[key, tier] = size
        self.journal.record(deltas)

    def compose(self, retry: bool) -> list[Batch]:
        """What the node would send now; with ``retry``, a full sync that is not acknowledged again."""
        journal = self.journal
        if journal.full_sync_due or (retry and journal.full_sync_pending):
            seq = journal.begin_full_sync()
            content = [Action(ActionKind.REPORT, tier, [key]) for key, tier in self.truth]
            return [Batch(journal.incarnation, seq, content, full_sync=True)]
        return [
            Batch(journal.incarnation, bundle.seq, [self._action(delta) for delta in bundle.deltas])
            for bundle in journal.bundles(2)
        ]

    @staticmethod
    def _action(delta: Delta) -> Action:
        kind = ActionKind.REVOKE if delta.size is None else ActionKind.REPORT
        return Action(kind, delta.tier, [delta.key])
