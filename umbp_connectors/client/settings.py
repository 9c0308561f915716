"""The times and bounds of a master's client."""

from __future__ import annotations

from dataclasses import dataclass, field

from umbp_core.breaker import Backoff


@dataclass(frozen=True, slots=True)
class ClientSettings:
    """Seconds, and numbers of hashes or block events."""

    call_timeout: float = 3.0
    """Deadline of a call of the client's own thread."""
    connect_timeout: float = 1.0
    """Deadline of a connection with its handshake."""
    query_timeout: float = 0.25
    """Deadline of a question, unless the caller says otherwise."""
    close_timeout: float = 3.0
    flush_interval: float = 0.02
    """What is said is on its way after this long at the latest, while the master answers."""
    flush_hashes: int = 8192
    """As many hashes are sent without waiting for the interval."""
    flush_events: int = 128
    """As many events of own blocks are sent without waiting for the next heartbeat."""
    batch_hashes: int = 8192
    """Hashes per batch of reports."""
    bundle_events: int = 1024
    """Events per bundle of own blocks."""
    heartbeat_bundles: int = 16
    """Bundles per heartbeat."""
    max_waiting: int = 1 << 20
    """Hashes, and likewise block events, that may wait to be told; beyond, a full sync replaces them."""
    failures: int = 3
    """Calls in a row that may fail before there is a pause."""
    backoff: Backoff = field(default_factory=Backoff)
    """The pauses.  Their ceiling should be less than a heartbeat's interval."""
    silent_intervals: float = 2.0
    """A master that does not tell what it forgot is told everything anew after so many intervals without heartbeats."""
    upgrade_interval: float = 30.0
    """How often a client that had to take a worse address tries a better one."""
