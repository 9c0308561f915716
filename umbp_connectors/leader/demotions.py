"""Copy-on-commit demotion: which DRAM objects are written to SSD next.

A bounded queue of block keys.  What does not fit is dropped and counted: the object then simply has no
SSD copy.  After several failed demotions in a row the tier is left alone for a while (doubling up to
ten minutes), so that a dying disk costs nothing but hits.  One that hangs counts as failing: what it was given stays
pinned, which is bounded, and nobody waits for it.
"""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Callable, Iterable

from umbp_core.directory import Directory
from umbp_core.ops import BlockCopy, Direction, LeaderTransferRequest
from umbp_core.ports import Clock
from umbp_core.tiers import Tier

FAILURES_BEFORE_FENCE = 3
FIRST_FENCE_S = 10.0
LONGEST_FENCE_S = 600.0


class DemotionQueue:
    """Plans demotions DRAM to SSD.  Scheduler thread only.

    ``limit`` bounds the waiting keys, ``batch`` the blocks per op and ``in_flight`` the blocks of all ops
    that were planned and have not ended.  One that has not ended after ``timeout_s`` is overdue.
    """

    def __init__(
        self,
        directory: Directory,
        clock: Clock,
        *,
        limit: int,
        timeout_s: float,
        batch: int = 16,
        in_flight: int = 64,
        new_op_id: Callable[[], str],
    ) -> None:
        self._directory = directory
        self._clock = clock
        self._limit = limit
        self._timeout_s = timeout_s
        self._batch = batch
        self._in_flight_limit = in_flight
        self._new_op_id = new_op_id
        self._waiting: OrderedDict[bytes, tuple[int, int]] = OrderedDict()
        """Group and depth of each."""
        self._in_flight: dict[str, frozenset[bytes]] = {}
        self._since: dict[str, float] = {}
        """When each of these was planned, the first one first."""
        self._overdue: set[str] = set()
        self._void: dict[str, frozenset[bytes]] = {}
        self._failures = 0
        self._fence_s = FIRST_FENCE_S
        self._fenced_until: float | None = None
        self.dropped = 0

    def __len__(self) -> int:
        return len(self._waiting)

    def __contains__(self, key: object) -> bool:
        """Whether ``key`` waits; what is on its way is pinned."""
        return key in self._waiting

    @property
    def fenced(self) -> bool:
        """Whether the SSD tier is being left alone after repeated failures."""
        return self._fenced_until is not None and self._clock() < self._fenced_until

    @property
    def overdue(self) -> int:
        """Ops in flight that nobody should wait for: the disk may never answer."""
        return len(self._overdue)

    @property
    def has_work(self) -> bool:
        """Whether :meth:`plan` is to be called again soon: something waits, and there is room for it or will be."""
        return bool(self._waiting) and (self._room() > 0 or len(self._overdue) < len(self._in_flight))

    def offer(self, key: bytes, group: int, depth: int) -> None:
        """Queue the DRAM object ``key``; drops it (counted) when the queue is full or SSD is fenced."""
        if key in self._waiting:
            return
        if len(self._waiting) >= self._limit or self.fenced:
            self.dropped += 1
            return
        self._waiting[key] = (group, depth)

    def plan(self) -> list[LeaderTransferRequest]:
        """The demotions to send now; pins their DRAM copies and reserves their SSD slots."""
        self._look_for_overdue()
        ops = []
        room = self._room()
        later = self._take_what_void_ops_write()
        while self._waiting and room > 0:
            op = self._next_op(min(self._batch, room))
            if op is not None:
                ops.append(op)
                room -= len(op.blocks)
        self._waiting.update(later)
        return ops

    def _room(self) -> int:
        return self._in_flight_limit - sum(map(len, self._in_flight.values()))

    def _look_for_overdue(self) -> None:
        until = self._clock() - self._timeout_s
        late = itertools.takewhile(lambda op_id: self._since[op_id] <= until, self._since)
        for op_id in [op_id for op_id in late if op_id not in self._overdue]:
            self._overdue.add(op_id)
            self._judge(failure=True)

    def _take_what_void_ops_write(self) -> dict[bytes, tuple[int, int]]:
        """What was stored again after a reset waits until the op is through that writes it for nothing."""
        written = (key for keys in self._void.values() for key in keys)
        return {key: self._waiting.pop(key) for key in written if key in self._waiting}

    def _next_op(self, most: int) -> LeaderTransferRequest | None:
        op_id = self._new_op_id()
        blocks: list[BlockCopy] = []
        while self._waiting and len(blocks) < most:
            key, (group, depth) = self._waiting.popitem(last=False)
            block = self._plan_block(op_id, key, group, depth)
            if block is not None:
                blocks.append(block)
        if not blocks:
            return None
        self._in_flight[op_id] = frozenset(block.key for block in blocks)
        self._since[op_id] = self._clock()
        return LeaderTransferRequest(
            op_id=op_id,
            request_id="",
            direction=Direction.DEMOTE,
            blocks=tuple(blocks),
            immediate=True,
            timeout_s=self._timeout_s,
        )

    def _plan_block(self, op_id: str, key: bytes, group: int, depth: int) -> BlockCopy | None:
        copy = self._directory.copy(key, Tier.DRAM)
        if copy is None or self._directory.is_present_or_pending(key, Tier.SSD):
            return None
        slot = self._directory.reserve(op_id, key, Tier.SSD, copy.nbytes, depth)
        if slot is None:
            self.dropped += 1
            return None
        self._directory.pin(op_id, [key], tier=Tier.DRAM)
        return BlockCopy(
            key=key, group=group, hbm_block=-1, dram_page=copy.pages[0], ssd_slot=slot[0], checksums=copy.checksum
        )

    def ended(self, op: LeaderTransferRequest, failed: Iterable[int]) -> None:
        """Take the end of ``op``: publishes the blocks that arrived, unless :meth:`void` was called meanwhile.

        What the op still owns afterwards (pins, slots not published) is for the caller to release.
        """
        if self._in_flight.pop(op.op_id, None) is None:
            return
        del self._since[op.op_id]
        self._overdue.discard(op.op_id)
        bad = set(failed)
        if self._void.pop(op.op_id, None) is None:
            written = {block.key: block.checksums for index, block in enumerate(op.blocks) if index not in bad}
            self._directory.commit_many(op.op_id, written, Tier.SSD)
        self._judge(bool(bad))

    def _judge(self, failure: bool) -> None:
        if not failure:
            self._failures = 0
            self._fence_s = FIRST_FENCE_S
            self._fenced_until = None
            return
        self._failures += 1
        if self._failures >= FAILURES_BEFORE_FENCE:
            self._failures = 0
            self._fenced_until = self._clock() + self._fence_s
            self._fence_s = min(2 * self._fence_s, LONGEST_FENCE_S)
            self.dropped += len(self._waiting)
            self._waiting.clear()

    def void(self) -> None:
        """The pool was reset: forget what waits, and publish nothing of what is in flight."""
        self._waiting.clear()
        self._void.update(self._in_flight)
