"""The client with UMBP's names, over any pool and, for external KV, a line to a master."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

from umbp_connectors.pool.buffers import memory_at
from umbp_connectors.pool.rows import ObjectRows
from umbp_core.errors import StateError, TierUnavailable
from umbp_core.master.model import ExternalMatch
from umbp_core.outcomes import DeploymentMode, GetStatus, PoolStats, PutStatus
from umbp_core.ports import PoolClient
from umbp_core.tiers import Tier

_TIERS = (Tier.DRAM, Tier.SSD)
Key = bytes | str


class MasterLine(Protocol):
    """What the client needs of a master; ``MasterClient`` is one."""

    def report(self, hashes: Sequence[bytes], tier: int) -> None:
        """This node holds ``hashes`` in ``tier``; does not wait."""
        ...

    def revoke(self, hashes: Sequence[bytes], tier: int) -> None:
        """It does not any more."""
        ...

    def clear(self, tier: int) -> None:
        """It holds nothing in ``tier`` any more."""
        ...

    def match(
        self, hashes: Sequence[bytes], count_as_hit: bool = False, timeout: float | None = None
    ) -> list[ExternalMatch]:
        """Who holds which of ``hashes``."""
        ...

    def hit_counts(self, hashes: Sequence[bytes], timeout: float | None = None) -> list[tuple[bytes, int]]:
        """How often ``hashes`` were hits."""
        ...

    def flush(self, timeout: float) -> bool:
        """Wait until what was told has arrived."""
        ...

    def close(self, timeout: float | None = None, unregister: bool = True) -> bool:
        """End the line."""
        ...


class ExternalKv:
    """What a process tells a master of blocks that its node holds elsewhere, and asks it.  Any thread.

    Without a line (:meth:`connect`) telling does nothing and asking finds nothing.  What was told is kept, so that a
    master that forgot can be told again: the record changes before the master is told, and both in the same order.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._held: dict[int, dict[bytes, None]] = {}
        self._line: MasterLine | None = None

    def connect(self, line: MasterLine) -> None:
        """Tell and ask through ``line``, which is closed with this, and whose snapshot is this one's."""
        self._line = line

    def snapshot(self) -> Iterator[tuple[int, Sequence[bytes]]]:
        """Everything that was told and still holds, tier by tier."""
        with self._lock:
            tiers = list(self._held)
        for tier in tiers:
            with self._lock:
                hashes = list(self._held.get(tier, ()))
            yield tier, hashes

    def report(self, hashes: Sequence[Key], tier: int) -> None:
        """``hashes`` came to ``tier``."""
        line, keys = self._line, _keys(hashes)
        if line is not None and keys:
            with self._lock:
                self._held.setdefault(tier, {}).update(dict.fromkeys(keys))
                line.report(keys, tier)

    def revoke(self, hashes: Sequence[Key], tier: int) -> None:
        """``hashes`` left ``tier``."""
        line, keys = self._line, _keys(hashes)
        if line is not None and keys:
            with self._lock:
                held = self._held.get(tier, {})
                for each in keys:
                    held.pop(each, None)
                line.revoke(keys, tier)

    def clear(self, tier: int) -> None:
        """Everything left ``tier``."""
        line = self._line
        if line is not None:
            with self._lock:
                self._held.pop(tier, None)
                line.clear(tier)

    def clear_all(self) -> None:
        """Everything left every tier."""
        for tier, _ in list(self.snapshot()):
            self.clear(tier)

    def match(self, hashes: Sequence[Key], count_as_hit: bool = False) -> list[ExternalMatch]:
        """Who holds which of ``hashes``; empty when the master does not answer in time."""
        return [] if self._line is None else self._line.match(_keys(hashes), count_as_hit)

    def hit_counts(self, hashes: Sequence[Key]) -> list[tuple[bytes, int]]:
        """How often ``hashes`` were hits."""
        return [] if self._line is None else self._line.hit_counts(_keys(hashes))

    def flush(self, timeout: float) -> bool:
        """Wait until the master knows what it was told; true when it does, and without one."""
        return True if self._line is None else self._line.flush(timeout)

    def close(self) -> None:
        """End the line; idempotent."""
        line, self._line = self._line, None
        if line is not None:
            line.close()


class Client:
    """An :class:`~umbp_core.ports.UMBPClient` over an open ``pool`` and ``external``, both of which it closes."""

    def __init__(self, pool: PoolClient, mode: DeploymentMode, external: ExternalKv | None = None) -> None:
        self._pool = pool
        self._mode = mode
        self._external = external or ExternalKv()
        self._lock = threading.Lock()
        self._regions: dict[int, int] = {}
        self._closed = False

    @property
    def deployment_mode(self) -> DeploymentMode:
        """Who owns the bytes."""
        return self._mode

    @property
    def is_distributed(self) -> bool:
        """Whether objects of other nodes can be read."""
        return self._mode is DeploymentMode.DISTRIBUTED

    def put(self, key: Key, buffer: Any) -> PutStatus:
        """Store one object."""
        return self.batch_put([key], [buffer])[0]

    def get(self, key: Key, buffer: Any) -> GetStatus:
        """Fill ``buffer`` with one object."""
        return self.batch_get([key], [buffer])[0]

    def exists(self, key: Key) -> bool:
        """Whether an object can be read now."""
        return self._pool.exists([_key(key)])[0]

    def batch_put(self, keys: Sequence[Key], buffers: Any) -> list[PutStatus]:
        """Store many objects."""
        return self._pool.put(_keys(keys), _buffers(buffers))

    def batch_put_with_depth(self, keys: Sequence[Key], buffers: Any, depths: Sequence[int]) -> list[PutStatus]:
        """Store many objects with their places in prefix chains."""
        places = [max(0, depth) for depth in depths] if len(depths) else None
        return self._pool.put(_keys(keys), _buffers(buffers), places)

    def batch_get(self, keys: Sequence[Key], buffers: Any) -> list[GetStatus]:
        """Fill many buffers."""
        return self._pool.get(_keys(keys), _buffers(buffers))

    def batch_exists(self, keys: Sequence[Key]) -> list[bool]:
        """Which objects can be read now."""
        return self._pool.exists(_keys(keys))

    def batch_exists_consecutive(self, keys: Sequence[Key]) -> int:
        """How many objects can be read now before the first that cannot."""
        return self._pool.count_prefix(_keys(keys))

    def clear(self) -> bool:
        """Forget every object, and what the master was told of this node."""
        try:
            with contextlib.suppress(StateError):  # closed: there is nothing
                self._pool.clear()
        except TierUnavailable:  # the daemon is away, with everything that it has
            return False
        self._external.clear_all()
        return True

    def flush(self, timeout: float = 30.0) -> bool:
        """Wait until everything is where it would be found again."""
        deadline = time.monotonic() + timeout
        stored = self._pool.flush(timeout)
        return self._external.flush(max(0.0, deadline - time.monotonic())) and stored

    def close(self) -> None:
        """Give everything back; idempotent."""
        with self._lock:
            closed, self._closed = self._closed, True
        if not closed:
            self._external.close()
            self._pool.close()

    def register_memory(self, address: int, size: int) -> bool:
        """Take note of a region; every mode of this release copies in this process, so that nothing else is needed."""
        if address <= 0 or size <= 0:
            return False
        with self._lock:
            self._regions[address] = size
        return True

    def deregister_memory(self, address: int) -> None:
        """Forget the region that was registered under ``address``."""
        with self._lock:
            self._regions.pop(address, None)

    def report_external_kv_blocks(self, hashes: Sequence[Key], tier: Tier) -> bool:
        """Tell the master that this node holds blocks."""
        self._external.report(hashes, int(tier))
        return True

    def revoke_external_kv_blocks(self, hashes: Sequence[Key], tier: Tier) -> bool:
        """Tell the master that it does not any more."""
        self._external.revoke(hashes, int(tier))
        return True

    def revoke_all_external_kv_blocks_at_tier(self, tier: Tier) -> bool:
        """Tell the master that this node holds nothing in ``tier`` any more."""
        self._external.clear(int(tier))
        return True

    def match_external_kv(self, hashes: Sequence[Key], count_as_hit: bool = False) -> list[ExternalMatch]:
        """Who holds which of ``hashes``."""
        return self._external.match(hashes, count_as_hit)

    def get_external_kv_hit_counts(self, hashes: Sequence[Key]) -> list[tuple[bytes, int]]:
        """How often ``hashes`` were hits."""
        return self._external.hit_counts(hashes)

    def stats(self) -> PoolStats:
        """How full the tiers are, and what happened so far."""
        found = {tier: self._pool.stats(tier) for tier in _TIERS}
        tiers = {tier: stats for tier, stats in found.items() if stats is not None}
        return PoolStats(tiers, self._pool.counters())


def _key(key: Key) -> bytes:
    return key.encode() if isinstance(key, str) else key


def _keys(keys: Sequence[Key]) -> list[bytes]:
    return [key.encode() if isinstance(key, str) else key for key in keys]


def _buffers(buffers: Any) -> Any:
    return buffers if isinstance(buffers, ObjectRows) else [_buffer(buffer) for buffer in buffers]


def _buffer(buffer: Any) -> Any:
    """Memory for a pair (address, size), also as a segment of several."""
    if not isinstance(buffer, tuple):
        return buffer
    if len(buffer) == 2 and isinstance(buffer[0], int):
        return memory_at(*buffer)
    return tuple(_buffer(part) for part in buffer)
