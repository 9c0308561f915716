"""How the engine carries out one op: a few small steps on different threads.

::

    STORE   device: commit, gather ─► hashing: checksums ─► result       (in batches, side by side)
            by layer: see :mod:`umbp_connectors.transfer.layer_stores`
    LOAD    see :mod:`umbp_connectors.transfer.loads`, and :mod:`~umbp_connectors.transfer.layerwise`
    DEMOTE  io: commit ─► io: write slot, for each block ─► result

An exception inside a step fails the blocks that the step was about, never its thread and never another op.
Each job consumes its :class:`~umbp_core.completion.CompletionHandle` once, after its last touch of the op's memory,
whatever happened; a job whose op was dropped meanwhile does so too, which ends the op's quarantine.  A job that is gone
without having done so has its op failed.

What a device copies at once is bounded by ``Tools.batch_blocks``, so that a load comes in between the parts of a long
store.
"""

from __future__ import annotations

import abc
import dataclasses
import functools
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Final, Protocol

from umbp_connectors.pool.buffers import round_up
from umbp_connectors.pool.checksums import object_checksum
from umbp_connectors.transfer.failures import FailureLog
from umbp_connectors.transfer.lanes import Lanes, TaskQueue
from umbp_connectors.transfer.memory import PageMemory, SlotStore
from umbp_core.completion import CompletionHandle
from umbp_core.errors import TierUnavailable
from umbp_core.ops import Direction, LeaderTransferRequest, OpResult, OpStatus
from umbp_core.ports import DeviceCopier, LayerCopier, SlotRuns

Step = tuple[TaskQueue, Callable[[], None]]
"""Something to do, and the threads that do it."""

#: Direct I/O moves whole sectors; pages and slots are multiples of this, so an object's last sector fits.
SECTOR_BYTES: Final = 4096

#: Labels for ``OpResult.reason``.
IO: Final = "io"
DEVICE: Final = "device"
INTERNAL: Final = "internal"


class Control(Protocol):
    """What a job asks the engine.  Any thread."""

    def commit(self, op_id: str) -> bool:
        """The scheduler's commitment point."""
        ...

    def is_running(self, op_id: str) -> bool:
        """False once the op was dropped: further work on it is wasted."""
        ...

    def delivered(self, op_id: str, bands: int) -> bool:
        """The first ``bands`` bands of layers are in place; False: nobody waits for the others any more."""
        ...

    def after_layers(self, iteration: int, layers: Sequence[str], call: Callable[[object], None]) -> None:
        """Call ``call`` with a fence behind ``layers`` of ``iteration`` when they are done, at the latest at its end.

        ``call`` must be quick: the engine's lock is held.
        """
        ...

    def finished(self, result: OpResult) -> None:
        """The job has touched the op's memory for the last time."""
        ...

    def lost(self, op: LeaderTransferRequest) -> object:
        """The job of ``op`` is gone and never said how it ended.  Called by the interpreter: takes no lock."""
        ...


@dataclasses.dataclass(frozen=True)
class Tools:
    """What every job of one engine works with."""

    copier: DeviceCopier
    layers: LayerCopier | None
    pages: PageMemory
    slots: SlotStore | None
    runs: SlotRuns | None
    """The same, where it can read neighbours in one go."""
    identity: bytes
    world_rank: int
    object_bytes: Mapping[int, int]
    device: Lanes
    io: Lanes
    io_threads: int
    hashing: Lanes
    hash_threads: int
    failures: FailureLog
    batch_blocks: int


class Countdown:
    """Says which of several parallel steps was the last one to end."""

    def __init__(self, count: int) -> None:
        self._left = count
        self._lock = threading.Lock()

    def is_last(self) -> bool:
        """Called once per step, when it has ended; True for the last one."""
        with self._lock:
            self._left -= 1
            return self._left == 0


class Job(abc.ABC):
    """One op in execution."""

    def __init__(self, op: LeaderTransferRequest, fence: object, tools: Tools, control: Control) -> None:
        self._op = op
        self._fence = fence
        self._tools = tools
        self._control = control
        self._handle = CompletionHandle(op, control.finished, control.lost)
        self._failed: dict[int, str] = {}
        self._first_error: Exception | None = None

    @abc.abstractmethod
    def start(self) -> None:
        """Queue the first step.  Called with the engine's lock held: takes microseconds."""

    def _put(self, lanes: Lanes, step: Callable[[], None]) -> None:
        """Queue a step that concerns the whole op."""
        lanes.put(self._op.direction, functools.partial(self._run, step))

    def _run(self, step: Callable[[], None]) -> None:
        try:
            step()
        except Exception as error:  # noqa: BLE001 - op boundary: a bug in one op must not reach another
            self._fail(range(len(self._op.blocks)), INTERNAL, error)
            self._finish(OpStatus.FAILED)

    def _attempt(self, indexes: Sequence[int], reason: str, action: Callable[[], None]) -> bool:
        """Run ``action``; an exception fails the blocks ``indexes`` with ``reason``."""
        try:
            action()
        except Exception as error:  # noqa: BLE001 - op boundary: copiers and disks raise what they like
            self._fail(indexes, reason, error)
            return False
        return True

    def _fail(self, indexes: Sequence[int], reason: str, error: Exception) -> None:
        if self._first_error is None:
            # Without its frames, which would keep this job alive.
            self._first_error = error.with_traceback(None)
        for index in indexes:
            self._failed.setdefault(index, reason)

    def _spread(
        self, steps: Sequence[Step], then: Callable[[], None], order: Callable[[int], float] = lambda _: 0.0
    ) -> None:
        """Run ``steps`` in parallel and ``then`` after the last one, on the thread that ran it.

        ``order`` of a step's index, below 1, puts it behind the steps of ops of the same direction with a smaller one.
        """
        if not steps:
            then()
            return
        countdown = Countdown(len(steps))

        def run(step: Callable[[], None]) -> None:
            self._attempt(range(len(self._op.blocks)), INTERNAL, step)
            if countdown.is_last():
                self._run(then)

        for index, (lanes, step) in enumerate(steps):
            lanes.put(self._op.direction + order(index), functools.partial(run, step))

    def _shares(self, indexes: Sequence[int]) -> list[Sequence[int]]:
        """``indexes`` in at most one part per hashing thread: a task per small object would cost more than it."""
        count = min(self._tools.hash_threads, len(indexes))
        return [indexes[part::count] for part in range(count)]

    def _by_group(self, indexes: Sequence[int]) -> dict[int, list[int]]:
        groups: dict[int, list[int]] = {}
        for index in indexes:
            groups.setdefault(self._op.blocks[index].group, []).append(index)
        return groups

    def _batches(self, indexes: Sequence[int]) -> list[tuple[int, Sequence[int]]]:
        """``indexes`` as one device copies them at once: blocks of one KV group, with that group."""
        most = self._tools.batch_blocks
        return [
            (group, members[start : start + most])
            for group, members in self._by_group(indexes).items()
            for start in range(0, len(members), most)
        ]

    def _object_key(self, index: int) -> bytes:
        return self._tools.identity + self._op.blocks[index].key

    def _object(self, index: int) -> memoryview:
        """The bytes of block ``index`` in its DRAM page."""
        block = self._op.blocks[index]
        return self._tools.pages.page(block.dram_page, self._tools.object_bytes[block.group])

    def _sectors(self, index: int) -> memoryview:
        """As :meth:`_object`, up to the end of its last sector."""
        block = self._op.blocks[index]
        nbytes = self._tools.object_bytes[block.group]
        return self._tools.pages.page(block.dram_page, round_up(nbytes, SECTOR_BYTES))

    def _slots(self) -> SlotStore:
        if self._tools.slots is None:
            raise TierUnavailable(
                f"op {self._op.op_id} names SSD slots, but this rank has no SSD tier; give all ranks the same tiers"
            )
        return self._tools.slots

    def _finish(self, status: OpStatus, checksums: bytes = b"", moved: Sequence[int] = ()) -> None:
        op = self._op
        if status is OpStatus.DONE:
            failed: tuple[int, ...] = ()
        elif op.direction is Direction.LOAD and status is OpStatus.FAILED:
            failed = tuple(sorted(self._failed))
        else:
            failed = tuple(range(len(op.blocks)))
        moved_bytes = sum(self._tools.object_bytes[op.blocks[index].group] for index in moved)
        reason = next(iter(self._failed.values()), "")
        if status is OpStatus.FAILED and self._first_error is not None:
            self._tools.failures.failed(op, len(self._failed), reason, self._first_error)
        self._handle.consume(
            OpResult(op.op_id, op.request_id, op.direction, status, failed, checksums, moved_bytes, reason=reason)
        )


class StoreJob(Job):
    """HBM to DRAM."""

    def __init__(self, op: LeaderTransferRequest, fence: object, tools: Tools, control: Control) -> None:
        super().__init__(op, fence, tools, control)
        self._checksums = [b""] * len(op.blocks)
        self._left = Countdown(0)

    def start(self) -> None:
        """Queue the gather."""
        self._put(self._tools.device, self._gather)

    def _gather(self) -> None:
        if not self._control.commit(self._op.op_id):
            self._finish(OpStatus.CANCELLED)
            return
        batches = self._batches(range(len(self._op.blocks)))
        if not batches:
            self._end()
            return
        parts = [self._shares(members) for _, members in batches]
        self._left = Countdown(sum(map(len, parts)))
        device = self._tools.device
        for (group, members), shares in zip(batches[1:], parts[1:], strict=True):
            self._put(device, functools.partial(self._gather_batch, group, members, shares))
        self._gather_batch(*batches[0], parts[0])

    def _gather_batch(self, group: int, members: Sequence[int], shares: Sequence[Sequence[int]]) -> None:
        """Copy one batch; its checksums are made while the next one is copied."""
        blocks = self._op.blocks
        copy = functools.partial(
            self._tools.copier.gather,
            group,
            [blocks[index].hbm_block for index in members],
            [blocks[index].dram_page for index in members],
            self._fence,
        )
        if not self._failed:
            self._attempt(range(len(blocks)), DEVICE, copy)
        for share in shares:
            self._put(self._tools.hashing, functools.partial(self._hash, share))

    def _gathered(self) -> None:
        """Everything is in its page: make all checksums."""
        shares = self._shares(range(len(self._op.blocks)))
        if not shares or self._failed:
            self._end()
            return
        self._left = Countdown(len(shares))
        for share in shares:
            self._put(self._tools.hashing, functools.partial(self._hash, share))

    def _hash(self, indexes: Sequence[int]) -> None:
        def hash_all() -> None:
            for index in indexes:
                with self._object(index) as data:
                    self._checksums[index] = object_checksum(self._object_key(index), data)

        if not self._failed:
            self._attempt(indexes, INTERNAL, hash_all)
        if self._left.is_last():
            self._end()

    def _end(self) -> None:
        if self._failed:
            self._finish(OpStatus.FAILED)
        else:
            self._finish(OpStatus.DONE, b"".join(self._checksums), range(len(self._op.blocks)))


class DemoteJob(Job):
    """DRAM to SSD."""

    def start(self) -> None:
        """Queue the commitment; the writes follow."""
        self._put(self._tools.io, self._begin)

    def _begin(self) -> None:
        if not self._control.commit(self._op.op_id):
            self._finish(OpStatus.CANCELLED)
            return
        io = self._tools.io
        # One task per block, so that the loads' reads come in between.
        self._spread([(io, functools.partial(self._write, index)) for index in range(len(self._op.blocks))], self._end)

    def _write(self, index: int) -> None:
        def write() -> None:
            with self._sectors(index) as buffer:
                self._slots().write_from(self._op.blocks[index].ssd_slot, buffer)

        if not self._failed:
            self._attempt((index,), IO, write)

    def _end(self) -> None:
        if self._failed:
            self._finish(OpStatus.FAILED)
        else:
            self._finish(OpStatus.DONE, moved=range(len(self._op.blocks)))
