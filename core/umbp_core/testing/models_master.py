"""A plain model of the master's state: rows, sets and loops, and a list of changes that are under way."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from umbp_core.index_gate import Action, ActionKind, Batch, Verdict
from umbp_core.master.model import NodeStatus, PutOutcome, Registration, TierCapacity
from umbp_core.testing.models_index import BlockModel, HitModel, IndexModel

Answer = tuple[Verdict, int, int, bool]
"""Verdict, incarnation, acked, whether a full sync is asked for."""


@dataclass
class Row:
    """One life of one node."""

    incarnation: int
    node_address: str
    peer_address: str
    seen: float
    heard: bool = True
    status: NodeStatus = NodeStatus.ALIVE
    capacities: tuple[TierCapacity, ...] = ()
    acked: int = 0
    """Of its batches."""
    owes: bool = False
    """Nothing but a full sync of its batches counts."""


@dataclass
class Pending:
    """A change that is under way: what is left of it, and whether that still counts."""

    node: str
    row: Row | None
    actions: list[Action]
    void: set[int] = field(default_factory=set)
    """Tiers that were cleared."""
    dropped: bool = False
    """The node expired or went."""


@dataclass
class MasterModel:
    """What the master should know."""

    patience: float
    lease: float
    hits: HitModel
    slice_hashes: int
    rows: dict[str, Row] = field(default_factory=dict)
    external: IndexModel = field(default_factory=IndexModel)
    blocks: BlockModel = field(default_factory=BlockModel)
    pending: list[Pending] = field(default_factory=list)

    # Nodes.

    def overdue(self, node: str, now: float) -> bool:
        """Whether a node with the status ALIVE was silent for too long."""
        row = self.rows[node]
        return row.status is NodeStatus.ALIVE and now - row.seen > self.patience

    def audible(self, node: str, now: float) -> bool:
        """Whether a node counts for answers."""
        row = self.rows.get(node)
        return row is not None and row.status is NodeStatus.ALIVE and not self.overdue(node, now)

    def registers(self, told: Registration, now: float) -> bool | None:
        """Whether a new life begins; ``None``: it is refused."""
        row = self.rows.get(told.node_id)
        new_life = True
        if row is not None and row.heard and self.audible(told.node_id, now):
            if told.incarnation == 0 or told.incarnation < row.incarnation:
                return None
            new_life = told.incarnation > row.incarnation
        address, host = told.peer_address, told.node_address
        if row is not None:
            if not address and (not host or not row.node_address or host == row.node_address):
                address = row.peer_address
            host = host or row.node_address
        if new_life or row is None:
            self.drop(told.node_id)
            self.rows.pop(told.node_id, None)
            row = self.rows[told.node_id] = Row(told.incarnation, host, address, now)
            self.blocks.acked[told.node_id] = 0
            self.blocks.lost.discard(told.node_id)
        row.peer_address, row.node_address = address, host
        row.capacities = told.capacities
        row.seen, row.status, row.heard = now, NodeStatus.ALIVE, True
        return new_life

    def drop(self, node: str) -> None:
        """Everything that a node said is void."""
        self.external.clear(node)
        self.blocks.clear(node)
        for change in self.pending:
            change.dropped = change.dropped or change.node == node

    def unregister(self, node: str) -> bool:
        """Forget a node; whether it was known."""
        self.drop(node)
        self.blocks.acked.pop(node, None)
        self.blocks.lost.discard(node)
        return self.rows.pop(node, None) is not None

    def expire(self, now: float) -> set[str]:
        """Let the overdue nodes expire."""
        gone = {node for node in self.rows if self.overdue(node, now)}
        for node in gone:
            self.rows[node].status = NodeStatus.EXPIRED
            self._owe(node)
        return gone

    def restart(self, now: float) -> None:
        """The master begins again with its table of nodes."""
        for node, row in self.rows.items():
            row.status, row.heard, row.seen, row.acked = NodeStatus.ALIVE, False, now, 0
            self.blocks.acked[node] = 0
            self._owe(node)
        self.external, self.hits.hits, self.blocks.leases, self.pending = IndexModel(), {}, {}, []

    def _owe(self, node: str) -> None:
        self.drop(node)
        self.rows[node].owes = True
        self.blocks.lost.add(node)

    # External blocks.

    def clear(self, node: str, tier: int | None) -> int:
        """A tier or all of a node is cleared, and what is left of changes under way is void."""
        for change in self.pending:
            if change.node == node:
                change.void |= {action.tier for action in change.actions} if tier is None else {tier}
        return self.external.clear(node, tier)

    def begin(self, node: str, actions: Iterable[Action]) -> Pending:
        """A change is asked for."""
        cut = [part for action in actions for part in self._cut(action)]
        change = Pending(node, self.rows.get(node), cut)
        self.pending.append(change)
        return change

    def _cut(self, action: Action) -> list[Action]:
        starts = range(0, len(action.hashes) or 1, self.slice_hashes)
        return [Action(action.kind, action.tier, action.hashes[start : start + self.slice_hashes]) for start in starts]

    def step(self, change: Pending) -> None:
        """The next slice that still counts."""
        while change.actions:
            action = change.actions.pop(0)
            if change.dropped or action.tier in change.void:
                continue
            if action.kind is ActionKind.REPORT:
                self.external.report(change.node, action.hashes, action.tier)
            elif action.kind is ActionKind.REVOKE:
                self.external.revoke(change.node, action.hashes, action.tier)
            else:
                self.external.clear(change.node, action.tier)
            return

    def judge(self, node: str, batch: Batch, now: float) -> Answer:
        """What happens to a batch when it begins."""
        row = self.rows.get(node)
        if row is None or batch.incarnation > row.incarnation:
            return Verdict.UNREGISTERED, batch.incarnation, 0, True
        if batch.incarnation < row.incarnation:
            return Verdict.STALE, row.incarnation, row.acked, False
        row.seen, row.status, row.heard = max(row.seen, now), NodeStatus.ALIVE, True
        verdict = Verdict.GAP
        if not row.owes and batch.seq <= row.acked:
            verdict = Verdict.REPLAY
        elif batch.full_sync or (not row.owes and batch.seq == row.acked + 1):
            verdict = Verdict.APPLY
        return verdict, row.incarnation, row.acked, verdict is Verdict.GAP

    def match(self, query: Sequence[bytes], now: float) -> dict[str, list[tuple[int, list[bytes]]]]:
        """Node to tiers to hashes."""
        return {node: tiers for node, tiers in self.external.match(query) if self.audible(node, now)}

    # Blocks that nodes own.

    def put_targets(self, requester: str, exclude: set[str], now: float) -> dict[str, dict[int, int]]:
        """The nodes that may be given blocks, in the order in which they came, with their room."""
        return {
            node: {capacity.tier: capacity.available for capacity in row.capacities}
            for node, row in self.rows.items()
            if row.heard and self.audible(node, now) and node not in exclude
            if row.peer_address or node == requester
        }

    def puts(
        self, requester: str, keys: Sequence[bytes], sizes: Sequence[int], exclude: set[str], now: float
    ) -> list[tuple[PutOutcome, str, int]]:
        """Outcome, node and tier of each, with most available room and no affinity."""
        rooms = self.put_targets(requester, exclude, now)
        routes = []
        for key, size in zip(keys, sizes, strict=True):
            route = (PutOutcome.UNAVAILABLE, "", 0)
            if self.blocks.locations(key):
                route = (PutOutcome.ALREADY_EXISTS, "", 0)
            else:
                fitting = [
                    (tier, -room[tier], number, node)
                    for number, (node, room) in enumerate(rooms.items())
                    for tier in (1, 2)
                    if room.get(tier, -1) >= size
                ]
                if fitting:
                    tier, _, _, node = min(fitting)
                    rooms[node][tier] -= size
                    route = (PutOutcome.ROUTED, node, tier)
            routes.append(route)
        return routes

    def victims(self, now: float, excess: Callable[[TierCapacity], int]) -> list[tuple[str, list[bytes]]]:
        """Node and keys of every tier that is too full."""
        orders = []
        for node, row in self.rows.items():
            if row.status is not NodeStatus.ALIVE or not row.peer_address:
                continue
            for capacity in row.capacities:
                left, keys = excess(capacity) if capacity.tier in (1, 2) else 0, []
                for copy in self.blocks.cells.get((node, capacity.tier), []):
                    if left > 0 and not self.blocks.leases.get(copy.key, -1.0) > now:
                        keys.append(copy.key)
                        left -= copy.size
                if keys:
                    orders.append((node, keys))
        return orders
