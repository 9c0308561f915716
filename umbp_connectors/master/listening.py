"""Whether an address can be listened at, found out before anything else is done.

Both protocols and gRPC's own library would say so too, but each in its own way, and the original master of UMBP shares
its port with whoever asks: a second one would take half of the calls.
"""

from __future__ import annotations

import errno
import socket

from umbp_connectors.master.settings import Endpoint
from umbp_core.errors import ConfigError


class AddressBusy(ConfigError):
    """Another process listens there."""


def check_free(endpoint: Endpoint, option: str) -> None:
    """Raises ``ConfigError`` when nobody can listen at ``endpoint``, ``AddressBusy`` when somebody else does.

    ``option`` is what the user would change.
    """
    try:
        found = socket.getaddrinfo(*endpoint, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError as error:
        raise ConfigError(
            f"{option} {endpoint}: {endpoint.host} is no name of this machine ({error.strerror})"
        ) from error
    reasons = [reason for family, _, _, _, address in found if (reason := _reason(family, address)) is not None]
    busy = next((reason for reason in reasons if reason.errno == errno.EADDRINUSE), None)
    if busy is not None:
        raise AddressBusy(
            f"{option} {endpoint} is taken by another process, maybe another master; stop it or give another"
        )
    if len(reasons) == len(found):
        raise ConfigError(f"{option} {endpoint} cannot be listened at: {reasons[0].strerror}") from reasons[0]


def _reason(family: int, address: object) -> OSError | None:
    """Why a socket cannot be bound to ``address``; nothing when it can."""
    try:
        probe = socket.socket(family, socket.SOCK_STREAM)
    except OSError as error:
        return error
    with probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        try:
            probe.bind(address)  # type: ignore[arg-type]
        except OSError as error:
            return error
    return None
