"""What becomes of the objects of a put or get: the core's words, under the name that the pool uses."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from umbp_core.outcomes import GetStatus, PoolCounters, PoolStats, PutStatus

__all__ = ["GetStatus", "PoolCounters", "PoolStats", "PutStatus", "secured"]


def secured(
    keys: Sequence[bytes], statuses: Sequence[PutStatus], secure: Callable[[list[bytes]], Iterable[bytes]]
) -> list[PutStatus]:
    """``statuses`` of ``keys`` with the durability `strict`: what was stored is ``VOLATILE`` unless it is on SSD.

    ``secure`` waits for that and says which of the keys it is given are there; it is not called for none.
    """
    stored = [key for key, status in zip(keys, statuses, strict=True) if status is PutStatus.STORED]
    durable = set(secure(stored)) if stored else set()
    return [
        PutStatus.VOLATILE if status is PutStatus.STORED and key not in durable else status
        for key, status in zip(keys, statuses, strict=True)
    ]
