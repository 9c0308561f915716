"""One node's life at a master: registered, kept alive, told everything, and told anew when the master forgot.

A session is driven step by step, by one thread, and does its calls in that thread.  It has no thread and no sleep of
its own, so that a test drives it with a clock and a network of its choice.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from umbp_connectors.client.addresses import MasterAddress
from umbp_connectors.client.counters import Counters
from umbp_connectors.client.dialects import Dialect
from umbp_connectors.client.intake import Barrier, Intake
from umbp_connectors.client.link import Link
from umbp_connectors.client.outbox import BlockOutbox
from umbp_connectors.client.settings import ClientSettings
from umbp_core.breaker import Backoff, Breaker
from umbp_core.errors import AlreadyRegistered, InvalidRequest, MasterError, MasterUnavailable
from umbp_core.index_gate import Acknowledgement, Verdict
from umbp_core.master.model import NodeStatus, Registration
from umbp_core.ports import Clock
from umbp_core.reports import ReportJournal

logger = logging.getLogger(__name__)

ReportSnapshot = Callable[[], Iterable[tuple[int, Sequence[bytes]]]]
"""Every external hash that a node holds now: tiers, each with some of its hashes, as often as it takes."""

_BATCHES_PER_STEP = 16
_FIRST_INTERVAL = 5.0
"""Seconds between heartbeats until the master says how many."""


@dataclass(frozen=True, slots=True)
class SessionParts:
    """What a session works with.  Other threads may use ``intake`` and ``link`` as these allow; the rest is its own."""

    link: Link
    intake: Intake
    reports: ReportJournal
    snapshot: ReportSnapshot
    blocks: BlockOutbox
    breaker: Breaker
    clock: Clock
    random: Callable[[], float]
    settings: ClientSettings
    counters: Counters


class _Pause:
    """Keeps what may have to be repeated at once from being repeated for ever at full speed."""

    def __init__(self, clock: Clock, random: Callable[[], float], backoff: Backoff) -> None:
        self._clock = clock
        self._random = random
        self._times = 0
        self.backoff = backoff
        self.until = 0.0

    def over(self) -> bool:
        """Whether it may be done now."""
        return self._clock() >= self.until

    def begin(self) -> None:
        """It is done now.  The pause is longer if the last one ended not long ago."""
        now = self._clock()
        self._times = 1 if now > self.until + self.backoff.ceiling else self._times + 1
        self.until = now + self.backoff.delay(self._times, self._random())


class Session:
    """See the module.  ``registration`` says who we are; its incarnation is larger than in any earlier life."""

    def __init__(self, registration: Registration, parts: SessionParts) -> None:
        self._registration = registration
        self._link = parts.link
        self._intake = parts.intake
        self._reports = parts.reports
        self._snapshot = parts.snapshot
        self._blocks = parts.blocks
        self._breaker = parts.breaker
        self._clock = parts.clock
        self._settings = parts.settings
        self._counters = parts.counters
        self._barrier: Barrier | None = None
        self._deadline = math.inf
        self._interval = _FIRST_INTERVAL
        self._heartbeat_due = 0.0
        self._answered = 0.0
        self._dialect: Dialect | None = None
        self._home: MasterAddress | None = None
        self._registering = _Pause(parts.clock, parts.random, parts.settings.backoff)
        self._syncing = _Pause(parts.clock, parts.random, parts.settings.backoff)
        self._was_well = False
        self.registered = False
        """Whether the master knows us, as far as we know."""

    @property
    def incarnation(self) -> int:
        """The number of this life; it grows when the master knows a larger one."""
        return self._registration.incarnation

    def step(self) -> float:
        """Do what is due; returns when to be called again at the latest.

        Takes as long as a few calls.  What a snapshot raises comes out of it; call :meth:`recover` then.
        """
        self._absorb()
        permit = self._breaker.attempt(self._clock())
        if permit is None:
            return self._breaker.due
        try:
            due = self._talk()
        except MasterError as error:
            self._lose(error)
            self._breaker.failed(permit, self._clock())
            return self._breaker.due
        self._breaker.succeeded(permit)
        if self._barrier is not None and self.registered and self._reports.settled and self._blocks.settled:
            self._barrier.reached.set()
            self._barrier = None
            return self._clock()
        return due

    def recover(self) -> None:
        """What was said may be lost: everything is told anew, as soon as possible."""
        self._reports.request_full_sync()
        self._blocks.journal.request_full_sync()
        self._heartbeat_due = 0.0

    def limit(self, deadline: float) -> None:
        """No call that begins later may take longer than until ``deadline``.  Any thread."""
        self._deadline = deadline
        self._link.limit(deadline)

    def leave(self, unregister: bool) -> None:
        """Disconnect; before that, unregister if that is wanted and there is time.  Raises nothing."""
        dialect = self._link.dialect
        if unregister and dialect is not None and self.registered:
            try:
                dialect.transport.unregister(self._registration.node_id, self._timeout())
            except MasterError as error:
                logger.info("the master was not told that node %s left: %s", self._registration.node_id, error)
        self.registered = False
        self._link.drop()

    def _absorb(self) -> None:
        """Take in what callers said, up to a barrier, which has to be reached before anything else is taken in.

        A barrier takes a heartbeat, and with it an answer that the master still knows what it was told before.
        """
        if self._barrier is not None and self._barrier.abandoned:
            self._barrier = None
        while self._barrier is None:
            taken = self._intake.take()
            if taken.overflowed:
                self._counters.overflows += 1
                self.recover()
            before = len(self._blocks.journal)
            for call in taken.calls:
                call.call(*call.args)
            waiting = len(self._blocks.journal)
            self._barrier = taken.barrier
            if taken.barrier is not None or waiting >= max(before + 1, self._settings.flush_events):
                self._heartbeat_due = 0.0
            if taken.barrier is None:
                return
            if taken.barrier.abandoned:
                self._barrier = None

    def _talk(self) -> float:
        """Say what there is to say; returns when there is more."""
        dialect = self._connected()
        if not self.registered:
            if not self._registering.over():
                return self._registering.until
            self._register(dialect)
        if self._clock() >= self._heartbeat_due:
            self._heartbeat(dialect)
        if not self.registered:
            return min(self._registering.until, self._heartbeat_due)
        if self._blocks.full_sync_due and not dialect.says_what_it_forgot:
            return self._heartbeat_due  # see _ask_whether_known: what is told before it would be told again
        return min(self._deliver(dialect), self._heartbeat_due)

    def _connected(self) -> Dialect:
        """The way to talk; another connection begins with a heartbeat, another master with a registration."""
        dialect = self._link.dialect
        if dialect is None:
            dialect = self._link.connect()
        elif self._link.upgrade():
            dialect = self._link.dialect or dialect
        if dialect is not self._dialect:
            self._dialect = dialect
            self._heartbeat_due = 0.0
            self.registered = self.registered and self._link.address == self._home
        return dialect

    def _register(self, dialect: Dialect) -> None:
        registration = self._registration
        if self._blocks.capacities is not None:
            registration = replace(registration, capacities=self._blocks.capacities)
        self._registering.begin()
        try:
            ack = dialect.transport.register(registration, self._timeout())
        except AlreadyRegistered:
            registration, ack = dialect.take_over(registration, self._timeout())
            self._counters.takeovers += 1
            logger.warning(
                "the master knew a living node %s; it is taken for an earlier life of this process.  If this comes "
                "again and again, two processes have this node id: give each its own",
                registration.node_id,
            )
        self._counters.registrations += 1
        if ack.heartbeat_interval_ms > 0:
            self._use_interval(ack.heartbeat_interval_ms / 1000)
        self._home = self._link.address
        self._heartbeat_due = 0.0
        self._answered = self._clock()
        self.registered = self._was_well = True
        self._begin_life(registration)
        logger.info("node %s is registered at %s", registration.node_id, self._home)

    def _begin_life(self, registration: Registration) -> None:
        """The master knows nothing of what we told, or tell from now on as another life."""
        if registration.incarnation > self._reports.incarnation:
            self._reports.renew(registration.incarnation)
        else:
            self._reports.request_full_sync()
        self._blocks.begin(registration.incarnation)
        self._registration = registration

    def _use_interval(self, seconds: float) -> None:
        """Pauses are shorter than the time between heartbeats: after any failure we are back within two of them."""
        self._interval = seconds
        backoff = self._settings.backoff.below(seconds)
        self._breaker.backoff = self._registering.backoff = self._syncing.backoff = backoff

    def _heartbeat(self, dialect: Dialect) -> None:
        message = self._blocks.compose()
        events = sum([len(bundle.deltas) for bundle in message.bundles])
        sent = self._clock()
        self._heartbeat_due = sent + self._interval
        try:
            reply = dialect.transport.heartbeat(message, self._timeout())
        except InvalidRequest as error:
            if not events:
                raise
            self._refuse(events, error)
            self._blocks.mute()
            self._heartbeat_due = sent
            return
        if reply.status is not NodeStatus.ALIVE:
            self.registered = False
            return
        self._counters.heartbeats += 1
        self._counters.events += events
        silent = self._clock() - self._answered > self._settings.silent_intervals * self._interval
        self._answered = sent
        acked = self._blocks.journal.acked_seq
        self._blocks.receive(reply)
        self._ask_whether_known(dialect, reply.request_full_sync or message.full_sync, silent)
        told = self._blocks.journal.acked_seq > acked and not self._blocks.settled
        if told or (self._blocks.full_sync_due and not message.full_sync):
            self._heartbeat_due = sent

    def _ask_whether_known(self, dialect: Dialect, forgot: bool, silent: bool) -> None:
        """Find out whether the master still knows our reports; where it cannot say, believe the worst.

        A master of the plain kind that was told all our blocks anew does not say that it had forgotten them, and with
        them our reports.
        """
        if dialect.says_what_it_forgot:
            reports = self._reports
            answer = dialect.probe(self._registration.node_id, reports.incarnation, reports.acked_seq, self._timeout())
            self._receive(answer)
        elif silent:
            self.recover()
        elif forgot:
            self._reports.request_full_sync()

    def _deliver(self, dialect: Dialect) -> float:
        """Tell what waits, a few batches of it; returns when there is more."""
        reports = self._reports
        for _ in range(_BATCHES_PER_STEP):
            if reports.full_sync_due:
                if not self._syncing.over():
                    return self._syncing.until
                self._syncing.begin()
                self._counters.full_syncs += 1
                reports.begin_full_sync(self._snapshot())
            batch = reports.batch()
            if batch is None:
                return math.inf
            try:
                answer = dialect.deliver(self._registration.node_id, batch, self._timeout())
            except InvalidRequest as error:
                if not any(action.hashes for action in batch.actions):
                    raise
                self._refuse(reports.empty_batch(), error)
                continue
            self._receive(answer)
            if not self.registered:
                break
            if answer.verdict is Verdict.GAP:
                continue
            self._counters.batches += 1
            self._counters.hashes += sum([len(action.hashes) for action in batch.actions])
        return self._clock()

    def _receive(self, answer: Acknowledgement) -> None:
        """An answer about our reports.  If a later life is known, we go on as a still later one."""
        reports = self._reports
        reports.receive(answer.incarnation, answer.acked, answer.request_full_sync)
        if answer.verdict is Verdict.UNREGISTERED:
            self.registered = False
        if reports.incarnation != self._registration.incarnation:
            self._begin_life(replace(self._registration, incarnation=reports.incarnation))
            self.registered = False

    def _refuse(self, count: int, error: InvalidRequest) -> None:
        if not self._counters.refused:
            logger.error("the master refuses what node %s tells: %s", self._registration.node_id, error)
        self._counters.refused += count

    def _lose(self, error: MasterError) -> None:
        self._counters.failures += 1
        address = self._link.address
        self._link.drop()
        if self._was_well or self._counters.failures == 1:
            logger.warning("going on without the master (%s): %s", address or "no address answers", error)
        self._was_well = False

    def _timeout(self) -> float:
        timeout = min(self._settings.call_timeout, self._deadline - self._clock())
        if timeout <= 0:
            raise MasterUnavailable("the client is closing; there is no time for another call")
        return timeout
