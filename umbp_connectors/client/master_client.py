"""The client of a master for everything in this project: it keeps the master told, and asks it.

One thread of its own does all telling.  Nothing that is told makes its caller wait, whatever the master does; questions
wait for their deadline at most, and are answered with nothing when the master is not there (laws L5 and L11).
"""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from typing import TypeVar

from umbp_connectors.client.addresses import MasterAddress, parse_addresses
from umbp_connectors.client.counters import ClientStats, Counters
from umbp_connectors.client.dial import Dialer
from umbp_connectors.client.dialects import Dialect
from umbp_connectors.client.intake import Barrier, Intake
from umbp_connectors.client.link import Dial, Link
from umbp_connectors.client.outbox import BlockOutbox, BlockSnapshot
from umbp_connectors.client.queries import Queries
from umbp_connectors.client.session import ReportSnapshot, Session, SessionParts
from umbp_connectors.client.settings import ClientSettings
from umbp_core.breaker import Breaker
from umbp_core.index_match import PrefixMatch
from umbp_core.journal import Delta, Journal
from umbp_core.master.model import ExternalMatch, GetRoute, PutOutcome, PutRoute, Registration, TierCapacity
from umbp_core.master.samples import MetricSample
from umbp_core.ports import Clock
from umbp_core.reports import ReportJournal

logger = logging.getLogger(__name__)

T = TypeVar("T")

HIT_QUERY_MAX = 4096
"""Hashes that every master takes in one question for hit counters."""
_PAUSE_AFTER_A_BUG = 1.0


def _nothing() -> tuple[()]:
    return ()


class MasterClient:
    """A node's line to its master at ``addresses`` (see ``parse_addresses``).

    ``registration`` says who the node is; its incarnation, when it is 0, is taken from the wall clock, and has to be
    larger than in any earlier life of the node.  ``snapshot`` gives every external hash that the node holds, tier by
    tier, and ``blocks`` every block that it owns, whenever the master has to be told everything: at first, after either
    side restarted, after an overflow.  Both are called, and what they return is read, in the client's thread, piece by
    piece while the node goes on.  What they tell has to contain a change before that change is reported here.

    The constructor does nothing; :meth:`start` starts the thread.  All methods may be called by any thread.
    """

    def __init__(
        self,
        addresses: str | Sequence[MasterAddress],
        registration: Registration,
        *,
        snapshot: ReportSnapshot = _nothing,
        blocks: BlockSnapshot = _nothing,
        settings: ClientSettings | None = None,
        dial: Dial | None = None,
        clock: Clock = time.monotonic,
        chance: Callable[[], float] = random.random,
    ) -> None:
        settings = settings or ClientSettings()
        doors = parse_addresses(addresses) if isinstance(addresses, str) else tuple(addresses)
        dial = dial or Dialer(node_id=registration.node_id)
        life = registration.incarnation or time.time_ns()
        registration = replace(registration, incarnation=life)
        journal = Journal(life, settings.max_waiting, settings.bundle_events)
        self._settings = settings
        self._clock = clock
        self._counters = Counters()
        self._intake = Intake(clock, settings.max_waiting, settings.flush_hashes, settings.flush_interval)
        self._reports = ReportJournal(life, settings.max_waiting, settings.batch_hashes)
        self._blocks = BlockOutbox(
            registration.node_id, journal, blocks, settings.heartbeat_bundles, settings.bundle_events
        )
        self._breaker = Breaker(chance, settings.backoff, settings.failures)
        self._link = Link(doors, dial, clock, settings)
        self._queries = Queries(self._where, dial, Breaker(chance, settings.backoff, failures=1), clock)
        self._session = Session(
            registration,
            SessionParts(
                self._link,
                self._intake,
                self._reports,
                snapshot,
                self._blocks,
                self._breaker,
                clock,
                chance,
                settings,
                self._counters,
            ),
        )
        self._node_id = registration.node_id
        self._thread: threading.Thread | None = None
        self._starting = threading.Lock()
        self._closing = threading.Event()
        self._unregister = True

    def start(self) -> None:
        """Start the thread; connects and registers as soon as the master answers.  Never waits.  Idempotent."""
        with self._starting:
            if self._thread is None and not self._closing.is_set():
                self._thread = threading.Thread(target=self._run, name=f"umbp-master-{self._node_id}", daemon=True)
                self._thread.start()

    def report(self, hashes: Sequence[bytes], tier: int) -> None:
        """``hashes`` can be used from ``tier`` of this node.  ``hashes`` must not be changed afterwards."""
        if hashes and not self._closing.is_set():
            self._intake.put(len(hashes), self._reports.report, hashes, tier)

    def revoke(self, hashes: Sequence[bytes], tier: int) -> None:
        """``hashes`` cannot be used from ``tier`` any more.  ``hashes`` must not be changed afterwards."""
        if hashes and not self._closing.is_set():
            self._intake.put(len(hashes), self._reports.revoke, hashes, tier)

    def clear(self, tier: int) -> None:
        """Nothing can be used from ``tier`` any more."""
        if not self._closing.is_set():
            self._intake.put(1, self._reports.clear, tier)

    def record(self, deltas: Sequence[Delta]) -> None:
        """Own blocks came to tiers or left them.  ``deltas`` must not be changed afterwards."""
        if deltas and not self._closing.is_set():
            self._intake.put(len(deltas), self._blocks.journal.record, deltas)

    def set_capacities(self, capacities: Iterable[TierCapacity], counts: Mapping[int, int] | None = None) -> None:
        """What every heartbeat says from now on: bytes per tier, and blocks per tier."""
        self._intake.put(0, self._blocks.set_capacities, tuple(capacities), None if counts is None else dict(counts))

    def match(
        self, hashes: Sequence[bytes], count_as_hit: bool = False, timeout: float | None = None
    ) -> list[ExternalMatch]:
        """Who holds which of ``hashes``; empty when the master does not answer in time."""
        return self._ask(lambda dialect, left: dialect.transport.match(hashes, count_as_hit, left), [], timeout)

    def match_prefix(
        self,
        hashes: Sequence[bytes],
        weights: Mapping[int, float] | None = None,
        timeout: float | None = None,
        limit: int = 0,
    ) -> list[PrefixMatch]:
        """The longest usable prefix of ``hashes`` per node, longest first; empty when the master does not answer.

        See ``ExternalKvIndex.match_prefix``.  At most ``limit`` nodes; 0: all.  A master that knows no such question is
        asked for a plain match.
        """
        return self._ask(lambda dialect, left: dialect.match_prefix(hashes, weights, left, limit), [], timeout)

    def hit_counts(self, hashes: Sequence[bytes], timeout: float | None = None) -> list[tuple[bytes, int]]:
        """The hit counters of ``hashes``, each once, without those that have none; empty when there is no answer.

        Asks in pieces of what every master takes, which share the deadline.
        """
        distinct = list(dict.fromkeys(hashes))

        def question(dialect: Dialect, left: float) -> list[tuple[bytes, int]]:
            end = self._clock() + left
            found: list[tuple[bytes, int]] = []
            for start in range(0, len(distinct), HIT_QUERY_MAX):
                part = distinct[start : start + HIT_QUERY_MAX]
                found += dialect.transport.hit_counts(part, max(0.0, end - self._clock()))
            return found

        return self._ask(question, [], timeout)

    def lookup(self, keys: Sequence[bytes], timeout: float | None = None) -> list[bool]:
        """Whether any node owns these blocks; all false when the master does not answer in time."""
        return self._ask(lambda dialect, left: dialect.transport.lookup(keys, left), [False] * len(keys), timeout)

    def route_put(
        self,
        keys: Sequence[bytes],
        sizes: Sequence[int],
        exclude: Collection[str] = (),
        timeout: float | None = None,
    ) -> list[PutRoute]:
        """Where to put blocks; all unavailable when the master does not answer in time."""
        node, nothing = self._node_id, [PutRoute(PutOutcome.UNAVAILABLE)] * len(keys)
        return self._ask(
            lambda dialect, left: dialect.transport.route_put(node, keys, sizes, exclude, left), nothing, timeout
        )

    def route_get(
        self, keys: Sequence[bytes], exclude: Collection[str] = (), timeout: float | None = None
    ) -> list[GetRoute | None]:
        """Where to get blocks from; all ``None`` when the master does not answer in time."""
        nothing: list[GetRoute | None] = [None] * len(keys)
        node = self._node_id
        return self._ask(lambda dialect, left: dialect.transport.route_get(node, keys, exclude, left), nothing, timeout)

    def report_metrics(self, samples: Sequence[MetricSample], timeout: float | None = None) -> bool:
        """Hand over metrics, for the master to serve; false when it does not answer in time, and they are lost."""

        def question(dialect: Dialect, left: float) -> bool:
            dialect.transport.report_metrics(self._node_id, samples, left)
            return True

        return self._ask(question, False, timeout)

    def flush(self, timeout: float) -> bool:
        """Wait until the master knows everything that was told before; false when it does not within ``timeout``.

        What other threads tell meanwhile is taken in afterwards.
        """
        if self._thread is None or self._closing.is_set():
            return False
        barrier = Barrier()
        self._intake.put_barrier(barrier)
        if barrier.reached.wait(timeout):
            return True
        barrier.abandoned = True
        self._intake.kick()
        return barrier.reached.is_set()

    def stats(self) -> ClientStats:
        """How it goes.  The numbers are taken one after the other, while things go on."""
        address = self._link.address
        dialect = self._link.dialect
        return ClientStats(
            address="" if address is None else str(address),
            native=dialect is not None and dialect.transport.native,
            registered=self._session.registered,
            incarnation=self._session.incarnation,
            breaker=self._breaker.state,
            opened=self._breaker.opened,
            waiting=self._intake.weight,
            questions=self._queries.questions,
            degraded=self._queries.degraded,
            **asdict(self._counters),
        )

    def close(self, timeout: float | None = None, unregister: bool = True) -> bool:
        """Unregister, if wanted and if the master answers, and end the thread; false when it did not end in time.

        Takes ``timeout`` seconds at most, by default 3, whatever the master does.  What was not told is lost: flush
        before, if it matters.  Idempotent.
        """
        deadline = self._clock() + (self._settings.close_timeout if timeout is None else timeout)
        self._unregister = unregister
        with self._starting:
            self._closing.set()
            thread = self._thread
        self._session.limit(deadline)
        self._intake.kick()
        self._queries.close()
        if thread is None:
            return True
        thread.join(max(0.0, (deadline - self._clock()) / 2))
        if thread.is_alive():
            self._link.abort()
            thread.join(max(0.0, deadline - self._clock()))
        if thread.is_alive():
            logger.warning("the thread of the master's client is in a call that does not end; it is left behind")
        return not thread.is_alive()

    def _where(self) -> MasterAddress | None:
        return self._link.address

    def _ask(self, question: Callable[[Dialect, float], T], nothing: T, timeout: float | None) -> T:
        return self._queries.ask(question, nothing, self._settings.query_timeout if timeout is None else timeout)

    def _run(self) -> None:
        logged = ""
        while not self._closing.is_set():
            try:
                due = self._session.step()
            except Exception as error:  # thread top: a snapshot that raises must not end the telling
                if logged != repr(error):
                    logger.exception("telling the master failed; everything is told anew")
                logged = repr(error)
                self._session.recover()
                due = self._clock() + _PAUSE_AFTER_A_BUG
            self._intake.wait(due)
        self._session.leave(self._unregister)
