"""The gate between a step's layer-wise loads and its forward pass, over a transfer engine whose copies can be held."""

from __future__ import annotations

import time
from collections.abc import Iterator

import msgspec
import pytest

from tests.connectors.transfer.conftest import PATIENCE, Rig, Rigs
from umbp_core.ops import BlockCopy, Direction, LeaderTransferRequest, OpStatus
from umbp_core.ports import Clock
from umbp_core.testing.fakes import FakeClock
from umbp_vllm import layer_gate
from umbp_vllm.layer_gate import LayerGate

LAYERS = {"first": 1, "second": 2, "last": 4}


@pytest.fixture(params=[False, True], ids=["device", "host"])
def rig(request: pytest.FixtureRequest) -> Iterator[Rig]:
    rigs = Rigs(on_host=request.param)
    yield rigs()
    rigs.end()


def ops_of(rig: Rig) -> list[LeaderTransferRequest]:
    """Two loads of three blocks each, into HBM blocks 0 to 5."""
    sources = [rig.put(b"k%d" % page, page) for page in range(20, 26)]
    blocks = [BlockCopy(s.key, 0, hbm, s.dram_page, -1, s.checksums) for hbm, s in enumerate(sources)]
    return [
        msgspec.structs.replace(rig.op(name, Direction.LOAD, part, timeout_s=PATIENCE), layerwise=True)
        for name, part in (("a", blocks[:3]), ("b", blocks[3:]))
    ]


def started(rig: Rig, clock: Clock = time.monotonic) -> LayerGate:
    gate = LayerGate(rig.engine, LAYERS, clock)
    gate.expect(ops_of(rig))
    gate.start(1, rig.device.fence())
    return gate


def test_all_went_well(rig: Rig) -> None:
    gate = started(rig)
    for layer in ("first", "second", "last", "shared with another"):
        gate.wait(layer)
    gate.finish()
    settled = gate.settle(rig.engine.poll())
    assert [result.status for result in settled] == [OpStatus.DONE] * 2
    assert (gate.take_bad_blocks(), gate.is_open) == (set(), False)


@pytest.mark.parametrize(("layer", "bands"), [("first", 1), ("second", 2), ("last", 4), ("of nobody", 4)])
def test_a_layer_waits_for_what_it_reads(rig: Rig, layer: str, bands: int) -> None:

    def copied() -> list[int]:
        """The blocks that have what the layer reads, or are about to: one thread may copy for both loads."""
        return sorted(block for call in rig.device.calls if call.band == bands - 1 for block in call.blocks)

    copies = rig.hold_copies(lambda call: call.band >= bands and copied() == list(range(6)))
    gate = started(rig)
    gate.wait(layer)
    assert copied() == list(range(6))
    copies.open()
    gate.finish()


def test_the_end_of_the_step_waits_for_layers_that_nobody_asked_for(rig: Rig) -> None:
    gate = started(rig)
    gate.finish()
    assert [result.status for result in gate.settle(rig.engine.poll())] == [OpStatus.DONE] * 2
    assert not gate.has_late


def test_only_what_is_bad_is_bad(rig: Rig) -> None:
    ops = ops_of(rig)
    rig.pages.array[24, 0] ^= 1
    gate = LayerGate(rig.engine, LAYERS, rig.engine._clock)
    gate.expect(ops)
    gate.start(1, rig.device.fence())
    gate.finish()
    assert [result.status for result in gate.settle(rig.engine.poll())] == [OpStatus.DONE, OpStatus.FAILED]
    assert gate.take_bad_blocks() == {4}
    assert gate.take_bad_blocks() == set()


def test_a_step_that_went_wrong_trusts_nothing(rig: Rig) -> None:
    gate = started(rig)
    gate.distrust()
    gate.lack([9])
    gate.finish()
    gate.settle(rig.engine.poll())
    assert gate.take_bad_blocks() == {0, 1, 2, 3, 4, 5, 9}
    gate.expect(ops_of(rig))
    assert gate.take_bad_blocks() == {0, 1, 2, 3, 4, 5}, "unless told otherwise, nothing is there"


def test_a_copy_that_hangs_is_settled_without_it_and_released_when_it_ends(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layer_gate, "GRACE_S", 0.01)
    copies = rig.hold_copies(lambda call: 0 in call.blocks and call.band == 1)
    clock = FakeClock()
    gate = started(rig, clock)
    copies.wait_until_held()
    clock.advance(PATIENCE)
    gate.wait("last")
    gate.wait("last")
    gate.finish()
    results = rig.engine.poll()
    settled = {result.op_id: result for result in gate.settle(results)}
    assert (settled["a"].status, settled["a"].quarantined, settled["a"].reason) == (OpStatus.FAILED, True, "deadline")
    assert {0, 1, 2} <= gate.take_bad_blocks()
    assert gate.has_late
    copies.open()
    assert rig.engine.wait(["a", "b"], PATIENCE)
    assert "a" in gate.released(rig.engine.poll())
    assert not gate.has_late


def test_an_op_that_was_never_taken_over_is_not_waited_for(rig: Rig) -> None:
    gate = LayerGate(rig.engine, LAYERS, rig.engine._clock)
    gate.expect(ops_of(rig))
    gate.finish()
    settled = gate.settle([])
    assert [(result.status, result.quarantined) for result in settled] == [(OpStatus.FAILED, False)] * 2
    assert gate.take_bad_blocks() == set(range(6))
    assert not gate.has_late
