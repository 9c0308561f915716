"""One tier's copies: what is published, being written, pinned, and which could be evicted.

Bookkeeping for :mod:`umbp_core.directory`, which is the door to use.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import msgspec

from umbp_core.errors import CapacityError
from umbp_core.eviction import EvictionPolicy
from umbp_core.grouping import BlockGroups, BlockOf
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


class Change(msgspec.Struct, frozen=True, gc=False):
    """Copies that became or stopped being readable together: the same change of each key, with its copy."""

    kind: EventKind
    tier: Tier
    keys: Sequence[bytes]
    copies: Sequence[Copy]

    def events(self) -> Iterator[DirectoryEvent]:
        """One event per key."""
        kind = self.kind
        for key, copy in zip(self.keys, self.copies, strict=True):
            yield DirectoryEvent(kind, key, copy.tier, copy.pages, copy.nbytes, copy.checksum, copy.depth)


@dataclass(frozen=True, slots=True)
class TierSpace:
    """What a directory manages of one tier.  Both parts are the directory's alone from then on.

    Without ``told``, the tier's changes make no events: for one that nobody follows.  With ``block_of``, the parts of a
    block are evicted together.
    """

    tier: Tier
    allocator: PageAllocator
    policy: EvictionPolicy
    told: bool = True
    block_of: BlockOf | None = None


@dataclass(frozen=True, slots=True)
class TierStats:
    """One tier at one moment.

    ``objects`` counts published copies, ``pinned`` pinned ones (also those that are not published any more) and
    ``reserved`` those being written.  ``nbytes`` is what the published ones have, where that is known: what their pages
    have beyond it is lost to the sizes of objects.
    """

    total_pages: int
    free_pages: int
    objects: int
    pinned: int
    reserved: int
    nbytes: int = 0


class Reservation(msgspec.Struct, frozen=True, gc=False):
    """A copy that is being written."""

    pages: tuple[int, ...]
    nbytes: int
    depth: int


_NOTHING: dict[bytes, Reservation] = {}


class TierCopies:
    """The copies of one tier.  A copy that holds pages is named by its first page."""

    __slots__ = (
        "allocator",
        "bit",
        "groups",
        "held_pages",
        "nbytes",
        "owned",
        "page_bytes",
        "pending",
        "pins",
        "policy",
        "published",
        "retired",
        "tier",
        "told",
    )

    def __init__(self, space: TierSpace) -> None:
        self.tier = space.tier
        self.bit = space.tier.bit
        self.allocator = space.allocator
        self.page_bytes = space.allocator.page_bytes
        self.policy = space.policy
        self.told = space.told
        self.groups = None if space.block_of is None else BlockGroups(space.block_of)
        self.published: dict[bytes, Copy] = {}
        self.pending: set[bytes] = set()
        self.owned: dict[str, dict[bytes, Reservation]] = {}
        """What is being written, by the owner that writes it; ``pending`` has the keys of all."""
        self.pins: dict[int, int] = {}
        self.retired: set[int] = set()
        """Pinned copies that are not published any more."""
        self.nbytes = 0
        """Of what is published."""
        self.held_pages = 0
        """Pages of pending and pinned copies: no eviction can free them."""

    def has(self, key: bytes) -> bool:
        """Whether ``key`` is published or being written."""
        return key in self.published or key in self.pending

    def reserve(self, owner: str, key: bytes, reservation: Reservation) -> None:
        """Note that ``owner`` is writing the pages of ``reservation``."""
        self.pending.add(key)
        self.owned.setdefault(owner, {})[key] = reservation
        self.held_pages += len(reservation.pages)

    def reserve_pages(
        self, owner: str, wanted: Iterable[tuple[bytes, int, int]], free: Iterable[int]
    ) -> dict[bytes, tuple[int, ...]]:
        """Reserve one page of ``free`` for each (key, bytes, depth) of ``wanted``, no key of which comes twice."""
        mine = self.owned.setdefault(owner, {})
        places: dict[bytes, tuple[int, ...]] = {}
        for (key, nbytes, depth), page in zip(wanted, free, strict=True):
            places[key] = pages = (page,)
            mine[key] = Reservation(pages, nbytes, depth)
        self.pending.update(places)
        self.held_pages += len(places)
        return places

    def settle(self, owner: str, key: bytes) -> Reservation | None:
        """Forget ``owner``'s reservation of ``key``, whose pages are published or freed next; ``None`` if none."""
        mine = self.owned.get(owner)
        reservation = mine.pop(key, None) if mine is not None else None
        if reservation is None:
            return None
        if not mine:
            del self.owned[owner]
        self.pending.remove(key)
        self.held_pages -= len(reservation.pages)
        return reservation

    def abort(self, owner: str) -> None:
        """Free the pages of all reservations of ``owner``."""
        mine = self.owned.pop(owner, None)
        if mine is not None:
            self.pending.difference_update(mine)
            self._free([page for reservation in mine.values() for page in reservation.pages])

    def _free(self, pages: Sequence[int]) -> None:
        """Free pages that were held."""
        self.held_pages -= len(pages)
        self.allocator.free(pages)

    def publish(self, key: bytes, copy: Copy) -> None:
        """Make ``copy`` readable."""
        self.published[key] = copy
        self.nbytes += copy.nbytes
        self.policy.added(key, copy.depth)
        if self.groups is not None:
            self.groups.added((key,))

    def publish_reserved(self, owner: str, written: Mapping[bytes, bytes]) -> list[Copy] | None:
        """Publish ``owner``'s reservation of each key of ``written`` with its checksum; ``None`` if it lacks one."""
        mine = self.owned.get(owner, _NOTHING)
        if not written.keys() <= mine.keys():
            return None
        published, added, tier = self.published, self.policy.added, self.tier
        copies: list[Copy] = []
        nbytes = 0
        for key, checksum in written.items():
            reserved = mine.pop(key)
            nbytes += reserved.nbytes
            self.held_pages -= len(reserved.pages)
            published[key] = copy = Copy(tier, reserved.pages, reserved.nbytes, checksum, reserved.depth)
            added(key, reserved.depth)
            copies.append(copy)
        self.nbytes += nbytes
        if self.groups is not None:
            self.groups.added(written)
        self.pending.difference_update(written)
        if not mine:
            self.owned.pop(owner, None)
        return copies

    def unpublish(self, key: bytes) -> Copy:
        """Make the copy of ``key`` unreadable; its pages are freed now, or at its last unpin."""
        copy = self.published.pop(key)
        self.nbytes -= copy.nbytes
        self.policy.removed(key)
        if self.groups is not None:
            self.groups.removed((key,))
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
            self.nbytes -= copy.nbytes
        if self.groups is not None:
            self.groups.removed(keys)
        self.allocator.free(pages)
        return copies

    def pin(self, copies: Iterable[Copy]) -> None:
        """Keep the pages of each of ``copies`` that is of this tier until as many unpins."""
        pins, tier = self.pins, self.tier
        for copy in copies:
            if copy.tier is not tier:
                continue
            pages = copy.pages
            count = pins.get(pages[0], 0)
            pins[pages[0]] = count + 1
            if not count:
                self.held_pages += len(pages)

    def unpin(self, copies: Iterable[Copy]) -> None:
        """End one pin of each of ``copies`` that is of this tier."""
        pins, retired, tier = self.pins, self.retired, self.tier
        for copy in copies:
            if copy.tier is not tier:
                continue
            pages = copy.pages
            name = pages[0]
            count = pins[name] - 1
            if count:
                pins[name] = count
                continue
            del pins[name]
            if name in retired:
                retired.remove(name)
                self._free(pages)
            else:
                self.held_pages -= len(pages)

    def victims_for(self, nbytes: int, is_leased: Callable[[bytes], bool]) -> list[bytes] | None:
        """Keys whose eviction makes just enough room for ``nbytes``; ``None`` when no eviction does.

        The parts of a block go together, and stay while one of them is held, unless nothing else makes enough room.
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
        if self.groups:
            victims, passed = self._pick_blocks(self.groups, missing, is_leased)
        else:
            victims, passed = self._pick_alone(missing, is_leased)
        for key in passed:
            self.policy.touched(key)
        return victims

    def to_trim(self, pages: int, most: int, is_kept: Callable[[bytes], bool]) -> list[bytes]:
        """Keys whose eviction frees ``pages``, or what can go of the first ``most``.  Held blocks count as used now."""
        victims: list[bytes] = []
        passed: list[bytes] = []
        seen: set[bytes] = set()
        for key in self.policy.victims() if pages > 0 else ():
            if key in seen:
                continue
            parts = (key,) if self.groups is None else self.groups.together(key)
            seen.update(parts)
            if any(self.published[part].pages[0] in self.pins or is_kept(part) for part in parts):
                passed += parts
            else:
                victims += parts
                pages -= sum(len(self.published[part].pages) for part in parts)
            if pages <= 0 or len(seen) >= most:
                break
        for key in passed:
            self.policy.touched(key)
        return victims

    def _pick_alone(
        self, missing: int, is_leased: Callable[[bytes], bool]
    ) -> tuple[list[bytes] | None, Iterable[bytes]]:
        """The first that can go, until they have ``missing`` pages; ``None`` if they never do; and what was passed."""
        victims: list[bytes] = []
        passed: list[bytes] = []
        published, pins = self.published, self.pins
        for key in self.policy.victims():
            pages = published[key].pages
            if pages[0] in pins or is_leased(key):
                passed.append(key)
                continue
            victims.append(key)
            missing -= len(pages)
            if missing <= 0:
                break
        return victims if missing <= 0 else None, passed

    def _pick_blocks(
        self, groups: BlockGroups, missing: int, is_leased: Callable[[bytes], bool]
    ) -> tuple[list[bytes] | None, Iterable[bytes]]:
        """The same for whole blocks, then for what can go of those that somebody holds a part of."""
        victims: list[bytes] = []
        seen: dict[bytes, None] = {}
        spared: list[bytes] = []
        for key in self.policy.victims():
            if key in seen:
                continue
            parts = groups.together(key)
            seen.update(dict.fromkeys(parts))
            free = [part for part in parts if self.published[part].pages[0] not in self.pins and not is_leased(part)]
            if len(free) < len(parts):
                spared += free
                continue
            victims += parts
            missing -= sum(len(self.published[part].pages) for part in parts)
            if missing <= 0:
                break
        for key in spared:
            if missing <= 0:
                break
            victims.append(key)
            missing -= len(self.published[key].pages)
        going = set(victims)
        return victims if missing <= 0 else None, [key for key in seen if key not in going]
