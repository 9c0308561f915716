"""Hypothesis machine of the directory beside its plain model; it takes any eviction policy."""

from __future__ import annotations

import msgspec
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from umbp_core.directory import Copy, Directory, DirectoryEvent, TierSpace
from umbp_core.errors import CapacityError, StateError, UnknownOwner
from umbp_core.eviction import EvictionPolicy, LruPolicy
from umbp_core.grouping import BlockOf
from umbp_core.pages import PageAllocator
from umbp_core.testing.machines_pages import (
    KEYS,
    OWNERS,
    PAGE_BYTES,
    depths,
    key_lists,
    keys,
    owners,
    refused,
    seconds,
    short_waits,
)
from umbp_core.testing.models_directory import PENDING, PUBLISHED, DirectoryModel, LruModel, ModelCopy
from umbp_core.tiers import Tier, TierSet

TIER_BYTES = {Tier.DRAM: (250, 99, 300), Tier.SSD: (400,)}
"""Buffers of each tier; 2 + 0 + 3 pages of DRAM and 4 of SSD."""

tiers = st.sampled_from(tuple(TIER_BYTES))
sizes = st.integers(1, 2 * PAGE_BYTES) | st.integers(1, 6 * PAGE_BYTES)
checksums = st.binary(min_size=2, max_size=2)


class DirectoryMachine(RuleBasedStateMachine):
    """``Directory`` over two tiers, with concurrent owners; pages, answers, statistics and events are compared."""

    def new_policy(self) -> EvictionPolicy:
        """The policy of each tier."""
        return LruPolicy()

    def new_model(self) -> EvictionPolicy:
        """A policy with the same order; a second instance of your own will do."""
        return LruModel()

    def block_of(self) -> BlockOf | None:
        """Which objects are evicted together; here every object alone."""
        return None

    def __init__(self) -> None:
        super().__init__()
        spaces = [
            TierSpace(tier, PageAllocator(PAGE_BYTES, sizes), self.new_policy(), block_of=self.block_of())
            for tier, sizes in TIER_BYTES.items()
        ]
        self.directory = Directory(spaces)
        self.model = DirectoryModel(PAGE_BYTES, dict(TIER_BYTES), self.new_model, self.block_of())
        self.now = 0.0

    @initialize(stored=st.lists(st.tuples(keys, depths), max_size=2 * len(KEYS)))
    def fill(self, stored: list[tuple[bytes, int]]) -> None:
        """Begin with a node that is in use already, often full."""
        for key, depth in stored:
            for tier in TIER_BYTES:
                self._store(OWNERS[0], key, tier, PAGE_BYTES, depth)

    def _reserve(self, owner: str, key: bytes, tier: Tier, nbytes: int, depth: int) -> ModelCopy | None:
        known = self.model.find(key, tier, PENDING, PUBLISHED) is not None
        assert self.directory.is_present_or_pending(key, tier) is known
        if not known and not self.model.fits(tier, nbytes):
            assert refused(CapacityError, self.directory.reserve, owner, key, tier, nbytes, depth)
            return None
        pages = self.directory.reserve(owner, key, tier, nbytes, depth)
        if known or not self.model.make_room(tier, nbytes):
            assert pages is None
            return None
        assert pages is not None
        assert (len(pages) - 1) * PAGE_BYTES < nbytes <= len(pages) * PAGE_BYTES
        copy = ModelCopy(key, tier, pages, nbytes, depth, PENDING, owner)
        self.model.add(copy)
        return copy

    def _store(self, owner: str, key: bytes, tier: Tier, nbytes: int, depth: int) -> None:
        copy = self._reserve(owner, key, tier, nbytes, depth)
        if copy is not None:
            self.directory.commit(owner, key, tier, b"st")
            self.model.publish(copy, b"st")

    @rule(owner=owners, key=keys, tier=tiers, nbytes=sizes, depth=depths)
    def reserve(self, owner: str, key: bytes, tier: Tier, nbytes: int, depth: int) -> None:
        """Refused, too large, no room, or pages that nobody else has."""
        self._reserve(owner, key, tier, nbytes, depth)

    @rule(owner=owners, tier=tiers, stored=st.lists(st.tuples(keys, sizes, depths), min_size=1, max_size=6))
    def store(self, owner: str, tier: Tier, stored: list[tuple[bytes, int, int]]) -> None:
        """The same several times over, and readable at once where there was room."""
        for key, nbytes, depth in stored:
            self._store(owner, key, tier, nbytes, depth)

    @rule(
        owner=owners,
        tier=tiers,
        wanted=st.lists(st.tuples(keys, st.integers(1, PAGE_BYTES), depths), max_size=6),
        unfit=st.none() | st.sampled_from([0, PAGE_BYTES + 1]),
        published=st.booleans(),
    )
    def store_many(
        self, owner: str, tier: Tier, wanted: list[tuple[bytes, int, int]], unfit: int | None, published: bool
    ) -> None:
        """A batch of objects of one page each: room for all at once if possible, else one by one."""
        if unfit is not None:
            assert refused(StateError, self.directory.reserve_many, owner, [*wanted, (KEYS[0], unfit, 0)], tier)
            return
        places = self.directory.reserve_many(owner, wanted, tier)
        new = {key for key, _, _ in wanted if self.model.find(key, tier, PENDING, PUBLISHED) is None}
        total = self.model.total[tier]
        for_all = len(new) <= total and self.model.make_room(tier, len(new) * PAGE_BYTES)
        copies = []
        for (key, nbytes, depth), pages in zip(wanted, places, strict=True):
            room = key in new and (for_all or self.model.make_room(tier, nbytes))
            assert (pages is not None) is room
            if pages is not None:
                assert len(pages) == 1
                new.remove(key)
                copies.append(ModelCopy(key, tier, pages, nbytes, depth, PENDING, owner))
                self.model.add(copies[-1])
        if published:
            self.directory.commit_many(owner, {copy.key: b"mn" for copy in copies}, tier)
            for copy in copies:
                self.model.publish(copy, b"mn")

    @precondition(lambda self: self.model.in_state(PENDING))
    @rule(data=st.data())
    def commit_many_with_a_stray(self, data: st.DataObject) -> None:
        """All of the reservations or none."""
        copy = data.draw(st.sampled_from(self.model.in_state(PENDING)))
        assert refused(UnknownOwner, self.directory.commit_many, copy.owner, {copy.key: b"x", b"?": b"x"}, copy.tier)
        assert refused(UnknownOwner, self.directory.commit_many, "nobody", {copy.key: b"x"}, copy.tier)

    @precondition(lambda self: self.model.in_state(PENDING))
    @rule(data=st.data(), checksum=checksums)
    def commit(self, data: st.DataObject, checksum: bytes) -> None:
        """What is being written becomes readable."""
        copy = data.draw(st.sampled_from(self.model.in_state(PENDING)))
        self.directory.commit(copy.owner, copy.key, copy.tier, checksum)
        self.model.publish(copy, checksum)

    @precondition(lambda self: self.model.in_state(PENDING))
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        """What is being written is given up."""
        copy = data.draw(st.sampled_from(self.model.in_state(PENDING)))
        self.directory.abort(copy.owner, copy.key, copy.tier)
        self.model.abort([copy])

    @rule(key=keys, tier=tiers)
    def settle_for_a_stranger(self, key: bytes, tier: Tier) -> None:
        """Only the owner of a reservation can end it."""
        copy = self.model.find(key, tier, PENDING)
        for owner in {*OWNERS, "nobody"} - {copy.owner if copy else ""}:
            assert refused(UnknownOwner, self.directory.commit, owner, key, tier, b"")
            assert refused(UnknownOwner, self.directory.abort, owner, key, tier)

    @rule(owner=owners)
    def abort_owner(self, owner: str) -> None:
        """All of an owner's reservations, none of its pins."""
        self.directory.abort_owner(owner)
        self.model.abort([copy for copy in self.model.in_state(PENDING) if copy.owner == owner])

    def _mostly_there(self, data: st.DataObject, strays: list[bytes]) -> list[bytes]:
        there = [key for key in KEYS if self.model.tiers_of(key)]
        return strays + (data.draw(st.lists(st.sampled_from(there), max_size=4)) if there else [])

    @rule(owner=owners, data=st.data(), strays=st.lists(keys, max_size=1), tier=st.none() | tiers)
    def pin(self, owner: str, data: st.DataObject, strays: list[bytes], tier: Tier | None) -> None:
        """The asked tier's copies, or the fastest ones; all or nothing."""
        pinned = self._mostly_there(data, strays)
        copies = []
        for key in pinned:
            where = TierSet.fastest(self.model.tiers_of(key)) if tier is None else tier
            copies.append(None if where is None else self.model.find(key, where, PUBLISHED))
        found = [copy for copy in copies if copy is not None]
        if len(found) < len(copies):
            assert refused(UnknownOwner, self.directory.pin, owner, pinned, tier)
            return
        assert self.directory.pin(owner, pinned, tier) == [_copy_of(copy) for copy in found]
        for copy in found:
            copy.pinned_by.append(owner)

    @rule(owner=owners)
    def unpin(self, owner: str) -> None:
        """All of an owner's pins, however often it is said."""
        self.directory.unpin(owner)
        self.model.unpin(owner)

    @rule(touched=key_lists)
    def touch(self, touched: list[bytes]) -> None:
        """The head of the chain becomes the most recent."""
        self.directory.touch(touched)
        for key in reversed(touched):
            for policy in self.model.policies.values():
                policy.touched(key)

    @rule(owner=owners, data=st.data(), strays=st.lists(keys, max_size=1), wait=seconds)
    def lease(self, owner: str, data: st.DataObject, strays: list[bytes], wait: float) -> None:
        """Only what is there can be leased; all or nothing."""
        leased = self._mostly_there(data, strays)
        if all(self.model.tiers_of(key) for key in leased):
            self.directory.lease(owner, leased, self.now + wait)
            self.model.leases.grant(owner, leased, self.now + wait)
        else:
            assert refused(UnknownOwner, self.directory.lease, owner, leased, self.now + wait)

    @rule(owner=owners)
    def release(self, owner: str) -> None:
        """An owner's lease, however often it is said."""
        self.directory.release(owner)
        self.model.leases.release(owner)

    @rule(wait=short_waits)
    def expire(self, wait: float) -> None:
        """What is due, counted by owner."""
        self.now += wait
        assert self.directory.expire(self.now) == len(self.model.leases.expire(self.now))

    @rule(key=keys, tier=tiers)
    def drop(self, key: bytes, tier: Tier) -> None:
        """Bad bytes go at once."""
        copy = self.model.find(key, tier, PUBLISHED)
        assert self.directory.drop(key, tier) is (copy is not None)
        if copy is not None:
            self.model.unpublish(copy)

    @precondition(lambda self: any(copy.pinned_by for copy in self.model.in_state(PUBLISHED)))
    @rule(data=st.data())
    def drop_while_pinned(self, data: st.DataObject) -> None:
        """Not readable any more, and its pages are freed at the last unpin."""
        copy = data.draw(st.sampled_from([copy for copy in self.model.in_state(PUBLISHED) if copy.pinned_by]))
        assert self.directory.drop(copy.key, copy.tier)
        self.model.unpublish(copy)

    @rule(tier=tiers)
    def clear(self, tier: Tier) -> None:
        """Everything that is not leased."""
        assert self.directory.clear(tier) == self.model.clear(tier)

    @rule(tier=tiers, pages=st.integers(0, 5), most=st.integers(1, 8), keep=st.lists(keys, max_size=2))
    def trim(self, tier: Tier, pages: int, most: int, keep: list[bytes]) -> None:
        """Some pages come free, as far as nobody holds what is in them and few were looked at."""
        assert self.directory.trim(tier, pages, most, keep) == self.model.trim(tier, pages, most, keep)

    @rule(key=keys, tier=tiers, pages=st.lists(st.integers(-1, 5), max_size=3), nbytes=sizes, depth=depths)
    def restore(self, key: bytes, tier: Tier, pages: list[int], nbytes: int, depth: int) -> None:
        """Exactly these pages, or nothing."""
        free = set(range(self.model.total[tier])) - set(self.model.used_pages(tier))
        fits = (len(pages) - 1) * PAGE_BYTES < nbytes <= len(pages) * PAGE_BYTES
        known = self.model.find(key, tier, PENDING, PUBLISHED) is not None
        if known or not fits or len(free & set(pages)) < len(pages):
            assert refused(StateError, self.directory.restore, key, tier, pages, nbytes, b"r", depth)
            return
        self.directory.restore(key, tier, pages, nbytes, b"r", depth)
        self.model.add(ModelCopy(key, tier, tuple(pages), nbytes, depth, PUBLISHED, checksum=b"r"))

    @invariant()
    def events_agree(self) -> None:
        """What changed since the last step, in order and each once."""
        told = [(kind, copy.key, _copy_of(copy)) for kind, copy in self.model.events]
        expected = [DirectoryEvent(kind, key, *msgspec.structs.astuple(copy)) for kind, key, copy in told]
        self.model.events = []
        assert self.directory.drain_events() == expected

    @invariant()
    def answers_agree(self) -> None:
        """Lookups see exactly what is published."""
        masks = [self.model.tiers_of(key) for key in KEYS]
        assert [self.directory.tiers_of(key) for key in KEYS] == masks
        assert [self.directory.fastest(key) for key in KEYS] == [TierSet.fastest(mask) for mask in masks]
        assert self.directory.contains_many(KEYS) == [bool(mask) for mask in masks]
        assert self.directory.count_prefix(KEYS) == [*masks, 0].index(0)
        for key in KEYS:
            for tier in TIER_BYTES:
                copy = self.model.find(key, tier, PUBLISHED)
                assert self.directory.copy(key, tier) == (None if copy is None else _copy_of(copy))

    @invariant()
    def pages_are_conserved(self) -> None:
        """L8: every page belongs to at most one copy, and no more is used than there is."""
        for tier in TIER_BYTES:
            used = self.model.used_pages(tier)
            assert len(set(used)) == len(used)
            assert self.directory.stats(tier) == self.model.stats(tier)

    def teardown(self) -> None:
        """When everything is let go of, everything is free."""
        for owner in OWNERS:
            self.unpin(owner)
            self.abort_owner(owner)
            self.release(owner)
        for tier in TIER_BYTES:
            self.clear(tier)
            assert self.directory.stats(tier).free_pages == self.model.total[tier]


def _copy_of(copy: ModelCopy) -> Copy:
    return Copy(copy.tier, copy.pages, copy.nbytes, copy.checksum, copy.depth)
