"""What the two sides of a shared pool say to each other, and how much of it.

Frames are those of :mod:`umbp_core.wire.frames`, in session 0.  The reader greets; the server's welcome carries the
arena's descriptor when it was asked for.  Then each request has one reply.  A reader has one loan at a time, which its
next frame ends, and so do the end of the lease and that of the connection.
"""

from __future__ import annotations

from typing import Annotated, TypeVar

import msgspec

from umbp_connectors.pool.outcomes import GetStatus
from umbp_core.ids import IDENTITY_BYTES
from umbp_core.ops import CHECKSUM_BYTES
from umbp_core.wire.codes import ErrorCode, WireError

REVISION = 1
GREETING_BYTES = 1 << 10
FRAME_BYTES = 4 << 20
"""Payload of any later frame."""
KEYS = 1 << 14
"""Keys of one lookup."""
KEY_BYTES = 256
LOAN_OBJECTS = 128
"""Objects of one loan."""
TIMEOUT_MS = 3_600_000

STATUSES = (GetStatus.MISS, GetStatus.DRAM, GetStatus.SSD, GetStatus.CORRUPT, GetStatus.TIMED_OUT)
"""The statuses of lent objects, by their number."""

Key = Annotated[bytes, msgspec.Meta(min_length=1, max_length=KEY_BYTES)]
Natural = Annotated[int, msgspec.Meta(ge=0, lt=1 << 62)]
Text = Annotated[str, msgspec.Meta(max_length=1024)]


class Greeting(msgspec.Struct, array_like=True, frozen=True, tag=1):
    """The reader's first frame: whose objects it wants, and whether it wants to map them here."""

    revision: Natural
    identity: Annotated[bytes, msgspec.Meta(min_length=IDENTITY_BYTES, max_length=IDENTITY_BYTES)]
    wants_arena: bool


class Welcome(msgspec.Struct, array_like=True, frozen=True, tag=2):
    """The server's first frame: how the arena is cut, and how many objects a loan may have."""

    page_bytes: Annotated[int, msgspec.Meta(gt=0, lt=1 << 48)]
    pages: Annotated[int, msgspec.Meta(gt=0, lt=1 << 48)]
    loan_objects: Annotated[int, msgspec.Meta(gt=0, le=LOAN_OBJECTS)]


class Lookup(msgspec.Struct, array_like=True, frozen=True, tag=3):
    """Which of ``keys`` can be read; with ``prefix`` only how many of them from the first on."""

    keys: Annotated[list[Key], msgspec.Meta(max_length=KEYS)]
    prefix: bool


class Found(msgspec.Struct, array_like=True, frozen=True, tag=4):
    """The answer: how many from the first on, and unless only that was asked, a byte 0 or 1 for each key."""

    prefix: Natural
    there: Annotated[bytes, msgspec.Meta(max_length=KEYS)]


class Borrow(msgspec.Struct, array_like=True, frozen=True, tag=5):
    """Lend ``keys``, within so many milliseconds."""

    keys: Annotated[list[Key], msgspec.Meta(max_length=LOAN_OBJECTS)]
    timeout_ms: Annotated[int, msgspec.Meta(ge=0, le=TIMEOUT_MS)]


class Place(msgspec.Struct, array_like=True, frozen=True):
    """Where a lent object lies; see :class:`umbp_connectors.pool.lending.LentObject`."""

    status: Annotated[int, msgspec.Meta(ge=0, lt=len(STATUSES))]
    page: Natural
    nbytes: Natural
    checksum: Annotated[bytes, msgspec.Meta(max_length=CHECKSUM_BYTES)]


class Lent(msgspec.Struct, array_like=True, frozen=True, tag=6):
    """The answer, in the order of the keys."""

    places: Annotated[list[Place], msgspec.Meta(max_length=LOAN_OBJECTS)]


class Doubt(msgspec.Struct, array_like=True, frozen=True, tag=7):
    """These did not verify in the reader; the server is to look itself."""

    keys: Annotated[list[Key], msgspec.Meta(max_length=LOAN_OBJECTS)]


class Done(msgspec.Struct, array_like=True, frozen=True, tag=8):
    """It was done.  Also what a reader says to end its loan, and then there is no answer."""


class Refusal(msgspec.Struct, array_like=True, frozen=True, tag=9):
    """In an error frame: why not."""

    message: Text


Request = Lookup | Borrow | Doubt | Done
M = TypeVar("M")

encode = msgspec.msgpack.Encoder().encode
_REQUESTS = msgspec.msgpack.Decoder(Request)


def decode_request(payload: memoryview) -> Request:
    """A reader's request.  Raises ``WireError``."""
    try:
        request: Request = _REQUESTS.decode(payload)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise WireError(ErrorCode.MALFORMED, f"a request is not what it should look like: {error}") from None
    return request


def decode_as(kind: type[M], payload: memoryview) -> M:
    """The message of type ``kind`` in ``payload``.  Raises ``WireError``."""
    try:
        return msgspec.msgpack.decode(payload, type=kind)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise WireError(ErrorCode.MALFORMED, f"a message is not what it should look like: {error}") from None
