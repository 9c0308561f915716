"""Questions from outside what the daemon holds, if it is sound, and for an object's bytes; its answers (law L10)."""

from __future__ import annotations

from typing import Annotated

import msgspec

from umbp_connectors.pool.sharing.messages import Key, Natural, Text

OBJECTS = 4096
"""Objects of one answer, at most: what a frame has room for."""
NAMED = 256
"""Keys of a pool in an answer about what is not sound, at most."""
VERIFY_MS = 3_600_000
PART_BYTES = 1 << 20
"""Bytes of an object in an answer, at most."""
Start = Annotated[bytes, msgspec.Meta(max_length=512)]


class ListObjects(msgspec.Struct, array_like=True, frozen=True, tag=40):
    """A first frame, and the only one of its connection: which objects can be read from ``tier``?

    Those of pools whose namespace contains ``name``, whose keys begin with one of ``starts`` (with anything, when there
    are none), of ``least`` to ``most`` bytes; the latest ``limit`` of each pool.
    """

    revision: Natural
    tier: Natural
    name: Text = ""
    starts: Annotated[list[Start], msgspec.Meta(max_length=4)] = []
    least: Natural = 0
    most: Natural = (1 << 62) - 1
    limit: Annotated[int, msgspec.Meta(ge=0, le=OBJECTS)] = OBJECTS


class ListedObject(msgspec.Struct, frozen=True):
    """One of them: its pool by the first digits of its identity, its place in its prefix chain, and its first page."""

    key: bytes
    nbytes: int
    depth: int
    page: int
    pool: str
    namespace: str


class Listing(msgspec.Struct, array_like=True, frozen=True, tag=41):
    """The answer.  ``found`` counts also those that the limit left out."""

    found: Natural
    objects: Annotated[list[ListedObject], msgspec.Meta(max_length=OBJECTS)]


class VerifyObjects(msgspec.Struct, array_like=True, frozen=True, tag=47):
    """A first frame, and the only one of its connection: is what lies in memory what was stored there?

    In pools whose namespace contains ``name``, within so many milliseconds.  What is not is forgotten.
    """

    revision: Natural
    name: Text
    timeout_ms: Annotated[int, msgspec.Meta(ge=0, le=VERIFY_MS)]


class VerifiedPool(msgspec.Struct, frozen=True):
    """Of one pool, how many objects and bytes were looked at, and the keys of the first that were not sound."""

    pool: str
    namespace: str
    objects: Natural
    nbytes: Natural
    unsound: Natural
    keys: Annotated[list[Key], msgspec.Meta(max_length=NAMED)]


class Verified(msgspec.Struct, array_like=True, frozen=True, tag=48):
    """The answer; ``complete`` unless time ran out."""

    complete: bool
    pools: Annotated[list[VerifiedPool], msgspec.Meta(max_length=OBJECTS)]


class FetchPart(msgspec.Struct, array_like=True, frozen=True, tag=49):
    """A first frame, and the only one of its connection: the bytes from ``start`` on of an object in memory.

    In pools whose namespace contains ``name``.
    """

    revision: Natural
    name: Text
    key: Key
    start: Natural


class FetchedPart(msgspec.Struct, array_like=True, frozen=True, tag=50):
    """The answer: how many pools have the object, and if it is one, what it has in all, its checksum, and the bytes.

    What is not what was stored counts as not there, and is forgotten.
    """

    pools: Natural
    nbytes: Natural = 0
    checksum: Annotated[bytes, msgspec.Meta(max_length=1 << 14)] = b""
    data: Annotated[bytes, msgspec.Meta(max_length=PART_BYTES)] = b""
