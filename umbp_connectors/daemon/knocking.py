"""How the two ends of a TCP connection find out that both know the token, before anything else is said (law L10).

Any user of the host can connect to a port, and can listen there while no daemon does.  So the token itself is never
sent: the daemon's first frame is a :class:`Challenge`, the client answers with a :class:`Knock`, and the daemon with an
:class:`Opened` or a refusal.  Each proof is made of the token and of what both sides have thrown for this connection.
The greeting, as over a Unix socket, comes after that.
"""

from __future__ import annotations

import hmac
import os
from typing import Annotated

import msgspec

from umbp_connectors.pool.sharing.messages import Natural, Refusal, decode_as, encode
from umbp_connectors.pool.sharing.sockets import FrameSocket
from umbp_core.errors import AccessDenied
from umbp_core.wire.codes import ErrorCode, WireError
from umbp_core.wire.frames import FrameType

REVISION = 1
BYTES = 32
"""Of what is thrown, and of a proof."""
_OF_CLIENT = b"umbp daemon: a client"
_OF_DAEMON = b"umbp daemon: the daemon"

Bytes32 = Annotated[bytes, msgspec.Meta(min_length=BYTES, max_length=BYTES)]


class Challenge(msgspec.Struct, array_like=True, frozen=True, tag=50):
    """The daemon's first frame: what it has thrown."""

    revision: Natural
    nonce: Bytes32


class Knock(msgspec.Struct, array_like=True, frozen=True, tag=51):
    """The client's first frame: what it has thrown, and that it knows the token."""

    nonce: Bytes32
    proof: Bytes32


class Opened(msgspec.Struct, array_like=True, frozen=True, tag=52):
    """The answer: the daemon knows it, too."""

    proof: Bytes32


def let_in(sock: FrameSocket, token: bytes, deadline: float) -> None:
    """The daemon's side.  Raises ``AccessDenied``, having told the client so, unless it knows ``token``."""
    ours = os.urandom(BYTES)
    sock.send(FrameType.HELLO, 0, encode(Challenge(REVISION, ours)), deadline)
    _, sequence, payload = sock.receive(deadline)
    try:
        knock = decode_as(Knock, payload)
    except WireError:
        knock = None
    if knock is None or not hmac.compare_digest(knock.proof, _proof(token, _OF_CLIENT, ours, knock.nonce)):
        problem = "no token was shown" if knock is None else "the token is wrong"
        told = Refusal(f"{problem}; give daemon_token_file, with the token that the daemon was given")
        sock.send(FrameType.ERROR, sequence, encode(told), deadline)
        raise AccessDenied(problem)
    opened = Opened(_proof(token, _OF_DAEMON, ours, knock.nonce))
    sock.send(FrameType.HELLO, sequence, encode(opened), deadline)


def knock(sock: FrameSocket, token: bytes, deadline: float) -> None:
    """The client's side.  Raises ``AccessDenied`` when one of the two does not know ``token``, as frames do besides."""
    kind, _, payload = sock.receive(deadline)
    challenge = decode_as(Challenge, payload) if kind == FrameType.HELLO else None
    if challenge is None or challenge.revision != REVISION:
        raise WireError(ErrorCode.VERSION, "the daemon opens its TCP door in another way; run the same version")
    ours = os.urandom(BYTES)
    proof = _proof(token, _OF_CLIENT, challenge.nonce, ours)
    sock.send(FrameType.HELLO, 0, encode(Knock(ours, proof)), deadline)
    kind, _, payload = sock.receive(deadline)
    if kind != FrameType.HELLO:
        raise AccessDenied(f"the daemon refuses: {decode_as(Refusal, payload).message}")
    opened = decode_as(Opened, payload)
    if not hmac.compare_digest(opened.proof, _proof(token, _OF_DAEMON, challenge.nonce, ours)):
        raise AccessDenied("whoever listens there does not know the token: it is no daemon, or one with another token")


def _proof(token: bytes, whose: bytes, daemons: bytes, clients: bytes) -> bytes:
    return hmac.digest(token, whose + daemons + clients, "sha256")
