"""Bytes arrive where they should, verified, after the right fence (laws L1 and L3)."""

from __future__ import annotations

from typing import Any

import pytest

from umbp_connectors.transfer import Limits
from umbp_core.ops import (
    BlockCopy,
    Direction,
    LeaderTransferRequest,
    OpStatus,
    Requirement,
    RequirementKind,
    WorkerTransferRequest,
)

Rig = Any


def test_a_store_copies_its_blocks_and_vouches_for_each(rig: Rig) -> None:
    blocks = [BlockCopy(b"a", 0, 3, 10), BlockCopy(b"b", 1, 4, 11), BlockCopy(b"c", 0, 5, 12)]
    (result,) = rig.run(rig.op("store", Direction.STORE, blocks))
    assert (result.status, result.failed, result.moved_bytes) == (OpStatus.DONE, (), 16_500)
    expected = b""
    for block in blocks:
        data = rig.hbm(block.hbm_block, block.group)
        assert bytes(rig.pages.page(block.dram_page, len(data))) == data
        expected += rig.checksum(block.key, data)
    assert result.checksums == expected


def test_a_load_from_dram_delivers_what_was_stored(rig: Rig) -> None:
    a, b = rig.put(b"a", 10), rig.put(b"b", 11, group=1)
    blocks = [BlockCopy(b"a", 0, 7, 10, -1, a.checksums), BlockCopy(b"b", 1, 8, 11, -1, b.checksums)]
    (result,) = rig.run(rig.op("load", Direction.LOAD, blocks))
    assert (result.status, result.failed, result.moved_bytes) == (OpStatus.DONE, (), 8_500)
    assert (rig.hbm(7), rig.hbm(8, 1)) == (rig.content(b"a"), rig.content(b"b", 1))


def test_a_load_mixes_tiers(rig: Rig) -> None:
    places = [(b"a", 0, -1), (b"b", 0, 3), (b"c", 1, 4), (b"d", 1, -1), (b"e", 0, 5)]
    blocks = []
    for number, (key, group, slot) in enumerate(places):
        source = rig.put(key, 20 + number, group, slot)
        blocks.append(BlockCopy(key, group, number, source.dram_page, slot, source.checksums))
    (result,) = rig.run(rig.op("load", Direction.LOAD, blocks))
    assert result.status is OpStatus.DONE
    for number, (key, group, _) in enumerate(places):
        assert rig.hbm(number, group) == rig.content(key, group)


def test_a_load_from_ssd_leaves_the_object_in_its_page(rig: Rig) -> None:
    source = rig.put(b"a", 30, slot=2)
    rig.run(rig.op("load", Direction.LOAD, [BlockCopy(b"a", 0, 1, 30, 2, source.checksums)]))
    assert bytes(rig.pages.page(30, 8000)) == rig.content(b"a")


def test_hbm_to_dram_to_ssd_and_back(rig: Rig) -> None:
    original = [rig.hbm(1), rig.hbm(2, 1)]
    stored = [BlockCopy(b"a", 0, 1, 10), BlockCopy(b"b", 1, 2, 11)]
    (store,) = rig.run(rig.op("store", Direction.STORE, stored))
    demoted = [BlockCopy(b"a", 0, -1, 10, 5), BlockCopy(b"b", 1, -1, 11, 6)]
    (demote,) = rig.run(rig.op("demote", Direction.DEMOTE, demoted))
    assert (demote.status, demote.moved_bytes, demote.checksums) == (OpStatus.DONE, 8_500, b"")
    rig.pages.array[:] = 0xEE
    for hbm in rig.device.hbm.values():
        hbm[:] = 0xEE
    sums = [b"o" * 16 + store.checksums[:16], b"o" * 16 + store.checksums[16:]]
    loaded = [BlockCopy(b"a", 0, 9, 20, 5, sums[0]), BlockCopy(b"b", 1, 9, 21, 6, sums[1])]
    (load,) = rig.run(rig.op("load", Direction.LOAD, loaded))
    assert load.status is OpStatus.DONE
    assert [rig.hbm(9), rig.hbm(9, 1)] == original


def test_slots_are_moved_in_whole_sectors(rig: Rig) -> None:
    """Direct I/O can do no other."""
    rig.run(rig.op("store", Direction.STORE, [BlockCopy(b"a", 0, 1, 10), BlockCopy(b"b", 1, 1, 11)]))
    rig.run(rig.op("demote", Direction.DEMOTE, [BlockCopy(b"a", 0, -1, 10, 5), BlockCopy(b"b", 1, -1, 11, 6)]))
    assert {slot: len(data) for slot, data in rig.slots.data.items()} == {5: 8192, 6: 4096}


def test_a_batch_is_one_copier_call_per_group(rig: Rig) -> None:
    blocks = [BlockCopy(b"%d" % n, n % 2, n, 10 + n) for n in range(6)]
    rig.run(rig.op("store", Direction.STORE, blocks))
    calls = [(call.kind, call.group, call.blocks, call.pages) for call in rig.device.calls]
    assert calls == [("gather", 0, (0, 2, 4), (10, 12, 14)), ("gather", 1, (1, 3, 5), (11, 13, 15))]


@pytest.mark.parametrize("direction", Direction)
def test_an_op_without_blocks_is_done(rig: Rig, direction: Direction) -> None:
    (result,) = rig.run(rig.op("empty", direction, []))
    assert (result.status, result.moved_bytes, rig.device.calls) == (OpStatus.DONE, 0, [])


class TestFences:
    def test_a_store_waits_for_its_iteration_and_takes_its_fence(self, rig: Rig) -> None:
        rig.engine.begin_iteration(3)
        rig.engine.submit([rig.op("store", Direction.STORE, [BlockCopy(b"a", 0, 1, 10)], after=3)])
        assert rig.engine.poll() == []
        assert rig.device.calls == []
        rig.engine.end_iteration(3, "fence 3")
        rig.results("store")
        assert [call.fence for call in rig.device.calls] == ["fence 3"]

    def test_a_store_that_comes_to_its_turn_later_keeps_its_own_fence(self, make_rig: Any) -> None:
        rig = make_rig(limits=Limits(stores=1))
        gate = rig.hold_copies()
        rig.engine.submit([rig.op("first", Direction.STORE, [BlockCopy(b"a", 0, 1, 10)])])
        gate.wait_until_held()
        rig.engine.submit([rig.op("second", Direction.STORE, [BlockCopy(b"b", 0, 2, 11)], after=3)])
        rig.engine.end_iteration(3, "fence 3")
        rig.engine.end_iteration(4, "fence 4")
        gate.open()
        rig.results("first", "second")
        assert [call.fence for call in rig.device.calls] == [1, "fence 3"]

    def test_a_store_whose_iteration_ended_unnoticed_takes_the_next_fence(self, rig: Rig) -> None:
        rig.engine.submit([rig.op("store", Direction.STORE, [BlockCopy(b"a", 0, 1, 10)], after=3)])
        rig.engine.end_iteration(5, "fence 5")
        rig.results("store")
        assert [call.fence for call in rig.device.calls] == ["fence 5"]

    def test_a_fence_that_was_forgotten_is_replaced_by_a_later_one(self, rig: Rig) -> None:
        for n in range(200):
            rig.engine.end_iteration(n, f"fence {n}")
        rig.run(rig.op("old", Direction.STORE, [BlockCopy(b"a", 0, 1, 10)], after=0))
        rig.run(rig.op("new", Direction.STORE, [BlockCopy(b"b", 0, 1, 11)], after=199))
        assert [call.fence for call in rig.device.calls] == ["fence 199", "fence 199"]

    def test_a_load_takes_the_newest_fence_and_the_first_one_its_own(self, rig: Rig) -> None:
        source = rig.put(b"a", 10)
        block = BlockCopy(b"a", 0, 1, 10, -1, source.checksums)
        rig.run(rig.op("first", Direction.LOAD, [block]))
        rig.engine.end_iteration(7, "fence 7")
        rig.run(rig.op("second", Direction.LOAD, [block]))
        assert [call.fence for call in rig.device.calls] == [1, "fence 7"]

    def test_a_layer_brings_its_fence(self, rig: Rig) -> None:
        requirement = Requirement(RequirementKind.LAYER_NAME_COMPLETE, 2, "model.1")
        source = rig.put(b"a", 10)
        blocks = (BlockCopy(b"a", 0, 1, 10, -1, source.checksums),)
        rig.engine.begin_iteration(2)
        rig.engine.submit([LeaderTransferRequest("load", "request", Direction.LOAD, blocks, requirement)])
        rig.engine.layer_done("model.0", 0, "layer 0")
        rig.engine.layer_done("model.1", 1, "layer 1")
        rig.results("load")
        assert [call.fence for call in rig.device.calls] == ["layer 1"]


class TestHalves:
    def test_an_unpaired_op_waits_for_the_workers_half(self, rig: Rig) -> None:
        op = rig.op("store", Direction.STORE, [BlockCopy(b"a", 0, 1, 10)])
        rig.engine.submit([op], paired=False)
        assert [line["phase"] for line in rig.engine.dump()] == ["HALF"]
        rig.engine.take([WorkerTransferRequest("store", "request", Direction.STORE)])
        (result,) = rig.results("store")
        assert result.status is OpStatus.DONE

    def test_an_op_that_comes_again_runs_once(self, rig: Rig) -> None:
        op = rig.op("store", Direction.STORE, [BlockCopy(b"a", 0, 1, 10)])
        rig.engine.submit([op, op])
        rig.results("store")
        rig.engine.submit([op])
        assert (rig.engine.pending(), rig.engine.poll(), len(rig.device.calls)) == (0, [], 1)

    def test_a_half_that_contradicts_is_ignored_and_said(self, rig: Rig, caplog: pytest.LogCaptureFixture) -> None:
        first = rig.op("store", Direction.STORE, [BlockCopy(b"a", 0, 1, 10)], after=1)
        other = rig.op("store", Direction.STORE, [BlockCopy(b"b", 0, 2, 11)])
        good = rig.op("good", Direction.STORE, [BlockCopy(b"c", 0, 3, 12)])
        rig.engine.submit([first])
        rig.engine.submit([other, good])
        rig.engine.take([WorkerTransferRequest("store", "another request", Direction.STORE)])
        assert caplog.text.count("op store came again with different contents") == 2
        rig.engine.end_iteration(1, "fence")
        done = rig.results("store", "good")
        assert [result.status for result in done] == [OpStatus.DONE, OpStatus.DONE]
        assert {call.pages for call in rig.device.calls} == {(10,), (12,)}
