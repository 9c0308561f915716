"""The queue of the catalogue, beside a plain model of what the file would hold."""

from __future__ import annotations

import itertools

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from umbp_connectors.pool.pending import PendingWords

Row = tuple[int, int]
"""A slot, and a number that no other row has."""
KEYS = st.sampled_from([b"a", b"b", b"c", b"d", b"e"])
SLOTS = st.integers(0, 2)
MOST = 4


class PendingMachine(RuleBasedStateMachine):
    """A file in which a slot has one key: writing the queue must end where writing everything at once ends.

    As the directory does, a slot's old key is forgotten before the slot goes to another, and so is a key's old slot.
    """

    def __init__(self) -> None:
        super().__init__()
        self.queue: PendingWords[Row] = PendingWords(MOST)
        self.numbers = itertools.count()
        self.owners: dict[bytes, int] = {}
        self.truth: dict[bytes, Row] = {}
        self.file: dict[bytes, Row] = {}
        self.barriers: list[dict[bytes, Row]] = []
        self.reached = 0

    def _apply(self, target: dict[bytes, Row], key: bytes, row: Row | None) -> None:
        target.pop(key, None)
        if row is not None:
            for other in [other for other, (taken, _) in target.items() if taken == row[0]]:
                del target[other]
            target[key] = row

    @rule(key=KEYS, slot=SLOTS)
    def record(self, key: bytes, slot: int) -> None:
        for old in [old for old, taken in self.owners.items() if old == key or taken == slot]:
            self.forget(old)
        self.owners[key] = slot
        row = (slot, next(self.numbers))
        if self.queue.record(key, row):
            self._apply(self.truth, key, row)

    @rule(key=KEYS)
    def forget(self, key: bytes) -> None:
        self.owners.pop(key, None)
        self.queue.forget(key)
        self._apply(self.truth, key, None)

    @rule()
    def forget_all(self) -> None:
        self.owners.clear()
        self.queue.forget_all()
        assert all(key in self.queue for key in (b"a", b"of nobody"))
        for state in [*self.barriers[self.reached :], self.truth]:
            state.clear()

    @rule()
    def seal(self) -> None:
        self.barriers.append(dict(self.truth))
        assert self.queue.seal() == len(self.barriers)

    @rule(count=st.integers(1, 3))
    def write(self, count: int) -> None:
        batch = self.queue.take(count)
        assert len(batch.words) <= count
        # The catalogue deletes first and then inserts in order.
        if batch.everything:
            self.file.clear()
        for key, row in batch.words:
            if row is None:
                self._apply(self.file, key, None)
        for key, row in batch.words:
            if row is not None:
                self._apply(self.file, key, row)
        if batch.sealed > self.reached:
            assert batch.sealed == self.reached + 1
            self.reached = batch.sealed
            assert self.file == self.barriers[self.reached - 1]

    @rule(count=st.integers(1, 3), forgotten=st.booleans())
    def fail_to_write(self, count: int, forgotten: bool) -> None:
        """What cannot be written is gone, also from what the barriers behind it wait for; unless said again."""
        batch = self.queue.take(count)
        for key, row in batch.words:
            if row is not None:
                for state in [*self.barriers[self.reached :], self.truth]:
                    if state.get(key) == row:
                        del state[key]
        if forgotten:  # there was room for that much
            if batch.everything:
                self.file.clear()
            for key, _ in batch.words:
                self._apply(self.file, key, None)
        if forgotten and batch.last:
            self.reached = batch.sealed
            assert self.file == self.barriers[self.reached - 1]
        if not forgotten:
            self.queue.give_back(batch)

    @rule()
    def write_all(self) -> None:
        while len(self.queue):
            self.write(2)
        assert self.file == self.truth

    @invariant()
    def records_are_bounded(self) -> None:
        words = [word for generation in self.queue._generations for word in generation.values()]
        assert sum(word is not None for word in words) <= MOST


TestPending = PendingMachine.TestCase


def test_a_full_queue_refuses_new_records_but_never_a_forget() -> None:
    queue: PendingWords[int] = PendingWords(1)
    assert queue.record(b"a", 0)
    assert not queue.record(b"b", 1)
    assert queue.record(b"a", 2), "replacing takes no more room"
    for number in range(10):
        queue.forget(b"%d" % number)
    assert len(queue) == 11
    queue.forget(b"a")
    assert queue.record(b"b", 1), "a forgotten record gives its room back"
