"""From what sources say to calls of the master's client, without a thread."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterable, Iterator

import pytest

from tests.connectors.reporting.told import Notes
from umbp_connectors.reporting.mirror import Mirror
from umbp_connectors.reporting.reader import PAUSE_AFTER_A_BUG, Reader
from umbp_connectors.reporting.words import Word, WordKind
from umbp_core.errors import StateError
from umbp_core.testing.fakes import FakeClock

HBM, DRAM, SSD = 1, 2, 3
ADD, REMOVE, CLEAR, REPLACE = WordKind.ADD, WordKind.REMOVE, WordKind.CLEAR, WordKind.REPLACE


def as_is(words: Iterable[Word]) -> Iterable[Word]:
    return words


def nothing() -> list[Word]:
    return []


class Rig:
    """A reader whose sources are told lists of words."""

    def __init__(self) -> None:
        self.clock = FakeClock()
        self.notes = Notes()
        self.mirror = Mirror()
        self.reader = Reader(self.notes, self.mirror, self.clock, threading.Event())
        self.pool = self.reader.feed("pool", as_is, nothing)
        self.l2 = self.reader.feed("l2", as_is, nothing)

    def held(self) -> set[tuple[int, bytes]]:
        return {(tier, key) for tier, hashes in self.mirror.snapshot() for key in hashes}


def test_words_of_a_kind_become_one_call() -> None:
    rig = Rig()
    rig.pool.tell(1, [Word(ADD, DRAM, [b"a"]), Word(ADD, SSD, [b"a"]), Word(ADD, DRAM, [b"b"])])
    rig.pool.tell(1, [Word(ADD, DRAM, [b"c"])])
    assert rig.notes.calls == []
    assert rig.reader.read() is None
    assert sorted(rig.notes.calls) == [("report", DRAM, (b"a", b"b", b"c")), ("report", SSD, (b"a",))]
    assert rig.held() == rig.notes.known


def test_the_order_within_a_tier_is_kept() -> None:
    rig = Rig()
    rig.pool.tell(1, [Word(ADD, DRAM, [b"a"]), Word(REMOVE, DRAM, [b"a"]), Word(ADD, DRAM, [b"a"])])
    rig.reader.read()
    assert [call[0] for call in rig.notes.calls] == ["report", "revoke", "report"]
    assert rig.notes.known == {(DRAM, b"a")}


@pytest.mark.statement("connector", 88)
@pytest.mark.statement("connector", 89)
def test_only_what_changes_for_the_tier_is_passed_on() -> None:
    rig = Rig()
    rig.pool.tell(1, [Word(ADD, DRAM, [b"a", b"b"])])
    rig.l2.tell(1, [Word(ADD, DRAM, [b"b", b"c"])])
    rig.reader.read()
    assert rig.notes.calls == [("report", DRAM, (b"a", b"b", b"c"))]
    rig.pool.tell(1, [Word(REMOVE, DRAM, [b"b", b"never"])])
    rig.reader.read()
    assert len(rig.notes.calls) == 1
    rig.l2.tell(0, [Word(CLEAR, DRAM)])
    rig.reader.read()
    assert sorted(rig.notes.calls[-1][2]) == [b"b", b"c"]
    assert rig.held() == rig.notes.known == {(DRAM, b"a")}


@pytest.mark.statement("connector", 88)
def test_a_tier_that_is_empty_is_cleared_and_what_was_to_be_said_of_it_is_not_said() -> None:
    rig = Rig()
    rig.pool.tell(1, [Word(ADD, DRAM, [b"a"]), Word(CLEAR, DRAM), Word(ADD, DRAM, [b"b"]), Word(ADD, SSD, [b"a"])])
    rig.reader.read()
    assert ("clear", DRAM, ()) in rig.notes.calls
    assert rig.notes.calls.index(("clear", DRAM, ())) < rig.notes.calls.index(("report", DRAM, (b"b",)))
    assert rig.notes.known == {(DRAM, b"b"), (SSD, b"a")}
    assert (rig.reader.changes.came, rig.reader.changes.left) == ({DRAM: 2, SSD: 1}, {DRAM: 1})


def test_a_list_of_everything_is_told_as_what_differs() -> None:
    rig = Rig()
    rig.pool.tell(2, [Word(ADD, DRAM, [b"a", b"b"])])
    rig.reader.read()
    rig.pool.tell(2, [Word(REPLACE, DRAM, [b"b", b"c"])])
    rig.reader.read()
    assert rig.notes.calls[1:] == [("revoke", DRAM, (b"a",)), ("report", DRAM, (b"c",))]


def test_the_mirror_is_ahead_of_what_is_told() -> None:
    rig = Rig()
    before: list[bool] = []

    class Looking(Notes):
        def report(self, hashes: Iterable[bytes], tier: int) -> None:
            before.append({(tier, key) for key in hashes} <= rig.held())

        def revoke(self, hashes: Iterable[bytes], tier: int) -> None:
            before.append(not {(tier, key) for key in hashes} & rig.held())

    reader = Reader(Looking(), rig.mirror, rig.clock, threading.Event())
    feed = reader.feed("pool", as_is, nothing)
    feed.tell(1, [Word(ADD, DRAM, [b"a", b"b"])])
    reader.read()
    feed.tell(1, [Word(REMOVE, DRAM, [b"a"])])
    reader.read()
    assert before == [True, True]


def test_a_source_that_is_not_understood_counts_as_empty_until_it_lists_everything(
    caplog: pytest.LogCaptureFixture,
) -> None:
    rig = Rig()
    truth = [Word(REPLACE, SSD, [b"s"])]

    def decode(words: list[Word]) -> Iterator[Word]:
        yield from words
        if words[-1].kind is REMOVE:
            raise KeyError("gibberish")

    disk = rig.reader.feed("disk", decode, lambda: truth)
    rig.pool.tell(1, [Word(ADD, DRAM, [b"a"])])
    disk.tell(1, [Word(ADD, DRAM, [b"a", b"b"])])
    rig.reader.read()
    with caplog.at_level(logging.ERROR):
        disk.tell(1, [Word(ADD, SSD, [b"x"]), Word(REMOVE, DRAM, [b"a"])])
        disk.tell(1, [Word(ADD, SSD, [b"y"])])
        assert rig.reader.read() == rig.clock() + PAUSE_AFTER_A_BUG
    assert "what disk told is not understood" in caplog.text
    assert rig.held() == rig.notes.known == {(DRAM, b"a")}
    assert rig.reader.failures == 1

    disk.tell(1, [Word(ADD, SSD, [b"z"])])
    rig.reader.read()
    assert rig.held() == {(DRAM, b"a")}
    rig.clock.advance(PAUSE_AFTER_A_BUG)
    assert rig.reader.read() is None
    disk.tell(1, [Word(ADD, SSD, [b"z"])])
    rig.reader.read()
    assert rig.held() == rig.notes.known == {(DRAM, b"a"), (SSD, b"s")}


@pytest.mark.parametrize("wrong", [["text"], [b"a", 7], [None]])
def test_hashes_that_no_master_could_be_told_cost_their_source_only(wrong: list[bytes]) -> None:
    rig = Rig()
    rig.pool.tell(1, [Word(ADD, DRAM, [b"a"])])
    rig.l2.tell(1, [Word(ADD, DRAM, wrong)])
    rig.reader.read()
    assert rig.reader.failures == 1
    assert rig.held() == rig.notes.known == {(DRAM, b"a")}


def test_a_source_that_cannot_list_what_it_holds_counts_as_empty() -> None:
    rig = Rig()
    able = False

    def truth() -> list[Word]:
        if not able:
            raise RuntimeError
        return [Word(REPLACE, SSD, [b"s"])]

    disk = rig.reader.feed("disk", as_is, truth)
    disk.tell(1, [Word(ADD, SSD, [b"s"])])
    rig.reader.read()
    disk.tell_all()
    assert rig.reader.read() == rig.clock() + PAUSE_AFTER_A_BUG
    assert rig.held() == rig.notes.known == set()
    able = True
    rig.clock.advance(PAUSE_AFTER_A_BUG)
    rig.reader.read()
    disk.tell(0, [])
    rig.reader.read()
    assert rig.held() == rig.notes.known == {(SSD, b"s")}


def test_a_source_has_one_feed() -> None:
    rig = Rig()
    with pytest.raises(StateError, match="source 'pool' has a feed already"):
        rig.reader.feed("pool", as_is, nothing)


def test_a_feed_that_comes_after_the_end_takes_nothing() -> None:
    rig = Rig()
    rig.reader.close()
    late = rig.reader.feed("late", as_is, nothing)
    for feed in (late, rig.pool):
        feed.tell(1, [Word(ADD, DRAM, [b"a"])])
    rig.reader.read()
    assert rig.held() == set()
