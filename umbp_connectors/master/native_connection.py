"""One connection of the native door: frames in, answers out.

Requests of a connection take effect in the order in which they came.  A read of the socket is worked off as a whole,
and all of its answers are written at once.  What is kept for a client is bounded: while it does not read, or while a
large request of its is worked on, nothing more is read from it.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
import socket
from collections import deque
from collections.abc import Coroutine
from time import monotonic
from typing import Any, Protocol, cast

from umbp_connectors.master.native_calls import NativeCalls
from umbp_connectors.master.native_limits import NativeLimits
from umbp_connectors.master.native_watch import WatchStream
from umbp_connectors.master.service import MasterObserver, MasterService
from umbp_core.errors import InvalidRequest, MasterError
from umbp_core.wire import bounds, messages, replies
from umbp_core.wire.codec import decode_hello, decode_request, encode
from umbp_core.wire.codes import ErrorCode, WireError, code_of
from umbp_core.wire.frames import Frame, FrameSplitter, FrameType, encode_frame
from umbp_core.wire.messages import Message

logger = logging.getLogger(__name__)

_FLUSH = 1 << 18
"""Bytes of answers that are written without waiting for the rest of a read."""
_REQUEST, _REPLY = int(FrameType.REQUEST), int(FrameType.REPLY)
_ERROR, _EVENT = int(FrameType.ERROR), int(FrameType.EVENT)
_OK = "OK"


class Door(Protocol):
    """What a connection needs of its server."""

    service: MasterService
    observer: MasterObserver
    calls: NativeCalls
    limits: NativeLimits
    token: bytes
    name: str

    def opened(self, connection: NativeConnection) -> int:
        """A connection begins; returns the number of its session, or 0 when there are too many."""
        ...

    def closed(self, connection: NativeConnection) -> None:
        """A connection is gone."""
        ...


class NativeConnection(asyncio.Protocol):
    """One client.  The master's loop only."""

    def __init__(self, door: Door) -> None:
        self._door = door
        self._limits = door.limits
        self._table = door.calls.table
        self._finished = door.observer.call_finished
        self._splitter = FrameSplitter((FrameType.HELLO,), bounds.HELLO_BYTES)
        self._backlog: deque[Frame] = deque()
        self._out: list[bytes] = []
        self._out_bytes = 0
        self._transport: asyncio.Transport | None = None
        self._session = 0
        self._max_answer = bounds.FRAME_BYTES
        self._task: asyncio.Task[None] | None = None
        self._turn: asyncio.Handle | None = None
        self._watch: WatchStream | None = None
        self._greeted = False
        self._ending = False
        self._stalled_since: float | None = None
        self._partial_since: float | None = None
        self._ending_since = 0.0
        self._heard = 0.0
        self._began = 0.0
        self._paused = False
        self.peer = ""

    # asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Called by the loop."""
        self._transport = wire = cast("asyncio.Transport", transport)  # uvloop's have no base class in common with it
        self._heard = monotonic()
        sock = wire.get_extra_info("socket")
        if sock is not None and sock.family in (socket.AF_INET, socket.AF_INET6):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        wire.set_write_buffer_limits(high=self._limits.write_buffer)
        self.peer = str(wire.get_extra_info("peername") or "a local process")
        self._session = self._door.opened(self)

    def data_received(self, data: bytes) -> None:
        """Called by the loop."""
        if self._ending:
            return
        self._heard = now = monotonic()
        splitter = self._splitter
        frames = splitter.feed(data)
        if not splitter.partial:
            self._partial_since = None
        elif frames or self._partial_since is None:
            self._partial_since = now
        if self._turn is not None or self._task is not None:
            self._backlog += frames
            self._pace()
            return
        self._began = now
        alone = not self._backlog and not self._paused and self._stalled_since is None and splitter.error is None
        if alone and len(frames) == 1 and frames[0][0] == _REQUEST:
            _, sequence, payload = frames[0]  # what a client that waits for its answers sends
            self._request(sequence, payload)
            self._flush()
        else:
            self._backlog += frames
            self._work()

    def eof_received(self) -> None:
        """Called by the loop; the transport then closes itself."""

    def pause_writing(self) -> None:
        """Called by the loop: the client does not read."""
        self._stalled_since = monotonic()

    def resume_writing(self) -> None:
        """Called by the loop."""
        self._stalled_since = None
        if self._watch is not None:
            self._watch.writable()
        if self._turn is None:
            self._turn = asyncio.get_running_loop().call_soon(self._next_turn)

    def connection_lost(self, exc: Exception | None) -> None:
        """Called by the loop.  A request under way is worked on to its end: half of it would be of no use."""
        self._ending = True
        self._backlog.clear()
        self._out.clear()
        if self._turn is not None:
            self._turn.cancel()
        if self._watch is not None:
            self._watch.stop()
        self._door.closed(self)

    # for the server

    def overdue(self, now: float) -> str:
        """Why this connection should not go on; empty if it may."""
        limits = self._limits
        if self._ending:
            return "its end was not read" if now - self._ending_since > limits.write_timeout else ""
        if self._stalled_since is not None:
            return "it does not read its answers" if now - self._stalled_since > limits.write_timeout else ""
        if self._partial_since is not None and now - self._partial_since > limits.frame_timeout:
            return "a frame began and did not end"
        if not self._greeted:
            return "it did not greet" if now - self._heard > limits.hello_timeout else ""
        busy = self._task is not None or self._watch is not None or bool(self._backlog)
        return "it was idle" if not busy and now - self._heard > limits.idle_timeout else ""

    def expire(self, reason: str) -> None:
        """Close a connection that is overdue."""
        logger.info("umbp: native client %s is let go: %s", self.peer, reason)
        if self._ending or self._stalled_since is not None:
            self.abort()
        else:
            self.end(ErrorCode.UNAVAILABLE, f"the connection is closed: {reason}")

    def stop(self) -> None:
        """Take nothing more; close when what is under way is answered."""
        self._backlog.clear()
        if self._watch is not None:
            self._watch.stop()
        if self._task is None:
            self.end(ErrorCode.UNAVAILABLE, "the master stops")
        elif not self._ending:
            self._ending = True
            self._ending_since = monotonic()

    def abort(self) -> None:
        """Close now; what was not sent is lost."""
        if self._task is not None:
            self._task.cancel()
        if self._transport is not None:
            self._transport.abort()

    def end(self, code: ErrorCode, message: str) -> None:
        """Tell the client why, and close."""
        failure = encode(replies.Failure(code, message[: bounds.TEXT_CHARS]))
        # A client that was not greeted knows of no session yet.
        self._put(_ERROR, 0, failure, session=None if self._greeted else 0)
        self._flush()
        self._ending = True
        self._ending_since = monotonic()
        self._backlog.clear()
        if self._transport is not None:
            self._transport.close()

    # for the watch

    def send_event(self, sequence: int, event: Message) -> None:
        """Send a part of a stream."""
        self._put(_EVENT, sequence, encode(event))
        self._flush()

    def stream_ended(self, sequence: int, code: ErrorCode | None, message: str = "") -> None:
        """A stream is over: cancelled, or it cannot go on."""
        self._watch = None
        if self._ending:
            return
        if code is None:
            self._put(_REPLY, sequence, encode(replies.Done()))
        else:
            self._put(_ERROR, sequence, encode(replies.Failure(code, message)))
        self._flush()

    @property
    def stalled(self) -> bool:
        """Whether the client leaves too much unread."""
        return self._stalled_since is not None

    # the work

    def _work(self) -> None:
        """Answer what was read, for one turn."""
        self._turn = None
        backlog = self._backlog
        until = self._began + self._limits.turn
        while backlog and self._task is None and self._stalled_since is None and not self._ending:
            kind, sequence, payload = backlog.popleft()
            if kind == _REQUEST:
                self._request(sequence, payload)
            else:
                self._control(kind, sequence, payload)
            if self._out_bytes > _FLUSH:
                self._flush()
            if backlog and self._began > until:
                self._turn = asyncio.get_running_loop().call_soon(self._next_turn)
                break
        self._flush()
        if backlog or self._task is not None or self._ending:
            self._pace()
        elif self._splitter.error is not None:
            self.end(self._splitter.error.code, str(self._splitter.error))
        elif self._paused:
            self._pace()

    def _next_turn(self) -> None:
        self._began = monotonic()
        self._work()

    def _pace(self) -> None:
        """Read on only when there is nothing left to do."""
        if self._transport is None or self._ending:
            return
        if self._backlog and not self._paused:
            self._paused = True
            self._transport.pause_reading()
        elif self._paused and not self._backlog:
            self._paused = False
            self._transport.resume_reading()

    def _request(self, sequence: int, payload: memoryview) -> None:
        name = ""
        try:
            request = decode_request(payload)
            call = self._table.get(type(request))
            if call is None:
                self._begin_watch(sequence, request)
                return
            name = call.name
            answer = call.run(request)
            if not isinstance(answer, Message):
                later = self._later(sequence, name, answer, self._began)
                self._task = asyncio.get_running_loop().create_task(later)
                return
            self._put(_REPLY, sequence, self._payload_of(answer))
        except Exception as error:  # noqa: BLE001 - op boundary: one call must not end the others'
            self._fail(sequence, name, error)
        else:
            self._finish(name, _OK)

    async def _later(self, sequence: int, name: str, answer: Coroutine[Any, Any, Message], started: float) -> None:
        """The rest of a request that takes longer."""
        try:
            payload = self._payload_of(await answer)
        except Exception as error:  # noqa: BLE001 - op boundary: the same for what takes longer
            self._began = started
            self._fail(sequence, name, error)
        else:
            self._began = started
            self._put(_REPLY, sequence, payload)
            self._finish(name, _OK)
        finally:
            self._task = None
        if self._ending:
            self._flush()
            if self._transport is not None:
                self._transport.close()
        elif self._turn is None:
            self._work()

    def _payload_of(self, answer: Message) -> bytes:
        payload = encode(answer)
        if len(payload) > self._max_answer:
            raise InvalidRequest(
                f"the answer has {len(payload)} bytes, and you take {self._max_answer}; ask for less at a time"
            )
        return payload

    def _fail(self, sequence: int, name: str, error: Exception) -> None:
        """Answer with what went wrong; of a mistake of ours only the log says more."""
        if isinstance(error, MasterError):
            code, message = code_of(error), str(error)[: bounds.TEXT_CHARS]
        else:
            logger.error("umbp: a native call %s of %s failed", name, self.peer, exc_info=error)
            code, message = ErrorCode.INTERNAL, f"{name or 'the call'} failed inside the master; its log says more"
        self._put(_ERROR, sequence, encode(replies.Failure(code, message)))
        self._finish(name or "unknown", code.name)

    def _finish(self, name: str, code: str) -> None:
        """A call is answered; the next one begins now."""
        now = monotonic()
        self._finished("native", name, code, now - self._began)
        self._began = now

    def _control(self, kind: int, sequence: int, payload: memoryview) -> None:
        """A frame that is no request."""
        if kind == FrameType.HELLO:
            self._greet(payload)
        elif self._watch is not None and self._watch.sequence == sequence:
            self._watch.cancel()

    def _greet(self, payload: memoryview) -> None:
        if self._greeted:
            self.end(ErrorCode.PROTOCOL, "this connection was greeted already")
            return
        try:
            hello = decode_hello(payload)
        except WireError as error:
            self.end(ErrorCode.PROTOCOL, str(error))
            return
        if self._door.token and not hmac.compare_digest(hello.token, self._door.token):
            logger.warning("umbp: native client %s has a wrong token", self.peer)
            self.end(ErrorCode.ACCESS_DENIED, "the token is wrong or missing; give the one that the master was given")
            return
        if not self._session:
            self.end(ErrorCode.UNAVAILABLE, f"{self._limits.connections} connections are open already; try again later")
            return
        self._greeted = True
        self._max_answer = min(hello.max_frame, bounds.FRAME_BYTES_CEILING)
        welcome = replies.Welcome(messages.REVISION, self._session, self._limits.max_frame, self._door.name)
        self._put(int(FrameType.HELLO), 0, encode(welcome), session=0)
        self._splitter.kinds = frozenset((FrameType.REQUEST, FrameType.CANCEL))
        self._splitter.max_payload = self._limits.max_frame
        self._splitter.session = self._session

    def _begin_watch(self, sequence: int, request: Message) -> None:
        """The one request that has no single answer."""
        if not isinstance(request, messages.Watch):
            raise TypeError(f"no call for {type(request).__name__}")
        if self._watch is not None:
            raise InvalidRequest("this connection watches already; cancel that first, or open another one")
        interval = self._limits.watch_interval
        self._watch = WatchStream(self, self._door.service, sequence, request, interval, self._max_answer)
        self._watch.start()

    def _put(self, kind: int, sequence: int, payload: bytes, session: int | None = None) -> None:
        frame = encode_frame(kind, self._session if session is None else session, sequence, payload)
        self._out.append(frame)
        self._out_bytes += len(frame)

    def _flush(self) -> None:
        out = self._out
        if not out:
            return
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(out[0] if len(out) == 1 else b"".join(out))
        out.clear()
        self._out_bytes = 0
