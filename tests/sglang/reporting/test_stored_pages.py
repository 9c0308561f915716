"""Which published ids are on which tier of L3, beside a plain model: namespaces, names learned late, shared names."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from umbp_connectors.reporting.words import Word, WordKind
from umbp_core.holdings import Holdings
from umbp_core.tiers import Tier
from umbp_sglang.page_ids import Description, PageIds
from umbp_sglang.stored_pages import StoredPages


@dataclass(frozen=True)
class Key:
    """A request's tokens, one per page, and its namespace."""

    tokens: tuple[int, ...]
    namespace: str


class Chains:
    """Hashes with the structure of SGLang's: pages of namespaces that start with ``same`` share their event ids."""

    def stored(self, key: Key, parent: str | None, pages: int) -> list[str]:
        return chain(key.tokens, parent or digest("storage", key.namespace))

    def events(self, key: Key, parent: str | None, pages: int) -> list[str]:
        start = "" if key.namespace.startswith("same") else key.namespace
        return chain(key.tokens, parent or digest("events", start))

    def published(self, key: Key, event: str) -> int:
        return int.from_bytes(bytes.fromhex(event[:16]), "big", signed=True)


def digest(*parts: str) -> str:
    return hashlib.sha256("/".join(parts).encode()).hexdigest()


def chain(tokens: Sequence[int], before: str) -> list[str]:
    hashes = []
    for token in tokens:
        before = digest(before, str(token))
        hashes.append(before)
    return hashes


CHAINS = Chains()
TOKENS = (1, 2, 3, 4)
NAMESPACES = ["same a", "same b", "c", "d"]


def names(namespace: str) -> list[tuple[bytes, bytes]]:
    """Storage hash and published id of each page of the only prompt."""
    key = Key(TOKENS, namespace)
    stored, events = CHAINS.stored(key, None, 4), CHAINS.events(key, None, 4)
    return [(bytes.fromhex(a), b"%d" % CHAINS.published(key, b)) for a, b in zip(stored, events, strict=True)]


def plain() -> list[tuple[bytes, bytes]]:
    """The same for a request without a namespace: one chain serves both."""
    hashes = chain(TOKENS, digest("events", ""))
    return [(bytes.fromhex(each), b"%d" % CHAINS.published(Key(TOKENS, ""), each)) for each in hashes]


class Machine(RuleBasedStateMachine):
    """What was told is what there is, but for pages of which nobody said a word, which have their storage's names."""

    @initialize()
    def begin(self) -> None:
        self.pages = StoredPages(PageIds(CHAINS, kept=3))
        self.told = Holdings()
        self.held: dict[Tier, set[bytes]] = {Tier.DRAM: set(), Tier.SSD: set()}

    def take(self, *words: Word) -> None:
        for kind, tier, hashes in words:
            if kind is WordKind.ADD:
                self.told.add("pool", tier, hashes)
            elif kind is WordKind.REMOVE:
                self.told.remove("pool", tier, hashes)
            else:
                self.told.replace("pool", tier, hashes)

    @rule(
        namespace=st.sampled_from([*NAMESPACES, ""]),
        which=st.lists(st.integers(0, 3), min_size=1, unique=True),
        tier=st.sampled_from([Tier.DRAM, Tier.SSD]),
        come=st.booleans(),
        described=st.booleans(),
    )
    def move(self, namespace: str, which: list[int], tier: Tier, come: bool, described: bool) -> None:
        pairs = names(namespace) if namespace else plain()
        if described and namespace:
            self.describe(namespace, 0, 4)
        keys = [pairs[index][0] for index in which]
        if come:
            self.held[tier] |= set(keys)
            self.take(self.pages.add(tier, keys))
        else:
            self.held[tier] -= set(keys)
            self.take(self.pages.remove(tier, keys))

    @rule(namespace=st.sampled_from(NAMESPACES), first=st.integers(0, 3), last=st.integers(1, 4))
    def describe(self, namespace: str, first: int, last: int) -> None:
        """Pages are described from anywhere: those in the middle can be named when those before them are."""
        if first >= last:
            return
        pairs = names(namespace)
        parent = pairs[first - 1][0] if first else None
        part = Key(TOKENS[first:last], namespace)
        hashes = [each.hex() for each, _ in pairs[first:last]]
        self.take(*self.pages.learn([Description(part, parent.hex() if parent else None, hashes)]))

    @rule()
    def list_all(self) -> None:
        self.take(*self.pages.replace({tier: list(keys) for tier, keys in self.held.items()}))

    @invariant()
    def told_is_true(self) -> None:
        told = {tier: set(hashes) for tier, hashes in self.told.snapshot()}
        ids = self.pages._ids
        for tier, keys in self.held.items():
            wanted = {b"%d" % int.from_bytes(found, "big", signed=True) for key in keys if (found := ids.of(key[:8]))}
            assert told.get(tier, set()) == wanted

    @invariant()
    def names_are_right_or_the_storages_own_or_unknown(self) -> None:
        for namespace in NAMESPACES:
            for key, name in names(namespace):
                found = self.pages._ids.of(key[:8])
                assert found in (None, key[:8], int(name).to_bytes(8, "big", signed=True))
        for key, _ in plain():
            assert self.pages._ids.of(key[:8]) == key[:8]

    @invariant()
    def held_names_are_kept(self) -> None:
        assert len(self.pages._ids) <= 16


TestStoredPages = Machine.TestCase
TestStoredPages.settings = settings(max_examples=80, stateful_step_count=25, deadline=None)


def describe(namespace: str, first: int, last: int) -> Description:
    pairs = names(namespace)
    hashes = [each.hex() for each, _ in pairs[first:last]]
    return Description(Key(TOKENS[first:last], namespace), pairs[first - 1][0].hex() if first else None, hashes)


def pages_of(pairs: Sequence[tuple[bytes, bytes]]) -> tuple[list[bytes], list[bytes]]:
    return [key for key, _ in pairs], [name for _, name in pairs]


def test_a_described_page_is_told_by_the_name_that_events_have() -> None:
    pages = StoredPages(PageIds(CHAINS))
    keys, told = pages_of(names("c"))
    assert pages.learn([describe("c", 0, 4)]) == []
    assert pages.add(Tier.SSD, keys) == Word(WordKind.ADD, Tier.SSD, told)
    assert pages.remove(Tier.SSD, keys) == Word(WordKind.REMOVE, Tier.SSD, told)


def test_what_was_told_by_the_storages_name_is_told_anew_when_it_is_described() -> None:
    """After a restart: nothing is known of what is found on SSD."""
    pages = StoredPages(PageIds(CHAINS))
    (key, *_), (name, *_) = pages_of(names("c"))
    (before,) = pages.add(Tier.SSD, [key]).hashes
    words = pages.learn([describe("c", 0, 1)])
    assert words == [Word(WordKind.REMOVE, Tier.SSD, [before]), Word(WordKind.ADD, Tier.SSD, [name])]
    assert pages.learn([describe("c", 0, 1)]) == [], "again"


def test_a_page_whose_beginning_is_not_known_is_not_told_until_it_is() -> None:
    pages = StoredPages(PageIds(CHAINS))
    keys, told = pages_of(names("c"))
    pages.learn([describe("c", 2, 4)])
    assert pages.add(Tier.DRAM, keys[2:]).hashes == []
    assert pages.untold == 2
    pages.learn([describe("c", 0, 2)])
    (first, second) = pages.learn([describe("c", 2, 4)])
    assert (first.hashes, second.hashes) == ([told[2]], [told[3]])
    assert pages.untold == 0


def test_tokens_that_are_not_the_pages_are_not_believed() -> None:
    pages = StoredPages(PageIds(CHAINS))
    wrong = describe("c", 0, 4)._replace(key=Key((9, 9, 9, 9), "c"))
    pages.learn([wrong])
    assert pages.add(Tier.DRAM, pages_of(names("c"))[0]).hashes == []


class Uncompiled(Chains):
    """SGLang's hash cannot be compiled here."""

    def stored(self, key: Key, parent: str | None, pages: int) -> list[str]:
        raise OSError("there is no compiler")


def test_without_hashes_the_pages_of_namespaces_are_not_told() -> None:
    pages = StoredPages(PageIds(Uncompiled()))
    pages.learn([describe("c", 0, 4)])
    assert pages.add(Tier.DRAM, pages_of(names("c"))[0]).hashes == []
    assert len(pages.add(Tier.DRAM, pages_of(plain())[0]).hashes) == 4


def test_two_namespaces_with_one_name_hold_it_together() -> None:
    pages = StoredPages(PageIds(CHAINS))
    pages.learn([describe("same a", 0, 1), describe("same b", 0, 1)])
    (a, name), (b, same), (c, plainly) = names("same a")[0], names("same b")[0], plain()[0]
    assert name == same == plainly
    pages.add(Tier.DRAM, [a, b, c])
    assert pages.remove(Tier.DRAM, [a]).hashes == []
    assert pages.remove(Tier.DRAM, [c]).hashes == []
    assert pages.remove(Tier.DRAM, [b]).hashes == [name]


def test_names_of_pages_that_are_gone_are_forgotten_in_time() -> None:
    ids = PageIds(CHAINS, kept=8)
    pages = StoredPages(ids)
    for number in range(40):
        key = Key((number,), "c")
        pages.learn([Description(key, None, CHAINS.stored(key, None, 1))])
        if number == 0:
            held = bytes.fromhex(CHAINS.stored(key, None, 1)[0])
            pages.add(Tier.SSD, [held])
    assert len(ids) < 20
    assert ids.of(held[:8]) != held[:8], "the name of a page that is held is kept"
