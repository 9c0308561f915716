"""The tiers of the pool, ordered by speed."""

from __future__ import annotations

import enum


class Tier(enum.IntEnum):
    """Where a copy of an object lies.

    The numbers are those of UMBP's wire (``umbp.proto``); the order is the speed.  ``UNKNOWN`` is
    accepted from others but never preferred: use :attr:`preference` to sort.
    """

    UNKNOWN = 0
    HBM = 1
    DRAM = 2
    SSD = 3

    __hash__ = int.__hash__  # Enum's own is a Python function, and members are keys on hot paths

    @property
    def preference(self) -> int:
        """Sort key, fastest tier first and ``UNKNOWN`` last."""
        return self.value if self is not Tier.UNKNOWN else len(Tier)

    @property
    def bit(self) -> int:
        """This tier's bit in a tier set mask."""
        return 1 << self.value


class TierSet:
    """Functions on sets of tiers held as bit masks (one small int per hash in the indexes)."""

    EMPTY = 0

    @staticmethod
    def of(*tiers: Tier) -> int:
        """The mask that holds exactly ``tiers``."""
        mask = 0
        for tier in tiers:
            mask |= tier.bit
        return mask

    @staticmethod
    def members(mask: int) -> tuple[Tier, ...]:
        """The tiers in ``mask``, fastest first, ``UNKNOWN`` last."""
        return tuple(sorted((t for t in Tier if mask & t.bit), key=lambda t: t.preference))

    @staticmethod
    def fastest(mask: int) -> Tier | None:
        """The fastest tier in ``mask``, or ``None`` when it is empty."""
        members = TierSet.members(mask)
        return members[0] if members else None
