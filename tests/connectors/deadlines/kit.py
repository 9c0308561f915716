"""What the tests of calls with a time of their own have in common."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

import pytest

from tests.connectors.disk import Disk
from umbp_connectors.pool import batches, loads
from umbp_connectors.pool.local import GetStatus, LocalPool
from umbp_core.tiers import Tier

SIZE = 8192
SHORT = 0.05
"""Seconds: for calls that are to run out of time."""
COLD = [b"cold %d" % number for number in range(6)]
WARM = [b"warm %d" % number for number in range(2)]


@contextlib.contextmanager
def late(disk: Disk, held: int = 1) -> Iterator[None]:
    """What calls want of ``disk`` meanwhile is late, and nothing else, however busy the machine is.

    A call that waits for the disk looks at its time when so many transfers hang there and had ``SHORT`` seconds; a copy
    from memory to memory is always in time.
    """
    finish, pause = loads.LoadBatch.finish, threading.Event()

    def finish_later(batch: loads.LoadBatch, deadline: float | None) -> list[tuple[int, GetStatus]]:
        if batch._loads:
            disk.wait_held(held)
            pause.wait(SHORT)
        return finish(batch, deadline)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loads.LoadBatch, "finish", finish_later)
        patch.setattr(batches, "_is_over", lambda deadline: False)
        yield


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
