"""What a pool promises to whoever follows what it holds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from umbp_core.directory import Change
from umbp_core.tiers import Tier

Contents = Callable[[], list[tuple[Tier, list[bytes]]]]
"""Everything that is published, tier by tier."""


class PoolObserver(Protocol):
    """Who follows what a pool holds.

    Called under the pool's lock, so that nothing changes meanwhile and calls come in order: it must be short, call
    nothing of the pool and raise nothing.
    """

    def changed(self, changes: Sequence[Change], contents: Contents) -> None:
        """``changes`` happened.  ``contents`` says what there is now; it may be called until this method returns."""
