"""What the callers of a daemon's client ask for, checked."""

from __future__ import annotations

from collections.abc import Sequence

from umbp_connectors.pool.batches import PutBatch
from umbp_connectors.pool.buffers import ScatteredSource
from umbp_connectors.pool.rows import views_of
from umbp_connectors.pool.sharing.messages import KEY_BYTES


def check_keys(keys: Sequence[bytes]) -> None:
    """Raises ``ValueError`` for keys that no object in a daemon has."""
    lengths = set(map(len, keys))
    if lengths and not 0 < min(lengths) <= max(lengths) <= KEY_BYTES:
        raise ValueError(f"the key of an object in a daemon has 1 to {KEY_BYTES} bytes")


def put_batch(
    keys: Sequence[bytes], buffers: Sequence[ScatteredSource], depths: Sequence[int] | None, deadline: float
) -> PutBatch:
    """What a put wants; without ``depths`` all are first of their prefix.  Raises ``ValueError``."""
    views = views_of(buffers)
    places = depths if depths is not None else [0] * len(keys)
    if not len(keys) == len(views) == len(places):
        raise ValueError(f"{len(keys)} keys, {len(views)} buffers and {len(places)} depths do not match")
    check_keys(keys)
    return PutBatch(keys, views, places, deadline)
