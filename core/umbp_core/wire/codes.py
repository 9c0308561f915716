"""What an error frame says, and the exceptions that it becomes on the other side."""

from __future__ import annotations

import enum

from umbp_core.errors import (
    AccessDenied,
    AlreadyRegistered,
    InvalidRequest,
    MasterError,
    MasterUnavailable,
    ProtocolError,
)


class ErrorCode(enum.IntEnum):
    """Why a request was not done.  After 1 to 4 the connection is closed; after the others it goes on."""

    PROTOCOL = 1
    """A frame that is not understood, or not expected now."""
    VERSION = 2
    """A version of the protocol that is not spoken here."""
    ACCESS_DENIED = 3
    """The token is wrong or missing."""
    TOO_LARGE = 4
    """A frame above the bound."""
    MALFORMED = 5
    """The payload is not what its message looks like, or breaks a bound."""
    UNKNOWN_MESSAGE = 6
    """A message that is not known here; a later revision may know it."""
    INVALID_REQUEST = 7
    """Understood and refused; sending it again brings the same answer."""
    ALREADY_REGISTERED = 8
    """A living node has this id."""
    UNAVAILABLE = 9
    """Not now: stopping, or too many connections."""
    INTERNAL = 10
    """A mistake in the server; its log says more."""


class WireError(ProtocolError):
    """Something that came over the wire is not understood; ``code`` is what the other side is told."""

    def __init__(self, code: ErrorCode, message: str) -> None:
        super().__init__(message)
        self.code = code

    @property
    def fatal(self) -> bool:
        """Whether the connection cannot go on."""
        return self.code <= ErrorCode.TOO_LARGE


_EXCEPTIONS: dict[int, type[MasterError]] = {
    ErrorCode.PROTOCOL: ProtocolError,
    ErrorCode.VERSION: ProtocolError,
    ErrorCode.ACCESS_DENIED: AccessDenied,
    ErrorCode.TOO_LARGE: InvalidRequest,
    ErrorCode.MALFORMED: InvalidRequest,
    ErrorCode.UNKNOWN_MESSAGE: InvalidRequest,
    ErrorCode.INVALID_REQUEST: InvalidRequest,
    ErrorCode.ALREADY_REGISTERED: AlreadyRegistered,
    ErrorCode.UNAVAILABLE: MasterUnavailable,
}
_CODES: tuple[tuple[type[MasterError], ErrorCode], ...] = (
    (InvalidRequest, ErrorCode.INVALID_REQUEST),
    (AlreadyRegistered, ErrorCode.ALREADY_REGISTERED),
    (MasterUnavailable, ErrorCode.UNAVAILABLE),
    (AccessDenied, ErrorCode.ACCESS_DENIED),
    (ProtocolError, ErrorCode.MALFORMED),
)


def exception_of(code: int, message: str) -> MasterError:
    """What a client raises for an error frame; codes of later revisions become plain ``MasterError``."""
    return _EXCEPTIONS.get(code, MasterError)(message)


def code_of(error: MasterError) -> ErrorCode:
    """What a server answers when a call raised ``error``; the connection goes on."""
    if isinstance(error, WireError):
        return error.code
    for kind, code in _CODES:
        if isinstance(error, kind):
            return code
    return ErrorCode.INTERNAL
