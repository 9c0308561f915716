"""What can be asked of a directory: which tiers hold an object, where, and how full they are.

The half of :class:`umbp_core.directory.Directory` that changes nothing; that one is the door to use.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import takewhile
from typing import NoReturn

from umbp_core.copies import Copy, TierCopies, TierStats
from umbp_core.errors import StateError
from umbp_core.tiers import Tier, TierSet

_FASTEST = tuple(TierSet.fastest(mask) for mask in range(2 * max(Tier).bit))
"""The fastest tier of every mask."""


class Lookups:
    """Answers out of the copies of each tier.  What is not among the tiers counts as empty."""

    def __init__(self, spaces: dict[Tier, TierCopies]) -> None:
        self._spaces = spaces
        self._masks: dict[bytes, int] = {}

    def tiers_of(self, key: bytes) -> int:
        """The tiers in which ``key`` is published, as a mask (see ``TierSet``)."""
        return self._masks.get(key, 0)

    def fastest(self, key: bytes) -> Tier | None:
        """The fastest tier in which ``key`` is published."""
        return _FASTEST[self._masks.get(key, 0)]

    def count_prefix(self, keys: Sequence[bytes]) -> int:
        """How many of ``keys``, from the first on and without a gap, are published in any tier."""
        published = self._masks.__contains__
        if all(map(published, keys)):  # asked first: where it holds, that is faster than to count
            return len(keys)
        return len(list(takewhile(published, keys)))

    def contains_many(self, keys: Iterable[bytes]) -> list[bool]:
        """For each of ``keys`` whether it is published in any tier."""
        return list(map(self._masks.__contains__, keys))

    def copy(self, key: bytes, tier: Tier) -> Copy | None:
        """The published copy of ``key`` in ``tier``."""
        state = self._spaces.get(tier)
        return state.published.get(key) if state else None

    def keys(self, tier: Tier) -> list[bytes]:
        """Everything that is published in ``tier``."""
        state = self._spaces.get(tier)
        return list(state.published) if state else []

    def copies(self, tier: Tier) -> list[tuple[bytes, Copy]]:
        """The same with the copies, in the order in which they were published."""
        state = self._spaces.get(tier)
        return list(state.published.items()) if state else []

    def is_present_or_pending(self, key: bytes, tier: Tier) -> bool:
        """Whether ``key`` is published or being written in ``tier``: then ``reserve`` refuses it."""
        state = self._spaces.get(tier)
        return state is not None and state.has(key)

    def stats(self, tier: Tier) -> TierStats:
        """Counts of ``tier``.  O(1)."""
        state = self._state(tier)
        return TierStats(
            total_pages=state.allocator.total_pages,
            free_pages=state.allocator.free_pages,
            objects=len(state.published),
            pinned=len(state.pins),
            reserved=len(state.pending),
            nbytes=state.nbytes,
        )

    def _state(self, tier: Tier) -> TierCopies:
        return self._spaces.get(tier) or self._missing(tier)

    def _missing(self, tier: Tier) -> NoReturn:
        known = ", ".join(known.name for known in self._spaces) or "none"
        raise StateError(f"tier {tier!r} is not part of this directory ({known}); configure it or leave it out")
