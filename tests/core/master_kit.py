"""What the tests of the master's state share."""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence

from umbp_core.journal import Bundle, Delta
from umbp_core.master.model import Heartbeat, HeartbeatReply, MasterSettings, NodeStatus, Registration, TierCapacity
from umbp_core.master.state import MasterState
from umbp_core.tiers import Tier

HBM, DRAM, SSD, UNKNOWN = Tier.HBM, Tier.DRAM, Tier.SSD, Tier.UNKNOWN
A, B, C = b"a", b"b", b"c"
START = 100.0
EXPIRY = 30.0
"""Seconds after which a silent node expires, with the default settings."""


def master(settings: MasterSettings | None = None, seed: int = 7) -> MasterState:
    return MasterState(settings or MasterSettings(), random.Random(seed))


def registration(
    node: str, peer: str | None = None, incarnation: int = 0, capacities: Sequence[TierCapacity] = ()
) -> Registration:
    """``peer`` None: an address that follows from the node's name."""
    return Registration(
        node,
        node_address=f"{node}.host",
        peer_address=f"{node}.host:1" if peer is None else peer,
        capacities=tuple(capacities),
        incarnation=incarnation,
    )


def register(
    state: MasterState, *nodes: str, at: float = START, capacities: Sequence[TierCapacity] = (), incarnation: int = 0
) -> MasterState:
    for node in nodes:
        state.register(registration(node, capacities=capacities, incarnation=incarnation), at)
    return state


def add(key: bytes, tier: int = DRAM, size: int = 10) -> Delta:
    return Delta(key, tier, size)


def remove(key: bytes, tier: int = DRAM) -> Delta:
    return Delta(key, tier, None)


def beat(
    state: MasterState,
    node: str,
    *bundles: tuple[int, Iterable[Delta]],
    at: float = START,
    capacities: Sequence[TierCapacity] | None = None,
    counts: Mapping[int, int] | None = None,
    incarnation: int = 0,
) -> HeartbeatReply:
    """A heartbeat with bundles of a sequence number and deltas."""
    sent = [Bundle(seq, tuple(deltas)) for seq, deltas in bundles]
    told = None if capacities is None else tuple(capacities)
    return state.heartbeat(Heartbeat(node, sent, capacities=told, counts=counts, incarnation=incarnation), at)


def full_sync(
    state: MasterState, node: str, baseline: int, *deltas: Delta, at: float = START, incarnation: int = 0
) -> HeartbeatReply:
    bundles = [Bundle(baseline, deltas)] if deltas else []
    heartbeat = Heartbeat(node, bundles, full_sync=True, baseline=baseline, incarnation=incarnation)
    return state.heartbeat(heartbeat, at)


def alive(acked: int = 0) -> HeartbeatReply:
    return HeartbeatReply(NodeStatus.ALIVE, acked, request_full_sync=False)


def asked(acked: int = 0) -> HeartbeatReply:
    """A full sync is asked for."""
    return HeartbeatReply(NodeStatus.ALIVE, acked, request_full_sync=True)


def matched(state: MasterState, hashes: Sequence[bytes], count: bool = False, at: float = START) -> object:
    """node -> tier -> hashes, with the tiers in their order."""
    return {match.node: list(match.tiers.items()) for match in state.match(hashes, count, at)}


def status(state: MasterState, node: str, at: float = START) -> NodeStatus:
    info = state.node(node, at)
    return NodeStatus.UNKNOWN if info is None else info.status
