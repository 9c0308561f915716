"""Producers at full speed, a reader that cannot keep up, and others that look on: in the end all is told."""

from __future__ import annotations

import random
import sys
import threading
from collections.abc import Iterator

import pytest

from tests.connectors.reporting.told import Notes
from tests.connectors.waiting import until
from umbp_connectors.reporting.feed import Feed
from umbp_connectors.reporting.mirror import Mirror
from umbp_connectors.reporting.reader import Reader
from umbp_connectors.reporting.words import Word, WordKind
from umbp_core.testing.fakes import FakeClock

DRAM, SSD = 2, 3
STEPS = 3000
LONG = 120.0


@pytest.fixture(autouse=True)
def switches() -> Iterator[None]:
    """Threads interrupt each other a thousand times as often as usual."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(5e-6)
    yield
    sys.setswitchinterval(before)


class Producer:
    """One source that speaks for two tiers, in a thread of its own."""

    def __init__(self, name: str, reader: Reader) -> None:
        self.held: dict[int, set[bytes]] = {DRAM: set(), SSD: set()}
        self.feed: Feed[list[Word]] = reader.feed(name, lambda words: words, self._all)
        self._random = random.Random(name)
        self.thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        keys = [b"%d" % number for number in range(60)]
        for step in range(STEPS):
            hashes = self._random.sample(keys, 5)
            tier = self._random.choice((DRAM, SSD))
            if step % 50 == 49:
                self.held[tier] = set()
                self.feed.tell(0, [Word(WordKind.CLEAR, tier)])
            elif self._random.random() < 0.5:
                self.held[tier] |= set(hashes)
                self.feed.tell(5, [Word(WordKind.ADD, tier, hashes)])
            else:
                self.held[tier] -= set(hashes)
                self.feed.tell(5, [Word(WordKind.REMOVE, tier, hashes)])

    def _all(self) -> list[Word]:
        return [Word(WordKind.REPLACE, tier, sorted(held)) for tier, held in self.held.items()]


def test_nothing_is_lost_between_threads() -> None:
    bell = threading.Event()
    mirror = Mirror()
    notes = Notes()
    reader = Reader(notes, mirror, FakeClock(), bell, max_waiting=40)
    producers = [Producer(name, reader) for name in ("l2", "pool", "ssd")]
    ended = threading.Event()
    looked = 0

    def read() -> None:
        """Begins when it has something to catch up on."""
        until(lambda: any(producer.feed.counters.overflows for producer in producers))
        while not ended.is_set():
            bell.wait(LONG)
            bell.clear()
            reader.read()

    def look() -> None:
        nonlocal looked
        while not ended.is_set():
            for tier, hashes in mirror.snapshot():
                assert len(hashes) == len(set(hashes)) <= 60, tier
            assert all(0 <= count <= 60 for count in mirror.counts().values())
            looked += 1

    others = [threading.Thread(target=target) for target in (read, look)]
    threads = [*others, *(producer.thread for producer in producers)]
    for thread in others:
        thread.start()
    until(lambda: looked > 0)
    for producer in producers:
        producer.thread.start()
    for producer in producers:
        producer.thread.join(LONG)
    ended.set()
    bell.set()
    for thread in others:
        thread.join(LONG)
    assert not any(thread.is_alive() for thread in threads)
    reader.read()
    truth = {(tier, key) for producer in producers for tier, held in producer.held.items() for key in held}
    assert {(tier, key) for tier, hashes in mirror.snapshot() for key in hashes} == truth == notes.known
    assert sum(producer.feed.counters.told for producer in producers) == 3 * STEPS
    assert reader.failures == 0
    assert sum(producer.feed.counters.overflows for producer in producers) > 0
