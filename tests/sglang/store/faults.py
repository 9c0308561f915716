"""Pools that fail on demand, and a clock that stands still."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from umbp_connectors.pool.local import GetStatus, LocalPool, LocalPoolConfig, PutStatus, StagedPut
from umbp_core.errors import TierUnavailable
from umbp_core.ids import Identity


class FakeClock:
    """Seconds that pass when a test says so."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Faults:
    """Makes pools and is what goes wrong in them: an exception, no time, no room, or nobody who clears."""

    def __init__(self) -> None:
        self.error: Exception | None = None
        self.late = False
        self.keeps = False
        self.clears = 0
        self.full: Callable[[bytes], bool] = lambda key: False
        self.calls = 0
        self.patience: list[float | None] = []
        """How long each lookup might have taken."""
        self.given: list[float | None] = []
        """How long each put might have taken."""
        self.pools: list[FaultyPool] = []

    def make(self, identity: Identity, config: LocalPoolConfig) -> FaultyPool:
        pool = FaultyPool(identity, config)
        pool.faults = self
        self.pools.append(pool)
        return pool

    def strike(self) -> None:
        """Called by every call that moves pages."""
        self.calls += 1
        if self.error is not None:
            raise self.error


class FaultyPool(LocalPool):
    """A real pool, with faults in front of it."""

    faults: Faults

    def exists(self, keys: Sequence[bytes], timeout: float | None = None) -> list[bool]:
        self.faults.patience.append(timeout)
        return super().exists(keys, timeout)

    def count_prefix(self, keys: Sequence[bytes], timeout: float | None = None) -> int:
        self.faults.patience.append(timeout)
        return super().count_prefix(keys, timeout)

    def clear(self) -> int:
        self.faults.clears += 1
        if self.faults.keeps:
            raise TierUnavailable("nobody there")
        return super().clear()

    def put(
        self,
        keys: Sequence[bytes],
        buffers: Sequence[Any],
        depths: Sequence[int] | None = None,
        timeout: float | None = None,
    ) -> list[PutStatus]:
        self.faults.strike()
        self.faults.given.append(timeout)
        if self.faults.late:
            return [PutStatus.TIMED_OUT] * len(keys)
        good = [index for index, key in enumerate(keys) if not self.faults.full(key)]
        stored = super().put([keys[i] for i in good], [buffers[i] for i in good], None, timeout)
        statuses = [PutStatus.NO_ROOM] * len(keys)
        for index, status in zip(good, stored, strict=True):
            statuses[index] = status
        return statuses

    def stage(
        self,
        keys: Sequence[bytes],
        buffers: Sequence[Any],
        depths: Sequence[int] | None = None,
        timeout: float | None = None,
    ) -> StagedPut:
        self.faults.strike()
        self.faults.given.append(timeout)
        good = [index for index, key in enumerate(keys) if not self.faults.full(key)]
        staged = super().stage([keys[i] for i in good], [buffers[i] for i in good], None, timeout)
        statuses = [PutStatus.NO_ROOM] * len(keys)
        for index, status in zip(good, staged.statuses, strict=True):
            statuses[index] = status
        return StagedPut(statuses, lambda publish: staged.publish() if publish else bool(staged.discard()))

    def get(self, keys: Sequence[bytes], buffers: Sequence[Any], timeout: float | None = None) -> list[GetStatus]:
        self.faults.strike()
        if self.faults.late:
            return [GetStatus.TIMED_OUT] * len(keys)
        return super().get(keys, buffers, timeout)
