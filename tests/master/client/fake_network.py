"""A master in this process, a clock that is moved by hand, and a network that does to calls what networks do."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

import pytest

from umbp_connectors.client.addresses import MasterAddress, Wire
from umbp_core.errors import InvalidRequest, MasterError, MasterUnavailable, ProtocolError
from umbp_core.index_gate import Acknowledgement, Batch
from umbp_core.index_match import PrefixMatch
from umbp_core.master.model import (
    BlockPage,
    ExternalMatch,
    GetRoute,
    HashExplanation,
    Heartbeat,
    HeartbeatReply,
    MasterSettings,
    NodeInfo,
    PutRoute,
    Registration,
    RegistrationAck,
)
from umbp_core.master.samples import MetricSample
from umbp_core.master.state import MasterState
from umbp_core.master.transport import MasterTransport

T = TypeVar("T")

NATIVE = MasterAddress(Wire.NATIVE_TCP, "master", 1)
GRPC = MasterAddress(Wire.GRPC, "master", 2)

SETTINGS = MasterSettings(heartbeat_ttl=10.0, max_missed_heartbeats=3)
"""A heartbeat every 5 seconds, expiry after 30."""


@dataclass
class FakeClock:
    """Seconds that pass when a test says so, or when a call has to wait."""

    now: float = 100.0

    def __call__(self) -> float:
        return self.now


def always_well() -> str:
    """A network without faults."""
    return "well"


@dataclass
class FakeNetwork:
    """What lies between a client and the master.

    ``fate`` says what becomes of the next call: ``well``, ``lost`` (it never arrives), ``unanswered`` (it arrives, its
    answer does not), ``repeated`` (it arrives twice) or ``delayed`` (it arrives after the caller gave up, before some
    later call).  UMBP's calls are not delayed but lost: they have no numbers, so one that takes effect after its
    repetition, and after what came next, cannot be told from a new one by anybody.
    """

    clock: FakeClock = field(default_factory=FakeClock)
    fate: Callable[[], str] = always_well
    native_door: bool = True
    grpc_door: bool = True
    partitioned: bool = False
    calls: list[str] = field(default_factory=list)
    late: list[Callable[[], object]] = field(default_factory=list)
    dials: int = 0
    transports: list[FakeTransport] = field(default_factory=list)
    registrations: list[Registration] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.lives = 0
        self.state = self._new_state()

    def _new_state(self) -> MasterState:
        self.lives += 1
        return MasterState(SETTINGS, random.Random(1), self.lives)

    def restart_master(self, persistent: bool) -> None:
        """The master dies and comes back, with its table of nodes or without; connections do not survive."""
        records = [self.state.record(info.node_id) for info in self.state.list_nodes(self.clock.now)]
        self.state = self._new_state()
        if persistent:
            self.state.restore([record for record in records if record is not None], self.clock.now)

    def pass_time(self, seconds: float) -> None:
        """Time goes by at the master too."""
        self.clock.now += seconds
        self.state.tick(self.clock.now)

    def dial(self, address: MasterAddress, timeout: float) -> MasterTransport:
        """What a client is given to connect with."""
        self.dials += 1
        native = address.wire is not Wire.GRPC
        if self.partitioned or self.fate() == "lost":
            self.clock.now += timeout
            raise MasterUnavailable(f"{address} does not answer")
        if not (self.native_door if native else self.grpc_door):
            raise ProtocolError(f"{address} speaks something else")
        self.transports.append(FakeTransport(self, native, self.lives))
        return self.transports[-1]

    def call(self, name: str, made: Callable[[], T], timeout: float, life: int, native: bool) -> T:
        """One call of a transport that was connected in ``life`` of the master."""
        assert timeout > 0, "a call without a deadline"
        self.calls.append(name)
        if life != self.lives:
            raise MasterUnavailable("connection reset")
        fate = "lost" if self.partitioned else self.fate()
        if fate == "delayed" and not native:
            fate = "lost"
        if fate != "delayed":
            late, self.late = self.late, []
            for arriving in late:
                arriving()
        if fate == "delayed":
            self.late.append(lambda: _swallow(made))
        if fate in ("lost", "delayed"):
            self.clock.now += timeout
            raise MasterUnavailable(f"{name} timed out")
        if fate == "repeated":
            _swallow(made)
        answer = made()
        if fate == "unanswered":
            self.clock.now += timeout
            raise MasterUnavailable(f"{name} timed out")
        return answer

    def external(self, node_id: str) -> set[tuple[int, bytes]]:
        """What the master knows of the external hashes of a node."""
        index = self.state.index
        return {(tier, key) for tier in index.counts(node_id) for part in index.blocks(node_id, tier) for key in part}

    def owned(self, node_id: str) -> dict[tuple[bytes, int], int]:
        """What the master knows of the blocks that a node owns."""
        blocks = self.state.blocks
        return {
            (key, tier): size
            for tier in blocks.use(node_id)
            for part in blocks.blocks(node_id, tier)
            for key, size in part
        }


def _swallow(made: Callable[[], object]) -> None:
    """A call whose caller is not there any more."""
    with contextlib.suppress(MasterError):
        made()


class FakeTransport:
    """``NativeTransport`` over a :class:`FakeNetwork`; without ``native``, what UMBP's wire can say."""

    def __init__(self, network: FakeNetwork, native: bool, life: int) -> None:
        self._network = network
        self._native = native
        self._life = life
        self.closed = False

    @property
    def native(self) -> bool:
        return self._native

    def _call(self, name: str, made: Callable[[MasterState, float], T], timeout: float) -> T:
        if self.closed:
            raise MasterUnavailable("this connection is closed")
        network = self._network
        state = network.state
        return network.call(name, lambda: made(state, network.clock.now), timeout, self._life, self._native)

    def register(self, registration: Registration, timeout: float) -> RegistrationAck:
        told = registration if self._native else _without_incarnation(registration)
        self._network.registrations.append(told)
        return self._call("register", lambda state, now: state.register(told, now), timeout)

    def unregister(self, node_id: str, timeout: float) -> None:
        self._call("unregister", lambda state, now: state.unregister(node_id, now), timeout)

    def heartbeat(self, heartbeat: Heartbeat, timeout: float) -> HeartbeatReply:
        told = heartbeat if self._native else _without_incarnation(heartbeat)
        return self._call("heartbeat", lambda state, now: state.heartbeat(told, now), timeout)

    def route_put(
        self, node_id: str, keys: Sequence[bytes], sizes: Sequence[int], exclude: Collection[str], timeout: float
    ) -> list[PutRoute]:
        return self._call("route_put", lambda state, now: state.route_put(node_id, keys, sizes, exclude, now), timeout)

    def route_get(
        self, node_id: str, keys: Sequence[bytes], exclude: Collection[str], timeout: float
    ) -> list[GetRoute | None]:
        return self._call("route_get", lambda state, now: state.route_get(node_id, keys, exclude, now), timeout)

    def lookup(self, keys: Sequence[bytes], timeout: float) -> list[bool]:
        return self._call("lookup", lambda state, now: state.lookup(keys), timeout)

    def report(self, node_id: str, hashes: Sequence[bytes], tier: int, timeout: float) -> bool:
        stored = self._call("report", lambda state, now: state.report(node_id, hashes, tier, now), timeout)
        return stored or not self._native

    def revoke(self, node_id: str, hashes: Sequence[bytes], tier: int, timeout: float) -> None:
        self._call("revoke", lambda state, now: state.revoke(node_id, hashes, tier, now), timeout)

    def clear_tier(self, node_id: str, tier: int, timeout: float) -> None:
        self._call("clear_tier", lambda state, now: state.clear_tier(node_id, tier, now), timeout)

    def clear_node(self, node_id: str, timeout: float) -> None:
        self._call("clear_node", lambda state, now: state.clear_node(node_id, now), timeout)

    def match(self, hashes: Sequence[bytes], count_as_hit: bool, timeout: float) -> list[ExternalMatch]:
        def made(state: MasterState, now: float) -> list[ExternalMatch]:
            return [
                ExternalMatch(found.node, state.peer_address(found.node), found.tiers)
                for found in state.match(hashes, count_as_hit, now)
            ]

        return self._call("match", made, timeout)

    def hit_counts(self, hashes: Sequence[bytes], timeout: float) -> list[tuple[bytes, int]]:
        return self._call("hit_counts", lambda state, now: state.hit_counts(hashes), timeout)

    def report_metrics(self, node_id: str, samples: Sequence[MetricSample], timeout: float) -> None:
        self._call("report_metrics", lambda state, now: None, timeout)

    def apply_batch(self, node_id: str, batch: Batch, timeout: float) -> Acknowledgement:
        return self._call("apply_batch", lambda state, now: state.apply_batch(node_id, batch, now), timeout)

    def probe(self, node_id: str, incarnation: int, acked: int, timeout: float) -> Acknowledgement:
        return self._call("probe", lambda state, now: state.probe(node_id, incarnation, acked, now), timeout)

    def match_prefix(
        self, hashes: Sequence[bytes], weights: Mapping[int, float] | None, timeout: float, limit: int = 0
    ) -> list[PrefixMatch]:
        found = self._call("match_prefix", lambda state, now: state.match_prefix(hashes, weights, now), timeout)
        return found[: limit or None]

    def list_nodes(self, timeout: float) -> list[NodeInfo]:
        return self._call("list_nodes", lambda state, now: state.list_nodes(now), timeout)

    def list_blocks(self, node_id: str, tier: int, cursor: int, limit: int, timeout: float) -> BlockPage:
        return self._call("list_blocks", lambda state, now: state.list_blocks(node_id, tier, cursor, limit), timeout)

    def explain(self, node_id: str, key: bytes, timeout: float) -> HashExplanation:
        return self._call("explain", lambda state, now: state.explain(node_id, key, now), timeout)

    def close(self) -> None:
        self.closed = True


V = TypeVar("V", Registration, Heartbeat)


def _without_incarnation(message: V) -> V:
    return replace(message, incarnation=0)


def seeded(seed: int, faults: Sequence[str], share: float) -> Iterator[str]:
    """Fates from a seed: a ``share`` of the calls meets one of ``faults``."""
    chance = random.Random(seed)
    while True:
        yield chance.choice(faults) if chance.random() < share else "well"


def refuse_events(state: MasterState, monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on ``state`` refuses heartbeats that carry events of blocks."""
    heartbeat = state.heartbeat

    def picky(message: Heartbeat, now: float) -> HeartbeatReply:
        if message.bundles:
            raise InvalidRequest("these events are not for me")
        return heartbeat(message, now)

    monkeypatch.setattr(state, "heartbeat", picky)
