"""A client's connection to the daemon."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

from umbp_connectors.daemon import messages
from umbp_connectors.daemon.doors import Door, TcpDoor, dial
from umbp_connectors.daemon.listing import (
    VERIFY_MS,
    FetchedPart,
    FetchPart,
    Listing,
    ListObjects,
    Verified,
    VerifyObjects,
)
from umbp_connectors.daemon.managing import KEYS, Evict, Manage
from umbp_connectors.daemon.mapping import MappedArena, open_memory
from umbp_connectors.daemon.messages import (
    AskStats,
    Attach,
    Borrow,
    Clear,
    Count,
    Doubt,
    Flush,
    Found,
    Granted,
    Greeting,
    Inspect,
    KeepPages,
    Lent,
    Lookup,
    NewObject,
    Overview,
    Place,
    PoolStats,
    Publish,
    Published,
    PublishPages,
    Refusal,
    Reserve,
    Return,
    ReturnPages,
    Secure,
    TakenPages,
    TakePages,
    Welcome,
)
from umbp_connectors.daemon.news import Follow, News
from umbp_connectors.pool.sharing.sockets import FrameSocket
from umbp_core.errors import TierUnavailable
from umbp_core.wire.codes import ErrorCode, WireError
from umbp_core.wire.frames import FrameType

Told = TypeVar("Told", Overview, Listing, Verified, FetchedPart)
Reply = TypeVar("Reply", Found, Lent, Granted, Count, PoolStats, TakenPages, Published)

_DAEMONS_PART = 0.8
"""How much of a call's time the daemon gets to bring objects to DRAM: its answer must come while somebody listens."""


class Link:
    """An open connection, attached to a pool.  One thread at a time.

    Every call raises ``OSError`` (``TimeoutError`` at its deadline), ``WireError`` or ``UmbpError``; the link is of no
    use then and has to be closed, which ends all that was lent and granted over it.
    """

    def __init__(self, sock: FrameSocket, welcome: Welcome, arena: MappedArena, sequence: int = 0) -> None:
        self._socket = sock
        self.sequence = sequence
        """Of the request that was sent last; numbers of loans and grants are such."""
        self.welcome = welcome
        self.arena = arena

    def look_up(self, keys: Sequence[bytes], prefix: bool, deadline: float) -> Found:
        """What of ``keys`` (``messages.KEYS`` at most) can be read."""
        found = self._ask(Lookup(keys if isinstance(keys, list) else list(keys), prefix), Found, deadline)
        sound = prefix or (len(found.there) == len(keys) and not found.there.translate(None, b"\x00\x01"))
        if found.prefix > len(keys) or not sound:
            raise WireError(ErrorCode.MALFORMED, f"an answer about {len(keys)} keys speaks of others")
        return found

    def borrow(self, keys: Sequence[bytes], deadline: float) -> tuple[int, list[Place]]:
        """The number of a loan, and where ``keys`` lie, or the first of them; until :meth:`give_back`."""
        number = self.ask_loan(keys, deadline)
        return number, self.lent(number, len(keys), deadline)

    def ask_loan(self, keys: Sequence[bytes], deadline: float) -> int:
        """Ask where ``keys`` lie: the number of a loan, about which :meth:`lent` tells.

        Of several things that were asked, the answers have to be taken in the same order, with nothing else between.
        """
        return self._send(Borrow(list(keys), _daemons_part(deadline)), deadline)

    def lent(self, number: int, count: int, deadline: float) -> list[Place]:
        """Where the ``count`` objects of loan ``number`` lie, or the first of them; until :meth:`give_back`."""
        places = self._receive(number, Lent, deadline).places
        page_bytes, pages = self.welcome.page_bytes, self.welcome.pages
        sound = all(
            place.page < pages and place.nbytes <= page_bytes and place.status < len(messages.LENT) for place in places
        )
        if len(places) > count or not sound:
            raise WireError(ErrorCode.MALFORMED, f"an answer about {count} objects does not fit them or the arena")
        return places

    def ask_pages(self, keys: Sequence[bytes], sizes: Sequence[int], depths: Sequence[int], deadline: float) -> int:
        """Ask for pages for ``keys``: the number of a grant, about which :meth:`granted` tells; in order, as loans."""
        return self._send(Reserve(list(keys), list(sizes), list(depths)), deadline)

    def granted(self, number: int, count: int, deadline: float) -> list[int]:
        """The pages of grant ``number``, for its ``count`` keys or the first of them; until its end."""
        places = self._receive(number, Granted, deadline).places
        if len(places) > count or max(places, default=0) >= self.welcome.pages:
            raise WireError(ErrorCode.MALFORMED, f"an answer about {count} objects does not fit them or the arena")
        return places

    def publish(self, number: int, checksums: Sequence[bytes], deadline: float) -> bool:
        """End a grant: what has a checksum can be read from now on, if the answer is true."""
        return self.published(self.ask_publish(number, checksums, deadline), deadline)

    def ask_publish(self, number: int, checksums: Sequence[bytes], deadline: float) -> int:
        """The same without the answer, for which this is the number."""
        return self._send(Publish(number, list(checksums)), deadline)

    def published(self, number: int, deadline: float) -> bool:
        """The answer; in order, as those about loans."""
        return bool(self._receive(number, Count, deadline).count)

    def give_back(self, number: int, deadline: float) -> None:
        """End a loan or a grant.  Does not wait for the daemon."""
        self._send(Return(number), deadline)

    def take_pages(self, count: int, deadline: float) -> list[int]:
        """Pages to write to, without keys; may be fewer."""
        return self._taken(TakePages(count), count, deadline).pages

    def keep_pages(self, pages: Sequence[int], deadline: float) -> TakenPages:
        """Give back what an earlier connection of the same life took, but these; which of them are held still."""
        taken = self._taken(KeepPages(list(pages)), len(pages), deadline)
        if not set(taken.pages) <= set(pages):
            raise WireError(ErrorCode.MALFORMED, "an answer about pages speaks of others")
        return taken

    def return_pages(self, pages: Sequence[int], deadline: float) -> None:
        """Give pages without keys back.  Does not wait for the daemon."""
        self._send(ReturnPages(list(pages)), deadline)

    def publish_pages(self, objects: Sequence[NewObject], deadline: float) -> list[int]:
        """Publish what was written to pages without keys; the numbers of what became of them."""
        statuses = self._ask(PublishPages(list(objects)), Published, deadline).statuses
        if len(statuses) != len(objects):
            raise WireError(ErrorCode.MALFORMED, f"an answer about {len(objects)} objects speaks of {len(statuses)}")
        return statuses

    def doubt(self, keys: Sequence[bytes], deadline: float) -> None:
        """Have the daemon verify ``keys``, which did not verify here."""
        self._ask(Doubt(list(keys)), Count, deadline)

    def clear(self, deadline: float) -> int:
        """Forget everything; how much it was."""
        return self._ask(Clear(), Count, deadline).count

    def flush(self, timeout: float, deadline: float) -> bool:
        """Wait for the SSD for at most ``timeout`` seconds; whether all is there."""
        return bool(self._ask(Flush(min(messages.TIMEOUT_MS, int(1000 * timeout))), Count, deadline).count)

    def secure(self, keys: Sequence[bytes], deadline: float) -> list[bytes]:
        """Wait for the SSD; those of ``keys`` that are there then."""
        durable: list[bytes] = []
        for start in range(0, len(keys), messages.KEYS):
            part = keys[start : start + messages.KEYS]
            there = self._ask(Secure(list(part), _daemons_part(deadline)), Found, deadline).there
            if len(there) != len(part):
                raise WireError(ErrorCode.MALFORMED, f"an answer about {len(part)} keys speaks of others")
            durable += [key for key, found in zip(part, there, strict=True) if found]
        return durable

    def stats(self, deadline: float) -> PoolStats:
        """How full the pool is, and what happened in it."""
        return self._ask(AskStats(), PoolStats, deadline)

    def close(self) -> None:
        """End the connection."""
        self._socket.close()

    def _taken(self, request: TakePages | KeepPages, most: int, deadline: float) -> TakenPages:
        taken = self._ask(request, TakenPages, deadline)
        pages = taken.pages
        if len(pages) > most or len(set(pages)) < len(pages) or max(pages, default=0) >= self.welcome.pages:
            raise WireError(ErrorCode.MALFORMED, f"{len(pages)} pages were given that do not fit what was asked")
        return taken

    def _ask(self, request: messages.Request, kind: type[Reply], deadline: float) -> Reply:
        return self._receive(self._send(request, deadline), kind, deadline)

    def _receive(self, number: int, kind: type[Reply], deadline: float) -> Reply:
        what, sequence, payload = self._socket.receive(deadline)
        if what != FrameType.REPLY or sequence != number:
            raise WireError(ErrorCode.PROTOCOL, "an answer to nothing that was asked")
        return messages.decode_as(kind, payload)

    def _send(self, request: messages.Request, deadline: float) -> int:
        self.sequence += 1
        self._socket.send(FrameType.REQUEST, self.sequence, messages.encode(request), deadline)
        return self.sequence


def attach(
    door: Door, greeting: Attach, known: MappedArena | None, prefault: bool, deadline: float, sequence: int = 0
) -> Link:
    """A link to the pool that ``greeting`` names, of the daemon at ``door``.

    ``known`` is the arena that the greeting names as mapped.  Requests are numbered from ``sequence`` on.  Raises as
    the link does, and ``TierUnavailable`` when the daemon does not want this client.
    """
    with contextlib.ExitStack() as undo:
        sock = _greet(door, greeting, undo, deadline)
        kind, _, payload = sock.receive(deadline, with_fd=True)
        if kind != FrameType.HELLO:
            raise _refused(door, payload)
        welcome = messages.decode_as(Welcome, payload)
        fd = sock.take_fd()
        if fd is None and welcome.memory is not None and isinstance(door, TcpDoor):
            fd = open_memory(welcome.pid, welcome.memory)
        if fd is not None:
            arena = MappedArena(fd, welcome, prefault)
        elif known is not None and known.name == welcome.arena:
            arena = known
        else:
            raise TierUnavailable(f"the daemon at {door} offers no memory")
        sock.allow(messages.FRAME_BYTES)
        undo.pop_all()
    return Link(sock, welcome, arena, sequence)


class NewsLink:
    """An open connection over which a daemon tells what a pool holds.  One thread at a time, except :meth:`shut`."""

    def __init__(self, sock: FrameSocket) -> None:
        self._socket = sock

    def receive(self, deadline: float) -> News:
        """What it says next.  Raises as a :class:`Link` does, and ``TierUnavailable`` when it has no such pool."""
        kind, _, payload = self._socket.receive(deadline)
        if kind != FrameType.EVENT:
            raise TierUnavailable(f"the daemon refuses: {messages.decode_as(Refusal, payload).message}")
        return messages.decode_news(payload)

    def shut(self) -> None:
        """Wake whoever waits for news, from another thread."""
        self._socket.shut()

    def close(self) -> None:
        """End the connection."""
        self._socket.close()


def follow(door: Door, digest: bytes, deadline: float) -> NewsLink:
    """Ask the daemon at ``door`` for news of the pool with this digest of an identity.  Raises as a link does."""
    with contextlib.ExitStack() as undo:
        sock = _greet(door, Follow(messages.REVISION, digest), undo, deadline)
        sock.allow(messages.FRAME_BYTES)
        undo.pop_all()
    return NewsLink(sock)


class ManagingLink:
    """An open connection over which somebody manages a pool.  One thread.  Calls raise as those of a link do."""

    def __init__(self, sock: FrameSocket) -> None:
        self._socket = sock

    def evict(self, keys: Sequence[bytes], deadline: float) -> int:
        """Have these forgotten; how many of them there were."""
        parts = (list(keys[start : start + KEYS]) for start in range(0, len(keys), KEYS))
        return sum(self._order(Evict(part), deadline) for part in parts)

    def clear(self, deadline: float) -> int:
        """Have everything forgotten; how many copies there were."""
        return self._order(Clear(), deadline)

    def flush(self, timeout: float, deadline: float) -> bool:
        """Have it written down within ``timeout`` seconds; whether it is."""
        return bool(self._order(Flush(int(1000 * timeout)), deadline))

    def close(self) -> None:
        """End the connection."""
        self._socket.close()

    def _order(self, order: messages.Order, deadline: float) -> int:
        self._socket.send(FrameType.REQUEST, 0, messages.encode(order), deadline)
        kind, _, payload = self._socket.receive(deadline)
        if kind != FrameType.REPLY:
            raise WireError(ErrorCode.PROTOCOL, "an answer to nothing that was asked")
        return messages.decode_as(Count, payload).count


def manage(door: Door, digest: bytes, folder: Path, deadline: float) -> ManagingLink:
    """A connection to manage the pool with this digest of an identity, whose SSD tier lies in ``folder``.

    Raises as a link does, and ``TierUnavailable`` when the daemon at ``door`` has no such pool.
    """
    with contextlib.ExitStack() as undo:
        sock = _greet(door, Manage(messages.REVISION, digest, str(folder.resolve())), undo, deadline)
        kind, _, payload = sock.receive(deadline)
        if kind != FrameType.REPLY:
            raise _refused(door, payload)
        undo.pop_all()
    return ManagingLink(sock)


def inspect(door: Door, deadline: float) -> Overview:
    """What the daemon at ``door`` says about itself.  Raises as a link does."""
    return _ask(door, Inspect(messages.REVISION), Overview, deadline)


def list_objects(door: Door, wanted: ListObjects, deadline: float) -> Listing:
    """The objects of the daemon at ``door`` that ``wanted`` describes.  Raises as a link does."""
    return _ask(door, wanted, Listing, deadline)


def verify_objects(door: Door, name: str, timeout: float, deadline: float) -> Verified:
    """Have the daemon at ``door`` look for ``timeout`` seconds whether what it has in memory is what was stored.

    In pools whose namespace contains ``name``.  Raises as a link does.
    """
    wanted = VerifyObjects(messages.REVISION, name, min(VERIFY_MS, int(1000 * timeout)))
    return _ask(door, wanted, Verified, deadline)


def fetch_object(door: Door, name: str, key: bytes, deadline: float) -> tuple[int, bytes]:
    """How many pools of the daemon at ``door`` have the object in memory, and its bytes if it is one.

    Pools whose namespace contains ``name``.  An object that another one takes the place of meanwhile counts as not
    there.  Raises as a link does.
    """
    data, first = b"", None
    while True:
        part = _ask(door, FetchPart(messages.REVISION, name, key, len(data)), FetchedPart, deadline)
        first = first or part
        if part.pools != 1:
            return part.pools, b""
        if (part.nbytes, part.checksum) != (first.nbytes, first.checksum) or not part.data:
            return 0, b""
        data += part.data
        if len(data) >= part.nbytes:
            return 1, data


def _ask(
    door: Door, greeting: Inspect | ListObjects | VerifyObjects | FetchPart, kind: type[Told], deadline: float
) -> Told:
    """The only answer of a connection to the only question."""
    with contextlib.ExitStack() as undo:
        sock = _greet(door, greeting, undo, deadline)
        sock.allow(messages.FRAME_BYTES)
        answer, _, payload = sock.receive(deadline)
        if answer != FrameType.REPLY:
            raise _refused(door, payload)
        return messages.decode_as(kind, payload)


def _greet(door: Door, greeting: Greeting, undo: contextlib.ExitStack, deadline: float) -> FrameSocket:
    sock = dial(door, deadline)
    undo.callback(sock.close)
    sock.send(FrameType.HELLO, 0, messages.encode(greeting), deadline)
    return sock


def _refused(door: Door, payload: memoryview) -> TierUnavailable:
    return TierUnavailable(f"the daemon at {door} refuses: {messages.decode_as(Refusal, payload).message}")


def _daemons_part(deadline: float) -> int:
    """How many milliseconds the daemon may take for what is to be answered by ``deadline``."""
    return min(messages.TIMEOUT_MS, int(1000 * _DAEMONS_PART * max(0.0, deadline - time.monotonic())))
