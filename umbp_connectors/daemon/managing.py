"""What somebody at the command line has the daemon forget (law L10)."""

from __future__ import annotations

from typing import Annotated

import msgspec

from umbp_connectors.pool.sharing.messages import Key, Natural, Text
from umbp_core.ids import IDENTITY_BYTES

KEYS = 1 << 12
"""Keys of one request, at most."""


class Manage(msgspec.Struct, array_like=True, frozen=True, tag=45):
    """A first frame: this connection is about the pool with this digest of an identity, and is no client of it.

    Its SSD tier has to lie in ``folder``.  The answer is a ``Count``, as to each :class:`Evict`, ``Clear`` and
    ``Flush`` that follows.
    """

    revision: Natural
    identity: Annotated[bytes, msgspec.Meta(min_length=IDENTITY_BYTES, max_length=IDENTITY_BYTES)]
    folder: Text


class Evict(msgspec.Struct, array_like=True, frozen=True, tag=46):
    """Forget these, in memory and on SSD.  The answer: how many of them there were."""

    keys: Annotated[list[Key], msgspec.Meta(max_length=KEYS)]
