"""The client's side of a native connection, without the connection: greeting, requests, numbers."""

from __future__ import annotations

import asyncio
from collections.abc import Collection
from dataclasses import dataclass

from umbp_connectors.client.addresses import MasterAddress, Wire
from umbp_core.errors import InvalidRequest, MasterError, MasterUnavailable, ProtocolError
from umbp_core.wire import bounds
from umbp_core.wire.codec import decode_failure, decode_welcome, encode
from umbp_core.wire.codes import exception_of
from umbp_core.wire.frames import FrameSplitter, FrameType, encode_frame
from umbp_core.wire.messages import Hello, Message
from umbp_core.wire.replies import Welcome

NativeAddress = str | tuple[str, int]
"""The path of a Unix socket, or host and port."""

_REQUEST, _REPLY, _ERROR = int(FrameType.REQUEST), int(FrameType.REPLY), int(FrameType.ERROR)
ANSWERS = (FrameType.REPLY, FrameType.ERROR)
STREAMED = (FrameType.REPLY, FrameType.ERROR, FrameType.EVENT)


@dataclass(frozen=True, slots=True)
class Identity:
    """What a client says of itself; ``token`` is the master's, if it has one."""

    role: str = "client"
    node_id: str = ""
    token: bytes = b""
    max_frame: int = bounds.FRAME_BYTES
    """Bytes of payload that the client takes."""


class NativeSession:
    """One connection's numbers.  Not thread-safe."""

    def __init__(self, identity: Identity, kinds: Collection[FrameType] = ANSWERS) -> None:
        self.splitter = FrameSplitter((FrameType.HELLO, FrameType.ERROR), bounds.HELLO_BYTES)
        self.welcome: Welcome | None = None
        """What the server said; ``None`` until then."""
        self.sequence = 0
        """The number of the last request."""
        self._identity = identity
        self._kinds = frozenset(kinds)
        self._session = 0
        self._max_request = 0

    def hello(self) -> bytes:
        """The first thing to send."""
        me = self._identity
        hello = Hello(role=me.role, node_id=me.node_id, token=me.token, max_frame=me.max_frame)
        return encode_frame(FrameType.HELLO, 0, 0, encode(hello))

    def greeted(self, data: bytes) -> bool:
        """Take what the server said until now; whether it was all that it has to say.

        Raises what it refused us with, or ``ProtocolError`` when it does not speak our protocol.
        """
        frames = self.splitter.feed(data)
        for kind, _, payload in frames:
            if kind == _ERROR:
                raise failure_of(payload)
        if self.splitter.error is not None:
            raise self.splitter.error
        if not frames:
            return False
        welcome = decode_welcome(frames[0][2])
        self.welcome = welcome
        self._session = welcome.session
        self._max_request = welcome.max_frame
        self.splitter.kinds = self._kinds
        self.splitter.session = welcome.session
        self.splitter.max_payload = self._identity.max_frame
        return True

    def request(self, message: Message) -> bytes:
        """The frame of a new request, which gets the next number.  Raises ``InvalidRequest`` if it is too large."""
        try:
            payload = encode(message)
        except (OverflowError, UnicodeError) as error:
            raise InvalidRequest(f"a request has a value that cannot be sent: {error}") from None
        if len(payload) > self._max_request:
            raise InvalidRequest(
                f"a request of {len(payload)} bytes is above the master's bound of {self._max_request}; split it"
            )
        self.sequence += 1
        return encode_frame(_REQUEST, self._session, self.sequence, payload)

    def cancel(self, sequence: int) -> bytes:
        """The frame that ends a stream."""
        return encode_frame(FrameType.CANCEL, self._session, sequence)


def failure_of(payload: memoryview) -> MasterError:
    """What an ERROR frame says, as an exception."""
    failure = decode_failure(payload)
    return exception_of(failure.code, failure.message)


def describe(address: NativeAddress) -> str:
    """``address`` for people."""
    return address if isinstance(address, str) else MasterAddress(Wire.NATIVE_TCP, *address).target


def unreachable(address: NativeAddress, error: Exception) -> MasterUnavailable:
    """What is raised when a socket fails."""
    reason = _reason(error)
    return MasterUnavailable(f"the master at {describe(address)} is not reached: {reason}")


def _reason(error: Exception) -> str:
    """The system's words for ``error``."""
    if isinstance(error, (TimeoutError, asyncio.TimeoutError, BlockingIOError)):
        return "no answer in time"
    return str(error) or type(error).__name__


def garbled(address: NativeAddress, what: str) -> ProtocolError:
    """What is raised when the server sends what it should not."""
    return ProtocolError(f"the master at {describe(address)} sent {what}; the connection is closed")
