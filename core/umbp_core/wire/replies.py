"""The messages of answers: what a server sends.  See ``messages`` for how they are written."""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta

from umbp_core.wire import bounds
from umbp_core.wire.fields import (
    AnyCapacities,
    AnyTags,
    AnyText,
    AnyTierCounts,
    Bitmap,
    Column,
    Count,
    LongText,
    Packed,
    SmallCount,
    Text,
    TierNumber,
)
from umbp_core.wire.messages import Message


class Welcome(Message, frozen=True, tag=2):
    """The server's answer to ``Hello``, in a HELLO frame."""

    revision: SmallCount
    session: Count
    """For every later frame of this connection, in both directions."""
    max_frame: SmallCount
    """Bytes of payload that the server takes."""
    server: Text = ""


class Failure(Message, frozen=True, tag=3):
    """The payload of an ERROR frame; ``code`` is an ``ErrorCode``."""

    code: SmallCount
    message: LongText


class Done(Message, frozen=True, tag=4):
    """It was done, and there is nothing to say.  Also the end of a stream that was cancelled."""


class Registered(Message, frozen=True, tag=111):
    """How often to send heartbeats, and up to where the node's bundles are known."""

    heartbeat_interval_ms: Count
    ack_seq: Count = 0


class HeartbeatAnswer(Message, frozen=True, tag=113):
    """``status`` is 1 (alive), or 0 when the node has to register."""

    status: SmallCount
    acked_seq: Count
    request_full_sync: bool


class PutRoutes(Message, frozen=True, tag=114):
    """Columns with an entry per key.

    ``outcomes`` has a u8: 0 unavailable, 1 routed, 2 exists already.  ``refs`` has a u32: the number of the node in
    ``nodes``, from 1 on, or 0.  ``tiers`` has an i32.
    """

    nodes: Packed
    addresses: Packed
    outcomes: Column
    refs: Column
    tiers: Column


class GetRoutes(Message, frozen=True, tag=115):
    """Columns with an entry per key: ``refs`` (u32, 0: nobody has it), ``tiers`` (i32), ``sizes`` (u64)."""

    nodes: Packed
    addresses: Packed
    refs: Column
    tiers: Column
    sizes: Column


class Found(Message, frozen=True, tag=116):
    """The positions of the query that somebody holds."""

    bitmap: Bitmap


class Accepted(Message, frozen=True, tag=117):
    """Whether the node lives; if not, nothing was stored."""

    accepted: bool


class Matches(Message, frozen=True, tag=121):
    """What each node holds of a query.

    ``cells`` has, for each tier of each node that holds some of it, the number of the node in ``nodes`` from 0 on (u32)
    and the tier (i32), the nodes in the order of ``nodes`` and the tiers by number.  ``bitmaps`` has a bitmap over the
    positions of the query for each cell, one after the other.
    """

    nodes: Packed
    addresses: Packed
    cells: Column
    bitmaps: Bitmap


class HitCountsAnswer(Message, frozen=True, tag=122):
    """The hashes that have a counter, in the order of the query without duplicates, and the counters (u64)."""

    hashes: Packed
    counts: Column


class BatchAnswer(Message, frozen=True, tag=131):
    """``verdict`` is 1 applied, 2 replay, 3 gap, 4 stale, 5 not registered; ``incarnation`` is the one that counts."""

    verdict: SmallCount
    incarnation: Count
    acked: Count
    request_full_sync: bool


class Prefixes(Message, frozen=True, tag=133):
    """Columns with an entry per node, the best first: ``lengths`` (u32), ``costs`` (f64), ``run_counts`` (u32).

    ``runs`` has all runs of all nodes one after the other: tier (i32) and length (u32).
    """

    nodes: Packed
    lengths: Column
    costs: Column
    run_counts: Column
    runs: Column


class NodeRow(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """One node."""

    node_id: AnyText
    status: SmallCount
    node_address: AnyText
    peer_address: AnyText
    tags: AnyTags
    incarnation: Count
    capacities: AnyCapacities
    last_heartbeat_age: float
    external_counts: AnyTierCounts
    block_counts: AnyTierCounts


class Nodes(Message, frozen=True, tag=134):
    """All nodes that the master knows."""

    nodes: Annotated[tuple[NodeRow, ...], Meta(max_length=bounds.LIST)]


class Blocks(Message, frozen=True, tag=135):
    """A page; ``cursor`` is for the next request, 0 after the last page."""

    hashes: Packed
    cursor: Count


class ChangeRow(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """A change of the index: ``kind`` is 1 reported, 2 revoked, 3 cleared (all hashes of the tier, none named)."""

    seq: Count
    kind: SmallCount
    node_id: AnyText
    tier: TierNumber
    hashes: Packed
    reason: AnyText = ""


class Changes(Message, frozen=True, tag=136):
    """Changes after a cursor, maybe none.

    ``lost``: some were missed, and the client has to list the nodes and blocks anew; the stream goes on after
    ``cursor``.
    """

    incarnation: Count
    cursor: Count
    lost: bool
    changes: Annotated[tuple[ChangeRow, ...], Meta(max_length=bounds.LIST)]


class ExplainedChange(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """The last thing that happened to a hash on a tier, ``age`` seconds ago."""

    tier: TierNumber
    kind: Text
    age: float
    reason: AnyText


class Explained(Message, frozen=True, tag=137):
    """Why a hash can, or cannot, be used on a node."""

    node_id: AnyText
    status: SmallCount
    tiers: Annotated[tuple[TierNumber, ...], Meta(max_length=bounds.LIST)]
    changes: Annotated[tuple[ExplainedChange, ...], Meta(max_length=bounds.LIST)]
    text: AnyText


Reply = (
    Done
    | Registered
    | HeartbeatAnswer
    | PutRoutes
    | GetRoutes
    | Found
    | Accepted
    | Matches
    | HitCountsAnswer
    | BatchAnswer
    | Prefixes
    | Nodes
    | Blocks
    | Changes
    | Explained
)
