"""Frames: a header of 40 bytes, and a payload whose length it says.

The layer is the same for everything that we speak ourselves; what a payload is depends on the type of its frame.  All
integers are little-endian::

    offset  0   4 bytes   magic, b"UMBP"
            4   u32       version, 1
            8   u32       type, see FrameType
           12   u64       session: 0 in a client's hello, then the number that the server's hello gave
           20   i32       worker: which one behind the other side is meant; 0 where there is but one
           24   u64       sequence: the sender's number of a request; the answers to it carry the same
           32   u32       length of the payload in bytes
           36   u32       flags, none of which is known: 0

What is not understood ends the connection; there is no way to find the next frame.  No I/O, no threads, no clock.
"""

from __future__ import annotations

import enum
import struct
from collections.abc import Collection

from umbp_core.wire import bounds
from umbp_core.wire.codes import ErrorCode, WireError

MAGIC = b"UMBP"
VERSION = 1
_START = int.from_bytes(MAGIC + VERSION.to_bytes(4, "little"), "little")
_HEADER = struct.Struct("<QIQiQII")
_HEADER_BYTES = bounds.HEADER_BYTES


class FrameType(enum.IntEnum):
    """What a payload is."""

    HELLO = 1
    """The first frame of each side."""
    REQUEST = 2
    REPLY = 3
    """The last frame of a request."""
    ERROR = 4
    """Instead of a reply.  Sequence 0: it concerns the connection, which ends."""
    EVENT = 5
    """Part of a stream that a request began."""
    CANCEL = 6
    """Ends the stream that the request of the same sequence began; empty."""


Frame = tuple[int, int, memoryview]
"""Type, sequence and payload of a frame; the payload is a view of what was fed."""


def encode_frame(kind: int, session: int, sequence: int, payload: bytes = b"", worker: int = 0) -> bytes:
    """A whole frame.  The caller keeps the bound of the payload."""
    return _HEADER.pack(_START, kind, session, worker, sequence, len(payload), 0) + payload


class FrameSplitter:
    """Bytes of one connection to frames, as they come.

    Takes frames of ``kinds``, of ``session`` and ``worker``, with payloads of up to ``max_payload`` bytes; the owner
    may change these between frames.  It keeps less than one frame, and never more than was really received.
    """

    __slots__ = ("_held", "_missing", "_worker", "error", "kinds", "max_payload", "session")

    def __init__(
        self, kinds: Collection[FrameType], max_payload: int = bounds.HELLO_BYTES, session: int = 0, worker: int = 0
    ) -> None:
        self.kinds = frozenset(kinds)
        self.max_payload = max_payload
        self.session = session
        self.error: WireError | None = None
        """What was wrong after the frames that were returned; nothing more is taken then."""
        self._worker = worker
        self._held = bytearray()
        self._missing = 0

    @property
    def partial(self) -> bool:
        """Whether a frame has begun and not ended."""
        return bool(self._held)

    def feed(self, data: bytes) -> list[Frame]:
        """The frames that ``data`` completes.  Look at :attr:`error` afterwards."""
        frames: list[Frame] = []
        if self.error is not None:
            return frames
        whole: bytes | bytearray = data
        if self._held:
            self._held += data
            if len(self._held) < self._missing:
                return frames
            whole, self._held = self._held, bytearray()
        at, size, view = 0, len(whole), memoryview(whole)
        self._missing = _HEADER_BYTES
        while size - at >= _HEADER_BYTES:
            start, kind, session, worker, sequence, length, flags = _HEADER.unpack_from(whole, at)
            if (
                start != _START
                or kind not in self.kinds
                or flags
                or length > self.max_payload
                or session != self.session
                or worker != self._worker
            ):
                self.error = self._refusal(whole[at : at + _HEADER_BYTES])
                return frames
            end = at + _HEADER_BYTES + length
            if end > size:
                self._missing = end - at
                break
            frames.append((kind, sequence, view[at + _HEADER_BYTES : end]))
            at = end
        if at < size:
            self._held += view[at:]
        return frames

    def _refusal(self, header: bytes | bytearray) -> WireError:
        """What is wrong with ``header``, in the order of its fields."""
        start, kind, session, worker, _, length, flags = _HEADER.unpack(header)
        magic, version = bytes(header[:4]), start >> 32
        if magic != MAGIC:
            return WireError(
                ErrorCode.PROTOCOL, f"a frame begins with {MAGIC!r}, not {magic!r}; is this another service's port?"
            )
        if version != VERSION:
            return WireError(ErrorCode.VERSION, f"version {VERSION} of the protocol is spoken here, not {version}")
        if kind not in self.kinds:
            return WireError(ErrorCode.PROTOCOL, f"a frame of type {kind} is not known, or not expected now")
        if flags:
            return WireError(ErrorCode.PROTOCOL, f"flags {flags:#x} of a frame are not known; send 0")
        if length > self.max_payload:
            return WireError(
                ErrorCode.TOO_LARGE, f"a payload of {length} bytes is above the bound of {self.max_payload}; split it"
            )
        return WireError(
            ErrorCode.PROTOCOL,
            f"session {session}, worker {worker} is not this connection's {self.session}, {self._worker}",
        )
