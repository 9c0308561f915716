"""Pages of the daemon for an engine whose ranks copy by themselves: what vLLM's leader and its ranks need.

The leader has a :class:`PageClient`: it takes pages before it knows what will be written there, publishes them under
keys, and borrows what others published.  Each rank has a :class:`RankArena`: its stripe of every page, mapped.  Both
carry the token of their engine, to which everything belongs that the leader takes and borrows: it ends with the last
of their connections, so that nobody else gets a page which a rank may still write to when its leader is dead.

An object has a part for each stripe, all of the same size.  With one stripe it is the object that any other client of
the same identity stores and finds.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import msgspec

from umbp_connectors.daemon import messages
from umbp_connectors.daemon.doors import Door
from umbp_connectors.daemon.link import Link, attach
from umbp_connectors.daemon.mapping import MappedArena
from umbp_connectors.daemon.messages import Attach, Found, NewObject, Place, TierFill
from umbp_connectors.pool.buffers import Bytes, round_up
from umbp_connectors.pool.outcomes import PutStatus
from umbp_connectors.pool.slab import ALIGNMENT
from umbp_connectors.pool.stripes import Stripes, group_identity
from umbp_core.errors import ConfigError, StateError, TierUnavailable, UmbpError
from umbp_core.ids import Identity

__all__ = ["DaemonArena", "Found", "NewObject", "PageClient", "Place", "RankArena", "WantedPages", "engine_token"]


class DaemonArena(msgspec.Struct, frozen=True):
    """The memory of a pool, as its ranks have it mapped.

    ``name`` differs for each life of the pool.  ``page_bytes`` are those of one stripe.  What was borrowed may change
    ``lease_s`` seconds after it was asked for: what is copied later does not count.  ``objects`` is how many of them
    one call of :meth:`PageClient.borrow` answers about at most.

    ``known`` says whether the pool is the one of the client's connection before, and still holds what was taken and
    borrowed over it.  Then ``taken`` are the pages, without keys, that are the client's still: not more than it was
    told of, and without those that were published when the answer was lost.  Otherwise all of it is void.
    """

    name: bytes
    pages: int
    page_bytes: int
    stripes: int
    lease_s: float
    objects: int
    known: bool = False
    taken: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class WantedPages:
    """Which daemon and whose objects; the same for an engine's leader and all its ranks.

    ``identities`` are those of the parts of an object, one for each stripe.  ``object_bytes`` is the largest part.
    ``dram_bytes`` is asked for, for all parts together, should the daemon have no such pool yet.  ``token`` is
    :func:`engine_token`.  ``label`` is what ``umbp daemon --status`` calls the engine.
    """

    door: Door
    identities: tuple[Identity, ...]
    object_bytes: int
    dram_bytes: int
    token: bytes
    label: str = ""
    ssd_share: float = 1.0

    @property
    def page_bytes(self) -> int:
        """Of one stripe."""
        return round_up(self.object_bytes, ALIGNMENT)

    @property
    def identity(self) -> Identity:
        """What the objects with all their parts have in common.  Raises ``ConfigError`` without any part."""
        if not 0 < len(self.identities) <= messages.STRIPES:
            raise ConfigError(f"an object has 1 to {messages.STRIPES} parts, not {len(self.identities)}")
        return group_identity(self.identities)

    @property
    def stripes(self) -> Stripes:
        """How a page is divided."""
        return Stripes(tuple(identity.digest for identity in self.identities), self.page_bytes)

    def greeting(self, life: bytes = b"", turn: int = 0) -> Attach:
        """What a connection says first."""
        identity, prefixes = self.identity, self.stripes.prefixes
        return Attach(
            messages.REVISION,
            self.token,
            identity.namespace,
            identity.layout,
            messages.scope_of(identity),
            self.object_bytes,
            self.dram_bytes,
            0,
            1,
            self.ssd_share,
            b"",
            self.label or f"process {os.getpid()}",
            list(prefixes),
            life,
            turn,
        )


def engine_token(engine_id: str) -> bytes:
    """16 bytes that stand for one engine: ``engine_id`` has to differ for each start of it."""
    return hashlib.sha256(b"umbp engine " + engine_id.encode()).digest()[: messages.TOKEN_BYTES]


class PageClient:
    """What an engine's leader says to the daemon.  One thread at a time.

    Each call but :meth:`close` has a ``deadline`` in monotonic seconds and raises ``OSError`` (``TimeoutError`` when
    it is over), ``WireError`` or ``UmbpError``.  The connection is closed then, and :meth:`connect` may be called
    again; what it finds is in its answer.
    """

    def __init__(self, wanted: WantedPages) -> None:
        self._wanted = wanted
        self._life = os.urandom(messages.TOKEN_BYTES)
        self._link: Link | None = None
        self._sequence = 0
        self._turn = 0
        self._name = b""
        self._taken: set[int] = set()

    def connect(self, deadline: float) -> DaemonArena:
        """Connect, anew if there is a connection.  Which of the pages taken before are still ours, the answer says."""
        self.close()
        wanted = self._wanted
        self._turn += 1
        greeting = wanted.greeting(self._life, self._turn)
        link = attach(wanted.door, greeting, None, False, deadline, self._sequence)
        self._link = link
        try:
            welcome = link.welcome
            link.arena.close()
            _check_pages(wanted, welcome.page_bytes)
            taken = link.keep_pages(sorted(self._taken) if welcome.arena == self._name else [], deadline)
        except (OSError, UmbpError):
            self.close()
            raise
        known = taken.held and welcome.arena == self._name
        self._name, self._taken = welcome.arena, set(taken.pages)
        return DaemonArena(
            welcome.arena,
            welcome.pages,
            wanted.page_bytes,
            len(wanted.identities),
            welcome.lease_ms / 1000,
            welcome.objects,
            known,
            tuple(taken.pages) if known else (),
        )

    def take_pages(self, count: int, deadline: float) -> list[int]:
        """Up to ``count`` pages that have no key and are ours until they are published or returned.

        Fewer when the daemon has no more to give, or this engine has its part: what is taken and what is borrowed is
        half of the arena at most, divided among all engines.
        """
        with self._calling() as link:
            count = min(count, messages.OBJECTS, messages.PAGES - len(self._taken))
            pages = link.take_pages(count, deadline)
        self._taken.update(pages)
        return pages

    def return_pages(self, pages: Iterable[int], deadline: float) -> None:
        """Nobody writes to ``pages`` any more.  Does not wait for an answer.

        Raises ``StateError`` for a page that is not ours.
        """
        going = sorted(set(pages))
        self._check(going)
        with self._calling() as link:
            for start in range(0, len(going), messages.PAGES):
                link.return_pages(going[start : start + messages.PAGES], deadline)
        self._taken.difference_update(going)

    def publish(self, objects: Sequence[NewObject], deadline: float) -> list[PutStatus]:
        """Make readable what was written.  ``STORED``: the page is the pool's now; otherwise it stays ours.

        ``PRESENT``: somebody else was first.  ``NO_ROOM``: the pool was cleared after the page was taken, so that
        what is in it may be too old; it can be used again.  ``TOO_LARGE``: empty, or larger than a stripe.  Raises
        ``StateError`` for a page that is not ours.
        """
        self._check([each.page for each in objects])
        statuses: list[PutStatus] = []
        with self._calling() as link:
            for start in range(0, len(objects), messages.OBJECTS):
                part = objects[start : start + messages.OBJECTS]
                found = [messages.PUBLISHED[number] for number in link.publish_pages(part, deadline)]
                stored = {each.page for each, status in zip(part, found, strict=True) if status is PutStatus.STORED}
                self._taken -= stored
                statuses += found
        return statuses

    def look_up(self, keys: Sequence[bytes], prefix: bool, deadline: float) -> Found:
        """How many of ``keys`` from the first on can be read; unless only this ``prefix`` is asked for, of each."""
        count, there = 0, b""
        with self._calling() as link:
            for start in range(0, len(keys), messages.KEYS):
                part = keys[start : start + messages.KEYS]
                found = link.look_up(part, prefix, deadline)
                count += found.prefix if count == start else 0
                there += found.there
                if prefix and count < start + len(part):
                    break
        return Found(count, there)

    def borrow(self, keys: Sequence[bytes], deadline: float) -> tuple[int, list[Place]]:
        """The number of a loan, and where ``keys``, or the first of them, lie until :meth:`give_back`.

        ``status`` of a place is one of ``messages.LENT``; unless that is a hit, the rest means nothing.  ``nbytes`` is
        the size of each part, ``checksum`` has 16 bytes for each stripe.  What is on SSD only is brought to DRAM,
        as far as the deadline allows; it takes a little longer than that only when the daemon hangs.
        """
        stripes, most = self._wanted.stripes, self._wanted.page_bytes
        with self._calling() as link:
            number, places = link.borrow(keys[: link.welcome.objects], deadline)
        return number, [
            msgspec.structs.replace(place, nbytes=stripes.part(place.nbytes))
            if messages.LENT[place.status].hit and 0 < stripes.part(place.nbytes) <= most
            else Place(place.status if not messages.LENT[place.status].hit else 0, 0, 0, b"")
            for place in places
        ]

    def give_back(self, number: int, deadline: float) -> None:
        """End a loan; one that has ended by itself is no mistake.  Does not wait for an answer."""
        with self._calling() as link:
            link.give_back(number, deadline)

    def doubt(self, keys: Sequence[bytes], deadline: float) -> None:
        """Have the daemon verify ``keys``, which did not verify in a rank, and forget what is bad."""
        with self._calling() as link:
            for start in range(0, len(keys), messages.OBJECTS):
                link.doubt(keys[start : start + messages.OBJECTS], deadline)

    def clear(self, deadline: float) -> int:
        """Forget every object, those of other engines of this identity too; returns how many copies there were."""
        with self._calling() as link:
            return link.clear(deadline)

    def fills(self, deadline: float) -> Sequence[TierFill]:
        """How full each tier is that the pool has, in its pages: of all stripes together."""
        with self._calling() as link:
            return link.stats(deadline).fills

    def close(self) -> None:
        """Close the connection; idempotent.  Where ranks have theirs still, what was taken waits for them or us."""
        link, self._link = self._link, None
        if link is not None:
            self._sequence = link.sequence
            link.close()

    def connected(self) -> Link:
        """The connection.  Raises ``StateError`` when there is none."""
        if self._link is None:
            raise StateError("there is no connection to the daemon; call connect() first")
        return self._link

    @contextlib.contextmanager
    def _calling(self) -> Iterator[Link]:
        """The connection, which is closed when the call over it fails."""
        with contextlib.ExitStack() as failed:
            failed.callback(self.close)
            yield self.connected()
            failed.pop_all()

    def _check(self, pages: Sequence[int]) -> None:
        if not self._taken.issuperset(pages) or len(set(pages)) < len(pages):
            self.close()
            raise StateError("pages are published or returned that are not ours, or twice; connect() says which are")


class RankArena:
    """A rank's stripe of the daemon's pages, mapped for reading and writing.

    Its connection stays open as long as it may copy: what the leader has taken and borrowed ends with the last one.
    When the daemon ends, the memory stays what it is, and nobody else sees it; :meth:`open` maps that of the next one.
    One thread at a time.
    """

    def __init__(self, wanted: WantedPages, stripe: int = 0, prefault: bool = True) -> None:
        self._wanted = wanted
        self._stripe = stripe
        self._prefault = prefault
        self._link: Link | None = None

    def open(self, deadline: float) -> None:
        """Connect and map, anew if that was done before.  Raises as a :class:`PageClient` does."""
        self.close()
        wanted = self._wanted
        if not 0 <= self._stripe < len(wanted.identities):
            raise ConfigError(f"stripe {self._stripe} of objects that have {len(wanted.identities)}")
        link = attach(wanted.door, wanted.greeting(), None, self._prefault, deadline)
        try:
            _check_pages(wanted, link.welcome.page_bytes)
        except UmbpError:
            link.arena.close()
            link.close()
            raise
        self._link = link

    @property
    def name(self) -> bytes:
        """That of the :class:`DaemonArena`.  Raises ``StateError`` when it is not open."""
        return self._opened().name

    @property
    def pages(self) -> Bytes:
        """This rank's part of every page: shape (pages, page_bytes), rows apart by ``stripes * page_bytes``.

        Row ``i`` begins at byte ``(i * stripes + stripe) * page_bytes`` of the arena (:attr:`whole`).  Raises
        ``StateError`` when it is not open.
        """
        width = self._wanted.page_bytes
        return self._opened().pages[:, self._stripe * width : (self._stripe + 1) * width]

    @property
    def whole(self) -> Bytes:
        """All of the arena, shape (pages, stripes * page_bytes), contiguous.  Raises ``StateError`` when not open."""
        return self._opened().pages

    def wait_present(self, timeout: float) -> bool:
        """Wait until the memory is present in this process, for at most ``timeout`` seconds."""
        return self._opened().wait_present(timeout)

    def close(self) -> None:
        """End the connection: nothing is copied any more.  Arrays stay what they are.  Idempotent."""
        link, self._link = self._link, None
        if link is not None:
            link.arena.close()
            link.close()

    def _opened(self) -> MappedArena:
        if self._link is None:
            raise StateError("this arena is not open; call open() first")
        return self._link.arena


def _check_pages(wanted: WantedPages, page_bytes: int) -> None:
    if page_bytes != wanted.page_bytes * len(wanted.identities):
        raise TierUnavailable(
            f"the daemon has pages of {page_bytes} bytes, and {len(wanted.identities)} x {wanted.page_bytes} are wanted"
        )
