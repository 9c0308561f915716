"""The values that go into and come out of a master, whatever wire they cross.

Names and meanings follow UMBP's master (``umbp.proto``); what the old wire cannot say (incarnations, prefixes, feeds,
explanations) has a default that means "not said".
"""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from umbp_core.index_match import PositionMatch
from umbp_core.journal import Bundle

__all__ = [
    "BlockPage",
    "ClientRecord",
    "EvictionOrder",
    "ExternalMatch",
    "GetRoute",
    "HashChange",
    "HashExplanation",
    "Heartbeat",
    "HeartbeatReply",
    "MasterSettings",
    "NodeInfo",
    "NodeStatus",
    "PositionMatch",
    "PutOutcome",
    "PutRoute",
    "Registration",
    "RegistrationAck",
    "TickEffects",
    "TierCapacity",
]


class NodeStatus(enum.IntEnum):
    """Whether a node is believed to live; the numbers are those of UMBP's wire."""

    UNKNOWN = 0
    ALIVE = 1
    EXPIRED = 2


class PutOutcome(enum.IntEnum):
    """What became of the wish to put a block somewhere; the numbers are those of UMBP's wire."""

    UNAVAILABLE = 0
    ROUTED = 1
    ALREADY_EXISTS = 2


class TierCapacity(NamedTuple):
    """Bytes of one tier of one node, as the node said."""

    tier: int
    total: int
    available: int


@dataclass(frozen=True, slots=True)
class Registration:
    """A node introduces itself.  ``incarnation`` 0 means that it has none (UMBP's wire)."""

    node_id: str
    node_address: str = ""
    peer_address: str = ""
    engine_desc: bytes = b""
    capacities: tuple[TierCapacity, ...] = ()
    tags: tuple[str, ...] = ()
    incarnation: int = 0


@dataclass(frozen=True, slots=True)
class RegistrationAck:
    """How often to send heartbeats, in milliseconds, and up to where the node's block events are known."""

    heartbeat_interval_ms: int
    ack_seq: int = 0


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """A sign of life with what changed.

    ``None`` as ``capacities`` or ``counts`` means "as before".  Kinds of events are checked where a message is read.
    """

    node_id: str
    bundles: Sequence[Bundle] = ()
    full_sync: bool = False
    baseline: int = 0
    """The number that the bundles after a full sync follow on."""
    capacities: tuple[TierCapacity, ...] | None = None
    counts: Mapping[int, int] | None = None
    """Blocks per tier, as the node counts them itself."""
    incarnation: int = 0


@dataclass(frozen=True, slots=True)
class HeartbeatReply:
    """``status`` is ``UNKNOWN`` when the node has to register (again), else ``ALIVE``."""

    status: NodeStatus
    acked_seq: int = 0
    request_full_sync: bool = False


class PutRoute(NamedTuple):
    """Where to put a block; the last three are empty unless it is routed."""

    outcome: PutOutcome
    node_id: str = ""
    tier: int = 0
    peer_address: str = ""


class GetRoute(NamedTuple):
    """Where to get a block from; ``peer_address`` is empty when its node does not live."""

    node_id: str
    tier: int
    size: int
    peer_address: str


class ExternalMatch(NamedTuple):
    """What one node holds of a query for external hashes, as a client is told."""

    node_id: str
    peer_address: str
    tiers: dict[int, list[bytes]]
    """Tier to hashes in the order of the query; tiers by number, as on UMBP's wire."""

    def matched_hash_count(self) -> int:
        """How many different hashes of the query the node holds, on whatever tier."""
        return len(set().union(*self.tiers.values()))


class BlockPage(NamedTuple):
    """Some of the hashes that a node holds on a tier; ``cursor`` is to be given to the next call, 0 after the last."""

    hashes: list[bytes]
    cursor: int


class HashChange(NamedTuple):
    """The last thing that happened to a hash on one tier of a node."""

    tier: int
    kind: str
    """``reported``, ``revoked`` or ``cleared``."""
    age: float
    """Seconds ago."""
    reason: str
    """Why the tier was cleared: ``revoked``, ``expired``, ``full sync`` and so on; else empty."""


@dataclass(frozen=True, slots=True)
class HashExplanation:
    """Why a hash can, or cannot, be used on a node."""

    node_id: str
    status: NodeStatus
    tiers: tuple[int, ...]
    """Where it is now, fastest first."""
    changes: tuple[HashChange, ...]
    """The latest first; empty when it was never reported, or longer ago than the master remembers."""
    text: str
    """The same in one sentence for people."""


@dataclass(frozen=True, slots=True)
class NodeInfo:
    """What is known of one node.  ``last_heartbeat_age`` is in seconds."""

    node_id: str
    status: NodeStatus
    node_address: str
    peer_address: str
    tags: tuple[str, ...]
    incarnation: int
    capacities: tuple[TierCapacity, ...]
    last_heartbeat_age: float
    external_counts: dict[int, int] = field(default_factory=dict)
    """External hashes per tier."""
    block_counts: dict[int, int] = field(default_factory=dict)
    """Blocks per tier that the node owns itself, by the master's index."""
    told_counts: dict[int, int] = field(default_factory=dict)
    """The same as the node counts them itself; without tiers that it never told."""


@dataclass(frozen=True, slots=True)
class EvictionOrder:
    """Blocks that a node should evict; its REMOVE events tell when it did."""

    node_id: str
    peer_address: str
    keys: tuple[bytes, ...]
    nbytes: int


@dataclass(frozen=True, slots=True)
class ClientRecord:
    """What has to survive a restart of the master so that a node stays routable."""

    node_id: str
    node_address: str
    peer_address: str
    engine_desc: bytes
    tags: tuple[str, ...]
    incarnation: int
    capacities: tuple[TierCapacity, ...]


@dataclass(frozen=True, slots=True)
class TickEffects:
    """What the passing of time brought: what the owner of the state has to do now."""

    expired: tuple[str, ...] = ()
    evictions: tuple[EvictionOrder, ...] = ()
    purged: tuple[str, ...] = ()
    """Nodes that expired so long ago that even their address is forgotten."""


@dataclass(frozen=True, slots=True)
class MasterSettings:
    """The times and choices of a master; seconds, with UMBP's defaults (its environment variables are in brackets)."""

    heartbeat_ttl: float = 10.0
    """[UMBP_HEARTBEAT_TTL_SEC]"""
    max_missed_heartbeats: int = 3
    """A node expires after this many ttl [UMBP_MAX_MISSED_HEARTBEATS]."""
    heartbeat_interval_divisor: int = 2
    """Nodes are asked for a heartbeat every ttl divided by this [UMBP_HEARTBEAT_INTERVAL_DIVISOR]."""
    reaper_interval: float = 5.0
    """[UMBP_REAPER_INTERVAL_SEC]"""
    expired_retention: float = 86400.0
    """For this long an expired node's address is kept: a node that comes back may not tell it again."""
    lease_duration: float = 2.0
    """What was routed to is not evicted for this long [UMBP_LEASE_DURATION_SEC]."""
    eviction_interval: float = 5.0
    """[UMBP_EVICTION_CHECK_INTERVAL_SEC]"""
    eviction_high_watermark: float = 0.9
    eviction_low_watermark: float = 0.7
    hit_ttl: float = 7200.0
    """[UMBP_HIT_INDEX_TTL_SEC]"""
    hit_gc_interval: float = 60.0
    """[UMBP_HIT_INDEX_GC_INTERVAL_SEC]"""
    hit_query_max: int = 4096
    """[UMBP_HIT_QUERY_MAX_BATCH]"""
    query_max: int = 1 << 20
    """Hashes or keys that one request may name."""
    put_select: str = "most_available"
    """``most_available`` or ``random`` [UMBP_ROUTE_PUT_SELECT_ALGO]."""
    put_affinity: str = "none"
    """``none``, ``same`` or ``local`` [UMBP_ROUTE_PUT_NODE_AFFINITY]."""
