"""What the tests of calls with a time of their own have in common."""

from __future__ import annotations

from umbp_connectors.pool.local import LocalPool
from umbp_core.tiers import Tier

SIZE = 8192
SHORT = 0.05
"""Seconds: for calls that are to run out of time."""
COLD = [b"cold %d" % number for number in range(6)]
WARM = [b"warm %d" % number for number in range(2)]


def object_of(key: bytes) -> bytes:
    """The bytes under a key."""
    return (key * SIZE)[:SIZE]


def buffers_for(keys: list[bytes]) -> list[bytearray]:
    """A buffer for each."""
    return [bytearray(SIZE) for _ in keys]


def check_hits(pool: LocalPool, keys: list[bytes]) -> None:
    """All of ``keys`` come, and they are what was put."""
    buffers = buffers_for(keys)
    assert all(status.hit for status in pool.get(keys, buffers, timeout=60))
    assert buffers == [object_of(key) for key in keys]


def held(pool: LocalPool, tier: Tier) -> tuple[int, int]:
    """How many copies are pinned, and how many are being written."""
    stats = pool.stats(tier)
    assert stats is not None
    return stats.pinned, stats.reserved
