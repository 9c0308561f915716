"""The directory: which object lies in which pages of which tier.  The only owner of a node's metadata.

A *copy* is one object in one tier.  Its life::

    reserve -> (commit -> published -> evicted | dropped | cleared) | abort

Pages belong to a copy from ``reserve`` (or ``restore``) until it is gone, so a tier never holds more than its
allocator has (law L8).  Nothing is readable before ``commit`` (law L2), whose caller knows that every rank's bytes
arrived.  Copies of one object in several tiers are independent of each other.

Who holds what is kept by owner, a string of the caller's choice (usually an op id).  An owner's reservations, pins
and leases are three separate things, each ended by its own call.

* A **pin** is for bytes that are being read: the copy is not evicted, and when it is dropped or cleared it stops
  being readable at once, while its pages are freed at the last unpin.
* A **lease** is for an object that somebody counts on: none of its copies is evicted or cleared before the deadline,
  whatever the tier and also when it was written later.  Bad bytes are dropped in spite of it.

No I/O, no threads, no clock.  One thread at a time.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping, Sequence

from umbp_core.copies import Change, Copy, DirectoryEvent, EventKind, Reservation, TierCopies, TierSpace, TierStats
from umbp_core.errors import StateError, UnknownOwner
from umbp_core.eviction import PrioritisedPolicy
from umbp_core.leases import LeaseTable
from umbp_core.lookups import Lookups
from umbp_core.tiers import Tier

__all__ = ["Change", "Copy", "Directory", "DirectoryEvent", "EventKind", "TierSpace", "TierStats"]


class Directory(Lookups):
    """All objects of a node over its tiers.

    ``spaces`` names every tier at most once.  Methods that look something up treat a tier that is not among them as
    empty; methods that change something raise ``StateError``.
    """

    def __init__(self, spaces: Sequence[TierSpace]) -> None:
        super().__init__({space.tier: TierCopies(space) for space in spaces})
        if len(self._spaces) != len(spaces):
            raise StateError(f"tiers {[space.tier.name for space in spaces]}: one is named twice; give each one space")
        self._by_speed = sorted(self._spaces.values(), key=lambda state: state.tier.preference)
        self._pinned: dict[str, list[Copy]] = {}
        self._leases = LeaseTable()
        self._changes: list[Change] = []
        policies = {state.tier: state.policy for state in self._by_speed}
        self._prioritised = {tier: known for tier, known in policies.items() if isinstance(known, PrioritisedPolicy)}

    @property
    def knows_priorities(self) -> bool:
        """Whether :meth:`prioritise` changes who is evicted first in any tier."""
        return bool(self._prioritised)

    def prioritise(self, priorities: Mapping[bytes, int], tier: Tier) -> None:
        """Evict from ``tier``, where its policy knows priorities, these objects in the order of theirs, lowest first.

        Later copies in other tiers get the same one.  What is not published in ``tier`` is ignored.
        """
        policy = self._prioritised.get(tier)
        if policy is not None:
            for key, priority in priorities.items():
                policy.prioritise(key, priority)

    def drain_events(self) -> list[DirectoryEvent]:
        """What became or stopped being readable since the last call, in order, in the tiers that are ``told``.

        Events are kept until they are drained, so a caller drains regularly, whether it uses them or not.
        """
        return [event for change in self.drain_changes() for event in change.events()]

    def drain_changes(self) -> list[Change]:
        """As :meth:`drain_events`, with what changed together in one piece."""
        changes, self._changes = self._changes, []
        return changes

    def touch(self, keys: Sequence[bytes]) -> None:
        """``keys``, in the order of their prefix chain, are being used now; unknown ones are ignored.

        The first becomes the most recently used in each of its tiers: the others are of no use without it.
        """
        for state in self._spaces.values():
            touched = state.policy.touched
            for key in reversed(keys):
                touched(key)

    def pin(self, owner: str, keys: Iterable[bytes], tier: Tier | None = None) -> list[Copy]:
        """Pin the copy of each of ``keys`` in ``tier`` (default: its fastest one) until ``owner`` unpins.

        An owner may pin several times, also the same copy.  All or nothing: raises ``UnknownOwner`` when a key has
        no such copy (any more).
        """
        keys = list(keys)
        copies = []
        for key, copy in zip(keys, self._copies(keys, tier), strict=True):
            if copy is None:
                place = "any tier" if tier is None else tier.name
                raise UnknownOwner(
                    f"object {key.hex()} is not in {place} (any more), {owner} cannot pin it; look it up again"
                )
            copies.append(copy)
        if copies:
            for state in self._by_speed:
                state.pin(copies)
            self._pinned.setdefault(owner, []).extend(copies)
        return copies

    def _copies(self, keys: Sequence[bytes], tier: Tier | None) -> list[Copy | None]:
        """For each of ``keys`` its copy in ``tier``, or in the fastest that has one."""
        copies: list[Copy | None] = [None] * len(keys)
        for state in self._by_speed:
            if tier is None or state.tier is tier:
                found = map(state.published.get, keys)
                copies = [mine or other for mine, other in zip(copies, found, strict=True)]
                if all(copies):
                    break
        return copies

    def unpin(self, owner: str) -> None:
        """End all pins of ``owner``, if it has any."""
        copies = self._pinned.pop(owner, None)
        if copies is not None:
            for state in self._by_speed:
                state.unpin(copies)

    def lease(self, owner: str, keys: Sequence[bytes], deadline: float) -> None:
        """Promise not to evict ``keys`` before ``deadline``, in addition to what ``owner`` leases already.

        All of an owner's keys share the latest deadline it was given.  Raises ``UnknownOwner``, with nothing
        changed, when a key is in no tier (any more).
        """
        for key in keys:
            if key not in self._masks:
                raise UnknownOwner(
                    f"object {key.hex()} is in no tier (any more), {owner} cannot lease it; look it up again"
                )
        self._leases.grant(owner, keys, deadline)

    def release(self, owner: str) -> None:
        """End ``owner``'s lease, if it has one."""
        self._leases.release(owner)

    def expire(self, now: float) -> int:
        """End all leases whose deadline is at or before ``now``; returns how many owners lost theirs."""
        return len(self._leases.expire(now))

    def reserve(self, owner: str, key: bytes, tier: Tier, nbytes: int, depth: int = 0) -> tuple[int, ...] | None:
        """Pages of ``tier`` for ``owner`` to write ``nbytes`` of ``key`` into, in the order of the bytes.

        Evicts by the tier's policy, never a pinned or leased copy, and nothing at all when that would not make
        enough room.  ``None`` means that there is no room, or that ``key`` is published or being written there
        already, which ``is_present_or_pending`` tells apart.  ``depth`` is the block's index in its prefix chain.
        Raises ``CapacityError`` when the whole tier is too small, and ``StateError`` when ``nbytes`` is below 1.
        """
        state = self._state(tier)
        if state.has(key):
            return None
        pages = state.allocator.allocate(nbytes) or self._evict_for(state, nbytes)
        if pages is None:
            return None
        state.reserve(owner, key, Reservation(pages, nbytes, depth))
        return pages

    def reserve_many(
        self, owner: str, wanted: Sequence[tuple[bytes, int, int]], tier: Tier
    ) -> list[tuple[int, ...] | None]:
        """As :meth:`reserve` for each (key, bytes, depth) in turn, at a fraction of the cost.

        For objects that take one page each: room for all that are new is made in one go, and only where that cannot
        be done one by one.  Raises ``StateError``, with nothing changed, when one has no byte or more than a page.
        """
        state = self._spaces.get(tier) or self._missing(tier)
        page_bytes, published, pending = state.page_bytes, state.published, state.pending
        new: dict[bytes, tuple[bytes, int, int]] = {}
        for each in wanted:
            key, nbytes, _ = each
            if not 0 < nbytes <= page_bytes:
                raise StateError(
                    f"an object of {nbytes} bytes does not take one page of {page_bytes}; reserve it alone"
                )
            if key not in published and key not in pending and key not in new:
                new[key] = each
        if not new:
            return [None] * len(wanted)
        free = state.allocator.allocate_each(len(new)) or self._evict_for_each(state, len(new))
        if free is None:
            return [self.reserve(owner, key, tier, *sized) if key in new else None for key, *sized in wanted]
        places = state.reserve_pages(owner, new.values(), free)
        if len(new) == len(wanted):
            return list(places.values())
        return [places.pop(key, None) for key, _, _ in wanted]

    def commit(self, owner: str, key: bytes, tier: Tier, checksum: bytes) -> None:
        """Publish what ``owner`` wrote.  Raises ``UnknownOwner`` when it has no such reservation."""
        state = self._state(tier)
        reservation = self._take(state, owner, key)
        self._publish(state, key, Copy(state.tier, reservation.pages, reservation.nbytes, checksum, reservation.depth))
        if self._prioritised:
            self._inherit((key,), state)

    def commit_many(self, owner: str, written: Mapping[bytes, bytes], tier: Tier) -> None:
        """As :meth:`commit` for each key and checksum in turn, at a fraction of the cost.

        Raises ``UnknownOwner``, with nothing changed, when ``owner`` has not all of these reservations.
        """
        state = self._spaces.get(tier) or self._missing(tier)
        copies = state.publish_reserved(owner, written)
        if copies is None:
            mine = state.owned.get(owner, {})
            raise self._not_reserved(owner, next(key for key in written if key not in mine), tier)
        masks, bit = self._masks, state.bit
        for key in written:
            masks[key] = masks.get(key, 0) | bit
        if copies and state.told:
            self._changes.append(Change(EventKind.ADDED, tier, tuple(written), copies))
        if self._prioritised:
            self._inherit(written, state)

    def abort(self, owner: str, key: bytes, tier: Tier) -> None:
        """Give the pages of ``owner``'s reservation back.  Raises ``UnknownOwner`` when it has no such one."""
        state = self._state(tier)
        state.allocator.free(self._take(state, owner, key).pages)

    def abort_owner(self, owner: str) -> None:
        """Give the pages of all reservations of ``owner`` back, if it has any."""
        for state in self._spaces.values():
            if owner in state.owned:
                state.abort(owner)

    def drop(self, key: bytes, tier: Tier) -> bool:
        """Forget the published copy of ``key`` in ``tier``, because its bytes are bad; whether there was one.

        It is not readable from now on, leased or not.  Pages of a pinned copy are freed at its last unpin.
        """
        state = self._state(tier)
        if key not in state.published:
            return False
        self._unpublish(state, (key,))
        return True

    def clear(self, tier: Tier) -> int:
        """Forget all published copies in ``tier`` that are not leased; returns how many.

        Pages of pinned ones are freed at their last unpin.  What is being written stays reserved: whoever must not
        see it published later aborts its owner.
        """
        state = self._state(tier)
        going = [key for key in state.published if not self._leases.is_leased(key)]
        if going:
            self._unpublish(state, going)
        return len(going)

    def trim(self, tier: Tier, pages: int, most: int, keep: Container[bytes] = ()) -> int:
        """Evict from ``tier`` by its policy until ``pages`` pages came free; returns how many objects went.

        Ends early when ``most`` objects were looked at.  Never a pinned or leased copy, none of what is in ``keep``,
        and all parts of a block or none.  What is passed over counts as used now, as it does in :meth:`reserve`.
        """
        state = self._state(tier)
        victims = state.to_trim(pages, most, lambda key: self._leases.is_leased(key) or key in keep)
        if victims:
            self._evict(state, victims)
        return len(victims)

    def restore(
        self, key: bytes, tier: Tier, pages: Sequence[int], nbytes: int, checksum: bytes, depth: int = 0
    ) -> None:
        """Publish a copy that an earlier life left in ``pages``, with an event like any other.

        It counts as used now: restore what was used longest ago first.
        Raises ``StateError``, with nothing changed, when ``key`` is published or being written in ``tier``, when the
        pages are taken or do not exist, or when their number does not fit ``nbytes``.
        """
        state = self._state(tier)
        if state.has(key):
            raise StateError(f"object {key.hex()} is in {tier.name} already and cannot be restored; drop the record")
        if len(pages) != state.allocator.pages_for(nbytes):
            raise StateError(
                f"object {key.hex()} of {nbytes} bytes cannot lie in {len(pages)} pages of {tier.name}; drop the record"
            )
        state.allocator.claim(pages)
        self._publish(state, key, Copy(state.tier, tuple(pages), nbytes, checksum, depth))

    def _take(self, state: TierCopies, owner: str, key: bytes) -> Reservation:
        reservation = state.settle(owner, key)
        if reservation is None:
            raise self._not_reserved(owner, key, state.tier)
        return reservation

    @staticmethod
    def _not_reserved(owner: str, key: bytes, tier: Tier) -> UnknownOwner:
        return UnknownOwner(
            f"{owner} holds no reservation for object {key.hex()} in {tier.name} (any more); "
            f"look up what is there before writing"
        )

    def _publish(self, state: TierCopies, key: bytes, copy: Copy) -> None:
        state.publish(key, copy)
        self._masks[key] = self._masks.get(key, 0) | state.bit
        self._tell(EventKind.ADDED, state, (key,), (copy,))

    def _inherit(self, keys: Iterable[bytes], state: TierCopies) -> None:
        """Give new copies the priorities of those in other tiers."""
        for tier, policy in self._prioritised.items():
            if tier is not state.tier:
                there = self._spaces[tier].published
                self.prioritise({key: policy.priority(key) for key in keys if key in there}, state.tier)

    def _unpublish(self, state: TierCopies, keys: Sequence[bytes]) -> None:
        copies = [state.unpublish(key) for key in keys]
        self._unmask(state, keys)
        self._tell(EventKind.REMOVED, state, keys, copies)

    def _unmask(self, state: TierCopies, keys: Iterable[bytes]) -> None:
        masks, keep = self._masks, ~state.bit
        for key in keys:
            mask = masks[key] & keep
            if mask:
                masks[key] = mask
            else:
                del masks[key]

    def _tell(self, kind: EventKind, state: TierCopies, keys: Sequence[bytes], copies: Sequence[Copy]) -> None:
        if state.told:
            self._changes.append(Change(kind, state.tier, keys, copies))

    def _evict_for(self, state: TierCopies, nbytes: int) -> tuple[int, ...] | None:
        return state.allocator.allocate(nbytes) if self._make_room(state, nbytes) else None

    def _make_room(self, state: TierCopies, nbytes: int) -> bool:
        """Evict as much as it takes; ``False``, with nothing evicted, when no eviction makes enough room."""
        victims = state.victims_for(nbytes, self._leases.is_leased)
        if victims is None:
            return False
        self._evict(state, victims)
        return True

    def _evict(self, state: TierCopies, victims: Sequence[bytes]) -> None:
        copies = state.unpublish_many(victims)
        self._unmask(state, victims)
        self._tell(EventKind.REMOVED, state, victims, copies)

    def _evict_for_each(self, state: TierCopies, count: int) -> list[int] | None:
        """A page for each of ``count`` objects, evicting; ``None``, with nothing evicted, when that makes no room."""
        if count <= state.allocator.total_pages and self._make_room(state, count * state.page_bytes):
            return state.allocator.allocate_each(count)
        return None
