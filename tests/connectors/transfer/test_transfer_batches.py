"""What a device copies at once is bounded, loads come in between, and a job that vanishes has its op failed."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from umbp_connectors.transfer import Limits
from umbp_core.ops import BlockCopy, Direction, ImmediateTransferResult, OpStatus

Rig = Any
PATIENCE = 60.0


def long_store(rig: Rig, count: int, op_id: str = "store") -> Any:
    return rig.op(op_id, Direction.STORE, [BlockCopy(b"s%d" % n, 0, n % 16, n) for n in range(count)])


def calls(rig: Rig) -> list[tuple[str, int]]:
    return [(call.kind, len(call.blocks)) for call in rig.device.calls]


@pytest.mark.statement("connector", 45)
def test_a_long_store_is_copied_sixteen_blocks_at_once(rig: Rig) -> None:
    (result,) = rig.run(long_store(rig, 40))
    assert (result.status, result.moved_bytes, len(result.checksums)) == (OpStatus.DONE, 40 * 8000, 40 * 16)
    assert calls(rig) == [("gather", 16), ("gather", 16), ("gather", 8)]
    for page in range(40):
        assert rig.pages.page(page, 8000).tobytes() == rig.hbm(page % 16)
        assert result.checksums[16 * page : 16 * page + 16] == rig.checksum(b"s%d" % page, rig.hbm(page % 16))


@pytest.mark.statement("connector", 45)
def test_a_load_waits_for_one_part_of_a_store_at_most(make_rig: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    rig = make_rig(limits=Limits(blocks=4))
    sources = [rig.put(b"k%d" % n, 50 + n) for n in range(6)]
    blocks = [BlockCopy(s.key, 0, n, s.dram_page, -1, s.checksums) for n, s in enumerate(sources)]
    gate = rig.hold_copies(lambda call: call.kind == "gather")
    rig.engine.submit([long_store(rig, 12)])
    gate.wait_until_held()
    queued = threading.Semaphore(0)
    put = rig.engine._tools.device.put
    monkeypatch.setattr(rig.engine._tools.device, "put", lambda *task: (put(*task), queued.release()))
    rig.engine.submit([rig.op("load", Direction.LOAD, blocks)])
    if rig.device.on_host:
        assert rig.engine.wait(["load"], PATIENCE), "other threads deliver"
    else:
        for _ in range(2):
            assert queued.acquire(timeout=PATIENCE)
    gate.open()
    load, store = rig.results("load", "store")
    assert (load.status, store.status) == (OpStatus.DONE, OpStatus.DONE)
    for n in range(6):
        assert rig.hbm(n) == rig.content(b"k%d" % n)
    gathers = [place for place, (kind, _) in enumerate(calls(rig)) if kind == "gather"]
    scatters = [size for kind, size in calls(rig) if kind == "scatter"]
    assert (len(gathers), sum(scatters)) == (3, 6)
    if not rig.device.on_host:
        assert scatters == [4, 2]
        assert gathers[1] > calls(rig).index(("scatter", 2)), "the rest of the store came first"


@pytest.mark.parametrize("bad", range(3))
def test_a_part_that_fails_fails_the_store_once_and_the_next_one_works(make_rig: Any, bad: int) -> None:
    rig = make_rig(limits=Limits(blocks=4))

    def on_copy(call: Any) -> None:
        if call.pages[0] == 4 * bad:
            raise OSError(5, "no luck")

    rig.device.on_copy = on_copy
    (result,) = rig.run(long_store(rig, 12))
    assert (result.status, result.failed, result.checksums) == (OpStatus.FAILED, tuple(range(12)), b"")
    assert len(calls(rig)) == bad + 1, "what comes behind a failed part is not copied"
    rig.device.on_copy = lambda call: None
    (result,) = rig.run(long_store(rig, 12, "again"))
    assert result.status is OpStatus.DONE


@pytest.mark.statement("connector", 67)
def test_an_op_whose_job_vanishes_fails_loudly(
    rig: Rig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It is committed, so no deadline ends it; nobody would ever say how it ended."""
    behind = threading.Event()
    with monkeypatch.context() as patch:
        patch.setattr(rig.engine._tools.hashing, "put", lambda *_: None)
        rig.engine.submit([long_store(rig, 2, "vanishes")])
        rig.engine._tools.device.put(9.0, behind.set)
        assert behind.wait(PATIENCE)
    (result,) = rig.results("vanishes")
    assert (result.status, result.failed, result.reason) == (OpStatus.FAILED, (0, 1), "lost")
    assert (rig.engine.pending(), rig.engine.quarantined()) == (0, frozenset())
    assert "store vanishes was dropped by its job" in caplog.text
    (result,) = rig.run(long_store(rig, 2, "the next one"))
    assert result.status is OpStatus.DONE


def test_what_was_carried_out_elsewhere_ends_here_too(rig: Rig) -> None:
    rig.engine.submit([long_store(rig, 2)], paired=False)
    rig.engine.take([ImmediateTransferResult("store", "request", Direction.STORE, OpStatus.FAILED, (1,), "io")])
    (result,) = rig.engine.poll()
    assert (result.status, result.failed, result.reason) == (OpStatus.FAILED, (1,), "io")
    assert rig.device.calls == []
