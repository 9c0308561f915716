"""Loads onto the host: verified and delivered a portion at a time, by several threads."""

from __future__ import annotations

from typing import Any

import pytest

from umbp_connectors.transfer import loads
from umbp_core.ops import BlockCopy, Direction, OpStatus

Rig = Any

PAGES = range(20, 26)


@pytest.fixture
def rig(make_host_rig: Any, monkeypatch: pytest.MonkeyPatch) -> Rig:
    """An engine whose portions are one block each."""
    monkeypatch.setattr(loads, "PORTION_BYTES", 1)
    return make_host_rig()


def blocks_of(rig: Rig) -> list[BlockCopy]:
    sources = [rig.put(b"k%d" % page, page) for page in PAGES]
    return [BlockCopy(s.key, 0, hbm, s.dram_page, -1, s.checksums) for hbm, s in enumerate(sources)]


def delivered(rig: Rig) -> list[bool]:
    return [rig.hbm(hbm) == rig.content(b"k%d" % page) for hbm, page in enumerate(PAGES)]


def test_two_threads_deliver_one_load(rig: Rig) -> None:
    gate = rig.hold_copies()
    rig.engine.submit([rig.op("load", Direction.LOAD, blocks_of(rig))])
    gate.wait_until_held(2)
    gate.open()
    (result,) = rig.results("load")
    assert (result.status, result.moved_bytes) == (OpStatus.DONE, len(PAGES) * 8000)
    assert delivered(rig) == [True] * len(PAGES)
    assert sorted(call.blocks for call in rig.device.calls) == [(hbm,) for hbm in range(len(PAGES))]


@pytest.mark.parametrize("bad", [0, 3, 5])
def test_a_bad_block_is_not_delivered_and_keeps_no_other_back(rig: Rig, bad: int) -> None:
    """L1."""
    blocks = blocks_of(rig)
    before = rig.hbm(bad)
    rig.pages.array[PAGES[bad], 7999] ^= 1
    (result,) = rig.run(rig.op("load", Direction.LOAD, blocks))
    assert (result.status, result.failed, result.reason) == (OpStatus.FAILED, (bad,), "verify")
    assert result.moved_bytes == (len(PAGES) - 1) * 8000
    assert [index for index, there in enumerate(delivered(rig)) if not there] == [bad]
    assert rig.hbm(bad) == before


def test_a_portion_that_cannot_be_copied_fails_alone(rig: Rig) -> None:
    def fail(call: Any) -> None:
        if call.blocks == (2,):
            raise OSError("copy")

    rig.device.on_copy = fail
    (result,) = rig.run(rig.op("load", Direction.LOAD, blocks_of(rig)))
    assert (result.status, result.failed, result.reason) == (OpStatus.FAILED, (2,), "device")
    assert delivered(rig) == [True, True, False, True, True, True]


def test_after_the_first_portion_a_load_runs_to_its_end(rig: Rig) -> None:
    gate = rig.hold_copies()
    rig.engine.submit([rig.op("load", Direction.LOAD, blocks_of(rig))])
    gate.wait_until_held()
    rig.engine.cancel(["load"])
    assert rig.engine.poll() == []
    gate.open()
    (result,) = rig.results("load")
    assert result.status is OpStatus.DONE
    assert all(delivered(rig))


def test_a_load_that_lost_its_op_stops_verifying(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    verified = []
    verify = loads.verify_object
    monkeypatch.setattr(loads, "verify_object", lambda *a: (verified.append(a[0]), verify(*a)))
    commit = rig.engine.commit
    monkeypatch.setattr(rig.engine, "commit", lambda op_id: (rig.engine.cancel([op_id]), commit(op_id))[1])
    (result,) = rig.run(rig.op("load", Direction.LOAD, blocks_of(rig)))
    assert rig.engine.close(60.0)
    assert (result.status, rig.device.calls) == (OpStatus.CANCELLED, [])
    assert len(verified) <= 2, "one per thread"
    assert rig.engine.take_released() == ["load"]


def test_nothing_is_delivered_while_a_read_may_still_hang(rig: Rig) -> None:
    """L4: a committed op has no deadline any more."""
    gate = rig.hold_io()
    before = [rig.hbm(hbm) for hbm in range(len(PAGES))]
    source = rig.put(b"slow", 30, slot=4)
    slow = BlockCopy(source.key, 0, 8, 30, 4, source.checksums)
    rig.engine.submit([rig.op("load", Direction.LOAD, [*blocks_of(rig), slow])])
    gate.wait_until_held()
    rig.run(rig.op("other", Direction.LOAD, [BlockCopy(b"k20", 0, 9, 20, -1, rig.put(b"k20", 20).checksums)]))
    assert [call.blocks for call in rig.device.calls] == [(9,)], "only the other load"
    rig.engine.cancel(["load"])
    (result,) = rig.engine.poll()
    assert (result.status, result.quarantined) == (OpStatus.CANCELLED, True)
    gate.open()
    assert rig.engine.close(60.0)
    assert [rig.hbm(hbm) for hbm in range(len(PAGES))] == before


def test_a_block_that_is_named_twice_fails_the_load(rig: Rig) -> None:
    blocks = blocks_of(rig)
    twice = [*blocks, BlockCopy(blocks[0].key, 0, 3, blocks[0].dram_page, -1, blocks[0].checksums)]
    (result,) = rig.run(rig.op("load", Direction.LOAD, twice))
    assert (result.status, result.reason, rig.device.calls) == (OpStatus.FAILED, "internal", [])
