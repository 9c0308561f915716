"""The metrics that a master emits about itself: their names are the original's where the original has them.

Every name has the prefix ``mori_umbp_`` on ``/metrics``; counters end in ``_total``.
"""

from __future__ import annotations

from bisect import bisect_left
from typing import Literal, NamedTuple

PREFIX = "mori_umbp_"

Kind = Literal["counter", "gauge", "histogram"]


class Family(NamedTuple):
    """One metric: ``name`` as on ``/metrics`` without the prefix, and the names of its labels."""

    name: str
    kind: Kind
    labels: tuple[str, ...]
    help: str


NODE, NODE_TIER = ("node",), ("node", "tier")

REPORTS = Family("external_kv_report_total", "counter", (*NODE_TIER, "result"), "Reports of external blocks.")
REPORTED_BLOCKS = Family(
    "external_kv_report_blocks_total", "counter", NODE_TIER, "Hashes in reports that were accepted, duplicates counted."
)
REVOKES = Family("external_kv_revoke_total", "counter", (*NODE_TIER, "result"), "Revokes; tier ALL: of a whole node.")
REVOKED_BLOCKS = Family(
    "external_kv_revoke_blocks_total",
    "counter",
    NODE_TIER,
    "Hashes named in revokes, known or not; not those of bulk revokes.",
)
MATCHES = Family("external_kv_match_total", "counter", (), "Match calls.")
MATCH_QUERIED = Family("external_kv_match_queried_blocks_total", "counter", (), "Hashes that match calls named.")
MATCH_MATCHED = Family(
    "external_kv_match_matched_blocks_total", "counter", (), "Hashes of match calls that were found, summed over nodes."
)
EXTERNAL_LIVE = Family(
    "external_kv_live_count",
    "gauge",
    NODE_TIER,
    "External hashes that a node holds on a tier; the node's tags are labels too.",
)
CLIENTS = Family("client_count", "gauge", (), "Nodes that are alive.")
CAPACITY_TOTAL = Family("client_capacity_total_bytes", "gauge", NODE_TIER, "Size of a tier, as its node says.")
CAPACITY_AVAILABLE = Family("client_capacity_available_bytes", "gauge", NODE_TIER, "Free bytes of a tier.")
CAPACITY_USED = Family("client_capacity_used_bytes", "gauge", NODE_TIER, "Bytes of a tier that are in use.")
CAPACITY_RATIO = Family("client_capacity_utilization_ratio", "gauge", NODE_TIER, "Used part of a tier, 0 to 1.")
KV_LIVE = Family(
    "client_kv_live_count", "gauge", NODE_TIER, "Blocks that a node owns on a tier; the node's tags are labels too."
)
KV_LIVE_TOTAL = Family(
    "client_kv_live_count_total", "gauge", NODE, "The same over all tiers; the node's tags are labels too."
)
ROUTE_PUT = Family("client_route_put_total", "counter", NODE, "Puts that were routed, by the node that asked.")
ROUTE_GET = Family("client_route_get_total", "counter", NODE, "Gets that were routed, by the node that asked.")
BATCH_ROUTE_PUT = Family("client_batch_route_put_total", "counter", NODE, "The same for each block of batches.")
BATCH_ROUTE_GET = Family("client_batch_route_get_total", "counter", NODE, "The same for each block of batches.")
LOOKUPS = Family(
    "client_lookup_total", "counter", NODE, "Blocks whose existence was asked for, by the node that asked."
)
HEARTBEAT_EVENTS = Family(
    "heartbeat_events_applied_total", "counter", NODE, "Block events that were received in heartbeats."
)
HEARTBEAT_GAPS = Family(
    "heartbeat_seq_gap_total", "counter", NODE, "Heartbeats after a hole, which ask for a full sync."
)
CALLS = Family(
    "master_call_latency_seconds",
    "histogram",
    ("protocol", "call", "code"),
    "Time from a request read to its answer written, by protocol (grpc, native).",
)
REJECTED_SAMPLES = Family(
    "master_metrics_rejected_total", "counter", ("reason",), "Samples of nodes that were not taken over."
)
STORE_LATENCY = Family(
    "store_op_latency_seconds",
    "histogram",
    ("op", "backend"),
    "Time of loading from and writing to the store of nodes.",
)
STORE_ERRORS = Family(
    "store_errors_total", "counter", ("backend",), "Writes to the store of nodes that failed and are tried again."
)
REDIS_ERRORS = Family("redis_transport_errors_total", "counter", (), "Commands of the Redis that failed.")
REDIS_NOSCRIPT = Family("redis_noscript_reload_total", "counter", (), "Always 0: no scripts are used.")
REDIS_POOL_EXHAUSTED = Family("redis_pool_exhausted_total", "counter", (), "Always 0: one connection, one writer.")
REDIS_DEGRADED = Family("redis_degraded_shard_total", "counter", (), "Always 0: there is one shard.")
REDIS_POOL_WAIT = Family("redis_pool_wait_seconds", "histogram", (), "Always empty: nobody waits for a connection.")
INFO = Family("master_info", "gauge", ("version",), "Always 1; the version of the master.")

FAMILIES: tuple[Family, ...] = tuple(value for value in list(globals().values()) if isinstance(value, Family))
"""All of them, in the order of this file."""

REDIS_ONLY = (REDIS_ERRORS, REDIS_NOSCRIPT, REDIS_POOL_EXHAUSTED, REDIS_DEGRADED, REDIS_POOL_WAIT)
"""Emitted when the nodes are remembered in Redis."""

CALL_BOUNDS = (
    *(0.00001, 0.00002, 0.00005, 0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005),
    *(0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0),
)
"""Upper bounds of the latency histograms, in seconds: a native call takes tens of microseconds."""


class Histogram:
    """Observations in buckets.  One thread at a time."""

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: tuple[float, ...] = CALL_BOUNDS) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def observe(self, value: float) -> None:
        """Count ``value`` in."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value

    def copy(self) -> Histogram:
        """The same, that others may read while this goes on."""
        other = Histogram(self.bounds)
        other.counts = list(self.counts)
        other.total = self.total
        return other

    def cumulative(self) -> list[int]:
        """How many were at most each bound; the last is all of them."""
        counts, running = [], 0
        for count in self.counts:
            running += count
            counts.append(running)
        return counts
