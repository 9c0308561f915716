"""One connection of a client, as the daemon serves it."""

from __future__ import annotations

import logging
import os
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from umbp_connectors.daemon import messages
from umbp_connectors.daemon.doors import TcpDoor
from umbp_connectors.daemon.holdings import ClientHoldings, HeldGrant
from umbp_connectors.daemon.keeper import PoolKeeper
from umbp_connectors.daemon.kept import KeptPool
from umbp_connectors.daemon.knocking import let_in
from umbp_connectors.daemon.listing import FetchedPart, FetchPart, Listing, ListObjects, Verified, VerifyObjects
from umbp_connectors.daemon.managing import Evict, Manage
from umbp_connectors.daemon.mapping import name_memory
from umbp_connectors.daemon.messages import (
    AskStats,
    Attach,
    Borrow,
    Clear,
    Count,
    Doubt,
    Flush,
    Found,
    Granted,
    Greeting,
    Inspect,
    KeepPages,
    Lent,
    Lookup,
    Overview,
    Place,
    PoolStats,
    Publish,
    Published,
    PublishPages,
    Refusal,
    Reserve,
    Return,
    ReturnPages,
    Secure,
    TakenPages,
    TakePages,
    Welcome,
)
from umbp_connectors.daemon.news import Follow
from umbp_connectors.daemon.overview import listing_of, overview_of, part_of, stats_of, verdict_on
from umbp_connectors.daemon.watches import GATHER_S, QUIET_S, Watch, news_of
from umbp_connectors.pool.books import Filled
from umbp_connectors.pool.lending import LentObject
from umbp_connectors.pool.outcomes import PutStatus
from umbp_connectors.pool.sharing.sockets import FrameSocket, check_peer
from umbp_connectors.pool.ssd import FlushMark
from umbp_core.errors import AccessDenied, TierUnavailable, UmbpError
from umbp_core.ops import CHECKSUM_BYTES
from umbp_core.tiers import Tier
from umbp_core.wire.codes import ErrorCode, WireError
from umbp_core.wire.frames import FrameType

logger = logging.getLogger(__name__)

TALK_S = 10.0
"""How long a client may take to greet, and to take an answer."""
_LENT_NUMBER = {status: number for number, status in enumerate(messages.LENT)}
_NOT_GRANTED_NUMBER = {status: -1 - number for number, status in enumerate(messages.NOT_GRANTED)}
_PUBLISHED_NUMBER = {status: number for number, status in enumerate(messages.PUBLISHED)}

Reply = Found | Lent | Granted | Count | PoolStats | TakenPages | Published


class Session:
    """Serves one connection in the thread that calls :meth:`run`.  ``lease_s`` is how long a loan may last.

    Over a Unix socket the client has to be of this user; at a ``door`` it has to know the token of that.
    A grant lasts as long as its connection, and where the client has a life, as long as those of its other processes:
    whoever may write to a page must not lose it while it does.  A process that dies has its connections closed by the
    system, after its last thread has ended.
    """

    def __init__(
        self, keeper: PoolKeeper, sock: socket.socket, lease_s: float, refused: str = "", door: TcpDoor | None = None
    ) -> None:
        self._keeper = keeper
        self._raw = sock
        self._door = door
        self._let_in = False
        self._socket = FrameSocket(sock, (FrameType.HELLO, FrameType.REQUEST), messages.GREETING_BYTES)
        self._lease_s = lease_s
        self._refused = refused
        self._holdings: ClientHoldings
        self._turn = 0
        self._known = False
        self._client = b""
        self._busy = True
        self._draining = False
        self._watch: Watch | None = None

    @property
    def is_attached(self) -> bool:
        """Whether the client has, or had, a pool."""
        return bool(self._client)

    @property
    def is_stranger(self) -> bool:
        """Whether the client has not shown yet that it knows the token."""
        return self._door is not None and not self._let_in

    def drain(self) -> None:
        """End it as soon as the client holds nothing.  Any thread."""
        self._draining = True
        self._end_watch()
        if self.is_stranger or not self._busy:
            self._socket.shut()

    def stop(self) -> None:
        """End it now.  Any thread."""
        self._draining = True
        self._end_watch()
        self._socket.shut()

    def end(self) -> None:
        """Close the connection.  After :meth:`run`."""
        self._socket.close()

    def run(self) -> None:
        """Serve until the client leaves.  Raises when the connection is of no use any more."""
        self._check_client()
        _, sequence, payload = self._socket.receive(time.monotonic() + TALK_S)
        greeting = messages.decode_greeting(payload)
        problem = self._problem(greeting)
        if problem:
            self._refuse(sequence, problem)
        elif isinstance(greeting, Follow):
            self._tell_news(greeting, sequence)
        elif isinstance(greeting, Manage):
            self._manage(greeting, sequence)
        elif isinstance(greeting, Attach):
            self._attached(greeting, sequence)
        else:
            answer = _TOLD[type(greeting)](self._keeper, greeting)
            self._send(FrameType.REPLY, sequence, messages.encode(answer))

    def _check_client(self) -> None:
        if self._door is None:
            check_peer(self._raw)
            return
        try:
            let_in(self._socket, self._door.token, time.monotonic() + TALK_S)
        except AccessDenied as error:
            logger.warning("umbp: a client at %s is refused: %s", self._door, error)
            raise
        self._let_in = True

    def _tell_news(self, greeting: Follow, sequence: int) -> None:
        """Tell what happens in a pool, until the client is gone, or the pool."""
        kept = self._keeper.find(greeting.identity)
        if kept is None:
            self._refuse(sequence, "there is no such pool yet; a client of it has to come first")
            return
        with kept.watches.watching() as watch:
            self._watch = watch
            if self._draining:
                return
            for news in news_of(watch, kept.pool.holdings, QUIET_S):
                self._send(FrameType.EVENT, sequence, messages.encode(news))
                watch.rest(GATHER_S)

    def _manage(self, greeting: Manage, sequence: int) -> None:
        """Do what somebody at the command line orders who says it in time."""
        kept = self._keeper.find(greeting.identity)
        if kept is None or not self._keeper.keeps_in(Path(greeting.folder)) or kept.pool.stats(Tier.SSD) is None:
            self._refuse(sequence, f"there is no such pool with its SSD tier in {greeting.folder}")
            return
        self._send(FrameType.REPLY, sequence, messages.encode(Count(0)))
        self._socket.allow(messages.FRAME_BYTES)
        mark = kept.pool.flush_mark()
        while not self._draining:
            kind, sequence, payload = self._socket.receive(time.monotonic() + TALK_S)
            if kind != FrameType.REQUEST:
                raise WireError(ErrorCode.PROTOCOL, "a second greeting")
            answer = self._carry_out(kept, messages.decode_order(payload), mark)
            self._send(FrameType.REPLY, sequence, messages.encode(answer))

    @staticmethod
    def _carry_out(kept: KeptPool, order: messages.Order, mark: FlushMark) -> Count:
        if isinstance(order, Evict):
            return Count(kept.pool.evict(order.keys))
        if isinstance(order, Clear):
            return Count(kept.pool.forget_all())
        return Count(int(kept.pool.flush(order.timeout_ms / 1000, mark)))

    def _end_watch(self) -> None:
        watch = self._watch
        if watch is not None:
            watch.end()

    def _attached(self, greeting: Attach, sequence: int) -> None:
        try:
            with self._keeper.attached(greeting) as (kept, number):
                self._holdings, self._turn, self._known = kept.holdings(number, greeting)
                try:
                    self._serve(kept, greeting, sequence)
                finally:
                    if not greeting.life:
                        kept.put_back(greeting.client, self._holdings.close())
        except AccessDenied:
            raise
        except UmbpError as error:
            if self._client:
                raise
            self._refuse(sequence, str(error))

    def _serve(self, kept: KeptPool, greeting: Attach, sequence: int) -> None:
        self._client = greeting.client
        self._welcome(kept, greeting, sequence)
        self._socket.allow(messages.FRAME_BYTES)
        while True:
            self._busy = self._holdings.is_busy
            if self._draining and not self._busy:  # in this order: drain() sets the one and then reads the other
                return
            kind, sequence, payload = self._next(kept)
            self._busy = True
            if kind != FrameType.REQUEST:
                raise WireError(ErrorCode.PROTOCOL, "a second greeting")
            request = messages.decode_request(payload)
            if isinstance(request, Return):
                kept.put_back(self._client, self._holdings.end(request.number))
                continue
            if isinstance(request, ReturnPages):
                kept.put_back(self._client, self._holdings.give_back(self._turn, request.pages))
                continue
            self._send(FrameType.REPLY, sequence, messages.encode(self._answer(kept, sequence, request)))
            # Thousands of keys: they are freed while the client works, not while it waits for the next answer.
            del payload, request

    def _next(self, kept: KeptPool) -> tuple[int, int, memoryview]:
        """The next frame; loans that last too long end meanwhile."""
        while True:
            until = self._holdings.next_lease()
            try:
                return self._socket.receive(until)
            except TimeoutError:
                late, pages = self._holdings.end_late()
                kept.put_back(self._client, pages)
                if late:
                    logger.warning("umbp: a client keeps what it was lent for too long; its lease has ended")

    def _problem(self, greeting: Greeting) -> str:
        if self._refused:
            return self._refused
        if greeting.revision != messages.REVISION:
            return f"revision {messages.REVISION} is spoken here, not {greeting.revision}; run the same version"
        return ""

    def _refuse(self, sequence: int, problem: str) -> None:
        self._send(FrameType.ERROR, sequence, messages.encode(Refusal(problem[:1000])))

    def _welcome(self, kept: KeptPool, greeting: Attach, sequence: int) -> None:
        objects = max(1, min(messages.OBJECTS, kept.pages // 4))
        lease_ms = max(1, int(1000 * self._lease_s))
        fd = None if greeting.mapped == kept.arena else kept.pool.arena_offer().fd
        memory = None
        if fd is not None and self._door is not None:
            memory, fd = name_memory(fd), None
        answer = Welcome(
            kept.arena, kept.page_bytes, kept.pages, objects, lease_ms, os.getpid(), memory, kept.pool.is_strict
        )
        self._socket.send(FrameType.HELLO, sequence, messages.encode(answer), time.monotonic() + TALK_S, fd)

    def _send(self, kind: FrameType, sequence: int, payload: bytes) -> None:
        self._socket.send(kind, sequence, payload, time.monotonic() + TALK_S)

    def _answer(self, kept: KeptPool, sequence: int, request: messages.Request) -> Reply:
        return _ANSWERS[type(request)](self, kept, sequence, request)

    def _look_up(self, kept: KeptPool, number: int, request: Lookup) -> Found:
        if request.prefix:
            return Found(kept.pool.count_prefix(request.keys), b"")
        there = bytes(kept.pool.exists(request.keys))
        return Found((there + b"\x00").index(0), there)

    def _secure(self, kept: KeptPool, number: int, request: Secure) -> Found:
        durable = set(kept.pool.secure(request.keys, request.timeout_ms / 1000))
        there = bytes(key in durable for key in request.keys)
        return Found((there + b"\x00").index(0), there)

    def _lend(self, kept: KeptPool, number: int, request: Borrow) -> Lent:
        if not self._holdings.has_room(number):
            return Lent([])
        allowed = kept.take(self._client, len(request.keys))
        pages = 0
        try:
            loan = kept.pool.lend(request.keys[:allowed], request.timeout_ms / 1000)
            pages = self._holdings.add_loan(self._turn, number, loan, time.monotonic() + self._lease_s)
        finally:
            kept.put_back(self._client, allowed - pages)
        kept.count_lent(lent.status for lent in loan.objects)
        return Lent([_place(lent) for lent in loan.objects])

    def _grant(self, kept: KeptPool, number: int, request: Reserve) -> Granted:
        if not len(request.keys) == len(request.sizes) == len(request.depths):
            raise WireError(ErrorCode.MALFORMED, "keys, sizes and depths of a request do not match")
        if not self._holdings.has_room(number):
            return Granted([])
        allowed = kept.take(self._client, len(request.keys))
        pages = 0
        try:
            part = slice(allowed)
            grant = kept.pool.grant(request.keys[part], request.sizes[part], request.depths[part])
            pages = self._holdings.add_grant(self._turn, number, HeldGrant(grant, request.keys[part]))
        finally:
            kept.put_back(self._client, allowed - pages)
        return Granted([_NOT_GRANTED_NUMBER[p] if isinstance(p, PutStatus) else p for p in grant.places])

    def _publish(self, kept: KeptPool, number: int, request: Publish) -> Count:
        held = self._holdings.pop_grant(request.number)
        try:
            if held is None or len(request.checksums) != len(held.keys):
                raise WireError(ErrorCode.INVALID_REQUEST, f"grant {request.number} is not held, or has another length")
            pairs = zip(held.keys, request.checksums, strict=True)
            return Count(int(held.grant.publish({key: checksum for key, checksum in pairs if checksum})))
        finally:
            if held is not None:
                held.grant.discard()
                kept.put_back(self._client, held.grant.pages)

    def _clear(self, kept: KeptPool, number: int, request: Clear) -> Count:
        try:
            return Count(kept.pool.clear())
        except TierUnavailable as error:
            logger.warning("umbp: a client ordered a clear that failed, and its connection ends: %s", error)
            raise

    def _take_pages(self, kept: KeptPool, number: int, request: TakePages) -> TakenPages:
        allowed = kept.take(self._client, min(request.count, messages.OBJECTS))
        taken: list[int] = []
        try:
            taken = self._holdings.take(self._turn, allowed)
        finally:
            kept.put_back(self._client, allowed - len(taken))
        return TakenPages(taken, self._known)

    def _keep_pages(self, kept: KeptPool, number: int, request: KeepPages) -> TakenPages:
        pages, gone = self._holdings.keep(self._turn, request.pages)
        kept.put_back(self._client, gone)
        return TakenPages(pages, self._known)

    def _publish_pages(self, kept: KeptPool, number: int, request: PublishPages) -> Published:
        stripes = kept.stripes
        if any(len(each.checksums) != stripes.count * CHECKSUM_BYTES for each in request.objects):
            raise WireError(ErrorCode.MALFORMED, f"an object has no checksum for each of its {stripes.count} parts")
        filled = [
            Filled(
                each.page,
                each.key,
                stripes.whole(each.nbytes) if 0 < each.nbytes <= stripes.nbytes_each else 0,
                each.depth,
                each.checksums,
            )
            for each in request.objects
        ]
        statuses = self._holdings.publish(self._turn, filled)
        kept.put_back(self._client, statuses.count(PutStatus.STORED))
        return Published([_PUBLISHED_NUMBER[status] for status in statuses])


_TOLD: dict[type[Any], Callable[[PoolKeeper, Any], Overview | Listing | Verified | FetchedPart]] = {
    Inspect: lambda keeper, asked: overview_of(keeper),
    ListObjects: listing_of,
    VerifyObjects: verdict_on,
    FetchPart: part_of,
}
"""Who asks one of these hears the answer, and that is all."""


def _place(lent: LentObject) -> Place:
    return Place(_LENT_NUMBER[lent.status], lent.page, lent.nbytes, lent.checksum)


_ANSWERS: dict[type[Any], Callable[[Session, KeptPool, int, Any], Reply]] = {
    Lookup: Session._look_up,
    Borrow: Session._lend,
    Reserve: Session._grant,
    Publish: Session._publish,
    Doubt: lambda session, kept, number, request: Count(kept.pool.check(request.keys)),
    Clear: Session._clear,
    Flush: lambda session, kept, number, request: Count(int(kept.flush(session._client, request.timeout_ms / 1000))),
    Secure: Session._secure,
    AskStats: lambda session, kept, number, request: stats_of(kept),
    TakePages: Session._take_pages,
    KeepPages: Session._keep_pages,
    PublishPages: Session._publish_pages,
}
"""What answers a request; ``Return`` and ``ReturnPages`` have no answer."""
