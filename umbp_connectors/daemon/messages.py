"""What a client and the daemon say to each other, and how much of it (law L10).

Frames are those of :mod:`umbp_core.wire.frames`, in session 0.  A client's first frame attaches the connection to a
pool, or asks for an overview; the welcome carries the arena's descriptor unless the client has mapped it already, or
names it, over TCP, where :mod:`umbp_connectors.daemon.knocking` comes before.
Then each request has one reply, except :class:`Return` and :class:`ReturnPages`.  The number of a loan or a grant is
the sequence of its request; it ends when it is returned or published, and with its connection.

Who copies by itself on several ranks attaches with a ``life``.  What it holds is not its connection's then: it may come
back with the same life and finds it again, and otherwise it ends with the last of the connections that carried the same
token when its own ended.  Sequences go on over the connections of a life.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated, TypeVar

import msgspec

from umbp_connectors.daemon.listing import FetchPart, ListObjects, VerifyObjects
from umbp_connectors.daemon.managing import Evict, Manage
from umbp_connectors.daemon.news import Follow, News
from umbp_connectors.pool.outcomes import GetStatus, PutStatus
from umbp_connectors.pool.sharing.messages import Found, Key, Lookup, Natural, Refusal, Text, decode_as, encode
from umbp_core.ids import IDENTITY_BYTES, Identity, RankScope
from umbp_core.ops import CHECKSUM_BYTES
from umbp_core.wire.codes import ErrorCode, WireError

__all__ = ["Found", "Lookup", "Refusal", "decode_as", "encode"]

REVISION = 2
GREETING_BYTES = 8 << 10
FRAME_BYTES = 4 << 20
"""Payload of any later frame."""
KEYS = 1 << 14
"""Keys of one lookup."""
OBJECTS = 512
"""Objects of one loan or grant."""
HELD = 256
"""Loans and grants of one client at a time: beyond, it is lent and granted nothing."""
TOKEN_BYTES = 16
STRIPES = 128
"""Parts of an object, at most."""
PAGES = 1 << 18
"""Pages without keys of one client, at most: what one frame has room for."""
TIMEOUT_MS = 3_600_000

LENT = (GetStatus.MISS, GetStatus.DRAM, GetStatus.SSD, GetStatus.CORRUPT, GetStatus.TIMED_OUT)
"""The statuses of lent objects, by their number."""
NOT_GRANTED = (PutStatus.PRESENT, PutStatus.NO_ROOM, PutStatus.TOO_LARGE)
"""Why there is no page: the first stands for -1, and so on."""
PUBLISHED = (PutStatus.STORED, PutStatus.PRESENT, PutStatus.NO_ROOM, PutStatus.TOO_LARGE)
"""What becomes of an object whose page had no key, by number."""

Token = Annotated[bytes, msgspec.Meta(min_length=TOKEN_BYTES, max_length=TOKEN_BYTES)]
Size = Annotated[int, msgspec.Meta(gt=0, lt=1 << 48)]
Small = Annotated[int, msgspec.Meta(ge=0, lt=1 << 20)]
Keys = Annotated[list[Key], msgspec.Meta(max_length=OBJECTS)]
Naturals = Annotated[list[Natural], msgspec.Meta(max_length=OBJECTS)]
Prefix = Annotated[bytes, msgspec.Meta(min_length=IDENTITY_BYTES, max_length=IDENTITY_BYTES)]
Pages = Annotated[list[Natural], msgspec.Meta(max_length=PAGES)]
Milliseconds = Annotated[int, msgspec.Meta(ge=0, le=TIMEOUT_MS)]


class Scope(msgspec.Struct, array_like=True, frozen=True):
    """A :class:`~umbp_core.ids.RankScope`, field by field."""

    tp_rank: Small
    tp_size: Small
    pp_rank: Small
    pp_size: Small
    cp_rank: Small
    cp_size: Small
    replicated: bool
    dcp_rank: Small
    dcp_size: Small
    heads: tuple[Small, Small] | None


class Attach(msgspec.Struct, array_like=True, frozen=True, tag=25):
    """A client's first frame: whose objects it wants, and how large a pool it would have, were there none yet.

    ``client`` is the same for all connections of one client.  ``mapped`` names the arena that it has mapped already, if
    any.  ``rank``, ``ranks`` and ``ssd_share`` are those of ``LocalPoolConfig``.  ``prefixes`` are the digests of the
    identities of an object's parts, where several ranks have one each: ``layout`` and ``scope`` follow from them then.
    ``life``, where it is not empty, is what holds what this connection takes and borrows; ``turn`` grows with each
    connection of a life, so that one that was given up while the daemon hung does not speak for it afterwards.
    """

    revision: Natural
    client: Token
    namespace: Text
    layout: Annotated[bytes, msgspec.Meta(min_length=32, max_length=32)]
    scope: Scope
    object_bytes: Size
    dram_bytes: Size
    rank: Small
    ranks: Annotated[int, msgspec.Meta(gt=0, lt=1 << 20)]
    ssd_share: Annotated[float, msgspec.Meta(gt=0, le=1)]
    mapped: Annotated[bytes, msgspec.Meta(max_length=TOKEN_BYTES)]
    label: Text
    prefixes: Annotated[list[Prefix], msgspec.Meta(max_length=STRIPES)] = []
    life: Annotated[bytes, msgspec.Meta(max_length=TOKEN_BYTES)] = b""
    turn: Natural = 0

    @property
    def identity(self) -> Identity:
        """What all objects of the pool have in common."""
        return Identity(self.namespace, self.layout, RankScope(**msgspec.structs.asdict(self.scope)))


class Inspect(msgspec.Struct, array_like=True, frozen=True, tag=26):
    """Another first frame, and the only one of its connection: what is there?"""

    revision: Natural


class NamedMemory(msgspec.Struct, array_like=True, frozen=True):
    """Where a client over TCP, which no descriptor can be sent to, finds the arena: descriptor ``fd`` of the daemon.

    It is the file of this ``inode`` on this ``device``, or it is not the arena.
    """

    fd: Natural
    device: Natural
    inode: Natural


class Welcome(msgspec.Struct, array_like=True, frozen=True, tag=27):
    """The daemon's first frame: which arena, how it is cut, how many objects a loan or grant may have.

    What was lent may change ``lease_ms`` milliseconds after it was asked for: what is copied later does not count.
    ``pid`` is the daemon's, and ``memory`` for clients over TCP that have not mapped the arena already.  With
    ``strict`` a put counts when :class:`Secure` says that it is on SSD.
    """

    arena: Token
    page_bytes: Size
    pages: Size
    objects: Annotated[int, msgspec.Meta(gt=0, le=OBJECTS)]
    lease_ms: Annotated[int, msgspec.Meta(gt=0, le=TIMEOUT_MS)]
    pid: Natural
    memory: NamedMemory | None = None
    strict: bool = False


class Borrow(msgspec.Struct, array_like=True, frozen=True, tag=12):
    """Lend ``keys``, within so many milliseconds."""

    keys: Keys
    timeout_ms: Milliseconds


class Place(msgspec.Struct, array_like=True, frozen=True):
    """Where a lent object lies; see :class:`umbp_connectors.pool.lending.LentObject`."""

    status: Annotated[int, msgspec.Meta(ge=0, lt=len(LENT))]
    page: Natural
    nbytes: Natural
    checksum: Annotated[bytes, msgspec.Meta(max_length=CHECKSUM_BYTES * STRIPES)]


class Lent(msgspec.Struct, array_like=True, frozen=True, tag=13):
    """The answer, in the order of the keys; about the first of them only, where the client has too much already."""

    places: Annotated[list[Place], msgspec.Meta(max_length=OBJECTS)]


class Reserve(msgspec.Struct, array_like=True, frozen=True, tag=14):
    """Grant pages to write ``keys`` of these sizes into."""

    keys: Keys
    sizes: Naturals
    depths: Naturals


class Granted(msgspec.Struct, array_like=True, frozen=True, tag=15):
    """The answer, in the order of the keys: a page, or a number below 0 (``NOT_GRANTED``).  May be short, too."""

    places: Annotated[
        list[Annotated[int, msgspec.Meta(ge=-len(NOT_GRANTED), lt=1 << 48)]], msgspec.Meta(max_length=OBJECTS)
    ]


class Publish(msgspec.Struct, array_like=True, frozen=True, tag=16):
    """The objects of grant ``number`` are written: their checksums in its order, empty where one is not."""

    number: Natural
    checksums: Annotated[
        list[Annotated[bytes, msgspec.Meta(max_length=CHECKSUM_BYTES)]], msgspec.Meta(max_length=OBJECTS)
    ]


class Return(msgspec.Struct, array_like=True, frozen=True, tag=17):
    """The loan or grant ``number`` is over.  There is no answer."""

    number: Natural


class TakePages(msgspec.Struct, array_like=True, frozen=True, tag=28):
    """Give me so many pages to write to; I do not know the keys yet."""

    count: Annotated[int, msgspec.Meta(ge=0, le=PAGES)]


class KeepPages(msgspec.Struct, array_like=True, frozen=True, tag=29):
    """After a connection broke: of the pages that I had I know these.  The others may go."""

    pages: Pages


class TakenPages(msgspec.Struct, array_like=True, frozen=True, tag=30):
    """The answer to both: pages that have no key and are the client's (of :class:`TakePages` the new ones only).

    ``held`` is whether the daemon knew of anything that this client holds, when it attached.
    """

    pages: Pages
    held: bool


class ReturnPages(msgspec.Struct, array_like=True, frozen=True, tag=31):
    """Nobody writes to these pages any more.  There is no answer."""

    pages: Pages


class NewObject(msgspec.Struct, array_like=True, frozen=True):
    """An object in a page that had no key.

    ``nbytes`` is the size of one part of it, ``depth`` its place in its prefix chain; ``checksums`` has 16 bytes for
    each part.
    """

    page: Natural
    key: Key
    nbytes: Natural
    depth: Natural
    checksums: Annotated[bytes, msgspec.Meta(max_length=CHECKSUM_BYTES * STRIPES)]


class PublishPages(msgspec.Struct, array_like=True, frozen=True, tag=32):
    """These are written."""

    objects: Annotated[list[NewObject], msgspec.Meta(max_length=OBJECTS)]


class Published(msgspec.Struct, array_like=True, frozen=True, tag=33):
    """The answer: what became of each (``PUBLISHED``).  Only the pages of the first kind are the pool's now."""

    statuses: Annotated[list[Annotated[int, msgspec.Meta(ge=0, lt=len(PUBLISHED))]], msgspec.Meta(max_length=OBJECTS)]


class Doubt(msgspec.Struct, array_like=True, frozen=True, tag=18):
    """These did not verify in the client; the daemon is to look itself."""

    keys: Keys


class Clear(msgspec.Struct, array_like=True, frozen=True, tag=19):
    """Forget every object of the pool."""


class Flush(msgspec.Struct, array_like=True, frozen=True, tag=20):
    """Bring what was stored to SSD, within so many milliseconds."""

    timeout_ms: Milliseconds


class Secure(msgspec.Struct, array_like=True, frozen=True, tag=34):
    """The same, and say which of ``keys`` are there (:class:`Found`, in their order)."""

    keys: Keys
    timeout_ms: Milliseconds


class Count(msgspec.Struct, array_like=True, frozen=True, tag=21):
    """The answer to several: how many, or 0 and 1 for no and yes."""

    count: Natural


class AskStats(msgspec.Struct, array_like=True, frozen=True, tag=22):
    """How full are the pool's tiers?"""


class TierFill(msgspec.Struct, frozen=True):
    """A ``TierStats`` of tier number ``tier``."""

    tier: Small
    total_pages: Natural
    free_pages: Natural
    objects: Natural
    pinned: Natural
    reserved: Natural
    nbytes: Natural = 0


class PoolStats(msgspec.Struct, array_like=True, frozen=True, tag=23):
    """The answer: the pool's tiers, and its counters by the names of ``PoolCounters`` (``put_stored`` and the like)."""

    fills: Annotated[list[TierFill], msgspec.Meta(max_length=8)]
    counters: dict[Annotated[str, msgspec.Meta(max_length=64)], Natural]


class PoolView(msgspec.Struct, frozen=True):
    """One pool of an overview."""

    identity: str
    namespace: str
    page_bytes: int
    dram_bytes: int
    clients: list[str]
    fills: list[TierFill]
    counters: dict[str, int]


class Overview(msgspec.Struct, frozen=True, tag=24):
    """The answer to :class:`Inspect`."""

    pid: Natural
    dram_bytes: Natural
    pools: list[PoolView]


Request = (
    Lookup
    | Borrow
    | Reserve
    | Publish
    | Return
    | Doubt
    | Clear
    | Flush
    | Secure
    | AskStats
    | TakePages
    | KeepPages
    | ReturnPages
    | PublishPages
)
Order = Evict | Clear | Flush
Greeting = Attach | Inspect | ListObjects | VerifyObjects | FetchPart | Follow | Manage

Said = TypeVar("Said")

_REQUESTS: msgspec.msgpack.Decoder[Request] = msgspec.msgpack.Decoder(Request)
_GREETINGS: msgspec.msgpack.Decoder[Greeting] = msgspec.msgpack.Decoder(Greeting)
_NEWS: msgspec.msgpack.Decoder[News] = msgspec.msgpack.Decoder(News)
_ORDERS: msgspec.msgpack.Decoder[Order] = msgspec.msgpack.Decoder(Order)


def scope_of(identity: Identity) -> Scope:
    """The scope of ``identity`` as a message has it."""
    return Scope(**asdict(identity.rank))


def decode_greeting(payload: memoryview) -> Greeting:
    """A client's first message.  Raises ``WireError``."""
    return _decode(_GREETINGS, payload, "a greeting is")


def decode_news(payload: memoryview) -> News:
    """What a daemon says to one who follows.  Raises ``WireError``."""
    return _decode(_NEWS, payload, "news are")


def decode_order(payload: memoryview) -> Order:
    """What somebody says who manages a pool.  Raises ``WireError``."""
    return _decode(_ORDERS, payload, "an order is")


def decode_request(payload: memoryview) -> Request:
    """A client's request.  Raises ``WireError``."""
    return _decode(_REQUESTS, payload, "a request is")


def _decode(decoder: msgspec.msgpack.Decoder[Said], payload: memoryview, what: str) -> Said:
    try:
        return decoder.decode(payload)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise WireError(ErrorCode.MALFORMED, f"{what} not what it should look like: {error}") from None
