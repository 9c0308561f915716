"""Where an engine's event stream is, from what the engine was told."""

from __future__ import annotations

import re

from umbp_core.errors import ConfigError

DEFAULT_ENDPOINT = "tcp://*:5557"
"""What both engines publish on unless they are told otherwise."""
_TCP = re.compile(r"tcp://(?P<host>\[[^\]\s]+\]|[^\s:\[\]/]+|::):(?P<port>\d{1,5})")
_MAX_PORT = 65535
_THIS_MACHINE = {"*": "127.0.0.1", "0.0.0.0": "127.0.0.1", "[::]": "[::1]", "::": "[::1]"}


def endpoint_of(text: str, rank: int = 0, bind: bool = False) -> str:
    """What to connect to, or with ``bind`` to bind, for rank ``rank`` of an engine whose endpoint is ``text``.

    Engines add the data-parallel rank to the port.  They bind a host that is a wildcard, so that one is this machine to
    us.  Raises ``ConfigError`` for what no other process can reach.
    """
    if text.startswith("ipc://") and len(text) > len("ipc://"):
        if rank:
            raise ConfigError(f"{text!r} is one endpoint, and rank {rank} needs its own; give the engine a tcp:// one")
        return text
    match = _TCP.fullmatch(text)
    if match is None:
        raise ConfigError(
            f"{text!r} is no endpoint of an event stream; give tcp://HOST:PORT or ipc://PATH, as the engine has it "
            "(an inproc:// one stays inside the engine's process)"
        )
    port = int(match["port"]) + rank
    if not rank < port <= _MAX_PORT:
        raise ConfigError(f"{text!r} with rank {rank} has the port {port}; ports are 1 to {_MAX_PORT}")
    host = match["host"] if bind else _THIS_MACHINE.get(match["host"], match["host"])
    return f"tcp://{host}:{port}"
