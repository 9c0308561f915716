"""The sequence of batches beside a plain engine that loses, repeats and restarts as hypothesis likes."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

import hypothesis.strategies as st
import msgspec
import pytest
from hypothesis import settings
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from umbp_connectors.reporting.zmq_sequence import Apply, BatchSequence, Clear, Event, Replay, State, Why

KEYS = st.integers(0, 6)
Batch = tuple[int, bytes]


@dataclass
class Life:
    """One life of an engine: what it published, and what it held after each batch."""

    number: int
    kept: deque[Batch]
    truth: set[int] = field(default_factory=set)
    held: list[frozenset[int]] = field(default_factory=list)

    def publish(self, add: bool, key: int) -> Batch:
        (self.truth.add if add else self.truth.discard)(key)
        number = len(self.held)
        self.held.append(frozenset(self.truth))
        batch = (number, msgspec.msgpack.encode([self.number, number, add, key]))
        self.kept.append(batch)
        return batch


class SequenceMachine(RuleBasedStateMachine):
    """What is claimed is at no time more than the engine held after the batch that was applied last."""

    @initialize(replays=st.booleans(), buffer=st.sampled_from([1, 2, 5, 1000]), pending=st.sampled_from([1, 2, 1000]))
    def begin(self, replays: bool, buffer: int, pending: int) -> None:
        self.replays, self.buffer = replays, buffer
        self.sequence = BatchSequence(replays, max_pending=pending)
        self.lives = [Life(0, deque(maxlen=buffer))]
        self.wire: deque[Batch] = deque()
        self.connected = False
        self.asked: int | None = None
        self.answer: deque[Batch] | None = None
        self.claims: set[int] = set()
        self.position: tuple[int, int] | None = None
        self.heard = False
        self.unanswered = -1
        """The last life that did not answer; what it published before is not asked for again."""

    @property
    def engine(self) -> Life:
        return self.lives[-1]

    def feed(self, event: Event, batch: Batch = (-1, b"")) -> None:
        for effect in self.sequence.feed(event, *batch):
            if isinstance(effect, Apply):
                life, number, add, key = msgspec.msgpack.decode(effect.payload)
                (self.claims.add if add else self.claims.discard)(key)
                self.position = life, number
            elif isinstance(effect, Clear):
                assert self.position is not None, "there was something to forget"
                self.claims.clear()
                self.position = None
            elif isinstance(effect, Replay):
                assert self.replays
                assert effect.start >= 0
                self.asked, self.answer, self.heard = effect.start, None, False

    @rule(add=st.booleans(), key=KEYS, lost=st.booleans())
    def publish(self, add: bool, key: int, lost: bool) -> None:
        batch = self.engine.publish(add, key)
        if self.connected and not lost:
            self.wire.append(batch)

    @rule(count=st.integers(1, 9))
    def burst_that_is_lost(self, count: int) -> None:
        for key in range(count):
            self.engine.publish(True, key % 7)

    @precondition(lambda self: self.wire)
    @rule()
    def deliver(self) -> None:
        self.feed(Event.LIVE, self.wire.popleft())

    @precondition(lambda self: self.asked is not None and self.answer is None)
    @rule(kept=st.lists(st.booleans(), max_size=8))
    def answer_replay(self, kept: list[bool]) -> None:
        """Some of it is lost on the way, too, but for the first batch: there is room for that."""
        assert self.asked is not None
        wanted = [batch for batch in self.engine.kept if batch[0] >= self.asked]
        self.answer = deque(batch for at, batch in enumerate(wanted) if at == 0 or at >= len(kept) or kept[at])

    @precondition(lambda self: self.answer is not None)
    @rule()
    def replay(self) -> None:
        assert self.answer is not None
        if self.answer:
            self.heard = True
            self.feed(Event.REPLAYED, self.answer.popleft())
        else:
            self.asked = self.answer = None
            self.feed(Event.ENDED)

    @precondition(lambda self: self.asked is not None)
    @rule()
    def fail(self) -> None:
        """Its end may be lost, or all of it."""
        if not self.heard:
            self.unanswered = self.engine.number
        self.asked = self.answer = None
        self.feed(Event.FAILED)

    @precondition(lambda self: self.connected)
    @rule()
    def lose_connection(self) -> None:
        self.connected = False
        self.wire.clear()  # the sockets do the same
        self.asked = self.answer = None
        self.feed(Event.DISCONNECTED)

    @precondition(lambda self: not self.connected)
    @rule()
    def connect(self) -> None:
        self.connected = True
        self.feed(Event.CONNECTED)

    @rule(batches=st.integers(0, 3))
    def restart(self, batches: int) -> None:
        if self.connected:
            self.lose_connection()
        self.lives.append(Life(len(self.lives), deque(maxlen=self.buffer)))
        for key in range(batches):
            self.engine.publish(True, key)

    @precondition(lambda self: not self.connected)
    @rule()
    def gone(self) -> None:
        self.feed(Event.GONE)
        assert self.claims == set()

    @precondition(lambda self: self.sequence.state is State.STEADY)
    @rule()
    def idle(self) -> None:
        self.feed(Event.IDLE)

    def _until_quiet(self) -> None:
        while self.asked is not None or self.wire:
            if self.asked is not None and self.answer is None:
                self.answer_replay([])
            while self.answer is not None:
                self.replay()
            while self.wire:
                self.deliver()

    @rule()
    def settle(self) -> None:
        """After a while without new faults, an engine that can be asked is known as well as its memory reaches."""
        if not self.connected:
            self.connect()
        self._until_quiet()
        self.feed(Event.IDLE)
        self._until_quiet()
        assert self.sequence.state is State.STEADY
        if not self.replays:
            return
        assert self.claims <= self.engine.truth
        assert self.position == ((self.engine.number, len(self.engine.held) - 1) if self.engine.held else None)
        if len(self.engine.held) <= self.buffer and self.unanswered != self.engine.number:
            assert self.claims == self.engine.truth

    @invariant()
    def nothing_is_claimed_that_was_not_there(self) -> None:
        if self.position is not None:
            life, number = self.position
            assert self.claims <= self.lives[life].held[number]
        else:
            assert self.claims == set()

    @invariant()
    def without_a_replay_a_lost_connection_clears(self) -> None:
        if not self.replays and not self.connected:
            assert self.claims == set()


def test_sequence_beside_an_engine() -> None:
    run_state_machine_as_test(
        SequenceMachine, settings=settings(max_examples=300, stateful_step_count=40, deadline=None)
    )


def test_reasons_are_told() -> None:
    """The four reasons, each in its plainest form."""
    plain = BatchSequence(replays=False)
    assert plain.feed(Event.LIVE, 5, b"before") == []
    assert plain.feed(Event.CONNECTED) == []
    assert plain.feed(Event.LIVE, 5, b"5") == [Apply(b"5")]
    assert plain.feed(Event.LIVE, 7, b"7") == [Clear(Why.GAP), Apply(b"7")]
    assert plain.feed(Event.LIVE, 0, b"0") == [Clear(Why.RESTART), Apply(b"0")]
    assert plain.feed(Event.DISCONNECTED) == [Clear(Why.UNPROVEN)]
    counters = plain.counters
    assert (counters.applied, counters.gaps, counters.missed, counters.restarts, counters.dropped) == (3, 1, 1, 1, 1)

    asked = BatchSequence(replays=True)
    assert asked.feed(Event.CONNECTED) == [Replay(0)]
    assert asked.feed(Event.REPLAYED, 0, b"a") == [Apply(b"a")]
    assert asked.feed(Event.LIVE, 0, b"a") == []
    assert asked.feed(Event.ENDED) == []
    assert asked.counters.repeated == 1
    assert asked.feed(Event.DISCONNECTED) == []
    assert asked.feed(Event.GONE) == [Clear(Why.GONE)]


def test_an_engine_that_reached_our_number_again_is_not_taken_for_the_old_one() -> None:
    sequence = BatchSequence(replays=True)
    sequence.feed(Event.CONNECTED)
    for number in range(3):
        sequence.feed(Event.REPLAYED, number, b"old %d" % number)
    sequence.feed(Event.ENDED)
    sequence.feed(Event.DISCONNECTED)
    assert sequence.feed(Event.CONNECTED) == [Replay(2)]
    assert sequence.feed(Event.LIVE, 3, b"new 3") == []
    assert sequence.feed(Event.REPLAYED, 2, b"new 2") == [Clear(Why.RESTART), Replay(0)]
    for number in range(2):
        assert sequence.feed(Event.REPLAYED, number, b"new %d" % number) == [Apply(b"new %d" % number)]
    assert sequence.feed(Event.REPLAYED, 2, b"new 2") == [Apply(b"new 2"), Apply(b"new 3")], (
        "the rest was there already"
    )
    assert (sequence.state, sequence.expected) == (State.STEADY, 4)
    assert sequence.feed(Event.REPLAYED, 3, b"new 3") == sequence.feed(Event.ENDED) == []


def test_a_replay_without_its_last_word_counts() -> None:
    """Where there is no room for a batch, there is none for the word that it was all."""
    sequence = BatchSequence(replays=True)
    sequence.feed(Event.CONNECTED)
    sequence.feed(Event.REPLAYED, 0, b"a")
    assert sequence.feed(Event.REPLAYED, 3, b"d") == [Replay(0)]
    assert sequence.feed(Event.REPLAYED, 0, b"a") == []
    assert sequence.feed(Event.FAILED) == []
    assert (sequence.state, sequence.expected) == (State.STEADY, 1)
    assert sequence.feed(Event.IDLE) == [Replay(0)]
    sequence.feed(Event.REPLAYED, 0, b"a")
    assert sequence.feed(Event.REPLAYED, 3, b"d") == [Replay(0)]
    sequence.feed(Event.REPLAYED, 0, b"a")
    assert sequence.feed(Event.REPLAYED, 3, b"d") == [Clear(Why.GAP), Apply(b"d")], "it is gone for good"
    assert sequence.counters.missed == 2


def test_a_question_that_gets_no_answer_costs_nothing() -> None:
    """An engine that is busy is not an engine that lost its memory."""
    sequence = BatchSequence(replays=True)
    sequence.feed(Event.CONNECTED)
    sequence.feed(Event.REPLAYED, 0, b"a")
    sequence.feed(Event.ENDED)
    assert sequence.feed(Event.IDLE) == [Replay(0)]
    assert sequence.feed(Event.LIVE, 1, b"b") == []
    assert sequence.feed(Event.FAILED) == [Apply(b"b")]
    assert sequence.feed(Event.LIVE, 3, b"d") == [Replay(1)]
    assert sequence.feed(Event.FAILED) == [Clear(Why.GAP), Apply(b"d")]


def test_what_waits_is_bounded_and_asked_for_again() -> None:
    sequence = BatchSequence(replays=True, max_pending=10, max_pending_bytes=4)
    sequence.feed(Event.CONNECTED)
    for number in range(6):
        assert sequence.feed(Event.LIVE, number, b"x%d" % number) == []
    assert sequence.counters.dropped == 4
    assert sequence.feed(Event.ENDED) == [Apply(b"x0"), Apply(b"x1"), Replay(1)]
    assert sequence.feed(Event.REPLAYED, 1, b"x1") == []
    assert sequence.feed(Event.REPLAYED, 2, b"x2") == [Apply(b"x2")]


def test_an_engine_that_does_not_answer_after_the_connection_was_lost_is_not_known_again() -> None:
    sequence = BatchSequence(replays=True)
    sequence.feed(Event.CONNECTED)
    sequence.feed(Event.REPLAYED, 0, b"a")
    sequence.feed(Event.ENDED)
    sequence.feed(Event.DISCONNECTED)
    assert sequence.feed(Event.CONNECTED) == [Replay(0)]
    assert sequence.feed(Event.FAILED) == [Clear(Why.GAP)]
    assert sequence.feed(Event.LIVE, 1, b"of a new life") == [Apply(b"of a new life")]


@pytest.mark.parametrize("number", [0, 4, 5])
@pytest.mark.parametrize("overlap", [False, True])
def test_a_restart_that_no_connection_shows_is_seen_by_the_numbers(number: int, overlap: bool) -> None:
    """Something between us and the engine may keep the connection."""
    sequence = BatchSequence(replays=True)
    sequence.feed(Event.CONNECTED)
    for old in (4, 5):
        sequence.feed(Event.REPLAYED, old, b"old %d" % old)
    sequence.feed(Event.ENDED)
    if overlap and number:
        assert sequence.feed(Event.LIVE, number, b"new") == [Clear(Why.RESTART), Replay(0)]
        return
    assert sequence.feed(Event.LIVE, 3, b"old 3") == [], "on its way since before the replay"
    assert sequence.feed(Event.LIVE, 4, b"old 4") == []
    assert sequence.feed(Event.LIVE, 6, b"old 6") == [Apply(b"old 6")]
    assert sequence.feed(Event.LIVE, number, b"new") == [Clear(Why.RESTART), Replay(0)]
