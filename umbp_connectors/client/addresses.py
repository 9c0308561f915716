"""Where a master is, and in which protocol it is spoken to.

====================  ============================================================
``umbp://HOST:PORT``  our native protocol over TCP
``umbp+unix://PATH``  our native protocol over a Unix socket
``grpc://HOST:PORT``  UMBP's gRPC: any master
``HOST:PORT``         the native protocol if the other side answers to it, else gRPC
====================  ============================================================

Several, separated by commas, are alternatives in the order of preference: a client uses the first that answers, and
goes back to a better one when that answers again.
"""

from __future__ import annotations

import enum
import re
from dataclasses import dataclass

from umbp_core.errors import ConfigError

_EXAMPLES = "umbp://host:port, umbp+unix:///path, grpc://host:port or host:port"
_HOST_PORT = re.compile(r"(?:\[(?P<ipv6>[0-9A-Fa-f:.%\w]+)\]|(?P<host>[^\s:/\[\]@?#]+)):(?P<port>\d{1,5})")
_MAX_PORT = 65535
_MAX_UNIX_PATH = 107
"""Bytes that Linux has room for in a socket's address."""


class Wire(enum.Enum):
    """A protocol over a kind of socket; the value is the scheme of its addresses."""

    NATIVE_TCP = "umbp"
    NATIVE_UNIX = "umbp+unix"
    GRPC = "grpc"


@dataclass(frozen=True, slots=True)
class MasterAddress:
    """One door of one master.  ``host`` and ``port`` are set, or for a Unix socket ``path``."""

    wire: Wire
    host: str = ""
    port: int = 0
    path: str = ""

    @property
    def target(self) -> str:
        """``host:port``, an IPv6 host in brackets; empty for a Unix socket."""
        if not self.host:
            return ""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    def __str__(self) -> str:
        return f"{self.wire.value}://{self.target or self.path}"


def parse_addresses(text: str) -> tuple[MasterAddress, ...]:
    """The doors that ``text`` names, the best first and each once.

    Raises ``ConfigError`` when there is none, or one that is not understood.
    """
    found = [address for part in text.split(",") if part.strip() for address in _parse(part.strip())]
    if not found:
        raise ConfigError(f"no address of a master in {text!r}; give {_EXAMPLES}")
    return tuple(dict.fromkeys(found))


def _parse(text: str) -> list[MasterAddress]:
    scheme, separator, rest = text.partition("://")
    if not separator:
        return [_internet(wire, text, text) for wire in (Wire.NATIVE_TCP, Wire.GRPC)]
    known = {wire.value: wire for wire in Wire}
    wire = known.get(scheme.lower())
    if wire is None:
        raise ConfigError(f"{text!r} has the unknown scheme {scheme!r}; give {_EXAMPLES}")
    return [_unix(text, rest) if wire is Wire.NATIVE_UNIX else _internet(wire, text, rest)]


def _unix(text: str, path: str) -> MasterAddress:
    if not path.startswith("/"):
        raise ConfigError(f"{text!r} names no absolute path; give umbp+unix:///path (three slashes)")
    if len(path.encode()) > _MAX_UNIX_PATH:
        raise ConfigError(f"{text!r}: the path of a Unix socket has at most {_MAX_UNIX_PATH} bytes; use a shorter one")
    return MasterAddress(Wire.NATIVE_UNIX, path=path)


def _internet(wire: Wire, text: str, rest: str) -> MasterAddress:
    match = _HOST_PORT.fullmatch(rest.removesuffix("/"))
    if match is None or not 0 < int(match["port"]) <= _MAX_PORT:
        raise ConfigError(
            f"{text!r} is no host and port of a master (port 1 to {_MAX_PORT}, IPv6 in brackets); give {_EXAMPLES}"
        )
    return MasterAddress(wire, match["ipv6"] or match["host"], int(match["port"]))
