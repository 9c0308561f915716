"""A reader's connection to the server of a shared pool."""

from __future__ import annotations

import contextlib
import mmap
import os
import socket
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np

from umbp_connectors.pool.buffers import Bytes
from umbp_connectors.pool.sharing import messages
from umbp_connectors.pool.sharing.messages import Borrow, Done, Doubt, Found, Greeting, Lent, Lookup, Refusal, Welcome
from umbp_connectors.pool.sharing.sockets import FrameSocket, check_peer
from umbp_core.errors import TierUnavailable
from umbp_core.wire.codes import ErrorCode, WireError
from umbp_core.wire.frames import FrameType

Reply = TypeVar("Reply", Found, Lent, Done)

_SERVERS_PART = 0.8
"""How much of a call's time the server gets to bring objects to DRAM: its answer must come while somebody listens."""


class Link:
    """An open connection, and the arena if it is mapped.  One thread at a time.

    Every call raises ``OSError`` (``TimeoutError`` at its deadline), ``WireError`` or ``UmbpError``; the link is of no
    use then and has to be closed.
    """

    def __init__(self, sock: FrameSocket, welcome: Welcome, pages: Bytes | None) -> None:
        self._socket = sock
        self._welcome = welcome
        self._pages = pages
        self._sequence = 0

    @property
    def loan_objects(self) -> int:
        """How many objects a loan may have."""
        return self._welcome.loan_objects

    def look_up(self, keys: Sequence[bytes], prefix: bool, deadline: float) -> Found:
        """What of ``keys`` (``messages.KEYS`` at most) can be read."""
        found = self._ask(Lookup(list(keys), prefix), Found, deadline)
        if found.prefix > len(keys) or not (prefix or len(found.there) == len(keys)):
            raise WireError(ErrorCode.MALFORMED, f"an answer about {len(keys)} keys speaks of others")
        return found

    def borrow(self, keys: Sequence[bytes], deadline: float) -> Lent:
        """Where ``keys`` (``loan_objects`` at most) lie; they stay there until :meth:`give_back`."""
        left = max(0.0, deadline - time.monotonic())
        lent = self._ask(Borrow(list(keys), min(messages.TIMEOUT_MS, int(1000 * _SERVERS_PART * left))), Lent, deadline)
        page_bytes, pages = self._welcome.page_bytes, self._welcome.pages
        sound = all(place.page < pages and place.nbytes <= page_bytes for place in lent.places)
        if len(lent.places) != len(keys) or not sound:
            raise WireError(ErrorCode.MALFORMED, f"an answer about {len(keys)} objects does not fit them or the arena")
        return lent

    def page(self, index: int, nbytes: int) -> Bytes:
        """The first bytes of a page of the server's arena, read-only."""
        if self._pages is None:
            raise TierUnavailable("this link has not mapped the arena; borrow through the one that has")
        return self._pages[index, :nbytes]

    def give_back(self, deadline: float) -> None:
        """End the loan.  Does not wait for the server."""
        self._send(Done(), deadline)

    def doubt(self, keys: Sequence[bytes], deadline: float) -> None:
        """Have the server verify ``keys``, which did not verify here."""
        self._ask(Doubt(list(keys)), Done, deadline)

    def close(self) -> None:
        """End the connection; what is mapped stays so for as long as somebody looks at it."""
        self._pages = None
        self._socket.close()

    def _ask(self, request: Lookup | Borrow | Doubt, kind: type[Reply], deadline: float) -> Reply:
        self._send(request, deadline)
        what, sequence, payload = self._socket.receive(deadline)
        if what != FrameType.REPLY or sequence != self._sequence:
            raise WireError(ErrorCode.PROTOCOL, "an answer to nothing that was asked")
        return messages.decode_as(kind, payload)

    def _send(self, request: Lookup | Borrow | Doubt | Done, deadline: float) -> None:
        self._sequence += 1
        self._socket.send(FrameType.REQUEST, self._sequence, messages.encode(request), deadline)


def connect(path: Path, identity: bytes, wants_arena: bool, deadline: float) -> Link:
    """A link to the server at ``path``, for objects of ``identity``.

    Raises as the link does, and ``TierUnavailable`` when the server does not want this reader.
    """
    raw = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock = FrameSocket(raw, (FrameType.HELLO, FrameType.REPLY, FrameType.ERROR), messages.GREETING_BYTES)
    with contextlib.ExitStack() as undo:
        undo.callback(sock.close)
        raw.settimeout(max(0.0, deadline - time.monotonic()))
        raw.connect(str(path))
        check_peer(raw)
        greeting = messages.encode(Greeting(messages.REVISION, identity, wants_arena))
        sock.send(FrameType.HELLO, 0, greeting, deadline)
        kind, _, payload = sock.receive(deadline, with_fd=wants_arena)
        if kind != FrameType.HELLO:
            refusal = messages.decode_as(Refusal, payload)
            raise TierUnavailable(f"the pool shared at {path} is not for this process: {refusal.message}")
        welcome = messages.decode_as(Welcome, payload)
        pages = _map(path, sock.take_fd(), welcome) if wants_arena else None
        sock.allow(messages.FRAME_BYTES)
        undo.pop_all()
    return Link(sock, welcome, pages)


def _map(path: Path, fd: int | None, welcome: Welcome) -> Bytes:
    """The arena behind ``fd``, which is closed, mapped for reading."""
    if fd is None:
        raise TierUnavailable(f"the pool shared at {path} offers no memory")
    try:
        size = os.fstat(fd).st_size
        needed = welcome.pages * welcome.page_bytes
        if size < needed:
            raise TierUnavailable(f"the memory of the pool shared at {path} has {size} bytes instead of {needed}")
        mapping = mmap.mmap(fd, size, mmap.MAP_SHARED, mmap.PROT_READ)
    finally:
        os.close(fd)
    pages: Bytes = np.frombuffer(mapping, dtype=np.uint8, count=needed).reshape(welcome.pages, welcome.page_bytes)
    return pages
