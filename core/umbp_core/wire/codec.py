"""Messages to payloads and back.

What comes back was checked: types, bounds and enumerations of every field.  What a field of bytes packs is checked
where it is unpacked, see ``hashes`` and ``columns``.  Any thread.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TypeVar

import msgspec

from umbp_core.wire.codes import ErrorCode, WireError
from umbp_core.wire.messages import Hello, Message, Request
from umbp_core.wire.replies import Failure, Welcome

M = TypeVar("M", bound=Message)

_ENCODER = msgspec.msgpack.Encoder()
_REQUESTS: msgspec.msgpack.Decoder[Request] = msgspec.msgpack.Decoder(Request)
_NUMBERS = frozenset(kind.__struct_config__.tag for kind in Request.__args__)
_ARRAYS = range(0x91, 0xA0)
_UNDECODABLE = (msgspec.MsgspecError, UnicodeDecodeError)

encode = _ENCODER.encode
"""The payload of a message."""


def decode_request(payload: memoryview | bytes) -> Request:
    """The request in ``payload``.

    Raises ``WireError``: ``UNKNOWN_MESSAGE`` when its number is not known, ``MALFORMED`` when it does not look as it
    should.
    """
    try:
        return _REQUESTS.decode(payload)
    except _UNDECODABLE as error:
        number = _number_of(payload)
        if number is None or number in _NUMBERS:
            raise _malformed(error) from None
        raise WireError(
            ErrorCode.UNKNOWN_MESSAGE, f"message {number} is not known here; greet first, and mind the revision"
        ) from None


def decode_as(kind: type[M], payload: memoryview | bytes) -> M:
    """The message of type ``kind`` in ``payload``.  Raises ``WireError`` with ``MALFORMED``."""
    try:
        message: M = _decoder(kind).decode(payload)
    except _UNDECODABLE as error:
        raise _malformed(error) from None
    return message


def decode_failure(payload: memoryview | bytes) -> Failure:
    """What an ERROR frame says."""
    return decode_as(Failure, payload)


def decode_hello(payload: memoryview | bytes) -> Hello:
    """What a client begins with."""
    return decode_as(Hello, payload)


def decode_welcome(payload: memoryview | bytes) -> Welcome:
    """What a server answers to it."""
    return decode_as(Welcome, payload)


def _malformed(error: Exception) -> WireError:
    return WireError(ErrorCode.MALFORMED, f"a message is not what it should look like: {error}")


def _number_of(payload: memoryview | bytes) -> int | None:
    """The number of the message, where ``payload`` has one at all; numbers are one byte of msgpack."""
    known = len(payload) > 1 and payload[0] in _ARRAYS and payload[1] < 128
    return int(payload[1]) if known else None


@lru_cache(maxsize=64)
def _decoder(kind: type[M]) -> msgspec.msgpack.Decoder[M]:
    return msgspec.msgpack.Decoder(kind)
