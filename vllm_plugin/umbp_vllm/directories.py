"""What loads and stores ask of whatever knows where objects are.

It is the node's own :class:`~umbp_core.directory.Directory`, or, where the host's daemon has that, what this engine has
of it (:mod:`umbp_vllm.host_pool`).  Calls promise what the directory's do.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol

from umbp_core.copies import TierStats
from umbp_core.directory import Change, Copy
from umbp_core.tiers import Tier


class Holds(Protocol):
    """What can be read."""

    def count_prefix(self, keys: Sequence[bytes]) -> int:
        """How many of ``keys``, from the first on and without a gap."""
        ...

    def contains_many(self, keys: Iterable[bytes]) -> list[bool]:
        """For each of ``keys`` whether it can."""
        ...


class Written(Protocol):
    """What stores and the gates before tiers ask."""

    @property
    def knows_priorities(self) -> bool:
        """Whether priorities change who is evicted first."""
        ...

    def prioritise(self, priorities: Mapping[bytes, int], tier: Tier) -> None:
        """Evict in this order."""
        ...

    def tiers_of(self, key: bytes) -> int:
        """The tiers that hold ``key``."""
        ...

    def contains_many(self, keys: Iterable[bytes]) -> list[bool]:
        """For each of ``keys`` whether it need not be stored."""
        ...

    def copy(self, key: bytes, tier: Tier) -> Copy | None:
        """The copy of ``key`` in ``tier``."""
        ...

    def is_present_or_pending(self, key: bytes, tier: Tier) -> bool:
        """Whether ``key`` is there or on its way."""
        ...

    def reserve_many(
        self, owner: str, wanted: Sequence[tuple[bytes, int, int]], tier: Tier
    ) -> list[tuple[int, ...] | None]:
        """Pages to write into."""
        ...

    def commit_many(self, owner: str, written: Mapping[bytes, bytes], tier: Tier) -> None:
        """Publish what was written."""
        ...

    def abort_owner(self, owner: str) -> None:
        """Give back what was not published."""
        ...


class Read(Holds, Protocol):
    """What loads ask."""

    def is_present_or_pending(self, key: bytes, tier: Tier) -> bool:
        """Whether ``key`` is there or on its way."""
        ...

    def reserve(self, owner: str, key: bytes, tier: Tier, nbytes: int, depth: int = 0) -> tuple[int, ...] | None:
        """Pages to write into."""
        ...

    def commit_many(self, owner: str, written: Mapping[bytes, bytes], tier: Tier) -> None:
        """Publish what was written."""
        ...

    def abort_owner(self, owner: str) -> None:
        """Give back what was not published."""
        ...

    def pin(self, owner: str, keys: Iterable[bytes], tier: Tier | None = None) -> list[Copy]:
        """Keep what is read."""
        ...

    def unpin(self, owner: str) -> None:
        """End it."""
        ...

    def touch(self, keys: Sequence[bytes]) -> None:
        """These are being used."""
        ...

    def drop(self, key: bytes, tier: Tier) -> bool:
        """The bytes of ``key`` are bad."""
        ...


class BlockDirectory(Read, Protocol):
    """What the pool itself asks besides."""

    def stats(self, tier: Tier) -> TierStats:
        """How full ``tier`` is."""
        ...

    def drain_changes(self) -> list[Change]:
        """What became or stopped being readable."""
        ...

    def clear(self, tier: Tier) -> int:
        """Forget everything in ``tier``."""
        ...
