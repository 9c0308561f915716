"""From pools' locks to a feed: parts that are joined, lives that end, and lists in the place of too many changes."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from umbp_connectors.reporting.feed import Feed
from umbp_connectors.reporting.words import WordKind
from umbp_core.directory import Change, EventKind
from umbp_core.holdings import Holdings
from umbp_core.tiers import Tier
from umbp_sglang.joined_parts import JoinedParts
from umbp_sglang.page_ids import PageIds
from umbp_sglang.pool_teller import PoolTeller
from umbp_sglang.stored_pages import StoredPages

DRAM, SSD = Tier.DRAM, Tier.SSD
KEYS = [bytes([number]) * 32 for number in range(200)]


def name(key: bytes) -> bytes:
    return b"%d" % int.from_bytes(key[:8], "big", signed=True)


class Part:
    """A pool that tells: sets per tier."""

    def __init__(self, observer: Any) -> None:
        self.observer = observer
        self.held: dict[Tier, set[bytes]] = {DRAM: set(), SSD: set()}

    def move(self, kind: EventKind, tier: Tier, keys: Sequence[bytes]) -> None:
        if kind is EventKind.ADDED:
            keys = [key for key in keys if key not in self.held[tier]]
            self.held[tier] |= set(keys)
        else:
            keys = [key for key in keys if key in self.held[tier]]
            self.held[tier] -= set(keys)
        changes = [Change(kind, tier, keys, ())] if keys else []
        self.observer.changed(changes, lambda: [(tier, list(held)) for tier, held in self.held.items()])


class Reader:
    """A teller, its feed, and who reads it."""

    def __init__(self, parts: dict[str, int], most: int = 1 << 18) -> None:
        self.teller = PoolTeller(StoredPages(PageIds(None)))  # type: ignore[arg-type]
        self.feed = Feed("pool", self.teller.decode, self.teller.whole, threading.Event(), most)
        self.teller.use(self.feed)
        self.held = Holdings()
        self.parts = self.begin(parts)

    def begin(self, parts: dict[str, int]) -> list[Part]:
        return [Part(self.teller.observer(number)) for number, _ in enumerate(self.teller.begin(parts))]

    def read(self) -> dict[int, set[bytes]]:
        for item in self.feed.take().items:
            for kind, tier, hashes in self.teller.decode(item):
                change = {
                    WordKind.ADD: self.held.add,
                    WordKind.REMOVE: self.held.remove,
                    WordKind.REPLACE: self.held.replace,
                }[kind]
                change("pool", tier, hashes)
        return {tier: set(hashes) for tier, hashes in self.held.snapshot()}


def names(*keys: bytes) -> set[bytes]:
    return {name(key) for key in keys}


def test_one_part_is_told_as_it_is() -> None:
    reader = Reader({"kv": 1, "swa": 1})
    (part,) = reader.parts
    part.move(EventKind.ADDED, DRAM, KEYS[:3])
    part.move(EventKind.ADDED, SSD, KEYS[:1])
    part.move(EventKind.REMOVED, DRAM, KEYS[1:2])
    assert reader.read() == {DRAM: names(KEYS[0], KEYS[2]), SSD: names(KEYS[0])}


def test_a_pool_that_is_opened_anew_voids_what_was_told_and_nobody_listens_to_the_old_one() -> None:
    reader = Reader({"kv": 1})
    (old,) = reader.parts
    old.move(EventKind.ADDED, DRAM, KEYS[:3])
    (new,) = reader.begin({"kv": 1})
    old.move(EventKind.ADDED, DRAM, KEYS[3:5])
    new.move(EventKind.ADDED, SSD, KEYS[5:6])
    assert reader.read() == {SSD: names(KEYS[5])}
    assert reader.begin({}) == []
    assert reader.read() == {}


def test_without_kv_of_its_own_a_rank_tells_nothing() -> None:
    assert Reader({"mamba": 1, "draft": 1}).parts == []


def test_too_many_changes_become_a_list() -> None:
    for parts in ({"kv": 1}, {"kv": 2}):
        reader = Reader(parts, most=50)
        for start in range(0, 200, 20):
            for part in reader.parts:
                part.move(EventKind.ADDED, DRAM, KEYS[start : start + 20])
        for part in reader.parts:
            part.move(EventKind.REMOVED, DRAM, KEYS[:190])
        assert reader.feed.counters.overflows > 0
        assert reader.read() == {DRAM: names(*KEYS[190:])}


MOVES = st.lists(
    st.tuples(
        st.integers(0, 2),
        st.sampled_from(EventKind),
        st.sampled_from([DRAM, SSD]),
        st.lists(st.sampled_from(KEYS[:6]), unique=True, min_size=1),
    ),
    max_size=40,
)


@given(MOVES, st.sampled_from([4, 1000]))
def test_parts_make_a_page(moves: list[tuple[int, EventKind, Tier, list[bytes]]], most: int) -> None:
    reader = Reader({"kv": 2, "indexer": 1}, most)
    for number, kind, tier, keys in moves:
        reader.parts[number].move(kind, tier, keys)
    wanted: dict[Tier, set[bytes]] = {DRAM: set(), SSD: set()}
    for key in KEYS[:6]:
        tiers = [{tier for tier in (DRAM, SSD) if key in part.held[tier]} for part in reader.parts]
        shared = set.intersection(*tiers)
        for tier in shared or ({SSD} if all(tiers) else set()):
            wanted[tier].add(name(key))
    assert reader.read() == {tier: found for tier, found in wanted.items() if found}


def test_parts_are_listed_as_they_were_told() -> None:
    joined = JoinedParts(2)
    joined.apply(0, [Change(EventKind.ADDED, DRAM, KEYS[:2], ())])
    assert joined.holdings() == [(DRAM, []), (SSD, [])]
    (change,) = joined.apply(1, [Change(EventKind.ADDED, SSD, KEYS[:1], ())])
    assert (change.kind, change.tier, change.keys) == (EventKind.ADDED, SSD, KEYS[:1])
    assert joined.holdings() == [(DRAM, []), (SSD, KEYS[:1])]
