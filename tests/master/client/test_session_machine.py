"""Whatever the network, the master and the node did: once they are well, the master knows the truth (law L11)."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule

from tests.master.client.fake_network import GRPC, NATIVE, FakeNetwork
from tests.master.client.reporting_node import TIERS, ReportingNode
from umbp_connectors.client.addresses import MasterAddress
from umbp_core.journal import Delta

INTERVAL = 5.0
KEYS = tuple(b"%d" % number for number in range(12))
FATES = ("lost", "unanswered", "repeated", "delayed")

keys = st.lists(st.sampled_from(KEYS), max_size=5)
tiers = st.sampled_from(TIERS)
seconds = st.sampled_from((0.0, 0.1, 1.0, 6.0, 40.0))


class SessionMachine(RuleBasedStateMachine):
    """Two nodes, a master that dies, forgets and comes back, and a network that fails as hypothesis likes."""

    doors: tuple[MasterAddress, ...] = (NATIVE, GRPC)

    def __init__(self) -> None:
        super().__init__()
        self.pending: list[str] = []
        self.network = FakeNetwork(fate=self._fate)
        self.latest = 100_000
        self.nodes = [ReportingNode(self.network, name, self.doors, self.latest) for name in ("one", "two")]

    def _fate(self) -> str:
        return self.pending.pop(0) if self.pending else "well"

    @rule(which=st.integers(0, 1), hashes=keys, tier=tiers)
    def report(self, which: int, hashes: list[bytes], tier: int) -> None:
        self.nodes[which].report(hashes, tier)

    @rule(which=st.integers(0, 1), hashes=keys, tier=tiers)
    def revoke(self, which: int, hashes: list[bytes], tier: int) -> None:
        self.nodes[which].revoke(hashes, tier)

    @rule(which=st.integers(0, 1), tier=tiers)
    def clear(self, which: int, tier: int) -> None:
        self.nodes[which].clear(tier)

    @rule(which=st.integers(0, 1), hashes=keys, tier=tiers, size=st.none() | st.integers(1, 3))
    def record(self, which: int, hashes: list[bytes], tier: int, size: int | None) -> None:
        self.nodes[which].record([Delta(key, tier, size) for key in hashes])

    @rule(data=st.data())
    def fail(self, data: st.DataObject) -> None:
        """What the next calls meet."""
        self.pending = data.draw(st.lists(st.sampled_from(("well", *FATES)), max_size=8))

    @rule(which=st.integers(0, 1), steps=st.integers(1, 4))
    def step(self, which: int, steps: int) -> None:
        for _ in range(steps):
            self.nodes[which].step()

    @rule(duration=seconds)
    def run(self, duration: float) -> None:
        """Both go on for a while; a node that does nothing meanwhile would be one that was stopped."""
        for node in self.nodes:
            node.run(duration / 2)

    @rule(duration=seconds)
    def stop_everything(self, duration: float) -> None:
        """Nobody does anything, maybe until all expire."""
        self.network.pass_time(duration)

    @rule(persistent=st.booleans())
    def restart_master(self, persistent: bool) -> None:
        self.network.restart_master(persistent)

    @rule(partitioned=st.booleans())
    def partition(self, partitioned: bool) -> None:
        self.network.partitioned = partitioned

    @rule(native=st.booleans())
    def change_doors(self, native: bool) -> None:
        """The native door comes or goes; what was connected through it stays until the master restarts."""
        self.network.native_door = native

    @precondition(lambda self: not self.network.late)
    @rule(which=st.integers(0, 1), clock_is_right=st.booleans())
    def restart_node(self, which: int, clock_is_right: bool) -> None:
        """A new life, whose incarnation is smaller when its clock was set back."""
        self.latest += 1000
        self.nodes[which] = ReportingNode(
            self.network, self.nodes[which].node_id, self.doors, self.latest if clock_is_right else self.latest - 50_000
        )

    @rule()
    def heal(self) -> None:
        """Within two heartbeats of its own, each node is known again."""
        self.network.partitioned = False
        self.pending = []
        self.network.native_door = True
        for node in self.nodes:
            node.run(2 * INTERVAL)
            assert node.told()
            assert node.session.registered


class PlainMachine(SessionMachine):
    """The same by UMBP's wire only."""

    doors = (GRPC,)


for machine in (SessionMachine, PlainMachine):
    machine.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
TestSession = SessionMachine.TestCase
TestPlainSession = PlainMachine.TestCase
