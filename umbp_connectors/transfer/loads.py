"""How the engine carries out a load.

::

    from SSD, or onto a device     hashing: plan ─► io: read, verify │ hashing: verify ─► commit, scatter ─► result
    DRAM to DRAM                   hashing: plan ─► hashing: verify, commit, scatter, a portion at a time ─► result

No block is delivered before it was verified (law L1).  Where the KV cache lies in host memory too, the threads that
verify also deliver: what they have just read is still in the processor's cache.

A committed op has no deadline any more.  Therefore a load with blocks on SSD, whose reads may hang, is committed only
when all of them have been read; what can hang no more is committed with its first portion.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import Final

from umbp_connectors.pool.buffers import round_up
from umbp_connectors.pool.checksums import verify_object
from umbp_connectors.pool.neighbours import in_runs
from umbp_connectors.transfer.jobs import DEVICE, IO, SECTOR_BYTES, Control, Job, Step, Tools
from umbp_core.errors import StateError
from umbp_core.ops import LeaderTransferRequest, OpStatus
from umbp_core.ports import SlotRuns

VERIFY: Final = "verify"
"""The label of blocks whose bytes are not those that were stored."""

RUN_BYTES: Final = 1 << 20
"""What is read from SSD in one go, at most: from here on, more is not faster."""

PORTION_BYTES: Final = 2 << 20
"""What one thread verifies and then delivers: several of these fit into a cache, and a call costs little beside it."""


class LoadJob(Job):
    """DRAM or SSD to HBM."""

    def __init__(self, op: LeaderTransferRequest, fence: object, tools: Tools, control: Control) -> None:
        super().__init__(op, fence, tools, control)
        self._lock = threading.Lock()
        self._committed: bool | None = None
        self._moved: list[int] = []

    def start(self) -> None:
        """Queue the planning, which is too long for the forward thread when there are many blocks."""
        self._put(self._tools.hashing, self._plan)

    def _plan(self) -> None:
        self._reject_repeats()
        blocks = self._op.blocks
        on_ssd = [index for index, block in enumerate(blocks) if block.ssd_slot >= 0]
        in_dram = [index for index, block in enumerate(blocks) if block.ssd_slot < 0]
        if self._tools.copier.on_host and not on_ssd:
            self._spread(self._by_portions(in_dram, self._verify_and_deliver), self._end)
            return
        fetches: list[Step] = [(self._tools.io, functools.partial(self._fetch, run)) for run in self._runs(on_ssd)]
        checks: list[Step] = [
            (self._tools.hashing, functools.partial(self._check, share)) for share in self._shares(in_dram)
        ]
        self._spread(fetches + checks, self._hand_over)

    def _reject_repeats(self) -> None:
        blocks = self._op.blocks
        if len({(block.group, block.hbm_block) for block in blocks}) != len(blocks):
            raise StateError(f"op {self._op.op_id} loads two objects into one block; name every block once")

    # -- verifying

    def _runs(self, indexes: Sequence[int]) -> list[list[int]]:
        """``indexes``, whose blocks are on SSD, in parts for one thread each: neighbours that fill their slots.

        A disk gives one large piece faster than several small ones.
        """
        blocks, runs = self._op.blocks, self._tools.runs
        if runs is None:
            return [[index] for index in indexes]
        slot_bytes = runs.slot_bytes

        def slot_of(index: int) -> int | None:
            full = round_up(self._tools.object_bytes[blocks[index].group], SECTOR_BYTES) == slot_bytes
            return blocks[index].ssd_slot if full else None

        most = min(RUN_BYTES // slot_bytes, -(-len(indexes) // self._tools.io_threads))
        in_order = sorted(indexes, key=lambda index: blocks[index].ssd_slot)
        return in_runs(in_order, slot_of, max(1, most))

    def _fetch(self, run: Sequence[int]) -> None:
        if not self._control.is_running(self._op.op_id):
            return
        runs = self._tools.runs
        if len(run) > 1 and runs is not None and self._attempt((), IO, lambda: self._read_together(runs, run)):
            self._check(run)
            return
        for index in run:  # one of several may be what cannot be read
            if self._attempt((index,), IO, functools.partial(self._read, index)):
                self._verify(index)

    def _read(self, index: int) -> None:
        with self._sectors(index) as buffer:
            self._slots().read_into(self._op.blocks[index].ssd_slot, buffer)

    def _read_together(self, runs: SlotRuns, run: Sequence[int]) -> None:
        with contextlib.ExitStack() as stack:
            buffers = [stack.enter_context(self._sectors(index)) for index in run]
            runs.read_run(self._op.blocks[run[0]].ssd_slot, buffers)

    def _check(self, indexes: Sequence[int]) -> None:
        for index in indexes:
            self._verify(index)

    def _verify(self, index: int) -> bool:
        """Whether block ``index`` in its page is the one that was stored."""

        def compare() -> None:
            with self._object(index) as data:
                expected = self._op.blocks[index].checksum_of(self._tools.world_rank)
                verify_object(self._object_key(index), data, expected)

        return self._attempt((index,), VERIFY, compare)

    # -- delivering

    def _verify_and_deliver(self, indexes: Sequence[int]) -> None:
        self._deliver([index for index in indexes if self._verify(index)])

    def _hand_over(self) -> None:
        """Everything is verified."""
        if not self._control.is_running(self._op.op_id):
            self._end()
            return
        good = [index for index in range(len(self._op.blocks)) if index not in self._failed]
        if self._tools.copier.on_host:
            self._spread(self._by_portions(good, self._deliver), self._end)
        elif good:
            device = self._tools.device
            steps = [(device, functools.partial(self._deliver, members)) for _, members in self._batches(good)]
            self._spread(steps, self._end)
        else:
            self._end()

    def _by_portions(self, indexes: Sequence[int], work: Callable[[Sequence[int]], None]) -> list[Step]:
        """``work`` on all ``indexes``: as many steps as there are hashing threads, which share the portions."""
        object_bytes, blocks = self._tools.object_bytes, self._op.blocks
        portions: deque[list[int]] = deque()
        room = 0
        for index in indexes:
            if room <= 0:
                portions.append([])
                room = PORTION_BYTES
            portions[-1].append(index)
            room -= object_bytes[blocks[index].group]

        def work_off() -> None:
            while portions and self._committed is not False:
                try:
                    portion = portions.popleft()
                except IndexError:  # another thread was faster
                    return
                work(portion)

        return [(self._tools.hashing, work_off)] * min(self._tools.hash_threads, len(portions))

    def _deliver(self, indexes: Sequence[int]) -> None:
        if not (indexes and self._may_write()):
            return
        blocks = self._op.blocks
        for group, members in self._by_group(indexes).items():
            copy = functools.partial(
                self._tools.copier.scatter,
                group,
                [blocks[index].hbm_block for index in members],
                [blocks[index].dram_page for index in members],
                self._fence,
            )
            if self._attempt(members, DEVICE, copy):
                self._moved += members

    def _may_write(self) -> bool:
        """The commitment point, passed once for all portions."""
        with self._lock:
            if self._committed is None:
                self._committed = self._control.commit(self._op.op_id)
            return self._committed

    def _end(self) -> None:
        blocks = self._op.blocks
        if not self._control.is_running(self._op.op_id):
            self._finish(OpStatus.CANCELLED)
        elif blocks and len(self._failed) == len(blocks):
            self._finish(OpStatus.FAILED)
        elif not self._may_write():
            self._finish(OpStatus.CANCELLED)
        else:
            self._finish(OpStatus.FAILED if self._failed else OpStatus.DONE, moved=self._moved)
