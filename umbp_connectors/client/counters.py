"""What a client counts, and what it says of itself."""

from __future__ import annotations

from dataclasses import dataclass

from umbp_core.breaker import BreakerState


@dataclass(slots=True)
class Counters:
    """Counted by the client's thread; others may read."""

    registrations: int = 0
    takeovers: int = 0
    """Registrations in place of a node of the same name that lived."""
    heartbeats: int = 0
    """That were answered."""
    full_syncs: int = 0
    """Full syncs of external hashes that were begun."""
    batches: int = 0
    """Batches of reports that were acknowledged."""
    hashes: int = 0
    """Hashes in them."""
    events: int = 0
    """Events of own blocks that were sent."""
    refused: int = 0
    """Hashes and events that the master does not take as they are; they are not told."""
    overflows: int = 0
    """How often more was said than may wait."""
    failures: int = 0
    """Calls, or attempts to connect, that failed."""


@dataclass(frozen=True, slots=True)
class ClientStats:
    """One look at a client.  See :class:`Counters` for the numbers that are not explained here."""

    address: str
    """What it is connected to; empty when it is not."""
    native: bool
    registered: bool
    incarnation: int
    breaker: BreakerState
    opened: int
    """How often the breaker opened."""
    waiting: int
    """Hashes and events that were said and are not sent yet; about."""
    questions: int
    degraded: int
    """Questions that were answered with nothing, since the master did not answer in time."""
    registrations: int
    takeovers: int
    heartbeats: int
    full_syncs: int
    batches: int
    hashes: int
    events: int
    refused: int
    overflows: int
    failures: int
