"""What an engine holds, beside a plain model of its groups."""

from __future__ import annotations

from collections import defaultdict

import hypothesis.strategies as st
import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

from umbp_connectors.reporting.words import Word, WordKind
from umbp_connectors.reporting.zmq_batches import Cleared, Removed, Stored
from umbp_connectors.reporting.zmq_blocks import BlockTable
from umbp_core.tiers import Tier

TIERS = st.sampled_from([Tier.HBM, Tier.DRAM, Tier.SSD])
HASHES = st.lists(st.sampled_from([b"%d" % number for number in range(6)]), max_size=4)
GROUPS = st.integers(0, 2)


def told(words: list[Word], known: dict[int, set[bytes]]) -> None:
    """What somebody knows who hears the words."""
    for kind, tier, hashes in words:
        if kind is WordKind.ADD:
            assert not known[tier].intersection(hashes), "nothing is said twice"
            known[tier].update(hashes)
        elif kind is WordKind.REMOVE:
            assert known[tier].issuperset(hashes)
            known[tier].difference_update(hashes)
        else:
            known[tier] = set(hashes)


class BlocksMachine(RuleBasedStateMachine):
    """Words lead to the intersection of the groups that count, however the groups become known."""

    def __init__(self) -> None:
        super().__init__()
        self.table = BlockTable()
        self.known: dict[int, set[bytes]] = defaultdict(set)
        self.groups: dict[tuple[int, int], set[bytes]] = {}
        self.whole: set[tuple[int, int]] = set()
        self.absent = 0

    def apply(self, event: Stored | Removed | Cleared) -> None:
        told(self.table.apply(event), self.known)
        before = {tier: set(keys) for tier, keys in self.known.items()}
        if not isinstance(event, Stored):  # a hash that is stored may come and go; else nothing changes
            assert [word for word in self.table.apply(event) if word.hashes] == []
        told(self.table.apply(event) if isinstance(event, Stored) else [], self.known)
        assert self.known == before

    @rule(tier=TIERS, group=GROUPS, whole=st.booleans(), hashes=HASHES)
    def store(self, tier: Tier, group: int, whole: bool, hashes: list[bytes]) -> None:
        self.groups.setdefault((tier, group), set()).update(hashes)
        if whole:
            self.whole.add((tier, group))
        self.apply(Stored(tier, hashes, group, whole))

    @rule(tier=TIERS, group=st.none() | GROUPS, hashes=HASHES)
    def remove(self, tier: Tier, group: int | None, hashes: list[bytes]) -> None:
        there: set[bytes] = set()
        for (at, number), own in self.groups.items():
            if at == tier and group in (None, number):
                there |= own.intersection(hashes)
                own.difference_update(hashes)
        distinct = set(hashes)
        self.absent += len(distinct - there) + len(distinct)  # it is applied again, and then none is there
        self.apply(Removed(tier, hashes, group))

    @rule()
    def reset(self) -> None:
        for (tier, _), own in self.groups.items():
            if tier in (Tier.HBM, Tier.DRAM):
                own.clear()
        self.apply(Cleared())

    @rule()
    def forget(self) -> None:
        for own in self.groups.values():
            own.clear()
        told(self.table.clear(), self.known)

    @invariant()
    def counts_what_was_removed_and_not_there(self) -> None:
        assert self.table.absent == self.absent

    @invariant()
    def is_what_every_group_that_counts_has(self) -> None:
        whole: dict[int, set[bytes]] = defaultdict(set)
        told(self.table.whole(), whole)
        for tier in (Tier.HBM, Tier.DRAM, Tier.SSD):
            groups = {number: own for (at, number), own in self.groups.items() if at == tier}
            counted = [own for number, own in groups.items() if (tier, number) in self.whole] or list(groups.values())
            truth = set.intersection(*counted) if counted else set()
            assert self.known[tier] == truth
            assert whole[tier] == truth


@pytest.mark.statement("connector", 88)
@pytest.mark.statement("connector", 89)
def test_blocks_beside_a_model() -> None:
    run_state_machine_as_test(BlocksMachine, settings=settings(max_examples=150, stateful_step_count=30, deadline=None))


@pytest.mark.statement("connector", 88)
@pytest.mark.statement("connector", 89)
def test_a_plain_engine_is_told_word_by_word() -> None:
    table = BlockTable()
    assert table.apply(Stored(Tier.HBM, [b"1", b"2", b"1"])) == [Word(WordKind.ADD, Tier.HBM, [b"1", b"2"])]
    assert table.apply(Stored(Tier.HBM, [b"2", b"3"])) == [Word(WordKind.ADD, Tier.HBM, [b"3"])]
    assert table.apply(Removed(Tier.HBM, [b"2", b"9"], 0)) == [Word(WordKind.REMOVE, Tier.HBM, [b"2"])]
    assert table.apply(Removed(Tier.SSD, [b"2"])) == []
    assert table.apply(Stored(Tier.SSD, [b"3"])) == [Word(WordKind.ADD, Tier.SSD, [b"3"])]
    assert table.apply(Cleared()) == [Word(WordKind.CLEAR, Tier.HBM)]
    assert table.whole() == [Word(WordKind.REPLACE, Tier.HBM, []), Word(WordKind.REPLACE, Tier.SSD, [b"3"])]
    assert table.clear() == [Word(WordKind.CLEAR, Tier.HBM), Word(WordKind.CLEAR, Tier.SSD)]


@pytest.mark.statement("connector", 89)
def test_what_is_removed_and_was_never_there_is_counted() -> None:
    """Each hash once, per tier and group; a group that is unknown has nothing."""
    table = BlockTable()
    assert table.apply(Removed(Tier.HBM, [b"1", b"2", b"1"])) == []
    assert table.absent == 2
    table.apply(Stored(Tier.HBM, [b"1", b"2"], 0))
    table.apply(Stored(Tier.HBM, [b"3"], 1, whole=False))
    table.apply(Removed(Tier.HBM, [b"1", b"3", b"9"]))
    assert table.absent == 3
    table.apply(Removed(Tier.HBM, [b"2"], 1))
    table.apply(Removed(Tier.HBM, [b"2"], 7))
    table.apply(Removed(Tier.SSD, [b"2"], 0))
    assert table.absent == 6
    table.apply(Removed(Tier.HBM, [b"2"], 0))
    assert table.absent == 6


def test_a_window_does_not_make_a_prefix() -> None:
    """A group that keeps all tokens is what counts, whichever of them is heard of first."""
    table = BlockTable()
    assert table.apply(Stored(Tier.HBM, [b"1", b"2"], 1, whole=False)) == [Word(WordKind.ADD, Tier.HBM, [b"1", b"2"])]
    assert table.apply(Stored(Tier.HBM, [b"1"], 0)) == [Word(WordKind.REPLACE, Tier.HBM, [b"1"])]
    assert table.apply(Removed(Tier.HBM, [b"1"], 1)) == []
    assert table.apply(Removed(Tier.HBM, [b"1"], 0)) == [Word(WordKind.REMOVE, Tier.HBM, [b"1"])]
