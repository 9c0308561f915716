"""The nodes that a master knows: who they are, when they were last heard, and whether what they said still counts.

A node is alive from its registration until it was silent for ``heartbeat_ttl * max_missed_heartbeats``; then it
expires.  An expired node's row is kept, since one that comes back may not tell its address again, and forgotten after
a day.  So is the row of a node that an earlier life of the master knew: it counts as alive, and was not *heard* yet.

Time is whatever monotonic seconds the caller passes.  No I/O, no threads, no clock.  One thread at a time.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import replace

from umbp_core.errors import AlreadyRegistered, InvalidRequest
from umbp_core.master.model import ClientRecord, Heartbeat, MasterSettings, NodeStatus, Registration, TierCapacity
from umbp_core.master.routing import Offer

MAX_TIERS = 32
"""Tiers that one node may name: the wire's enumeration is open, and every tier of a node costs every mask a bit."""

MAX_NAME = 8192
"""Characters of a node's name and addresses: answers repeat them, and every wire has to be able to carry them."""


class Client:
    """One life of one node.  Changed by ``ClientTable`` and by ``MasterState`` only."""

    __slots__ = (
        "_clears",
        "_tier_clears",
        "capacities",
        "counts",
        "engine_desc",
        "heard",
        "incarnation",
        "lapses",
        "node_address",
        "node_id",
        "offer",
        "peer_address",
        "seen",
        "status",
        "tags",
    )

    def __init__(self, record: ClientRecord, now: float, heard: bool) -> None:
        self.node_id = record.node_id
        self.seen = now
        self.heard = heard
        """Whether it gave a sign of life since this master began."""
        self.status = NodeStatus.ALIVE
        self.counts: dict[int, int] = {}
        """Blocks per tier, as the node counts them itself."""
        self.lapses = 0
        """How often it expired."""
        self._clears = 0
        self._tier_clears: dict[int, int] = {}
        self.introduce(record)

    def introduce(self, record: ClientRecord) -> None:
        """Who the node is."""
        self.node_address = record.node_address
        self.peer_address = record.peer_address
        self.engine_desc = record.engine_desc
        self.tags = record.tags
        self.incarnation = record.incarnation
        self._has(record.capacities)

    def _has(self, capacities: tuple[TierCapacity, ...]) -> None:
        self.capacities = capacities
        self.offer = Offer(self.node_id, self.peer_address, capacities)

    def record(self) -> ClientRecord:
        """What has to survive a restart of the master."""
        return ClientRecord(
            self.node_id,
            self.node_address,
            self.peer_address,
            self.engine_desc,
            self.tags,
            self.incarnation,
            self.capacities,
        )

    def take(self, heartbeat: Heartbeat) -> None:
        """Capacities and counts; what the heartbeat does not tell stays as it was."""
        if heartbeat.capacities is not None:
            self._has(heartbeat.capacities)
        if heartbeat.counts is not None:
            self.counts = dict(heartbeat.counts)

    def clear(self, tier: int | None = None) -> None:
        """What was said of ``tier``, or of all, does not count any more: see :meth:`clears`."""
        if tier is not None and (tier in self._tier_clears or len(self._tier_clears) < MAX_TIERS):
            self._tier_clears[tier] = self._tier_clears.get(tier, 0) + 1
        else:
            self._clears += 1

    def clears(self, tier: int) -> int:
        """How often ``tier`` was cleared.  Grows, so that a long change sees that the rest of it is void."""
        return self._clears + self._tier_clears.get(tier, 0)


class ClientTable:
    """All nodes, by their id."""

    def __init__(self, settings: MasterSettings) -> None:
        self._patience = settings.heartbeat_ttl * settings.max_missed_heartbeats
        self._retention = settings.expired_retention
        self._clients: dict[str, Client] = {}
        self._alive: dict[str, Client] = {}
        """Those with the status ALIVE, the one that was silent longest first."""
        self._expired: dict[str, Client] = {}
        """Those with the status EXPIRED, in the order in which they expired."""
        self.revision = 0
        """Grows whenever an answer of :meth:`peer_address` may have changed."""

    def __iter__(self) -> Iterator[Client]:
        """All nodes, in the order in which they came."""
        return iter(self._clients.values())

    def get(self, node_id: str) -> Client | None:
        """What is known of a node."""
        return self._clients.get(node_id)

    def is_alive(self, node_id: str) -> bool:
        """Whether the node has not expired."""
        return node_id in self._alive

    def peer_address(self, node_id: str) -> str:
        """Where to reach a node; empty unless it has not expired."""
        client = self._alive.get(node_id)
        return "" if client is None else client.peer_address

    def register(self, registration: Registration, now: float) -> tuple[Client, bool]:
        """The node, and whether a new life of it begins; if so, what an earlier one said is void.

        It does not when a living node repeats its registration: when it has an incarnation, and the same one.  A newer
        incarnation takes a living node's place.  An address that is not told is the one that the node had before.
        """
        if not registration.node_id:
            raise InvalidRequest("node_id must not be empty; register with an id of your own")
        if max(map(len, (registration.node_id, registration.node_address, registration.peer_address))) > MAX_NAME:
            raise InvalidRequest(f"node_id and addresses have at most {MAX_NAME} characters; take shorter ones")
        known = self._clients.get(registration.node_id)
        new_life = True
        if known is not None and known.heard and not self._is_overdue(known, now):
            if registration.incarnation == 0 or registration.incarnation < known.incarnation:
                raise AlreadyRegistered(
                    f"node is already alive and cannot be re-registered: {known.node_id} was heard "
                    f"{now - known.seen:.1f} s ago; end it, wait until it expires, or take another id"
                )
            new_life = registration.incarnation > known.incarnation
        record = _record_of(registration, known)
        if known is None or new_life:
            self.remove(registration.node_id)
            known = self._clients[record.node_id] = Client(record, now, heard=True)
        else:
            known.introduce(record)
            self.revision += 1
        self.hear(known, now)
        return known, new_life

    def complete(self, record: ClientRecord) -> bool:
        """What an earlier life of the master knew of a node that is here; whether that tells more."""
        known = self._clients[record.node_id]
        before = known.record()
        known.introduce(_completed(before, record))
        self.revision += 1
        return known.record() != before

    def restore(self, record: ClientRecord, now: float) -> Client:
        """A node that an earlier life of the master knew; it has as long to be heard as any other."""
        client = self._clients[record.node_id] = Client(record, now, heard=False)
        self._alive[client.node_id] = client
        self.revision += 1
        return client

    def remove(self, node_id: str) -> Client | None:
        """Forget a node."""
        self._alive.pop(node_id, None)
        self._expired.pop(node_id, None)
        self.revision += 1
        return self._clients.pop(node_id, None)

    def hear(self, client: Client, now: float) -> None:
        """A sign of life."""
        client.seen = max(client.seen, now)
        client.heard = True
        client.status = NodeStatus.ALIVE
        self._expired.pop(client.node_id, None)
        if self._alive.pop(client.node_id, None) is None:
            self.revision += 1
        self._alive[client.node_id] = client

    def silent(self, now: float) -> Collection[str]:
        """The nodes that will expire with the next :meth:`expire`."""
        overdue = []
        for client in self._alive.values():
            if now - client.seen <= self._patience and client.status is NodeStatus.ALIVE:
                break
            overdue.append(client.node_id)
        return overdue

    def expire(self, now: float) -> list[Client]:
        """Let those nodes expire that were silent for too long; returns them."""
        expired = [self._alive.pop(node_id) for node_id in self.silent(now)]
        self.revision += len(expired)
        for client in expired:
            client.status = NodeStatus.EXPIRED
            client.lapses += 1
            self._expired[client.node_id] = client
        return expired

    def purge(self, now: float) -> list[str]:
        """Forget the nodes that expired too long ago; returns them."""
        gone = []
        for client in self._expired.values():
            if now - client.seen <= self._retention:
                break
            gone.append(client.node_id)
        for node_id in gone:
            self.remove(node_id)
        return gone

    def forgive(self, seconds: float) -> None:
        """The master itself was away for ``seconds``, in which nobody could be heard."""
        for client in self._alive.values():
            client.seen += seconds

    def _is_overdue(self, client: Client, now: float) -> bool:
        return client.status is not NodeStatus.ALIVE or now - client.seen > self._patience


def _record_of(registration: Registration, known: Client | None) -> ClientRecord:
    """Who registers; what is not told is as it was known."""
    told = ClientRecord(
        registration.node_id,
        registration.node_address,
        registration.peer_address,
        registration.engine_desc,
        registration.tags,
        registration.incarnation,
        tuple(TierCapacity(*capacity) for capacity in registration.capacities),
    )
    return told if known is None else _completed(told, known.record())


def _completed(told: ClientRecord, known: ClientRecord) -> ClientRecord:
    """``told`` with the addresses that it lacks as they were ``known``, unless the node is at another one now."""
    moved = bool(told.node_address and known.node_address) and told.node_address != known.node_address
    completed = replace(told, node_address=told.node_address or known.node_address)
    if told.peer_address or moved:
        return completed
    return replace(completed, peer_address=known.peer_address, engine_desc=told.engine_desc or known.engine_desc)
