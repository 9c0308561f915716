"""What the benchmarks of pools share: objects, keys, and a pool to measure."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from umbp_connectors.pool.arena import Arena
from umbp_connectors.pool.local import LocalPool, LocalPoolConfig
from umbp_connectors.pool.rows import ObjectRows
from umbp_core.ids import Identity, RankScope

BATCH = 128
CACHE_BYTES = 192 << 20
"""Batches are taken in turns from at least this much memory: no processor cache holds it."""

Batch = list[np.ndarray]


class Memory:
    """Objects of one size in memory that is present: some batches, taken in turns."""

    def __init__(self, nbytes: int, batch: int = BATCH) -> None:
        self.nbytes = nbytes
        self.batch = batch
        self.batches = max(2, -(-CACHE_BYTES // (nbytes * batch)))
        self.arena = Arena(nbytes, self.batches * batch, prefault=False)
        self.arena.open()
        self.arena.array[:] = np.random.default_rng(1).integers(0, 256, nbytes, dtype=np.uint8)
        self.arena.array[:, :8] = np.arange(len(self.arena.array), dtype=np.uint64)[:, None].view(np.uint8)
        self._turn = 0

    def next(self) -> Batch:
        """The next batch."""
        return list(self.next_rows())

    def next_rows(self) -> ObjectRows:
        """The next batch, as rows of one array."""
        first = self._turn % self.batches * self.batch
        self._turn += 1
        return ObjectRows(self.arena.array, range(first, first + self.batch))


class Keys:
    """Block keys as vLLM makes them, 32 bytes and a group; a fresh batch each time."""

    def __init__(self) -> None:
        self._next = 0

    def fresh(self, count: int = BATCH) -> list[bytes]:
        """Keys that were never used."""
        self._next += count
        return [number.to_bytes(32, "big") + bytes(4) for number in range(self._next - count, self._next)]


def open_pool(nbytes: int, pages: int, **options: object) -> LocalPool:
    """A pool whose memory is present."""
    config = LocalPoolConfig(nbytes, pages * nbytes, shared_memory=False, **options)  # type: ignore[arg-type]
    pool = LocalPool(Identity("benchmark", bytes(32), RankScope()), config)
    pool.open()
    pool.wait_prefaulted(120)
    return pool


def check(found: Sequence[object], expected: object) -> None:
    """A benchmark of something that does not work is worth nothing."""
    if any(each != expected for each in found):
        raise SystemExit(f"expected {expected} throughout, got {set(found)}")


def size_name(nbytes: int) -> str:
    """``nbytes`` as a person writes it."""
    return f"{nbytes >> 10} KiB" if nbytes < 1 << 20 else f"{nbytes >> 20} MiB"
