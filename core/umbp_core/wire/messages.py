"""The messages of requests: what a client sends.

A message is a msgpack array: its number, then its fields in the order in which they stand here.  Numbers are never used
for anything else.  Fields are only ever added, at the end, with a default; those that are not known are ignored.
"""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta

from umbp_core.wire import bounds
from umbp_core.wire.fields import (
    Capacities,
    Column,
    Count,
    EngineDesc,
    LongText,
    Names,
    Packed,
    SmallCount,
    Tags,
    Text,
    TierCounts,
    TierNumber,
    TierWeights,
    Token,
)

REVISION = 1
"""Of the set of messages.  A side sends nothing newer than the lower of the two revisions that were greeted with."""


class Message(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """Base of all messages."""


class Hello(Message, frozen=True, tag=1):
    """What a client begins with, in a HELLO frame of session 0 and sequence 0."""

    revision: SmallCount = REVISION
    role: Text = ""
    """What the client is, for the server's log: ``worker``, ``router``, ``cli`` and so on."""
    node_id: Text = ""
    """Empty where there is none."""
    token: Token = b""
    max_frame: SmallCount = bounds.FRAME_BYTES
    """Bytes of payload that the client takes."""


class Register(Message, frozen=True, tag=11):
    """A node introduces itself; the answer is ``Registered``."""

    node_id: Text
    node_address: Text = ""
    peer_address: Text = ""
    engine_desc: EngineDesc = b""
    capacities: Capacities = ()
    tags: Tags = ()
    incarnation: Count = 0


class Unregister(Message, frozen=True, tag=12):
    """Forget a node; the answer is ``Done``."""

    node_id: Text


class BundleRow(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """A numbered bundle of changes: columns of the same length.

    ``kinds`` has a byte per change, 0 for ADD and 1 for REMOVE; ``tiers`` 4 bytes (i32), ``sizes`` 8 (u64, 0 for
    REMOVE).
    """

    seq: Count
    kinds: Column
    tiers: Column
    sizes: Column
    keys: Packed


class ReportHeartbeat(Message, frozen=True, tag=13):
    """A sign of life with what changed; the answer is ``HeartbeatAnswer``."""

    node_id: Text
    bundles: Annotated[tuple[BundleRow, ...], Meta(max_length=bounds.LIST)] = ()
    full_sync: bool = False
    baseline: Count = 0
    capacities: Capacities | None = None
    counts: TierCounts | None = None
    incarnation: Count = 0


class RoutePut(Message, frozen=True, tag=14):
    """Where to put blocks; ``sizes`` has a u64 per key.  The answer is ``PutRoutes``."""

    node_id: Text
    keys: Packed
    sizes: Column
    exclude: Names = ()


class RouteGet(Message, frozen=True, tag=15):
    """Where to get blocks from; the answer is ``GetRoutes``."""

    node_id: Text
    keys: Packed
    exclude: Names = ()


class Lookup(Message, frozen=True, tag=16):
    """Whether anybody holds blocks; the answer is ``Found``."""

    keys: Packed


class Report(Message, frozen=True, tag=17):
    """Add a tier to hashes of a node; the answer is ``Accepted``."""

    node_id: Text
    tier: TierNumber
    hashes: Packed


class Revoke(Message, frozen=True, tag=18):
    """Take a tier away from hashes of a node; the answer is ``Done``."""

    node_id: Text
    tier: TierNumber
    hashes: Packed


class ClearTier(Message, frozen=True, tag=19):
    """Take a tier away from all hashes of a node; the answer is ``Done``."""

    node_id: Text
    tier: TierNumber


class ClearNode(Message, frozen=True, tag=20):
    """Forget all hashes of a node; the answer is ``Done``."""

    node_id: Text


class Match(Message, frozen=True, tag=21):
    """Who holds which of ``hashes``; the answer is ``Matches``."""

    hashes: Packed
    count_as_hit: bool = False


class HitCounts(Message, frozen=True, tag=22):
    """The hit counters of ``hashes``; the answer is ``HitCountsAnswer``."""

    hashes: Packed


class CounterRow(msgspec.Struct, array_like=True, frozen=True, gc=False, tag=1):
    """How much a counter grew."""

    delta: float


class GaugeRow(msgspec.Struct, array_like=True, frozen=True, gc=False, tag=2):
    """What a gauge shows."""

    value: float


class HistogramRow(msgspec.Struct, array_like=True, frozen=True, gc=False, tag=3):
    """Observations; ``bounds`` has an f64, ``cumulative`` a u64 per bound."""

    bounds: Column
    cumulative: Column
    observed: Count
    total: float


class SampleRow(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """One series."""

    name: Text
    value: CounterRow | GaugeRow | HistogramRow
    help: LongText = ""
    labels: Annotated[tuple[tuple[Text, Text], ...], Meta(max_length=bounds.SMALL_LIST)] = ()


class ReportMetrics(Message, frozen=True, tag=23):
    """Metrics of a node; the answer is ``Done``."""

    node_id: Text
    samples: Annotated[tuple[SampleRow, ...], Meta(max_length=bounds.SAMPLES)]


class ActionRow(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """``kind`` is 1 to report, 2 to revoke, 3 to clear the tier (``hashes`` is an empty list then)."""

    kind: SmallCount
    tier: TierNumber
    hashes: Packed


class ApplyBatch(Message, frozen=True, tag=31):
    """``ApplyExternalKvBatch``: several actions under one number; the answer is ``BatchAnswer``."""

    node_id: Text
    incarnation: Count
    seq: Count
    actions: Annotated[tuple[ActionRow, ...], Meta(max_length=bounds.LIST)]
    full_sync: bool = False


class Probe(Message, frozen=True, tag=32):
    """Whether everything up to ``acked`` is still known; the answer is ``BatchAnswer``."""

    node_id: Text
    incarnation: Count
    acked: Count


class MatchPrefix(Message, frozen=True, tag=33):
    """The longest usable prefix per node; ``weights`` is the cost of a block per tier.  The answer is ``Prefixes``.

    It names at most ``limit`` nodes, the best first; 0: all of them.
    """

    hashes: Packed
    weights: TierWeights | None = None
    limit: Count = 0


class ListNodes(Message, frozen=True, tag=34):
    """All nodes; the answer is ``Nodes``."""


class ListBlocks(Message, frozen=True, tag=35):
    """A page of the hashes that a node holds on a tier; ``cursor`` 0 begins.  The answer is ``Blocks``."""

    node_id: Text
    tier: TierNumber
    cursor: Count = 0
    limit: Annotated[int, Meta(ge=1, le=bounds.PAGE_HASHES)] = 4096


class Watch(Message, frozen=True, tag=36):
    """Follow the index from ``cursor`` of ``incarnation`` on; the answers are ``Changes`` in EVENT frames."""

    incarnation: Count = 0
    cursor: Count = 0


class Explain(Message, frozen=True, tag=37):
    """Why a hash can, or cannot, be used on a node; the answer is ``Explained``."""

    node_id: Text
    hash: Annotated[bytes, Meta(max_length=bounds.HASH_BYTES)]


Request = (
    Register
    | Unregister
    | ReportHeartbeat
    | RoutePut
    | RouteGet
    | Lookup
    | Report
    | Revoke
    | ClearTier
    | ClearNode
    | Match
    | HitCounts
    | ReportMetrics
    | ApplyBatch
    | Probe
    | MatchPrefix
    | ListNodes
    | ListBlocks
    | Watch
    | Explain
)
