"""A question from outside what objects the daemon holds, and its answer (law L10)."""

from __future__ import annotations

from typing import Annotated

import msgspec

from umbp_connectors.pool.sharing.messages import Natural, Text

OBJECTS = 4096
"""Objects of one answer, at most: what a frame has room for."""
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
