"""Everything that vLLM's leader says to the host's daemon, in a thread of its own.

The scheduler's thread puts orders into a queue and takes what came of them out of another; neither ever waits.  Every
order that asks for something gets exactly one answer, also when the daemon is gone: then one that says so.
"""

from __future__ import annotations

import itertools
import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from umbp_connectors.daemon.pages import DaemonArena, NewObject, Place
from umbp_connectors.pool.outcomes import PutStatus
from umbp_core.errors import UmbpError
from umbp_core.master.model import TierCapacity
from umbp_core.ports import Clock
from umbp_core.tiers import Tier
from umbp_core.wire.codes import WireError
from umbp_vllm.host_words import (
    Answer,
    Attached,
    Borrow,
    Clear,
    Cleared,
    Doubt,
    GiveBack,
    Gone,
    Lent,
    LookUp,
    Measure,
    Order,
    Pages,
    PublishAll,
    Published,
    Stop,
    Take,
    Taken,
    There,
    Visit,
)

logger = logging.getLogger("vllm.umbp.host")

_FIRST_PAUSE_S = 0.1
"""How long a daemon that did not answer is left alone."""
_LONGEST_PAUSE_S = 2.0
"""The longest, after several in a row."""
_TIERS = (Tier.DRAM, Tier.SSD)
_FAILURES = (OSError, WireError, UmbpError)


class Talker:
    """Talks to the daemon.  Any thread may :meth:`say` something, one may :meth:`take`; neither waits.

    ``call_s`` bounds every call.  ``absent`` is told, in the thread, when there is no daemon.
    """

    def __init__(
        self,
        client: Pages,
        call_s: float,
        absent: Callable[[], None] | None = None,
        clock: Clock = time.monotonic,
    ) -> None:
        self._client = client
        self._call_s = call_s
        self._absent = absent
        self._clock = clock
        self._orders: queue.SimpleQueue[Order] = queue.SimpleQueue()
        self._answers: deque[Answer] = deque()
        self._thread = threading.Thread(target=self._run, name="umbp-host", daemon=True)
        self._arena: DaemonArena | None = None
        self._life = 0
        self._connected = False
        self._told_gone = False
        self._pause_s = _FIRST_PAUSE_S
        self._again_at = 0.0
        self._clears = 0
        self._stopping = False

    def open(self) -> None:
        """Start the thread, which connects."""
        self._thread.start()

    def say(self, order: Order) -> None:
        """Have it said.  Never waits."""
        self._orders.put(order)

    def take(self) -> Answer | None:
        """The next answer, if there is one.  Never waits."""
        return self._answers.popleft() if self._answers else None

    def close(self, timeout: float) -> bool:
        """Say what was ordered before, and leave; whether that was done within ``timeout`` seconds."""
        self.say(Stop())
        if self._thread.is_alive():
            self._thread.join(timeout)
        return not self._thread.is_alive()

    def _run(self) -> None:
        """Thread: carry out orders until the last one; connect anew meanwhile."""
        try:
            while not self._stopping:
                self._connect()
                order = self._next()
                if order is not None:
                    self._carry_out(order)
        except Exception:  # thread top: whoever waits for an answer must hear that none comes
            logger.exception("umbp: the thread that talks to the daemon ended; nothing is loaded or stored any more")
            self._answers.append(Gone("the thread that talks to the daemon ended"))
        finally:
            self._client.close()

    def _next(self) -> Order | None:
        """The next order; ``None`` when it is time to connect instead."""
        if self._connected:
            return self._orders.get()
        try:
            return self._orders.get(timeout=max(0.0, self._again_at - self._clock()))
        except queue.Empty:
            return None

    def _connect(self) -> None:
        if self._connected or self._clock() < self._again_at:
            return
        try:
            arena = self._client.connect(self._clock() + self._call_s)
            if not arena.known:
                self._life += 1  # here, since the next connection knows this one
            self._arena = arena
            if self._clears:
                self._client.clear(self._clock() + self._call_s)
        except _FAILURES as error:
            self._failed(error)
            if self._absent is not None:
                self._absent()
            return
        self._connected, self._told_gone, self._pause_s = True, False, _FIRST_PAUSE_S
        self._answers.append(Attached(self._life, arena))
        self._tell_cleared()

    def _failed(self, error: Exception) -> None:
        """The connection is of no use any more."""
        self._client.close()
        self._connected = False
        self._again_at = self._clock() + self._pause_s
        self._pause_s = min(2 * self._pause_s, _LONGEST_PAUSE_S)
        if not self._told_gone:
            self._told_gone = True
            self._answers.append(Gone(str(error) or type(error).__name__))

    def _tell_cleared(self) -> None:
        while self._clears:
            self._clears -= 1
            self._answers.append(Cleared())

    def _carry_out(self, order: Order) -> None:
        _HANDLERS[type(order)](self, order)

    def _try(self, call: Callable[[float], object]) -> bool:
        """Make one call; false when it could not be made or failed, after which there is no connection."""
        if not self._connected:
            return False
        try:
            call(self._clock() + self._call_s)
        except _FAILURES as error:
            self._failed(error)
            return False
        return True

    def _look_up(self, order: LookUp) -> None:
        there: set[bytes] = set()

        def ask(deadline: float) -> None:
            for keys, prefix in order.runs:
                found = self._client.look_up(keys, prefix, deadline)
                there.update(keys[: found.prefix] if prefix else itertools.compress(keys, found.there))

        asked = self._clock() < order.until and self._try(ask)
        self._answers.append(There(order.number, frozenset(there), asked))

    def _borrow(self, order: Borrow) -> None:
        loans: list[int] = []
        places: list[tuple[bytes, Place]] = []
        arena, since = self._arena, self._clock()

        def borrow(deadline: float) -> None:
            if arena is None:
                return
            for start in range(0, len(order.keys), arena.objects):
                part = order.keys[start : start + arena.objects]
                number, lent = self._client.borrow(part, deadline)
                loans.append(number)
                places.extend(zip(part, lent, strict=False))
                if len(lent) < len(part):
                    return

        if self._clock() < order.until and not self._try(borrow):
            loans, places = [], []
        until = since + (arena.lease_s if arena is not None else 0.0)
        self._answers.append(Lent(order.number, self._life, tuple(loans), places, until))

    def _give_back(self, order: GiveBack) -> None:
        if order.life != self._life:
            return

        def give_back(deadline: float) -> None:
            for number in order.loans:
                self._client.give_back(number, deadline)

        self._try(give_back)

    def _take(self, order: Take) -> None:
        pages: list[int] = []
        self._try(lambda deadline: pages.extend(self._client.take_pages(order.count, deadline)))
        self._answers.append(Taken(self._life, pages))

    def _publish(self, order: PublishAll) -> None:
        statuses: list[PutStatus | None] = []
        most = self._arena.objects if self._arena is not None else 1
        for start in range(0, len(order.objects), most):
            part = order.objects[start : start + most]
            if order.life != self._life or not self._connected:
                statuses += [PutStatus.TIMED_OUT] * len(part)  # it was not said, so the pages are what they were
                continue
            told: list[PutStatus] = []

            def publish(deadline: float, part: Sequence[NewObject] = part, told: list[PutStatus] = told) -> None:
                told += self._client.publish(part, deadline)

            if self._try(publish) and len(told) == len(part):
                statuses += told
            else:
                statuses += [None] * len(part)
        self._answers.append(Published(order.life, order.objects, statuses))

    def _doubt(self, order: Doubt) -> None:
        self._try(lambda deadline: self._client.doubt(order.keys, deadline))

    def _clear(self, order: Clear) -> None:
        self._clears += 1
        if self._try(self._client.clear):
            self._tell_cleared()

    def _visit(self, order: Visit) -> None:
        self._try(lambda deadline: self._client.take_pages(0, deadline))

    def _measure(self, order: Measure) -> None:
        capacities: list[TierCapacity] = []

        def measure(deadline: float) -> None:
            arena = self._arena
            nbytes = 0 if arena is None else arena.page_bytes * arena.stripes
            capacities.extend(
                TierCapacity(tier, fill.total_pages * nbytes, fill.free_pages * nbytes)
                for fill in self._client.fills(deadline)
                for tier in _TIERS
                if tier == fill.tier
            )

        self._try(measure)
        order.done(tuple(capacities))

    def _stop(self, order: Stop) -> None:
        self._stopping = True


_HANDLERS: Mapping[type[Any], Callable[[Talker, Any], None]] = {
    LookUp: Talker._look_up,
    Borrow: Talker._borrow,
    GiveBack: Talker._give_back,
    Take: Talker._take,
    PublishAll: Talker._publish,
    Doubt: Talker._doubt,
    Clear: Talker._clear,
    Visit: Talker._visit,
    Measure: Talker._measure,
    Stop: Talker._stop,
}
