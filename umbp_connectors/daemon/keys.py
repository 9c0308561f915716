"""Keys that objects in a daemon may have."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

import msgspec

from umbp_connectors.pool.sharing.messages import KEY_BYTES, Key

_KEYS = list[Key]


def checked(keys: Sequence[bytes]) -> Sequence[bytes]:
    """``keys``.  Raises ``ValueError`` for one that no object in a daemon has."""
    with contextlib.suppress(msgspec.ValidationError):  # which does not say whether it is the length or the type
        msgspec.convert(keys, _KEYS)
        return keys
    lengths = set(map(len, keys))
    if lengths and not 0 < min(lengths) <= max(lengths) <= KEY_BYTES:
        raise ValueError(f"the key of an object in a daemon has 1 to {KEY_BYTES} bytes")
    return keys
