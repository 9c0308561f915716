"""Heartbeats with what changed of a node's own blocks: bounded messages, whatever waits."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from itertools import islice

from umbp_core.journal import Bundle, Delta, Journal
from umbp_core.master.model import Heartbeat, HeartbeatReply, TierCapacity

BlockSnapshot = Callable[[], Iterable[Delta]]
"""Every block that a node owns now, as additions."""


class BlockOutbox:
    """The heartbeats of node ``node_id`` from its ``journal``, with up to ``bundles`` bundles each.

    A full sync that is larger begins with a heartbeat of that size and goes on in the next ones.  One thread.
    """

    def __init__(self, node_id: str, journal: Journal, snapshot: BlockSnapshot, bundles: int, events: int) -> None:
        self._node_id = node_id
        self._snapshot = snapshot
        self._bundles = bundles
        self._events = events
        self._muted = False
        self.journal = journal
        self.capacities: tuple[TierCapacity, ...] | None = None
        self.counts: Mapping[int, int] | None = None

    @property
    def settled(self) -> bool:
        """Whether nothing is left to tell."""
        return self._muted or self.journal.settled

    @property
    def full_sync_due(self) -> bool:
        """Whether the next heartbeat begins to tell everything anew."""
        return not self._muted and self.journal.full_sync_due

    def set_capacities(self, capacities: tuple[TierCapacity, ...], counts: Mapping[int, int] | None) -> None:
        """What every heartbeat says from now on."""
        self.capacities = capacities
        self.counts = counts

    def compose(self) -> Heartbeat:
        """The heartbeat to send now.  May read from the snapshot, and raises what that raises."""
        journal = self.journal
        full_sync = self.full_sync_due or (journal.full_sync_pending and not self._muted)
        baseline = 0
        if full_sync:
            deltas = iter(self._snapshot())
            parts = [tuple(islice(deltas, self._events)) for _ in range(self._bundles)]
            baseline = journal.begin_full_sync(deltas)
            bundles = [Bundle(baseline, part) for part in parts if part]
        else:
            bundles = [] if self._muted else journal.bundles(self._bundles)
        return Heartbeat(self._node_id, bundles, full_sync, baseline, self.capacities, self.counts, journal.incarnation)

    def receive(self, reply: HeartbeatReply) -> None:
        """The answer of a master that knows the node.

        If it acknowledges less than it did before, it is not the one that we told, or it forgot.
        """
        journal = self.journal
        forgot = reply.acked_seq < journal.acked_seq
        journal.receive(journal.incarnation, reply.acked_seq, reply.request_full_sync or forgot)

    def mute(self) -> None:
        """The master refuses our events as they are: go on with signs of life only, until the next registration."""
        self._muted = True

    def begin(self, incarnation: int) -> None:
        """The node was registered: everything is to be told."""
        self._muted = False
        if incarnation > self.journal.incarnation:
            self.journal.renew(incarnation)
        else:
            self.journal.request_full_sync()
