"""Loads for whose layers a forward pass waits: order, verification, deadlines, and no disk in their way."""

from __future__ import annotations

import itertools
from typing import Any

import msgspec
import pytest

from umbp_connectors.transfer import Limits
from umbp_core.errors import TransferError
from umbp_core.ops import BlockCopy, Direction, LeaderTransferRequest, OpStatus
from umbp_core.testing.fakes import FakeClock, MemoryDevice

Rig = Any

PAGES = range(20, 26)
BANDS = MemoryDevice.BANDS
PATIENCE = 60.0


def blocks_of(rig: Rig) -> list[BlockCopy]:
    """Six blocks in DRAM, to be loaded into HBM blocks 0 to 5."""
    sources = [rig.put(b"k%d" % page, page) for page in PAGES]
    return [BlockCopy(s.key, 0, hbm, s.dram_page, -1, s.checksums) for hbm, s in enumerate(sources)]


def layerwise(rig: Rig, blocks: list[BlockCopy], op_id: str = "load", timeout_s: float = 30.0) -> LeaderTransferRequest:
    return msgspec.structs.replace(rig.op(op_id, Direction.LOAD, blocks, timeout_s=timeout_s), layerwise=True)


def submit(rig: Rig, *ops: LeaderTransferRequest) -> None:
    rig.engine.submit_ahead(1, ops, rig.device.fence())


def bands_there(rig: Rig, hbm: int) -> list[bool]:
    wanted = rig.content(b"k%d" % PAGES[hbm])
    parts = [rig.device.band_bytes(0, band) for band in range(BANDS)]
    return [rig.hbm(hbm)[part] == wanted[part] for part in parts]


def test_every_layer_arrives(rig: Rig) -> None:
    submit(rig, layerwise(rig, blocks_of(rig)))
    assert rig.engine.wait_layers(["load"], BANDS, PATIENCE)
    assert all(all(bands_there(rig, hbm)) for hbm in range(len(PAGES)))
    (result,) = rig.results("load")
    assert (result.status, result.failed, result.moved_bytes) == (OpStatus.DONE, (), len(PAGES) * 8000)


@pytest.mark.parametrize("held", range(BANDS))
def test_a_layer_is_there_when_it_is_said_to_be_and_later_ones_are_not_awaited(rig: Rig, held: int) -> None:
    gate = rig.hold_copies(lambda call: call.band >= held)
    submit(rig, layerwise(rig, blocks_of(rig)))
    gate.wait_until_held()
    assert rig.engine.wait_layers(["load"], held, PATIENCE)
    assert all(all(bands_there(rig, hbm)[:held]) for hbm in range(len(PAGES)))
    assert not rig.engine.wait_layers(["load"], held + 1, 0.0)
    gate.open()
    assert rig.results("load")[0].status is OpStatus.DONE


def test_a_thread_that_tells_late_how_far_it_came_takes_no_layer_back(
    make_host_rig: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two threads that copy, one is held before it says that the first layers are there; the other goes on."""
    rig = make_host_rig()
    earlier = itertools.count()
    late = rig.gate(lambda _, bands: bands == 1 and not next(earlier))
    delivered = rig.engine.delivered
    monkeypatch.setattr(rig.engine, "delivered", lambda op_id, bands: (late(op_id, bands), delivered(op_id, bands))[1])
    second, last = (rig.gate(lambda call, band=band: call.band == band) for band in (1, BANDS - 1))
    rig.device.on_copy = lambda call: (second(call), last(call))
    submit(rig, layerwise(rig, blocks_of(rig)))
    late.wait_until_held()
    second.open()
    last.wait_until_held()
    assert rig.engine.wait_layers(["load"], BANDS - 1, PATIENCE)
    late.open()
    last.wait_until_held()
    assert rig.engine.wait_layers(["load"], BANDS - 1, 0.0)
    last.open()
    assert rig.results("load")[0].status is OpStatus.DONE


def test_it_comes_behind_the_fence_that_lies_before_the_step(rig: Rig) -> None:
    """L3."""
    rig.engine.end_iteration(0, rig.device.fence())
    fence = rig.device.fence()
    rig.engine.submit_ahead(1, [layerwise(rig, blocks_of(rig))], fence)
    rig.results("load")
    assert {call.fence for call in rig.device.calls} == {fence}


@pytest.mark.parametrize("bad", [0, 3, 5])
def test_no_byte_of_a_bad_block_is_delivered(rig: Rig, bad: int) -> None:
    """L1: also where its first layers are right and only the last one is not."""
    blocks = blocks_of(rig)
    before = rig.hbm(bad)
    rig.pages.array[PAGES[bad], 7999] ^= 1
    submit(rig, layerwise(rig, blocks))
    assert rig.engine.wait_layers(["load"], BANDS, PATIENCE)
    (result,) = rig.results("load")
    assert (result.status, result.failed, result.reason) == (OpStatus.FAILED, (bad,), "verify")
    assert rig.hbm(bad) == before
    assert all(all(bands_there(rig, hbm)) for hbm in range(len(PAGES)) if hbm != bad)


def test_a_layer_that_cannot_be_copied_fails_its_blocks(rig: Rig) -> None:
    def fail(call: Any) -> None:
        if call.band == 2 and 2 in call.blocks:
            raise TransferError("copy")

    rig.device.on_copy = fail
    submit(rig, layerwise(rig, blocks_of(rig)))
    assert rig.engine.wait_layers(["load"], BANDS, PATIENCE)
    (result,) = rig.results("load")
    assert (result.status, result.reason) == (OpStatus.FAILED, "device")
    assert 2 in result.failed
    assert all(all(bands_there(rig, hbm)) for hbm in range(len(PAGES)) if hbm not in result.failed)


def test_given_up_before_its_first_byte(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """L4: nothing is written any more, and it is reported at once."""
    commit = rig.engine.commit
    monkeypatch.setattr(rig.engine, "commit", lambda op_id: (rig.engine.give_up([op_id]), commit(op_id))[1])
    before = [rig.hbm(hbm) for hbm in range(len(PAGES))]
    submit(rig, layerwise(rig, blocks_of(rig)))
    assert rig.engine.wait_layers(["load"], 1, PATIENCE), "an op that has ended brings nothing any more"
    (result,) = rig.results("load")
    assert (result.status, len(result.failed)) == (OpStatus.CANCELLED, len(PAGES))
    assert rig.engine.close(PATIENCE)
    assert [rig.hbm(hbm) for hbm in range(len(PAGES))] == before
    assert rig.engine.take_released() == ["load"]


def test_given_up_between_two_layers(rig: Rig) -> None:
    """It ends after the copy that is being made; what follows is not copied."""
    gate = rig.hold_copies(lambda call: call.band == 1)
    submit(rig, layerwise(rig, blocks_of(rig)))
    gate.wait_until_held()
    assert not rig.engine.wait_layers(["load"], 2, 0.0)
    rig.engine.give_up(["load", "unknown"])
    assert rig.engine.poll() == [], "a byte may still be written"
    gate.open()
    (result,) = rig.results("load")
    assert (result.status, result.reason, result.moved_bytes) == (OpStatus.FAILED, "deadline", 0)
    assert result.failed == tuple(range(len(PAGES)))
    assert max(call.band for call in rig.device.calls) <= 2
    assert not result.quarantined


def test_its_deadline_counts_until_its_first_byte(make_rig: Any) -> None:
    clock = FakeClock()
    rig = make_rig(clock=clock, start=False)
    submit(rig, layerwise(rig, blocks_of(rig), timeout_s=2.0))
    clock.advance(2.0)
    (result,) = rig.engine.poll()
    assert (result.status, len(result.failed)) == (OpStatus.EXPIRED, len(PAGES))
    rig.engine.start()


def test_a_disk_that_hangs_is_not_in_its_way(make_rig: Any) -> None:
    """L5: not even when all tokens for loads and all threads for SSD are taken."""
    rig = make_rig(limits=Limits(loads=1), io_threads=1)
    gate = rig.hold_io()
    source = rig.put(b"slow", 30, slot=4)
    slow = BlockCopy(source.key, 0, 8, 30, 4, source.checksums)
    rig.engine.submit([rig.op("slow", Direction.LOAD, [slow])])
    gate.wait_until_held()
    submit(rig, layerwise(rig, blocks_of(rig)))
    assert rig.engine.wait_layers(["load"], BANDS, PATIENCE)
    assert rig.results("load")[0].status is OpStatus.DONE
    gate.open()
    assert rig.results("slow")[0].status is OpStatus.DONE


def test_it_is_refused_for_a_block_on_ssd(rig: Rig) -> None:
    """L5."""
    source = rig.put(b"slow", 30, slot=4)
    submit(rig, layerwise(rig, [BlockCopy(source.key, 0, 8, 30, 4, source.checksums)]))
    (result,) = rig.results("load")
    assert (result.status, result.reason, rig.device.calls) == (OpStatus.FAILED, "internal", [])


def test_a_closed_engine_lets_nobody_wait(rig: Rig) -> None:
    assert rig.engine.close(PATIENCE)
    submit(rig, layerwise(rig, blocks_of(rig)))
    assert rig.engine.wait_layers(["load"], BANDS, PATIENCE)
    assert [result.status for result in rig.engine.poll()] == [OpStatus.CANCELLED]
