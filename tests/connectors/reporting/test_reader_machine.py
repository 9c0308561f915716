"""Sources, feeds, reader and the journal of reports before a master that forgets, over a channel that loses: whatever
happened, the master knows the union of what the sources hold as soon as all of them work for a while.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from umbp_connectors.reporting.mirror import Mirror
from umbp_connectors.reporting.reader import PAUSE_AFTER_A_BUG, Reader
from umbp_connectors.reporting.words import Word, WordKind
from umbp_core.index import ExternalKvIndex
from umbp_core.index_gate import Acknowledgement, BatchApplier
from umbp_core.reports import ReportJournal
from umbp_core.testing.fakes import FakeClock

HBM, DRAM, SSD = 1, 2, 3
KEYS = tuple(b"%d" % number for number in range(9))
TIERS = {"hbm": (HBM,), "l2": (DRAM,), "pool": (DRAM, SSD)}
MAX_WAITING = 6

keys = st.lists(st.sampled_from(KEYS), min_size=1, max_size=4)
names = st.sampled_from(sorted(TIERS))


class Source:
    """A part of an engine: its truth changes first and is told then.  Sometimes it cannot say what it should."""

    def __init__(self, name: str, reader: Reader) -> None:
        self.held: dict[int, set[bytes]] = {tier: set() for tier in TIERS[name]}
        self.listable = True
        self.lost = False
        """Whether the reader was told something that it cannot understand, and nothing was listed since."""
        self.feed = reader.feed(name, self._decode, self._list)

    def _decode(self, item: Sequence[Word | None]) -> Iterator[Word]:
        for word in item:
            if word is None:
                raise ValueError("not a word")
            yield word

    def _list(self) -> Sequence[Word | None]:
        if not self.listable:
            self.lost = True
            raise RuntimeError("no list")
        self.lost = False
        return [Word(WordKind.REPLACE, tier, list(hashes)) for tier, hashes in self.held.items()]

    def change(self, kind: WordKind, tier: int, hashes: Sequence[bytes]) -> None:
        held = self.held[tier]
        changed = {
            WordKind.ADD: held.union(hashes),
            WordKind.REMOVE: held.difference(hashes),
            WordKind.CLEAR: set(),
            WordKind.REPLACE: set(hashes),
        }
        self.held[tier] = changed[kind]
        self.feed.tell(len(hashes), [Word(kind, tier, hashes)])


class Client:
    """A master's client and its thread: calls wait in it, and it tells what it can over the channel, when it can."""

    def __init__(self, snapshot: Callable[[], Iterator[tuple[int, Sequence[bytes]]]]) -> None:
        self.snapshot = snapshot
        self.calls: list[tuple[Callable[..., None], tuple[Any, ...]]] = []
        self.journal = ReportJournal(1, max_hashes=10, batch_hashes=3)
        self.index = ExternalKvIndex()
        self.applier = BatchApplier(self.index)

    def report(self, hashes: Sequence[bytes], tier: int) -> None:
        self.calls.append((self.journal.report, (hashes, tier)))

    def revoke(self, hashes: Sequence[bytes], tier: int) -> None:
        self.calls.append((self.journal.revoke, (hashes, tier)))

    def clear(self, tier: int) -> None:
        self.calls.append((self.journal.clear, (tier,)))

    def absorb(self) -> None:
        calls, self.calls = self.calls, []
        for call, arguments in calls:
            call(*arguments)

    def overflow(self) -> None:
        """More waits than may: what waits is dropped, and everything has to be told."""
        self.calls = []
        self.journal.request_full_sync()

    def step(self, arrives: bool = True, answered: bool = True) -> None:
        """Tell the master one batch."""
        if self.journal.full_sync_due:
            self.journal.begin_full_sync(self.snapshot())
        batch = self.journal.batch()
        if batch is not None and arrives:
            self._take(self.applier.apply("node", batch), answered)

    def keepalive(self) -> None:
        journal = self.journal
        self._take(self.applier.probe("node", journal.incarnation, journal.acked_seq), True)

    def known(self) -> set[tuple[int, bytes]]:
        return {
            (tier, key)
            for tier in self.index.counts("node")
            for part in self.index.blocks("node", tier)
            for key in part
        }

    def _take(self, answer: Acknowledgement, answered: bool) -> None:
        if answered:
            self.journal.receive(answer.incarnation, answer.acked, answer.request_full_sync)


class ReporterMachine(RuleBasedStateMachine):
    """See the module."""

    @initialize()
    def begin(self) -> None:
        self.clock = FakeClock()
        self.mirror = Mirror()
        self.client = Client(self.mirror.snapshot)
        self.reader = Reader(self.client, self.mirror, self.clock, threading.Event(), MAX_WAITING)
        self.sources = {name: Source(name, self.reader) for name in TIERS}

    @rule(name=names, kind=st.sampled_from(WordKind), far=st.booleans(), hashes=keys)
    def change(self, name: str, kind: WordKind, far: bool, hashes: list[bytes]) -> None:
        """Blocks come and go."""
        tier = TIERS[name][-1 if far else 0]
        self.sources[name].change(kind, tier, hashes if kind is not WordKind.CLEAR else [])

    @rule(name=names, hashes=keys)
    def demote(self, name: str, hashes: list[bytes]) -> None:
        """Blocks leave one tier and come to another, in one item."""
        source = self.sources[name]
        first, last = TIERS[name][0], TIERS[name][-1]
        source.held[first] = source.held[first].difference(hashes)
        source.held[last] = source.held[last].union(hashes)
        source.feed.tell(2 * len(hashes), [Word(WordKind.REMOVE, first, hashes), Word(WordKind.ADD, last, hashes)])

    @rule(name=names, hashes=keys)
    def babble(self, name: str, hashes: list[bytes]) -> None:
        """An item that begins well and cannot be understood to its end."""
        source = self.sources[name]
        before = source.feed.counters.resyncs
        source.feed.tell(1, [Word(WordKind.ADD, TIERS[name][0], hashes), None])
        if source.feed.counters.resyncs == before:
            source.lost = True

    @rule(name=names, listable=st.booleans())
    def able(self, name: str, listable: bool) -> None:
        """Whether a source can list what it holds, from now on."""
        self.sources[name].listable = listable

    @rule(name=names)
    def list_all(self, name: str) -> None:
        """A source lists everything of its own accord."""
        self.sources[name].feed.tell_all()

    @rule(seconds=st.sampled_from((0.0, PAUSE_AFTER_A_BUG)))
    def read(self, seconds: float) -> None:
        """The reporter's thread has its turn; after it the mirror is the truth of all sources that work."""
        self.clock.advance(seconds)
        self.reader.read()
        held = {(tier, key) for tier, hashes in self.mirror.snapshot() for key in hashes}
        sure = [source for source in self.sources.values() if not source.lost]
        assert held == self._truth(sure)

    @rule(arrives=st.booleans(), answered=st.booleans())
    def send(self, arrives: bool, answered: bool) -> None:
        """The client's thread has its turn, over a channel that loses messages and answers."""
        self.client.absorb()
        self.client.step(arrives, answered)

    @rule()
    def overflow_client(self) -> None:
        """The master was away for long."""
        self.client.overflow()

    @rule(forget=st.booleans())
    def restart_master(self, forget: bool) -> None:
        """The master knows nothing any more, or nothing of this node."""
        if forget:
            self.client.applier.forget("node")
        else:
            self.client.applier.expire("node")

    @rule()
    def settle(self) -> None:
        """Everything works for a while, and every source tells something."""
        for source in self.sources.values():
            source.listable = True
        self.reader.read()
        self.clock.advance(PAUSE_AFTER_A_BUG)
        self.reader.read()
        for source in self.sources.values():
            source.feed.tell(0, [])
        self.reader.read()
        self.client.absorb()
        for _ in range(60):
            self.client.step()
            self.client.keepalive()
            if self.client.journal.settled:
                break
        assert self.client.journal.settled
        assert self.client.known() == self._truth(list(self.sources.values()))

    @invariant()
    def bounded(self) -> None:
        """What waits is bounded."""
        assert all(source.feed.waiting <= MAX_WAITING for source in self.sources.values())

    def _truth(self, sources: Sequence[Source]) -> set[tuple[int, bytes]]:
        return {(tier, key) for source in sources for tier, held in source.held.items() for key in held}

    def teardown(self) -> None:
        if hasattr(self, "sources"):
            self.settle()


ReporterMachine.TestCase.settings = settings(max_examples=150, stateful_step_count=50, deadline=None)
TestReporter = ReporterMachine.TestCase
