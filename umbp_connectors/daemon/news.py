"""What a pool of the daemon holds, told as it changes: the question from outside, and what comes then (law L10).

A connection that begins with :class:`Follow` only listens.  :class:`Listed` messages say all that there is, then
:class:`Changed` messages what happened meanwhile and happens from then on; both may say what is so already.  When too
much happens at once, everything is listed anew.
"""

from __future__ import annotations

from typing import Annotated

import msgspec

from umbp_connectors.pool.sharing.messages import Key, Natural
from umbp_core.ids import IDENTITY_BYTES
from umbp_core.tiers import Tier

KEYS = 1 << 13
"""Keys of one message, at most."""

Keys = Annotated[list[Key], msgspec.Meta(max_length=KEYS)]


class Follow(msgspec.Struct, array_like=True, frozen=True, tag=42):
    """A first frame, and the only one of its connection: tell me of the pool with this digest of an identity."""

    revision: Natural
    identity: Annotated[bytes, msgspec.Meta(min_length=IDENTITY_BYTES, max_length=IDENTITY_BYTES)]


class Listed(msgspec.Struct, array_like=True, frozen=True, tag=43):
    """``keys`` can be read from ``tier``.  After the ``last`` message of a listing nothing else can."""

    tier: Tier
    keys: Keys
    last: bool


class Turn(msgspec.Struct, array_like=True, frozen=True):
    """``keys`` came to ``tier``, or left it."""

    came: bool
    tier: Tier
    keys: Keys


class Changed(msgspec.Struct, array_like=True, frozen=True, tag=44):
    """This happened, in this order.  Nothing: the daemon is there."""

    turns: Annotated[list[Turn], msgspec.Meta(max_length=KEYS)]


News = Listed | Changed
