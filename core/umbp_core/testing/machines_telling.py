"""Hypothesis machines of the parts that keep a master told: the journal of reports, and the circuit breaker."""

from __future__ import annotations

from collections.abc import Iterator

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from umbp_core.breaker import Backoff, Breaker, BreakerState
from umbp_core.index_gate import Acknowledgement
from umbp_core.reports import ReportJournal
from umbp_core.testing.machines_channel import ChannelMachine

KEYS = tuple(b"%d" % number for number in range(9))
TIERS = (1, 2, 3)

keys = st.lists(st.sampled_from(KEYS), max_size=6)
tiers = st.sampled_from(TIERS)


class ReportsMachine(ChannelMachine):
    """A node that reports, a channel that loses, repeats and reorders, and a receiver that forgets (law L11).

    The truth changes while a snapshot of it is being read, slice by slice.
    """

    max_hashes = 12
    batch_hashes = 3

    def __init__(self) -> None:
        super().__init__()
        self.latest = self.earliest = 1000
        self.truth: set[tuple[int, bytes]] = set()
        self.journal = self._journal(self.latest)

    def _journal(self, incarnation: int) -> ReportJournal:
        return ReportJournal(incarnation, self.max_hashes, self.batch_hashes)

    def _snapshot(self) -> Iterator[tuple[int, list[bytes]]]:
        """What is true when a slice is read, tier by tier."""
        for tier in TIERS:
            yield tier, [key for held_tier, key in sorted(self.truth) if held_tier == tier]

    @rule(hashes=keys, tier=tiers, eager=st.booleans())
    def report(self, hashes: list[bytes], tier: int, eager: bool) -> None:
        """Blocks come; sometimes a batch is cut at once."""
        self.truth |= {(tier, key) for key in hashes}
        self.journal.report(hashes, tier)
        if eager:
            self.send()

    @rule(hashes=keys, tier=tiers)
    def revoke(self, hashes: list[bytes], tier: int) -> None:
        """Blocks go."""
        self.truth -= {(tier, key) for key in hashes}
        self.journal.revoke(hashes, tier)

    @rule(tier=tiers)
    def clear(self, tier: int) -> None:
        """All blocks of a tier go."""
        self.truth = {(held_tier, key) for held_tier, key in self.truth if held_tier != tier}
        self.journal.clear(tier)

    @rule(eager=st.booleans())
    def resync(self, eager: bool) -> None:
        """The node begins a full sync, with a snapshot that is ready or one that is read bit by bit."""
        snapshot = self._snapshot()
        self.journal.begin_full_sync(list(snapshot) if eager else snapshot)

    @rule()
    def send(self) -> None:
        """Onto the channel, from where it may never arrive."""
        batch = self.journal.batch()
        if batch is not None:
            assert sum(len(action.hashes) for action in batch.actions) <= self.batch_hashes
            self.transmit(batch)

    @precondition(lambda self: self.answers)
    @rule(data=st.data())
    def answer(self, data: st.DataObject) -> None:
        """Any answer, late or several times."""
        self._take(data.draw(st.sampled_from(self.answers)))

    def _take(self, answer: Acknowledgement) -> None:
        self.journal.receive(answer.incarnation, answer.acked, answer.request_full_sync)

    @rule(later=st.booleans())
    def restart_node(self, later: bool) -> None:
        """A new life in which the tiers are empty; if its clock is wrong, nothing of the last life is on its way."""
        if later:
            self.latest += 100
        else:
            self.earliest -= 100
            self.messages, self.answers = [], []
        self.truth = set()
        self.journal = self._journal(self.latest if later else self.earliest)

    @rule(how=st.sampled_from(("expire", "forget")))
    def lose_state(self, how: str) -> None:
        """The receiver forgets."""
        if how == "expire":
            self.applier.expire("node")
        else:
            self.applier.forget("node")

    @rule()
    def settle(self) -> None:
        """With a channel that works for a while, the receiver knows the truth soon."""
        journal = self.journal
        told = False
        for _ in range(40):
            if journal.full_sync_due:
                journal.begin_full_sync(self._snapshot())
            batch = journal.batch()
            if batch is not None:
                self._take(self.applier.apply("node", batch))
            self._take(self.applier.probe("node", journal.incarnation, journal.acked_seq))
            told = journal.settled
            if told:
                break
        assert told
        known = {
            (tier, key)
            for tier in self.index.counts("node")
            for part in self.index.blocks("node", tier)
            for key in part
        }
        assert known == self.truth

    @invariant()
    def bounded(self) -> None:
        """What waits is bounded, and nothing waits while a full sync is due."""
        assert len(self.journal) <= (0 if self.journal.full_sync_due else self.max_hashes)


class BreakerMachine(RuleBasedStateMachine):
    """A breaker beside the list of everything that happened to it, from which each answer is worked out anew."""

    failures = 3
    backoff = Backoff(first=1.0, ceiling=8.0, jitter=0.5)

    def __init__(self) -> None:
        super().__init__()
        self.breaker = Breaker(lambda: 0.5, self.backoff, self.failures)
        self.now = 0.0
        self.permits: list[int] = []
        self.streak = 0
        """Failures in a row that counted."""
        self.closed_until: float | None = None
        """Until when nothing is let through; ``None`` while it is closed."""
        self.trial: float | None = None
        """When the trial that is on its way may be followed by another."""
        self.current: int | None = None
        """The permit whose result counts; ``None`` before the first."""

    @rule(seconds=st.floats(0.0, 10.0))
    def wait(self, seconds: float) -> None:
        """Time passes."""
        self.now += seconds

    @rule()
    def attempt(self) -> None:
        """Somebody wants to call."""
        permit = self.breaker.attempt(self.now)
        ready = self.closed_until is None or self.now >= (self.trial or self.closed_until)
        assert (permit is not None) == ready
        if permit is None:
            return
        if self.closed_until is not None:
            assert permit not in self.permits
            self.trial = self.now + self.backoff.ceiling
        self.permits = [*self.permits, permit][-6:]
        self.current = permit

    @precondition(lambda self: self.permits)
    @rule(data=st.data(), answered=st.booleans())
    def finish(self, data: st.DataObject, answered: bool) -> None:
        """Some call ends, maybe one of long ago."""
        permit = data.draw(st.sampled_from(self.permits))
        before = self.breaker.state
        counts = permit == self.current and (self.closed_until is None or self.trial is not None)
        if answered:
            self.breaker.succeeded(permit)
        else:
            self.breaker.failed(permit, self.now)
        if not counts:
            assert self.breaker.state is before
        elif answered:
            if self.closed_until is not None:
                self.current = None
            self.streak, self.closed_until, self.trial = 0, None, None
        else:
            self.streak += 1
            if self.streak >= self.failures:
                steps = self.streak - self.failures
                self.closed_until = self.now + min(8.0, 2.0**steps) * 0.75
                self.trial = None

    @invariant()
    def agree(self) -> None:
        """The state says what will happen."""
        expected = BreakerState.CLOSED if self.closed_until is None else BreakerState.OPEN
        if self.trial is not None:
            expected = BreakerState.HALF_OPEN
        assert self.breaker.state is expected
