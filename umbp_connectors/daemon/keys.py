"""Keys that objects in a daemon may have."""

from __future__ import annotations

from collections.abc import Sequence

from umbp_connectors.pool.sharing.messages import KEY_BYTES


def checked(keys: Sequence[bytes]) -> Sequence[bytes]:
    """``keys``.  Raises ``ValueError`` for one that no object in a daemon has."""
    lengths = set(map(len, keys))
    if lengths and not 0 < min(lengths) <= max(lengths) <= KEY_BYTES:
        raise ValueError(f"the key of an object in a daemon has 1 to {KEY_BYTES} bytes")
    return keys
