"""What a put wants, checked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from umbp_connectors.pool.buffers import ScatteredSource
from umbp_connectors.pool.rows import Views, views_of


@dataclass(frozen=True, slots=True)
class PutBatch:
    """What one put wants.  ``deadline`` is in monotonic seconds."""

    keys: Sequence[bytes]
    views: Views
    depths: Sequence[int]
    deadline: float | None

    def part(self, start: int, stop: int) -> PutBatch:
        """Some of it."""
        return PutBatch(self.keys[start:stop], self.views[start:stop], self.depths[start:stop], self.deadline)


def put_batch(
    keys: Sequence[bytes], buffers: Sequence[ScatteredSource], depths: Sequence[int] | None, deadline: float | None
) -> PutBatch:
    """Without ``depths`` all objects are first of their prefix.  Raises ``ValueError`` when lengths do not match."""
    views = views_of(buffers)
    places = depths if depths is not None else [0] * len(keys)
    if not len(keys) == len(views) == len(places):
        raise ValueError(f"{len(keys)} keys, {len(views)} buffers and {len(places)} depths do not match")
    return PutBatch(keys, views, places, deadline)
