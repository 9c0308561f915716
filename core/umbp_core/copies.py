"""One tier's copies: what is published, being written, pinned, and which could be evicted.

Bookkeeping for :mod:`umbp_core.directory`, which is the door to use.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import msgspec

from umbp_core.errors import CapacityError
from umbp_core.eviction import EvictionPolicy
from umbp_core.pages import PageAllocator
from umbp_core.tiers import Tier


class Copy(msgspec.Struct, frozen=True, gc=False):
    """One published object in one tier.  ``checksum`` is whatever ``commit`` was given."""

    tier: Tier
    pages: tuple[int, ...]
    nbytes: int
    checksum: bytes
    depth: int = 0


class EventKind(enum.Enum):
    """What happened to a copy."""

    ADDED = "added"
    """It became readable."""
    REMOVED = "removed"
    """It stopped being readable: evicted, dropped or cleared."""


class DirectoryEvent(NamedTuple):
    """A change of what is readable; the fields after ``key`` are those of the copy."""

    kind: EventKind
    key: bytes
    tier: Tier
    pages: tuple[int, ...]
    nbytes: int
    checksum: bytes
    depth: int = 0


@dataclass(frozen=True, slots=True)
class TierSpace:
    """What a directory manages of one tier.  Both parts are the directory's alone from then on.

    Without ``told``, the tier's changes make no events: for one that nobody follows.
    """

    tier: Tier
    allocator: PageAllocator
    policy: EvictionPolicy
    told: bool = True


@dataclass(frozen=True, slots=True)
class TierStats:
    """One tier at one moment.

    ``objects`` counts published copies, ``pinned`` pinned ones (also those that are not published any more) and
    ``reserved`` those being written.
    """

    total_pages: int
    free_pages: int
    objects: int
    pinned: int
    reserved: int


class Reservation(msgspec.Struct, frozen=True, gc=False):
    """A copy that ``owner`` is writing."""

    owner: str
    pages: tuple[int, ...]
    nbytes: int
    depth: int


class TierCopies:
    """The copies of one tier.  A copy that holds pages is named by its first page."""

    __slots__ = ("allocator", "bit", "held_pages", "pending", "pins", "policy", "published", "retired", "tier", "told")

    def __init__(self, space: TierSpace) -> None:
        self.tier = space.tier
        self.bit = space.tier.bit
        self.allocator = space.allocator
        self.policy = space.policy
        self.told = space.told
        self.published: dict[bytes, Copy] = {}
        self.pending: dict[bytes, Reservation] = {}
        self.pins: dict[int, int] = {}
        self.retired: set[int] = set()
        """Pinned copies that are not published any more."""
        self.held_pages = 0
        """Pages of pending and pinned copies: no eviction can free them."""

    def has(self, key: bytes) -> bool:
        """Whether ``key`` is published or being written."""
        return key in self.published or key in self.pending

    def lacking(self, keys: Iterable[bytes]) -> dict[bytes, None]:
        """Those of ``keys`` that are neither published nor being written, each once."""
        published, pending = self.published, self.pending
        return {key: None for key in keys if key not in published and key not in pending}

    def reserve(self, key: bytes, reservation: Reservation) -> None:
        """Note that the pages of ``reservation`` are being written."""
        self.pending[key] = reservation
        self.held_pages += len(reservation.pages)

    def settle(self, key: bytes) -> Reservation:
        """Forget the reservation of ``key``; its pages are published or freed next."""
        reservation = self.pending.pop(key)
        self.held_pages -= len(reservation.pages)
        return reservation

    def publish(self, key: bytes, copy: Copy) -> None:
        """Make ``copy`` readable."""
        self.published[key] = copy
        self.policy.added(key, copy.depth)

    def publish_reserved(self, written: Mapping[bytes, bytes]) -> list[Copy]:
        """Publish the reservation of each key of ``written`` with its checksum."""
        pending, published, added = self.pending, self.published, self.policy.added
        copies: list[Copy] = []
        for key, checksum in written.items():
            reserved = pending.pop(key)
            self.held_pages -= len(reserved.pages)
            copy = Copy(self.tier, reserved.pages, reserved.nbytes, checksum, reserved.depth)
            published[key] = copy
            added(key, copy.depth)
            copies.append(copy)
        return copies

    def unpublish(self, key: bytes) -> Copy:
        """Make the copy of ``key`` unreadable; its pages are freed now, or at its last unpin."""
        copy = self.published.pop(key)
        self.policy.removed(key)
        name = copy.pages[0]
        if name in self.pins:
            self.retired.add(name)
        else:
            self.allocator.free(copy.pages)
        return copy

    def unpublish_many(self, keys: Sequence[bytes]) -> list[Copy]:
        """As :meth:`unpublish` for each of ``keys``, none of which is pinned."""
        published, removed = self.published, self.policy.removed
        copies: list[Copy] = []
        pages: list[int] = []
        for key in keys:
            copy = published.pop(key)
            removed(key)
            copies.append(copy)
            pages += copy.pages
        self.allocator.free(pages)
        return copies

    def pin(self, copy: Copy) -> None:
        """Keep the pages of ``copy`` until as many unpins."""
        name = copy.pages[0]
        count = self.pins.get(name, 0)
        self.pins[name] = count + 1
        if not count:
            self.held_pages += len(copy.pages)

    def unpin(self, copy: Copy) -> None:
        """End one pin of ``copy``."""
        name = copy.pages[0]
        count = self.pins[name] - 1
        if count:
            self.pins[name] = count
            return
        del self.pins[name]
        self.held_pages -= len(copy.pages)
        if name in self.retired:
            self.retired.remove(name)
            self.allocator.free(copy.pages)

    def victims_for(self, nbytes: int, is_leased: Callable[[bytes], bool]) -> list[bytes] | None:
        """Keys whose eviction makes just enough room for ``nbytes``; ``None`` when no eviction does.

        Raises ``CapacityError`` when the whole tier is too small.  Copies that had to be passed over are held
        by somebody, so they count as used now; therefore the next call does not walk over them again.
        """
        need = self.allocator.pages_for(nbytes)
        total = self.allocator.total_pages
        if need > total:
            raise CapacityError(
                f"an object of {nbytes} bytes needs {need} pages, {self.tier.name} has {total} in all; "
                f"give the tier more memory or leave the object out"
            )
        if need > total - self.held_pages:
            return None
        missing = need - self.allocator.free_pages
        victims: list[bytes] = []
        passed: list[bytes] = []
        for key in self.policy.victims():
            copy = self.published[key]
            if copy.pages[0] in self.pins or is_leased(key):
                passed.append(key)
                continue
            victims.append(key)
            missing -= len(copy.pages)
            if missing <= 0:
                break
        for key in passed:
            self.policy.touched(key)
        return victims if missing <= 0 else None
