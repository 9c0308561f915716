"""Stores that take each layer as soon as the forward pass is through with it."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from umbp_connectors.transfer import Limits
from umbp_core.errors import TransferError
from umbp_core.ops import BlockCopy, Direction, LeaderTransferRequest, OpStatus, Requirement, RequirementKind
from umbp_core.testing.fakes import CopyCall, MemoryDevice

Rig = Any

STEP = 7
BANDS = MemoryDevice.BANDS
PATIENCE = 60.0
FIRST_LAYER = Requirement(RequirementKind.LAYER_COMPLETE, STEP, layer_index=0)


def store(op_id: str = "store", blocks: int = 3, first: int = 0, group: int = 0) -> LeaderTransferRequest:
    """HBM blocks ``first`` and following to pages 20 + block."""
    copies = [BlockCopy(b"%s%d" % (op_id.encode(), b), group, b, 20 + b) for b in range(first, first + blocks)]
    return LeaderTransferRequest(op_id, "request", Direction.STORE, tuple(copies), FIRST_LAYER)


def layer(band: int, group: int = 0) -> str:
    return f"group {group} layer {band}"


def begin(rig: Rig, *ops: LeaderTransferRequest) -> None:
    """The forward pass is about to be launched."""
    rig.engine.begin_iteration(STEP)
    rig.engine.submit(ops)


def write(rig: Rig, band: int, blocks: int = 3, group: int = 0) -> None:
    """The forward pass computes a layer of some blocks: until then they hold something else."""
    part = rig.device.band_bytes(group, band)
    rig.device.hbm[group][:blocks, part] = band + 1


def finish(rig: Rig, name: str, number: int, fence: object) -> None:
    rig.engine.layer_done(name, number, fence)


def start(rig: Rig, name: str, fence: object) -> None:
    """The first layer is done; returns when the store waits for all others."""
    waits = threading.Semaphore(0)
    after_layers = rig.engine.after_layers

    def counted(*arguments: Any) -> None:
        after_layers(*arguments)
        waits.release()

    rig.engine.after_layers = counted
    finish(rig, name, 0, fence)
    for _ in range(BANDS):
        assert waits.acquire(timeout=PATIENCE)


def seen_gathers(rig: Rig) -> list[CopyCall]:
    return [call for call in rig.device.calls if call.kind == "gather"]


@pytest.mark.statement("connector", 40)
def test_every_layer_leaves_behind_its_own_fence(rig: Rig) -> None:
    """L3: no part is read before its layer is done; all of it is right, and its checksum is the whole object's."""
    op = store()
    begin(rig, op)
    for band in range(BANDS):
        write(rig, band)
        gate = rig.hold_copies(lambda call, band=band: call.band == band)
        finish(rig, layer(band), band, f"behind {band}")
        gate.wait_until_held()
        assert rig.engine.poll() == [], "there are layers missing"
        gate.open()
    (result,) = rig.results("store")
    assert result.status is OpStatus.DONE
    assert [(call.band, call.fence) for call in seen_gathers(rig)] == [(b, f"behind {b}") for b in range(BANDS)]
    for number, block in enumerate(op.blocks):
        data = rig.pages.array[block.dram_page, :8000]
        assert data.tobytes() == rig.hbm(block.hbm_block)
        assert result.checksums[16 * number : 16 * (number + 1)] == rig.checksum(block.key, data)
    assert result.moved_bytes == 3 * 8000


@pytest.mark.statement("connector", 42)
def test_layers_that_are_never_reported_end_with_their_step(rig: Rig) -> None:
    """A replayed graph calls no hook: the store waits for the end of the step, and is right."""
    begin(rig, store())
    start(rig, layer(0), "behind 0")
    rig.engine.end_iteration(STEP, "the end")
    (result,) = rig.results("store")
    assert result.status is OpStatus.DONE
    assert [(call.band, call.fence) for call in seen_gathers(rig)] == [(0, "behind 0")] + [
        (band, "the end") for band in range(1, BANDS)
    ]


def test_a_step_without_any_report_stores_whole_blocks(rig: Rig) -> None:
    begin(rig, store())
    assert [line["phase"] for line in rig.engine.dump()] == ["WAITING"]
    rig.engine.end_iteration(STEP, "the end")
    assert rig.results("store")[0].status is OpStatus.DONE
    assert [(call.band, call.fence) for call in seen_gathers(rig)] == [(-1, "the end")]


def test_layers_may_be_done_in_any_order(rig: Rig) -> None:
    begin(rig, store())
    start(rig, layer(2), 2)
    for number, band in enumerate((0, 3, 1), 1):
        finish(rig, layer(band), number, band)
    assert rig.results("store")[0].status is OpStatus.DONE
    assert [(call.band, call.fence) for call in seen_gathers(rig)] == [(2, 2), (0, 0), (3, 3), (1, 1)]


def test_a_band_of_several_layers_waits_for_all_of_them(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rig.device, "band_layers", lambda group, band: (f"a{band}", f"b{band}"))
    begin(rig, store())
    start(rig, "b0", "b0")
    for number, name in enumerate(("a1", "a0", "a2", "b1", "b3", "b2", "a3"), 1):
        finish(rig, name, number, name)
    assert rig.results("store")[0].status is OpStatus.DONE
    assert [(call.band, call.fence) for call in seen_gathers(rig)] == [(0, "a0"), (1, "b1"), (2, "b2"), (3, "a3")]


def test_layers_of_another_step_do_not_count(rig: Rig) -> None:
    rig.engine.begin_iteration(STEP - 1)
    rig.engine.submit([store()])
    for band in range(BANDS):
        finish(rig, layer(band), band, "too early")
    rig.engine.begin_iteration(STEP)
    finish(rig, layer(0), 0, "right")
    assert not rig.engine.wait(["store"], 0.0)
    for band in range(1, BANDS):
        finish(rig, layer(band), band, "right")
    assert rig.results("store")[0].status is OpStatus.DONE
    assert {call.fence for call in seen_gathers(rig)} == {"right"}


def test_blocks_of_several_groups(rig: Rig) -> None:
    blocks = (BlockCopy(b"a", 0, 1, 21), BlockCopy(b"b", 1, 2, 22))
    begin(rig, LeaderTransferRequest("store", "request", Direction.STORE, blocks, FIRST_LAYER))
    for number, (band, group) in enumerate((band, group) for band in range(BANDS) for group in (0, 1)):
        finish(rig, layer(band, group), number, None)
    assert rig.results("store")[0].status is OpStatus.DONE
    assert rig.pages.array[21, :8000].tobytes() == rig.hbm(1)
    assert rig.pages.array[22, :500].tobytes() == rig.hbm(2, group=1)


@pytest.mark.statement("connector", 50)
@pytest.mark.parametrize("bad", range(BANDS))
def test_one_layer_that_cannot_be_copied_fails_the_whole_store(rig: Rig, bad: int) -> None:
    """L2, L4: reported once, and only when the last layer's turn is over: until then a copy may be under way."""

    def fail(call: CopyCall) -> None:
        if call.band == bad:
            raise TransferError("copy")

    rig.device.on_copy = fail
    begin(rig, store())
    for band in range(BANDS):
        assert not rig.engine.wait(["store"], 0.0)
        finish(rig, layer(band), band, None)
    (result,) = rig.results("store")
    assert (result.status, result.failed, result.checksums) == (OpStatus.FAILED, (0, 1, 2), b"")
    assert result.reason == "device"


def test_a_bug_in_a_copier_fails_its_op_and_no_other(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rig.device, "band_layers", lambda group, band: 1 // 0)
    begin(rig, store())
    finish(rig, layer(0), 0, None)
    (result,) = rig.results("store")
    assert (result.status, result.reason) == (OpStatus.FAILED, "internal")
    monkeypatch.undo()
    begin(rig, store("next"))
    rig.engine.end_iteration(STEP, None)
    assert rig.results("next")[0].status is OpStatus.DONE


def test_dropped_before_its_first_byte(rig: Rig) -> None:
    begin(rig, store())
    rig.engine.cancel(["store"])
    for band in range(BANDS):
        finish(rig, layer(band), band, None)
    (result,) = rig.results("store")
    assert result.status is OpStatus.CANCELLED
    assert seen_gathers(rig) == []


def test_a_cancellation_between_two_layers_changes_nothing(rig: Rig) -> None:
    """It is committed: it runs to its end (statement 65)."""
    begin(rig, store())
    gate = rig.hold_copies(lambda call: call.band == 0)
    finish(rig, layer(0), 0, None)
    gate.wait_until_held()
    rig.engine.cancel(["store"])
    gate.open()
    for band in range(1, BANDS):
        finish(rig, layer(band), band, None)
    assert rig.results("store")[0].status is OpStatus.DONE


def test_it_needs_a_token_as_every_store_and_then_takes_what_is_there(make_rig: Any) -> None:
    """The second one starts when the step is over: there is nothing to overlap with any more, so it goes whole."""
    rig = make_rig(limits=Limits(stores=1))
    begin(rig, store("first", blocks=16), store("second", blocks=3))
    gate = rig.hold_copies(lambda call: call.band == BANDS - 1)
    for band in range(BANDS):
        finish(rig, layer(band), band, None)
    rig.engine.end_iteration(STEP, "the end")
    gate.wait_until_held()
    gate.open()
    results = rig.results("first", "second")
    assert [result.status for result in results] == [OpStatus.DONE] * 2
    assert [call.band for call in seen_gathers(rig)] == [*range(BANDS), -1]


@pytest.mark.statement("connector", 72)
def test_a_pass_that_never_ends_does_not_keep_the_engine_open(rig: Rig) -> None:
    begin(rig, store())
    finish(rig, layer(0), 0, None)
    rig.engine.close(0.2)
    (result,) = rig.engine.poll()
    assert (result.status, result.quarantined) == (OpStatus.CANCELLED, True)
    assert rig.engine.close(PATIENCE), "no thread waits for it"


def test_a_copier_without_layers_fails_it(rig: Rig) -> None:
    rig.engine._tools = rig.engine._tools.__class__(**{**vars(rig.engine._tools), "layers": None})
    begin(rig, store())
    finish(rig, layer(0), 0, None)
    (result,) = rig.results("store")
    assert (result.status, result.reason) == (OpStatus.FAILED, "internal")
