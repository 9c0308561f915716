"""What the tests of the service share: a clock that is set, and parts that write down what they are told."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from umbp_connectors.master.ports import EvictionSender
from umbp_connectors.master.service import MasterService
from umbp_core.journal import Bundle, Delta
from umbp_core.master.changes import SLICES, Slices
from umbp_core.master.model import (
    ClientRecord,
    EvictionOrder,
    Heartbeat,
    MasterSettings,
    NodeInfo,
    Registration,
    TierCapacity,
)
from umbp_core.master.samples import MetricSample
from umbp_core.master.state import MasterState
from umbp_core.tiers import Tier

HBM, DRAM = Tier.HBM, Tier.DRAM
A, B, C = b"a", b"b", b"c"
PATIENCE = 60.0
T = TypeVar("T")
QUICK = MasterSettings(heartbeat_ttl=0.1, max_missed_heartbeats=3, reaper_interval=0.001)
"""Nodes expire after 0.3 s of the test's clock, which is looked at every millisecond of the real one."""


def run(scenario: Coroutine[Any, Any, T]) -> T:
    """Run a test on a loop, for some seconds at most."""
    return asyncio.run(asyncio.wait_for(scenario, PATIENCE))


@dataclass
class SetClock:
    """Shows what it is set to."""

    now: float = 100.0

    def __call__(self) -> float:
        return self.now


@dataclass
class MemoryStore:
    """A ``ClientStore`` that is a dictionary."""

    records: dict[str, ClientRecord] = field(default_factory=dict)
    closed: bool = False
    late: list[ClientRecord] = field(default_factory=list)
    """What could not be read at the start."""

    def load(self) -> list[ClientRecord]:
        return list(self.records.values())

    def catch_up(self, take: Callable[[list[ClientRecord]], None]) -> None:
        late, self.late = self.late, []
        if late:
            take(late)

    def save(self, record: ClientRecord) -> None:
        self.records[record.node_id] = record

    def delete(self, node_id: str) -> None:
        del self.records[node_id]

    def close(self) -> None:
        self.closed = True


class Notes:
    """A ``MasterObserver`` that writes everything down; ``wait`` for what is to come."""

    def __init__(self) -> None:
        self.notes: list[tuple[object, ...]] = []
        self._news = asyncio.Event()

    def _note(self, *note: object) -> None:
        self.notes.append(note)
        self._news.set()

    async def wait(self, *note: object) -> None:
        while note not in self.notes:
            self._news.clear()
            await self._news.wait()

    def take(self) -> list[tuple[object, ...]]:
        taken, self.notes = self.notes, []
        return taken

    def reported(self, node: str, tier: int, blocks: int, accepted: bool) -> None:
        self._note("reported", node, tier, blocks, accepted)

    def revoked(self, node: str, tier: int | None, blocks: int | None) -> None:
        self._note("revoked", node, tier, blocks)

    def matched(self, queried: int, matched: int) -> None:
        self._note("matched", queried, matched)

    def node_changed(self, info: NodeInfo) -> None:
        self._note("changed", info.node_id)

    def node_gone(self, node_id: str) -> None:
        self._note("gone", node_id)

    def heartbeat(self, node: str, events: int, gap: bool) -> None:
        self._note("heartbeat", node, events, gap)

    def routed(self, call: str, node: str, entries: int = 1) -> None:
        self._note("routed", call, node, entries)

    def metrics_reported(self, node: str, tags: Sequence[str], samples: Sequence[MetricSample]) -> None:
        self._note("metrics", node, tuple(tags), len(samples))

    def call_finished(self, protocol: str, call: str, code: str, seconds: float) -> None:
        raise AssertionError("the doors tell this, not the service")


class Peers:
    """An ``EvictionSender`` whose peers answer when ``answer`` is set."""

    def __init__(self) -> None:
        self.orders: list[EvictionOrder] = []
        self.answer = asyncio.Event()
        self.asked = asyncio.Event()
        self.answered = 0

    async def send(self, order: EvictionOrder) -> None:
        self.orders.append(order)
        self.asked.set()
        await self.answer.wait()
        self.answered += 1


@dataclass
class Master:
    """A service with its surroundings."""

    clock: SetClock
    store: MemoryStore
    notes: Notes
    service: MasterService

    def register(self, *nodes: str, incarnation: int = 0, room: int = 0) -> None:
        capacities = (TierCapacity(DRAM, 100, room),)
        for node in nodes:
            self.service.register(
                Registration(node, f"{node}.host", f"{node}.host:1", b"", capacities, ("rack=3",), incarnation)
            )

    def held(self, node: str = "n1", tier: int = HBM) -> int:
        return self.service.state.index.counts(node).get(tier, 0)


def master(
    settings: MasterSettings | None = None,
    store: MemoryStore | None = None,
    evictions: EvictionSender | None = None,
    slices: Slices = SLICES,
) -> Master:
    clock, notes = SetClock(), Notes()
    store = MemoryStore() if store is None else store
    state = MasterState(settings or MasterSettings(), random.Random(7), slices=slices)
    return Master(
        clock,
        store,
        notes,
        MasterService(state, clock=clock, store=store, observer=notes, evictions=evictions),
    )


def beat(node: str, *deltas: Delta, seq: int = 1, full_sync: bool = False) -> Heartbeat:
    bundles = [Bundle(seq, deltas)] if deltas else []
    return Heartbeat(node, bundles, full_sync=full_sync, baseline=seq)


def add(key: bytes, tier: int = DRAM, size: int = 10) -> Delta:
    return Delta(key, tier, size)


async def turns(count: int) -> None:
    """Let the loop go round."""
    for _ in range(count):
        await asyncio.sleep(0)


SMALL = Slices(hashes=8, deltas=8, query=8)
"""Requests of more than eight are large."""
KEYS = [b"%03d" % number for number in range(100)]


def small() -> Master:
    made = master(slices=SMALL)
    made.register("n1", "n2", incarnation=5)
    made.notes.take()
    return made
