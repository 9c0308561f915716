"""One asyncio connection to a native door with many requests under way."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from typing import cast

from umbp_connectors.client.native_session import (
    Identity,
    NativeAddress,
    NativeSession,
    failure_of,
    garbled,
    unreachable,
)
from umbp_core.errors import MasterError, MasterUnavailable
from umbp_core.wire.frames import FrameType
from umbp_core.wire.messages import Message

_REPLY = int(FrameType.REPLY)
Waiting = tuple[float, "asyncio.Future[memoryview]"]
Turn = asyncio.Future[bool]
"""Of one that waits for room: it got some, or its time is over."""


class NativePipe(asyncio.Protocol):
    """A connection; :attr:`greeting` is done when it may be used.  One loop's thread."""

    def __init__(self, address: NativeAddress, identity: Identity, limit: int, loop: asyncio.AbstractEventLoop) -> None:
        self.greeting: asyncio.Future[None] = loop.create_future()
        self.broken = False
        """Nothing more can be asked."""
        self._address = address
        self._session = NativeSession(identity)
        self._limit = limit
        self._loop = loop
        self._transport: asyncio.Transport | None = None
        self._waiting: dict[int, Waiting] = {}
        self._out: list[bytes] = []
        self._stalled = False
        self._queue: OrderedDict[Turn, None] = OrderedDict()
        self._given: set[Turn] = set()
        self._timer: asyncio.TimerHandle | None = None

    # asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Called by the loop."""
        self._transport = cast("asyncio.Transport", transport)
        self._transport.write(self._session.hello())

    def data_received(self, data: bytes) -> None:
        """Called by the loop."""
        try:
            if self._session.welcome is None:
                if self._session.greeted(data) and not self.greeting.done():
                    self.greeting.set_result(None)
                return
            for kind, sequence, payload in self._session.splitter.feed(data):
                self._answered(kind, sequence, payload)
        except MasterError as error:
            self._fail(error)
            return
        if self._session.splitter.error is not None:
            self._fail(self._session.splitter.error)
        elif self._queue:
            self._let_in()

    def connection_lost(self, exc: Exception | None) -> None:
        """Called by the loop."""
        self._fail(unreachable(self._address, exc or ConnectionResetError("it closed the connection")))

    def pause_writing(self) -> None:
        """Called by the loop: the master does not read."""
        self._stalled = True

    def resume_writing(self) -> None:
        """Called by the loop."""
        self._stalled = False
        self._let_in()

    # for the client

    @property
    def ready(self) -> bool:
        """Whether the master has greeted."""
        return self._session.welcome is not None and not self.broken

    @property
    def full(self) -> bool:
        """Whether a new request has to wait."""
        return self._stalled or len(self._waiting) + len(self._given) >= self._limit

    async def room(self, deadline: float) -> None:
        """Wait until there is room.  Raises ``MasterUnavailable`` when there is none in time."""
        while self.full and not self.broken:
            turn: Turn = self._loop.create_future()
            self._queue[turn] = None
            timer = self._loop.call_at(deadline, _too_late, turn)
            try:
                in_time = await turn
            finally:
                timer.cancel()
                self._leave(turn)
            if not in_time:
                raise unreachable(self._address, TimeoutError())
        if self.broken:
            raise MasterUnavailable("the connection to the master ended while a request waited for its turn")

    def ask(self, request: Message, deadline: float) -> asyncio.Future[memoryview]:
        """Send ``request``; the future has the payload of the reply, or raises what came instead."""
        frame = self._session.request(request)
        future: asyncio.Future[memoryview] = self._loop.create_future()
        if self._timer is None or deadline < self._timer.when():
            self._wake_at(deadline)
        self._waiting[self._session.sequence] = (deadline, future)
        if not self._out:
            self._loop.call_soon(self._flush)
        self._out.append(frame)
        return future

    def close(self) -> None:
        """End the connection; what is under way raises ``MasterUnavailable``."""
        self._fail(unreachable(self._address, ConnectionAbortedError("the client was closed")))

    def _flush(self) -> None:
        if self._transport is not None and not self.broken:
            self._transport.write(b"".join(self._out))
        self._out.clear()

    def _answered(self, kind: int, sequence: int, payload: memoryview) -> None:
        waiting = self._waiting.pop(sequence, None)
        if waiting is not None:
            future = waiting[1]
            if future.done():  # its caller was cancelled
                return
            if kind == _REPLY:
                future.set_result(payload)
            else:
                future.set_exception(failure_of(payload))
        elif kind != _REPLY and not sequence:
            raise failure_of(payload)
        elif not 0 < sequence <= self._session.sequence:
            raise garbled(self._address, f"an answer to request {sequence}, which was not made")

    def _let_in(self) -> None:
        """Wake as many of those that wait as there is room for; the others stay in line."""
        while self._queue and (self.broken or not self.full):
            turn, _ = self._queue.popitem(last=False)
            if not turn.done():  # else its waiter is about to leave
                self._given.add(turn)
                turn.set_result(True)

    def _leave(self, turn: Turn) -> None:
        """A waiter goes on, or gives up: what it leaves of the room that it was given is for the next."""
        self._queue.pop(turn, None)
        if turn in self._given:
            self._given.remove(turn)
            if self._queue:
                self._loop.call_soon(self._let_in)  # after it asked, if it does

    def _fail(self, error: MasterError) -> None:
        if self.broken:
            return
        self.broken = True
        if self._transport is not None:
            self._transport.abort()  # there is nothing to wait for
        if self._timer is not None:
            self._timer.cancel()
        waiting, self._waiting = self._waiting, {}
        for _, future in waiting.values():
            if not future.done():
                future.set_exception(error)
        if not self.greeting.done():
            self.greeting.set_exception(error)
            self.greeting.exception()  # whoever waited for it may be gone
        self._let_in()

    def _wake_at(self, deadline: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self._loop.call_at(deadline, self._expire)

    def _expire(self) -> None:
        """Give up the requests whose time is over."""
        self._timer = None
        now = self._loop.time()
        late = [sequence for sequence, (deadline, _) in self._waiting.items() if deadline <= now]
        for sequence in late:
            _, future = self._waiting.pop(sequence)
            if not future.done():
                future.set_exception(unreachable(self._address, TimeoutError()))
        if self._waiting:
            self._wake_at(min(deadline for deadline, _ in self._waiting.values()))
        self._let_in()


def _too_late(turn: Turn) -> None:
    if not turn.done():
        turn.set_result(False)
