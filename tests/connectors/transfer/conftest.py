"""An engine over memory that a test can look into, stop and break."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar

import numpy as np
import pytest

from tests.connectors.gate import Gate
from umbp_connectors.pool.checksums import object_checksum
from umbp_connectors.transfer import Limits, TransferEngine
from umbp_core.ids import Identity, RankScope
from umbp_core.ops import BlockCopy, Direction, LeaderTransferRequest, OpResult, Requirement, RequirementKind
from umbp_core.testing.fakes import CopyCall, FakeClock, MemoryDevice, MemoryPages, MemorySlots, RecordingObserver

PATIENCE = 60.0
"""Seconds for what takes milliseconds: only a bug waits for it."""


class Rig:
    """Two KV groups, 64 pages, 16 HBM blocks; group 1's objects are smaller than a sector."""

    object_bytes: ClassVar[dict[int, int]] = {0: 8000, 1: 500}

    def __init__(
        self,
        slots: MemorySlots | None,
        limits: Limits | None,
        clock: FakeClock | None,
        io_threads: int,
        on_host: bool,
    ) -> None:
        self.identity = Identity("model", b"l" * 32, RankScope(tp_rank=1, tp_size=2))
        self.pages = MemoryPages(8192, 64)
        self.device = MemoryDevice(self.pages.array, self.object_bytes, 16, on_host=on_host)
        self.slots = slots
        self.observer = RecordingObserver()
        self.clock = clock
        self.gates: list[Gate] = []
        rng = np.random.default_rng(7)
        for hbm in self.device.hbm.values():
            hbm[:] = rng.integers(0, 256, hbm.shape, dtype=np.uint8)
        options: dict[str, Any] = {} if clock is None else {"clock": clock}
        self.engine = TransferEngine(
            self.device,
            self.pages,
            slots,
            self.identity,
            1,
            self.object_bytes,
            limits,
            io_threads=io_threads,
            observer=self.observer,
            layers=self.device,
            **options,
        )

    def gate(self, only: Callable[..., bool] = lambda *_: True) -> Gate:
        """A gate that the end of the test opens, whatever happened."""
        gate = Gate(only=only)
        self.gates.append(gate)
        return gate

    def hold_copies(self, only: Callable[[CopyCall], bool] = lambda _: True) -> Gate:
        """Stop device copies."""
        gate = self.gate(only)
        self.device.on_copy = gate
        return gate

    def hold_io(self, only: Callable[[str, int], bool] = lambda *_: True) -> Gate:
        """Stop SSD reads and writes."""
        gate = self.gate(only)
        assert self.slots is not None
        self.slots.on_io = gate
        return gate

    def put(self, key: bytes, page: int, group: int = 0, slot: int = -1) -> BlockCopy:
        """An object that lies in a page (or, with ``slot``, on SSD only) with the checksum of rank 1 of 2."""
        nbytes = self.object_bytes[group]
        data = np.random.default_rng(list(key)).integers(0, 256, nbytes, dtype=np.uint8)
        if slot >= 0:
            assert self.slots is not None
            self.slots.data[slot] = data.tobytes() + bytes(-nbytes % 4096)
        else:
            self.pages.array[page, :nbytes] = data
        checksums = b"other rank's sum" + self.checksum(key, data)
        return BlockCopy(key, group, -1, page, slot, checksums)

    def content(self, key: bytes, group: int = 0) -> bytes:
        """The bytes that :meth:`put` gives an object."""
        return np.random.default_rng(list(key)).integers(0, 256, self.object_bytes[group], dtype=np.uint8).tobytes()

    def checksum(self, key: bytes, data: Any) -> bytes:
        """What this rank's checksum of an object must be."""
        return object_checksum(self.identity.object_key(key), data)

    def hbm(self, block: int, group: int = 0) -> bytes:
        """What lies in an HBM block."""
        return self.device.hbm[group][block].tobytes()

    def run(self, *ops: LeaderTransferRequest) -> list[OpResult]:
        """Submit ops and wait for all; their results in the order of ``ops``."""
        self.engine.submit(ops)
        return self.results(*[op.op_id for op in ops])

    def results(self, *op_ids: str) -> list[OpResult]:
        """The results of ops that end soon, and of no others."""
        assert self.engine.wait(op_ids, PATIENCE)
        found = {result.op_id: result for result in self.engine.poll()}
        assert sorted(found) == sorted(op_ids)
        return [found[op_id] for op_id in op_ids]

    @staticmethod
    def op(
        op_id: str, direction: Direction, blocks: Sequence[BlockCopy], after: int | None = None, timeout_s: float = 30.0
    ) -> LeaderTransferRequest:
        """An op, ``after`` the end of an iteration."""
        requirement = Requirement() if after is None else Requirement(RequirementKind.ITERATION_COMPLETE, after)
        return LeaderTransferRequest(op_id, "request", direction, tuple(blocks), requirement, timeout_s=timeout_s)


class Rigs:
    """Rigs whose engines run until the end of a test."""

    def __init__(self, on_host: bool) -> None:
        self._on_host = on_host
        self._rigs: list[Rig] = []

    def __call__(
        self,
        slots: MemorySlots | None = None,
        limits: Limits | None = None,
        clock: FakeClock | None = None,
        io_threads: int = 4,
        ssd: bool = True,
        start: bool = True,
    ) -> Rig:
        rig = Rig(slots or MemorySlots() if ssd else None, limits, clock, io_threads, self._on_host)
        self._rigs.append(rig)
        if start:
            rig.engine.start()
        return rig

    def end(self) -> None:
        """Let everything go and end."""
        for rig in self._rigs:
            for gate in rig.gates:
                gate.open()
            assert rig.engine.close(PATIENCE), "a transfer thread is still there"


@pytest.fixture(params=[False, True], ids=["device", "host"])
def make_rig(request: pytest.FixtureRequest) -> Iterator[Rigs]:
    """Every test runs with HBM on a device and with HBM in host memory, where other threads deliver."""
    rigs = Rigs(on_host=request.param)
    yield rigs
    rigs.end()


@pytest.fixture
def make_host_rig() -> Iterator[Rigs]:
    """For what is so with HBM in host memory only."""
    rigs = Rigs(on_host=True)
    yield rigs
    rigs.end()


@pytest.fixture
def rig(make_rig: Rigs) -> Rig:
    """A running engine."""
    return make_rig()
