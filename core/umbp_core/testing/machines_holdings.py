"""The Hypothesis machine of what a node holds: several sources on several tiers, beside sets of triples."""

from __future__ import annotations

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from umbp_core.holdings import Holdings

KEYS = tuple(b"%d" % number for number in range(10))
SOURCES = ("hbm", "l2", "pool")
TIERS = (0, 1, 2, 3)

Entries = set[tuple[str, int, bytes]]
"""(source, tier, hash)"""

sources = st.sampled_from(SOURCES)
tiers = st.sampled_from(TIERS)
keys = st.lists(st.sampled_from(KEYS), max_size=8)


class HoldingsMachine(RuleBasedStateMachine):
    """Every change, repeated hashes and repeated changes included; what each returns is worked out anew."""

    def __init__(self) -> None:
        super().__init__()
        self.holdings = Holdings()
        self.entries: Entries = set()

    def _held(self, tier: int) -> set[bytes]:
        return {key for _, held_tier, key in self.entries if held_tier == tier}

    def _change(self, tier: int, entries: Entries, added: list[bytes], removed: list[bytes]) -> None:
        """The entries are ``entries`` now; the tier was said to have got ``added`` and lost ``removed``."""
        before = self._held(tier)
        self.entries = entries
        after = self._held(tier)
        assert set(added) == after - before
        assert set(removed) == before - after
        assert len(added) + len(removed) == len(after ^ before), "each once"

    @rule(source=sources, tier=tiers, hashes=keys)
    def add(self, source: str, tier: int, hashes: list[bytes]) -> None:
        """Hashes come, in the order in which they are returned."""
        added = self.holdings.add(source, tier, hashes)
        assert added == [key for key in dict.fromkeys(hashes) if key in set(added)]
        self._change(tier, self.entries | {(source, tier, key) for key in hashes}, added, [])

    @rule(source=sources, tier=tiers, hashes=keys)
    def remove(self, source: str, tier: int, hashes: list[bytes]) -> None:
        """Hashes go, known or not."""
        removed = self.holdings.remove(source, tier, hashes)
        assert removed == [key for key in dict.fromkeys(hashes) if key in set(removed)]
        self._change(tier, self.entries - {(source, tier, key) for key in hashes}, [], removed)

    @rule(source=sources, tier=tiers)
    def clear(self, source: str, tier: int) -> None:
        """A source has nothing on a tier."""
        kept = {entry for entry in self.entries if entry[:2] != (source, tier)}
        removed = self.holdings.clear(source, tier)
        self._change(tier, kept, [], removed)
        assert tier not in self.holdings.tiers_of(source)

    @rule(source=sources, tier=tiers, hashes=keys)
    def replace(self, source: str, tier: int, hashes: list[bytes]) -> None:
        """A source lists all that it has on a tier."""
        kept = {entry for entry in self.entries if entry[:2] != (source, tier)}
        added, removed = self.holdings.replace(source, tier, hashes)
        self._change(tier, kept | {(source, tier, key) for key in hashes}, added, removed)
        assert tier in self.holdings.tiers_of(source)

    @rule()
    def read(self) -> None:
        """A snapshot names each hash of each tier once."""
        pieces = list(self.holdings.snapshot())
        found = {(tier, key) for tier, hashes in pieces for key in hashes}
        assert found == {(tier, key) for _, tier, key in self.entries}
        assert len(found) == sum(len(hashes) for _, hashes in pieces)
        assert self.holdings.tiers() == [tier for tier in TIERS if self._held(tier)] == [tier for tier, _ in pieces]

    @invariant()
    def counted(self) -> None:
        """Numbers are those of the sets, whoever holds them."""
        for tier in TIERS:
            assert self.holdings.count(tier) == len(self._held(tier))
        for source in SOURCES:
            assert set(self.holdings.tiers_of(source)) >= {tier for name, tier, _ in self.entries if name == source}
