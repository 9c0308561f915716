"""A node with nothing but what is true of it and a session that tells it, driven by hand."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from tests.master.client.fake_network import GRPC, NATIVE, FakeNetwork
from umbp_connectors.client.addresses import MasterAddress
from umbp_connectors.client.counters import Counters
from umbp_connectors.client.intake import Barrier, Intake
from umbp_connectors.client.link import Link
from umbp_connectors.client.outbox import BlockOutbox
from umbp_connectors.client.session import Session, SessionParts
from umbp_connectors.client.settings import ClientSettings
from umbp_core.breaker import Breaker
from umbp_core.journal import Delta, Journal
from umbp_core.master.model import Registration, TierCapacity
from umbp_core.reports import ReportJournal

TIERS = (1, 2, 3)

SMALL = ClientSettings(
    batch_hashes=4, bundle_events=2, heartbeat_bundles=2, flush_events=4, max_waiting=24, upgrade_interval=20.0
)
"""Bounds that are met within a few steps."""


class ReportingNode:
    """Changes of its truth are told; ``step`` and ``run`` do what the client's thread would."""

    def __init__(
        self,
        network: FakeNetwork,
        node_id: str = "node",
        addresses: Sequence[MasterAddress] = (NATIVE, GRPC),
        incarnation: int = 1000,
        settings: ClientSettings = SMALL,
    ) -> None:
        self.node_id = node_id
        self.network = network
        self.clock = network.clock
        self.held: set[tuple[int, bytes]] = set()
        self.owned: dict[tuple[bytes, int], int] = {}
        self.counters = Counters()
        self.intake = Intake(self.clock, settings.max_waiting, settings.flush_hashes, settings.flush_interval)
        self.reports = ReportJournal(incarnation, settings.max_waiting, settings.batch_hashes)
        journal = Journal(incarnation, settings.max_waiting, settings.bundle_events)
        self.blocks = BlockOutbox(node_id, journal, self.all_blocks, settings.heartbeat_bundles, settings.bundle_events)
        self.breaker = Breaker(lambda: 0.0, settings.backoff, settings.failures)
        self.link = Link(addresses, network.dial, self.clock, settings)
        self.settings = settings
        self.registration = Registration(
            node_id, "10.0.0.1", "10.0.0.1:7", b"engine", (TierCapacity(2, 100, 90),), ("role=x",), incarnation
        )
        self.session = self.new_session()

    def new_session(self) -> Session:
        return Session(
            self.registration,
            SessionParts(
                self.link,
                self.intake,
                self.reports,
                self.all_hashes,
                self.blocks,
                self.breaker,
                self.clock,
                lambda: 0.0,
                self.settings,
                self.counters,
            ),
        )

    def all_hashes(self) -> Iterator[tuple[int, list[bytes]]]:
        """The truth, as it is when each piece is read."""
        for tier in TIERS:
            yield tier, sorted(key for held_tier, key in self.held if held_tier == tier)

    def all_blocks(self) -> Iterator[Delta]:
        """The truth of its own blocks, as it is when the first is read."""
        for (key, tier), size in list(self.owned.items()):
            yield Delta(key, tier, size)

    def report(self, hashes: Sequence[bytes], tier: int) -> None:
        self.held |= {(tier, key) for key in hashes}
        self.intake.put(len(hashes), self.reports.report, hashes, tier)

    def revoke(self, hashes: Sequence[bytes], tier: int) -> None:
        self.held -= {(tier, key) for key in hashes}
        self.intake.put(len(hashes), self.reports.revoke, hashes, tier)

    def clear(self, tier: int) -> None:
        self.held = {(held_tier, key) for held_tier, key in self.held if held_tier != tier}
        self.intake.put(1, self.reports.clear, tier)

    def record(self, deltas: Sequence[Delta]) -> None:
        for key, tier, size in deltas:
            if size is None:
                self.owned.pop((key, tier), None)
            else:
                self.owned[key, tier] = size
        self.intake.put(len(deltas), self.blocks.journal.record, deltas)

    def barrier(self) -> Barrier:
        barrier = Barrier()
        self.intake.put_barrier(barrier)
        return barrier

    def step(self) -> float:
        return self.session.step()

    def run(self, seconds: float) -> None:
        """Let time pass, and do at each moment what is due."""
        end = self.clock.now + seconds
        steps = 0
        while self.clock.now < end:
            due = self.step()
            steps += 1
            assert steps < 2000, "the session does not come to rest"
            if due > self.clock.now:
                self.network.pass_time(min(due, end) - self.clock.now)

    def told(self) -> bool:
        """Whether the master knows the truth."""
        return self.network.external(self.node_id) == self.held and self.network.owned(self.node_id) == self.owned
