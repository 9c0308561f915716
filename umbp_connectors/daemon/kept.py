"""A pool of the daemon, with the clients that it has and what each of them holds of it."""

from __future__ import annotations

import itertools
import os
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from umbp_connectors.daemon.companions import Partings
from umbp_connectors.daemon.holdings import ClientHoldings
from umbp_connectors.daemon.messages import TOKEN_BYTES, Attach
from umbp_connectors.daemon.watches import Watches
from umbp_connectors.pool.local import CLOSE_TIMEOUT_S, LocalPool
from umbp_connectors.pool.outcomes import GetStatus
from umbp_connectors.pool.ssd import FlushMark
from umbp_core.errors import TierUnavailable, UmbpError

_REMEMBERED = 1024
"""Clients without a connection that will be told, should they come back, what the disk refused meanwhile."""


@dataclass(slots=True)
class _Engine:
    """What an engine holds over all its connections.  ``speaker`` is the connection that speaks for it.

    When there is none, it is kept as long as one of the ``witnesses`` lasts: connections of the same client that were
    there when the last speaker left.  Their processes may still copy.
    """

    holdings: ClientHoldings
    speaker: int
    witnesses: set[int] = field(default_factory=set)


class KeptPool:
    """A pool of the daemon, the clients that it has, and how many of its pages each of them holds.  Any thread.

    It is opened ``instead_of`` others, which it closes before.  ``place`` is its rank, and of how many; what it has
    lost, those of the other ranks, its ``companions``, forget.
    """

    def __init__(
        self,
        pool: LocalPool,
        pages: int,
        page_bytes: int,
        place: tuple[int, int] = (0, 1),
        instead_of: Sequence[KeptPool] = (),
        companions: Callable[[], Iterable[LocalPool]] = tuple,
    ) -> None:
        self.pool = pool
        self._place = place
        self.arena = os.urandom(TOKEN_BYTES)
        self.stripes = pool.stripes
        self.watches = Watches()
        self._partings = Partings(pool, self.watches, companions)
        self.pages = pages
        self.page_bytes = page_bytes
        self._labels: dict[bytes, str] = {}
        self.left_at = 0.0
        """When its last client left."""
        self.lent: Counter[GetStatus] = Counter()
        """What became of what its clients asked for."""
        self._lock = threading.Lock()
        self._numbers = itertools.count()
        self._connections: dict[int, bytes] = {}
        """The client of each connection."""
        self._leaving: set[int] = set()
        """Those of them that will copy nothing more."""
        self._engines: dict[tuple[bytes, bytes], _Engine] = {}
        """By client and life."""
        self._held: Counter[bytes] = Counter()
        self._marks: OrderedDict[bytes, FlushMark] = OrderedDict()
        """What each client was told of the losses of the SSD tier, those that left last at the end."""
        self._instead_of = instead_of
        self._changing = threading.Lock()
        """Held while the pool is opened or closed."""
        self._is_open = False
        self._ending = False
        self._is_closed = False
        self._failed = ""

    @property
    def namespace(self) -> str:
        """Whose objects these are."""
        return self.pool.identity.namespace

    def shares_folder(self, namespace: str, rank: int, ranks: int) -> bool:
        """Whether the SSD tier of such a pool has the same folder, or divides it up otherwise."""
        return self.namespace == namespace and (self._place[0] == rank or self._place[1] != ranks)

    @property
    def nbytes(self) -> int:
        """Bytes of its arena."""
        return self.pages * self.page_bytes

    @property
    def clients(self) -> list[str]:
        """What its clients call themselves."""
        with self._lock:
            return sorted(self._labels[client] for client in set(self._connections.values()))

    @property
    def is_idle(self) -> bool:
        """Whether it has no client."""
        with self._lock:
            return not self._connections

    @property
    def is_open(self) -> bool:
        """Whether it can be used already."""
        return self._is_open

    @property
    def is_closed(self) -> bool:
        """Whether its memory and its SSD folder were given back."""
        return self._is_closed

    def open(self, make_room: Callable[[], None] = lambda: None) -> None:
        """Close those whose place it takes, ``make_room()``, open the pool, once; others who call wait for that.

        Raises as ``LocalPool.open`` does, and ``TierUnavailable`` when it is to be closed by then.
        """
        with self._changing:
            if self._failed:
                raise TierUnavailable(self._failed)
            if self._is_open:
                return
            for other in self._instead_of:
                other.close()
            self._instead_of = ()
            make_room()
            if self._ending:
                raise TierUnavailable("the daemon is stopping")
            try:
                self.pool.observe(self.watches)
                self.pool.open()
            except UmbpError as error:
                self._failed = str(error)
                raise
            if self._place[1] > 1:
                self._partings.start()
            self._is_open = True

    def close(self, timeout: float = CLOSE_TIMEOUT_S) -> None:
        """Close the pool for ever, see ``LocalPool.close``; who follows it is told no more.

        Who calls while another does waits for that one.
        """
        self._ending = True
        self.watches.end()
        with self._changing:
            self._partings.join()
            self.pool.close(timeout)
            self._is_closed = True

    def join(self, client: bytes, label: str) -> int:
        """``client`` has one more connection: its number."""
        with self._lock:
            number = next(self._numbers)
            self._connections[number] = client
            self._labels[client] = label
            return number

    def leave(self, number: int) -> None:
        """This connection has ended, and with it what nobody may copy any more."""
        with self._lock:
            client = self._connections[number]
            self._leaving.add(number)
            over = self._end_connection(client, number)
        for holdings in over:
            self.put_back(client, holdings.close())
        with self._lock:
            del self._connections[number]
            self._leaving.remove(number)
            if client not in self._connections.values():
                del self._labels[client]
                self._forget_marks(client)
            self.left_at = time.monotonic()

    def holdings(self, number: int, greeting: Attach) -> tuple[ClientHoldings, int, bool]:
        """What this connection speaks for, its turn, and whether it is known from an earlier connection."""
        mark = self.pool.flush_mark()
        with self._lock:
            self._marks.setdefault(greeting.client, mark)
        if not greeting.life:
            return ClientHoldings(self.pool.stock()), 0, False
        name = (greeting.client, greeting.life)
        with self._lock:
            engine = self._engines.get(name)
            known = engine is not None
            if engine is None:
                engine = self._engines[name] = _Engine(ClientHoldings(self.pool.stock()), number)
            if engine.holdings.enter(greeting.turn):
                engine.speaker = number
                engine.witnesses.clear()
            return engine.holdings, greeting.turn, known

    def flush(self, client: bytes, timeout: float) -> bool:
        """See ``LocalPool.flush``; what the disk refused, each client is told."""
        with self._lock:
            mark = self._marks[client]
        return self.pool.flush(timeout, mark)

    def take(self, client: bytes, pages: int) -> int:
        """How many of ``pages`` more pages ``client`` may hold; they count as held from now on.

        Each client holds its part of half of the arena at most, and all together half of it: who comes when others have
        more than their part, because they were fewer, gets what is left until they are through with theirs.  Who holds
        nothing may hold one page even beyond that, so that every client gets on.
        """
        self._end_late()
        with self._lock:
            clients, mine = len(set(self._connections.values())), self._held[client]
            part, left = self.pages // (2 * max(1, clients)), self.pages // 2 - self._held.total()
            taken = max(0, min(pages, max(1 - mine, min(part - mine, left))))
            self._held[client] += taken
            return taken

    def count_lent(self, statuses: Iterable[GetStatus]) -> None:
        """Count what became of objects that were asked for."""
        with self._lock:
            self.lent.update(statuses)

    def put_back(self, client: bytes, pages: int) -> None:
        """``client`` holds so many pages less."""
        with self._lock:
            self._held[client] -= pages
            if self._held[client] <= 0:
                del self._held[client]

    def _end_connection(self, client: bytes, number: int) -> list[ClientHoldings]:
        """What ends with connection ``number``.  With the lock held."""
        others = {each for each, whose in self._connections.items() if whose == client} - self._leaving
        over = []
        for name, engine in list(self._engines.items()):
            if name[0] != client:
                continue
            if engine.speaker == number:
                engine.speaker = -1
                engine.witnesses = others
            elif engine.speaker >= 0:
                continue
            engine.witnesses.discard(number)
            if not engine.witnesses:
                del self._engines[name]
                over.append(engine.holdings)
        return over

    def _forget_marks(self, client: bytes) -> None:
        """``client`` has left; who left long ago is not remembered.  With the lock held."""
        if client in self._marks:
            self._marks.move_to_end(client)
        left = [each for each in self._marks if each not in self._labels]
        for each in left[: max(0, len(left) - _REMEMBERED)]:
            del self._marks[each]

    def _end_late(self) -> None:
        """End the loans, whose time is over, of engines that nobody speaks for."""
        with self._lock:
            silent = [(name[0], each.holdings) for name, each in self._engines.items() if each.speaker < 0]
        for client, holdings in silent:
            _, pages = holdings.end_late()
            self.put_back(client, pages)
