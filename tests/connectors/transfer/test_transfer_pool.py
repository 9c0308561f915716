"""The engine on the real arena and slab file."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from umbp_connectors.pool.arena import Arena
from umbp_connectors.pool.slab import SlabFile
from umbp_connectors.transfer import TransferEngine
from umbp_core.ids import Identity, RankScope
from umbp_core.ops import BlockCopy, Direction, LeaderTransferRequest, OpResult, OpStatus
from umbp_core.testing.fakes import MemoryDevice

PAGE = 256 * 1024
OBJECT = PAGE - 1000
PATIENCE = 60.0


@pytest.fixture
def arena() -> Iterator[Arena]:
    arena = Arena(PAGE, 8, staging_pages=4, prefault=False)
    arena.open()
    yield arena
    arena.close()


@pytest.fixture
def slab(tmp_path: Path) -> Iterator[SlabFile]:
    slab = SlabFile(tmp_path / "slab", PAGE, 8)
    slab.open()
    yield slab
    slab.close()


def run(engine: TransferEngine, op_id: str, direction: Direction, *blocks: BlockCopy) -> OpResult:
    engine.submit([LeaderTransferRequest(op_id, "request", direction, blocks)])
    assert engine.wait([op_id], PATIENCE)
    (result,) = engine.poll()
    return result


def test_hbm_to_dram_to_ssd_to_hbm(arena: Arena, slab: SlabFile) -> None:
    device = MemoryDevice(arena.array, {0: OBJECT}, 16)
    device.hbm[0][:] = np.random.default_rng(3).integers(0, 256, device.hbm[0].shape, dtype=np.uint8)
    original = device.hbm[0][:8].copy()
    identity = Identity("model", b"l" * 32, RankScope())
    engine = TransferEngine(device, arena, slab, identity, 0, {0: OBJECT})
    engine.start()
    store = run(engine, "store", Direction.STORE, *[BlockCopy(b"%d" % n, 0, n, n) for n in range(8)])
    assert store.status is OpStatus.DONE
    sums = [store.checksums[16 * n : 16 * n + 16] for n in range(8)]
    demote = run(engine, "demote", Direction.DEMOTE, *[BlockCopy(b"%d" % n, 0, -1, n, n) for n in range(8)])
    assert (demote.status, demote.moved_bytes) == (OpStatus.DONE, 8 * OBJECT)
    arena.array[:] = 0
    device.hbm[0][:] = 0
    through = [BlockCopy(b"%d" % n, 0, 8 + n, 8 + n % 4, n, sums[n]) for n in range(4)]
    assert run(engine, "staged", Direction.LOAD, *through).status is OpStatus.DONE
    kept = [BlockCopy(b"%d" % n, 0, 8 + n, n, n, sums[n]) for n in range(4, 8)]
    assert run(engine, "kept", Direction.LOAD, *kept).status is OpStatus.DONE
    np.testing.assert_array_equal(device.hbm[0][8:], original)
    np.testing.assert_array_equal(arena.array[4:8, :OBJECT], original[4:])
    assert engine.close(PATIENCE)


def test_a_slab_that_is_closed_fails_the_load_and_not_the_engine(arena: Arena, slab: SlabFile) -> None:
    device = MemoryDevice(arena.array, {0: OBJECT}, 2)
    engine = TransferEngine(device, arena, slab, Identity("model", b"l" * 32, RankScope()), 0, {0: OBJECT})
    engine.start()
    slab.close()
    load = run(engine, "load", Direction.LOAD, BlockCopy(b"a", 0, 0, 0, 0, b"x" * 16))
    assert (load.status, load.failed, load.reason) == (OpStatus.FAILED, (0,), "io")
    assert run(engine, "store", Direction.STORE, BlockCopy(b"a", 0, 0, 0)).status is OpStatus.DONE
    assert engine.close(PATIENCE)
