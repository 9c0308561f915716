"""Neighbouring slots are read in one go, and whatever is wrong with one of them costs that one only."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from umbp_connectors.pool.slab import SlabFile
from umbp_core.errors import TransferError
from umbp_core.ops import BlockCopy, Direction, OpStatus
from umbp_core.ports import SlotRuns
from umbp_core.testing.fakes import MemorySlots

Rig = Any

SLOT = 8192


class MemoryRuns(MemorySlots):
    """Slots in memory of which neighbours can be read in one go; ``runs`` are those that were."""

    slot_bytes = SLOT
    slots = 64

    def __init__(self) -> None:
        super().__init__()
        self.runs: list[tuple[int, int]] = []
        self.refused: set[int] = set()

    def read_run(self, slot: int, views: Sequence[memoryview], /) -> None:
        """Fails when one of the slots is ``refused``, with garbage in all views."""
        self.runs.append((slot, len(views)))
        for view in views:
            assert len(view) == SLOT
            view[:] = b"g" * SLOT
        for number, view in enumerate(views):
            if slot + number in self.refused:
                raise TransferError("a run that fails")
            self.read_into(slot + number, view)

    def write_run(self, slot: int, views: Sequence[memoryview], /) -> None:
        for number, view in enumerate(views):
            self.write_from(slot + number, view)

    def sync(self) -> None:
        """Nothing to wait for."""


@pytest.fixture
def slots() -> MemoryRuns:
    made = MemoryRuns()
    assert isinstance(made, SlotRuns)
    return made


def stored(rig: Rig, places: Sequence[int], group: int = 0) -> list[BlockCopy]:
    """A load of objects in these slots into HBM blocks 0, 1, ..."""
    sources = [rig.put(b"k%d" % n, 10 + n, group, slot) for n, slot in enumerate(places)]
    return [
        BlockCopy(each.key, group, n, each.dram_page, each.ssd_slot, each.checksums) for n, each in enumerate(sources)
    ]


def check(rig: Rig, count: int, group: int = 0, bad: Sequence[int] = ()) -> None:
    for n in range(count):
        assert (rig.hbm(n, group) == rig.content(b"k%d" % n, group)) is (n not in bad), n


def test_neighbours_are_read_together_in_whatever_order_the_op_names_them(make_rig: Any, slots: MemoryRuns) -> None:
    rig = make_rig(slots, io_threads=1)
    places = [5, 4, 6, 9, 3, 20]
    (result,) = rig.run(rig.op("load", Direction.LOAD, stored(rig, places)))
    assert result.status is OpStatus.DONE
    assert slots.runs == [(3, 4)]
    check(rig, len(places))


def test_every_thread_gets_a_part(make_rig: Any, slots: MemoryRuns) -> None:
    rig = make_rig(slots, io_threads=4)
    (result,) = rig.run(rig.op("load", Direction.LOAD, stored(rig, range(12))))
    assert result.status is OpStatus.DONE
    assert sorted(slots.runs) == [(0, 3), (3, 3), (6, 3), (9, 3)]
    check(rig, 12)


def test_objects_that_do_not_fill_their_slot_are_read_alone(make_rig: Any, slots: MemoryRuns) -> None:
    rig = make_rig(slots, io_threads=1)
    (result,) = rig.run(rig.op("load", Direction.LOAD, stored(rig, range(6), group=1)))
    assert result.status is OpStatus.DONE
    assert slots.runs == []
    check(rig, 6, group=1)


@pytest.mark.parametrize("bad", range(4))
def test_a_run_that_fails_is_read_block_by_block(make_rig: Any, slots: MemoryRuns, bad: int) -> None:
    rig = make_rig(slots, io_threads=1)
    blocks = stored(rig, range(4))
    slots.refused = {bad}
    (result,) = rig.run(rig.op("load", Direction.LOAD, blocks))
    assert (slots.runs, result.status) == ([(0, 4)], OpStatus.DONE)
    check(rig, 4)


@pytest.mark.parametrize("bad", range(4))
def test_what_cannot_be_read_alone_either_fails_alone(make_rig: Any, slots: MemoryRuns, bad: int) -> None:
    rig = make_rig(slots, io_threads=1)
    blocks = stored(rig, range(4))
    del slots.data[bad]
    (result,) = rig.run(rig.op("load", Direction.LOAD, blocks))
    assert (result.status, result.failed, result.reason) == (OpStatus.FAILED, (bad,), "io")
    check(rig, 4, bad=[bad])


@pytest.mark.parametrize("bad", range(4))
def test_a_flipped_bit_in_a_run_fails_its_block(make_rig: Any, slots: MemoryRuns, bad: int) -> None:
    rig = make_rig(slots, io_threads=1)
    blocks = stored(rig, range(4))
    data = bytearray(slots.data[bad])
    data[7999] ^= 1
    slots.data[bad] = bytes(data)
    (result,) = rig.run(rig.op("load", Direction.LOAD, blocks))
    assert (result.status, result.failed, result.reason) == (OpStatus.FAILED, (bad,), "verify")
    check(rig, 4, bad=[bad])


def test_a_real_slab(make_rig: Any, tmp_path: Path) -> None:
    slab = SlabFile(tmp_path / "slab.bin", SLOT, 32)
    slab.open()
    rig = make_rig(slab, io_threads=2)
    places = random.Random(3).sample(range(32), 14)
    memory = MemorySlots()
    rig.slots = memory
    blocks = stored(rig, places)
    for slot, data in memory.data.items():
        slab.write_from(slot, data)
    (result,) = rig.run(rig.op("load", Direction.LOAD, blocks))
    assert result.status is OpStatus.DONE
    check(rig, len(places))
    slab.close()
