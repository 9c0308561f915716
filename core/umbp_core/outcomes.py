"""What becomes of the objects of a put or get, how many, and where a client's bytes are."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field

from umbp_core.copies import TierStats
from umbp_core.tiers import Tier


class DeploymentMode(enum.Enum):
    """Who owns the bytes that a client puts and gets."""

    LOCAL = "local"
    """The client's own process."""
    DAEMON = "daemon"
    """One daemon for all engines of the host."""
    DISTRIBUTED = "distributed"
    """The nodes that a master knows."""


class _Status(enum.Enum):
    """Counted once for each object that moves: a member is its own only copy, so its identity is hashed."""

    __hash__ = object.__hash__


class PutStatus(_Status):
    """What became of one object of a put."""

    STORED = "stored"
    PRESENT = "present"
    """The pool has it, or another call is writing it: the first writer wins and this one's bytes are ignored."""
    NO_ROOM = "no_room"
    """Everything in DRAM is being read or written right now."""
    TOO_LARGE = "too_large"
    """Empty, or larger than ``object_bytes``."""
    TIMED_OUT = "timed_out"
    """Not stored: the call's time was over."""
    VOLATILE = "volatile"
    """In DRAM, and not on the device, though the durability `strict` asks for that."""

    @property
    def kept(self) -> bool:
        """True when nobody has to put the object again: it is there, or being written."""
        return self in (PutStatus.STORED, PutStatus.PRESENT, PutStatus.VOLATILE)


class GetStatus(_Status):
    """What became of one object of a get.  Unless it is a hit, the buffer's content is undefined."""

    DRAM = "dram"
    SSD = "ssd"
    MISS = "miss"
    SIZE_MISMATCH = "size_mismatch"
    """It is there, but has not the size of the buffer."""
    CORRUPT = "corrupt"
    """Its bytes could not be read or were not those that were stored; it is forgotten."""
    TIMED_OUT = "timed_out"
    """Not delivered: the call's time was over.  It is still there."""

    @property
    def hit(self) -> bool:
        """True when the buffer holds the object."""
        return self is GetStatus.DRAM or self is GetStatus.SSD


@dataclass(frozen=True, slots=True)
class PoolCounters:
    """Objects since the pool was opened.

    ``restored`` are those that an earlier life left on SSD.  ``fenced`` says how often the SSD tier was left alone
    because its disk did not answer, and ``fenced_loads`` how many objects were misses for that reason.
    ``demotions_dropped`` stayed in DRAM only since too many waited, or since nothing is written to a tier that failed.
    ``demotions_refused`` says how often each offload policy kept an object out of the SSD tier.
    ``trimmed`` were evicted from a tier because it was fuller than its high watermark.
    """

    puts: dict[PutStatus, int]
    gets: dict[GetStatus, int]
    restored: int
    demoted: int
    demotions_failed: int
    fenced: int = 0
    fenced_loads: int = 0
    demotions_dropped: int = 0
    demotions_refused: Mapping[str, int] = field(default_factory=dict)
    trimmed: Mapping[Tier, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class PoolStats:
    """A pool at one moment: how full each of its tiers is, and what happened so far."""

    tiers: Mapping[Tier, TierStats]
    counters: PoolCounters
