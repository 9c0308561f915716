"""What nodes tell a master, applied in steps: reports, revokes, heartbeats, batches.

Steps are generators that yield after some milliseconds of work and return the answer.  A change that was asked for
before its tier was cleared, or its node expired or replaced, counts as having come before that: what is left of it is
dropped.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Sequence
from typing import NamedTuple, TypeVar

from umbp_core.block_index import BlockIndex, HeartbeatAck
from umbp_core.errors import InvalidRequest
from umbp_core.index_gate import Acknowledgement, Action, ActionKind, Batch, BatchApplier, Verdict
from umbp_core.journal import Bundle
from umbp_core.master.clients import MAX_TIERS, Client, ClientTable
from umbp_core.master.model import Heartbeat, HeartbeatReply, NodeStatus

T = TypeVar("T")
Steps = Generator[None, None, T]


class Slices(NamedTuple):
    """How much one step does: two milliseconds' work, where the machine is not busy."""

    hashes: int = 4096
    """Of a change of the external index."""
    deltas: int = 2048
    """Of a heartbeat."""
    keys: int = 1024
    """To be routed."""
    query: int = 8192
    """Hashes of a question; a multiple of eight, since bitmaps are put together."""


SLICES = Slices()
_LOOKED_AT = 16
"""To look at a delta takes so much less than to apply it."""


def finish(steps: Steps[T]) -> T:
    """Run ``steps`` at one go."""
    while True:
        try:
            next(steps)
        except StopIteration as stop:
            answer: T = stop.value
            return answer


def check_tiers(node_id: str, tiers: Iterable[int]) -> None:
    """Raise ``InvalidRequest`` when ``tiers`` are more than one node may have."""
    if len(set(tiers)) > MAX_TIERS:
        raise InvalidRequest(f"node {node_id} names more than {MAX_TIERS} tiers; use the tiers of UMBP's wire")


class Hold:
    """What a change relies on since it was asked for: that its node's life goes on, and its tiers are not cleared."""

    __slots__ = ("_clears", "_clients", "_lapses", "client")

    def __init__(self, clients: ClientTable, node_id: str, tiers: Iterable[int] = ()) -> None:
        self._clients = clients
        self.client = clients.get(node_id)
        self._lapses = 0 if self.client is None else self.client.lapses
        self._clears = {} if self.client is None else {tier: self.client.clears(tier) for tier in tiers}

    def living(self) -> Client | None:
        """The node, if it is still the same life of it and did not expire in between."""
        client = self.client
        if client is None or self._clients.get(client.node_id) is not client or client.lapses != self._lapses:
            return None
        return client

    def counts(self, tier: int) -> bool:
        """Whether what was said of ``tier`` is still to be applied."""
        client = self.living()
        return client is not None and client.clears(tier) == self._clears[tier]


class Changes:
    """Changes of both indexes by the nodes in ``clients``."""

    def __init__(self, clients: ClientTable, external: BatchApplier, blocks: BlockIndex, slices: Slices) -> None:
        self._clients = clients
        self._external = external
        self._blocks = blocks
        self._slices = slices

    def report(self, node_id: str, hashes: Sequence[bytes], tier: int, now: float) -> Steps[bool]:
        """Steps of a report; whether the node is alive, without which nothing is stored."""
        hold = Hold(self._clients, node_id, [tier])
        return self._change(hold, Action(ActionKind.REPORT, tier, hashes), now, self._clients.is_alive(node_id))

    def revoke(self, node_id: str, hashes: Sequence[bytes], tier: int, now: float) -> Steps[bool]:
        """Steps of a revoke; whether the node is known."""
        hold = Hold(self._clients, node_id, [tier])
        return self._change(hold, Action(ActionKind.REVOKE, tier, hashes), now, hold.client is not None)

    def _change(self, hold: Hold, action: Action, now: float, accepted: bool) -> Steps[bool]:
        if accepted:
            yield from self._act(hold, action, now)
        return accepted

    def heartbeat(self, heartbeat: Heartbeat, now: float) -> Steps[HeartbeatReply]:
        """Steps of a heartbeat, with the rules of UMBP's master except for its defects."""
        return self._heartbeat(Hold(self._clients, heartbeat.node_id), heartbeat, now)

    def batch(self, node_id: str, batch: Batch, now: float) -> Steps[Acknowledgement]:
        """Steps of a batch of actions on external blocks."""
        return self._batch(Hold(self._clients, node_id, {action.tier for action in batch.actions}), batch, now)

    def probe(self, node_id: str, incarnation: int, acked: int, now: float) -> Acknowledgement:
        """The answer to a node that believes that all its batches up to ``acked`` are known here."""
        client = self._clients.get(node_id)
        if client is None or incarnation > client.incarnation:
            return _unregistered(incarnation)
        if incarnation == client.incarnation:
            self._clients.hear(client, now)
        return self._external.probe(node_id, incarnation, acked)

    def _heartbeat(self, hold: Hold, heartbeat: Heartbeat, now: float) -> Steps[HeartbeatReply]:
        client = hold.client
        if client is None or self._clients.get(client.node_id) is not client:
            return HeartbeatReply(NodeStatus.UNKNOWN)
        if heartbeat.incarnation not in (0, client.incarnation):
            return HeartbeatReply(NodeStatus.UNKNOWN)
        self._clients.hear(client, now)
        hold = Hold(self._clients, client.node_id)
        used = () if heartbeat.full_sync else self._blocks.use(client.node_id)
        yield from self._check_bundles(client.node_id, heartbeat.bundles, used)
        if hold.living() is None:
            ack = self._blocks.apply(client.node_id, (), now)
        elif heartbeat.full_sync:
            ack = yield from self._full_sync(client.node_id, heartbeat, now)
        else:
            ack = yield from self._bundles(hold, client.node_id, heartbeat.bundles, now)
        if self._clients.get(client.node_id) is not client:
            return HeartbeatReply(NodeStatus.UNKNOWN)
        if not (heartbeat.bundles and ack.request_full_sync):
            client.take(heartbeat)
        return HeartbeatReply(NodeStatus.ALIVE, ack.acked, ack.request_full_sync)

    def _check_bundles(self, node_id: str, bundles: Sequence[Bundle], used: Iterable[int]) -> Steps[None]:
        """Refuse too many tiers before anything is applied."""
        tiers, looked_at = set(used), 0
        for bundle in bundles:
            for start in range(0, len(bundle.deltas), self._slices.deltas):
                part = bundle.deltas[start : start + self._slices.deltas]
                looked_at += len(part)
                if looked_at > _LOOKED_AT * self._slices.deltas:
                    looked_at = len(part)
                    yield
                tiers.update(delta.tier for delta in part)
                check_tiers(node_id, tiers)

    def _full_sync(self, node_id: str, heartbeat: Heartbeat, now: float) -> Steps[HeartbeatAck]:
        sync = self._blocks.begin_full_sync(node_id)
        for bundle in heartbeat.bundles:
            for start in range(0, len(bundle.deltas), self._slices.deltas):
                part = bundle.deltas[start : start + self._slices.deltas]
                self._blocks.stage(sync, part, now)
                yield
        ack = self._blocks.commit(sync, heartbeat.baseline)
        return self._blocks.apply(node_id, (), now) if ack is None else ack

    def _bundles(self, hold: Hold, node_id: str, bundles: Sequence[Bundle], now: float) -> Steps[HeartbeatAck]:
        for bundle in bundles:
            if self._blocks.examine(node_id, bundle.seq) is Verdict.APPLY:
                for start in range(0, len(bundle.deltas), self._slices.deltas):
                    part = bundle.deltas[start : start + self._slices.deltas]
                    self._blocks.change(node_id, part, now)
                    yield
                    if hold.living() is None:
                        return self._blocks.apply(node_id, (), now)
            ack = self._blocks.apply(node_id, (Bundle(bundle.seq, ()),), now)
            if ack.request_full_sync:
                return ack
        return self._blocks.apply(node_id, (), now)

    def _batch(self, hold: Hold, batch: Batch, now: float) -> Steps[Acknowledgement]:
        client = hold.client
        if client is None or self._clients.get(client.node_id) is not client or batch.incarnation > client.incarnation:
            return _unregistered(batch.incarnation)
        answer = self._external.begin(client.node_id, batch, now)
        if answer.verdict is not Verdict.STALE:
            self._clients.hear(client, now)
        if answer.verdict is not Verdict.APPLY:
            return answer
        for action in batch.actions:
            yield from self._act(hold, action, now)
        if self._clients.get(client.node_id) is not client:
            return _unregistered(batch.incarnation)
        if hold.living() is None:
            return self._external.probe(client.node_id, batch.incarnation, batch.seq)
        return self._external.end(client.node_id, batch)

    def _act(self, hold: Hold, action: Action, now: float) -> Steps[None]:
        """One action, as far as it still counts."""
        node_id = "" if hold.client is None else hold.client.node_id
        for start in range(0, len(action.hashes) or 1, self._slices.hashes):
            if not hold.counts(action.tier):
                return
            part = Action(action.kind, action.tier, action.hashes[start : start + self._slices.hashes])
            self._external.act(node_id, part, now)
            yield


def _unregistered(incarnation: int) -> Acknowledgement:
    return Acknowledgement(Verdict.UNREGISTERED, incarnation, 0, request_full_sync=True)
