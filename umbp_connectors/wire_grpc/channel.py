"""How channels and doors of UMBP's wire are set up: bounds, reconnects, tokens, certificates, meaning of codes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import grpc

from umbp_connectors.wire_grpc.codec import MAX_MESSAGE, MessageTooLarge
from umbp_core.errors import (
    AccessDenied,
    AlreadyRegistered,
    ConfigError,
    InvalidRequest,
    MasterError,
    MasterUnavailable,
    ProtocolError,
)

Option = tuple[str, Any]
MESSAGE_OPTIONS: tuple[Option, ...] = (
    ("grpc.max_send_message_length", MAX_MESSAGE),
    ("grpc.max_receive_message_length", MAX_MESSAGE),
)
CHANNEL_OPTIONS: tuple[Option, ...] = (
    *MESSAGE_OPTIONS,
    # A master and its nodes are in one network; a proxy for the internet is not on the way between them.
    ("grpc.enable_http_proxy", 0),
    # A channel is made anew after a failure, and then it should really try to connect.
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 2000),
)
AUTHORIZATION = "authorization"
HEALTH = "grpc.health.v1.Health"
"""The service by which any gRPC server may tell that it serves."""
_BUSY = "Concurrent RPC limit exceeded"
"""What gRPC for Python says, with the code of a request that is too large, when a server has enough to do."""
_Code = grpc.StatusCode

_CODES: tuple[tuple[type[MasterError], grpc.StatusCode], ...] = (
    (MessageTooLarge, _Code.RESOURCE_EXHAUSTED),
    (InvalidRequest, _Code.INVALID_ARGUMENT),
    (AlreadyRegistered, _Code.ALREADY_EXISTS),
    (AccessDenied, _Code.UNAUTHENTICATED),
    (MasterUnavailable, _Code.UNAVAILABLE),
)
_KINDS: dict[grpc.StatusCode, type[MasterError]] = {
    _Code.INVALID_ARGUMENT: InvalidRequest,
    _Code.OUT_OF_RANGE: InvalidRequest,
    _Code.FAILED_PRECONDITION: InvalidRequest,
    _Code.RESOURCE_EXHAUSTED: InvalidRequest,
    _Code.ALREADY_EXISTS: AlreadyRegistered,
    _Code.UNAUTHENTICATED: AccessDenied,
    _Code.PERMISSION_DENIED: AccessDenied,
    _Code.UNAVAILABLE: MasterUnavailable,
    _Code.DEADLINE_EXCEEDED: MasterUnavailable,
    _Code.CANCELLED: MasterUnavailable,
    _Code.ABORTED: MasterUnavailable,
}


def code_of(error: MasterError) -> grpc.StatusCode:
    """The status that tells ``error``; what is not understood is ``INTERNAL``, as gRPC and UMBP's master have it."""
    for kind, code in _CODES:
        if isinstance(error, kind):
            return code
    return _Code.INTERNAL


def error_of(code: grpc.StatusCode, details: str, call: str, target: str) -> MasterError:
    """The error that a status tells; the master's own words are part of it."""
    kind = MasterUnavailable if _BUSY in details else _KINDS.get(code, ProtocolError)
    return kind(f"{call} at {target}: {details or 'no details'} ({code.name})")


def bearer(token: str) -> tuple[tuple[str, str], ...]:
    """The metadata that carries ``token``; empty without one."""
    return ((AUTHORIZATION, f"Bearer {token}"),) if token else ()


def server_credentials(certificate: bytes, key: bytes, client_ca: bytes | None = None) -> grpc.ServerCredentials:
    """TLS from PEM texts; with ``client_ca`` clients have to show a certificate that it signed."""
    return grpc.ssl_server_credentials(
        ((key, certificate),), root_certificates=client_ca, require_client_auth=client_ca is not None
    )


def channel_credentials(
    ca: bytes | None = None, certificate: bytes | None = None, key: bytes | None = None
) -> grpc.ChannelCredentials:
    """TLS from PEM texts; without ``ca`` the roots that gRPC brings.  Raises ``ConfigError`` for half a pair."""
    if (certificate is None) != (key is None):
        raise ConfigError("a client certificate and its key belong together; give both or neither")
    return grpc.ssl_channel_credentials(root_certificates=ca, private_key=key, certificate_chain=certificate)


def target_of(address: str) -> str:
    """``host:port`` as a gRPC target.  The scheme is given, so that an address cannot bring one of its own."""
    return f"dns:///{address}"


def options(*groups: Sequence[Option]) -> list[Option]:
    """One list of options."""
    return [option for group in groups for option in group]
