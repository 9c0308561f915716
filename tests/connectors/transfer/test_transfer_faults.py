"""Whatever breaks inside an op ends that op, with the blocks named, and nothing else (laws L1 and L4)."""

from __future__ import annotations

from typing import Any

import pytest

from umbp_core.errors import TierUnavailable, TransferError
from umbp_core.ops import BlockCopy, Direction, OpStatus
from umbp_core.testing.fakes import FakeClock

Rig = Any

ERRORS = [
    TransferError("bad copy"),
    TierUnavailable("gone"),
    OSError(5, "Input/output error"),
    ZeroDivisionError("bug"),
]


def fail_always(error: Exception) -> Any:
    def hook(*_: object) -> None:
        raise error

    return hook


def no_fault(*_: object) -> None:
    """The hook of a machine that works."""


def four_blocks(rig: Rig, ssd: bool = False) -> list[BlockCopy]:
    """A load of four objects into HBM blocks 0 to 3, whose HBM is poisoned."""
    rig.device.hbm[0][:] = 0xEE
    sources = [rig.put(b"k%d" % n, 10 + n, slot=n if ssd else -1) for n in range(4)]
    return [BlockCopy(s.key, 0, n, s.dram_page, s.ssd_slot, s.checksums) for n, s in enumerate(sources)]


def check_delivery(rig: Rig, bad: set[int]) -> None:
    """The good blocks are right and the bad ones were never touched."""
    for n in range(4):
        assert rig.hbm(n) == (b"\xee" * 8000 if n in bad else rig.content(b"k%d" % n))


@pytest.mark.parametrize("ssd", [False, True])
@pytest.mark.parametrize("bad", range(4))
def test_a_flipped_bit_never_reaches_hbm(rig: Rig, bad: int, ssd: bool) -> None:
    blocks = four_blocks(rig, ssd)
    if ssd:
        data = bytearray(rig.slots.data[bad])
        data[7999] ^= 1
        rig.slots.data[bad] = bytes(data)
    else:
        rig.pages.array[10 + bad, 7999] ^= 1
    (result,) = rig.run(rig.op("load", Direction.LOAD, blocks))
    assert (result.status, result.failed, result.reason) == (OpStatus.FAILED, (bad,), "verify")
    assert result.moved_bytes == 24_000
    check_delivery(rig, {bad})


def test_bytes_behind_the_object_are_not_part_of_it(rig: Rig) -> None:
    blocks = four_blocks(rig)
    rig.pages.array[10:14, 8000:] = 0x55
    (result,) = rig.run(rig.op("load", Direction.LOAD, blocks))
    assert result.status is OpStatus.DONE
    check_delivery(rig, set())


def test_right_bytes_under_a_wrong_name_do_not_verify(rig: Rig) -> None:
    first, *others = four_blocks(rig)
    swapped = BlockCopy(b"another block", 0, 0, first.dram_page, -1, first.checksums)
    (result,) = rig.run(rig.op("load", Direction.LOAD, [swapped, *others]))
    assert (result.failed, result.reason) == ((0,), "verify")
    check_delivery(rig, {0})


@pytest.mark.parametrize("checksums", [b"", b"x" * 16, b"x" * 31, b"x" * 32])
def test_without_this_ranks_checksum_nothing_is_delivered(rig: Rig, checksums: bytes) -> None:
    first, *others = four_blocks(rig)
    unknown = BlockCopy(first.key, 0, 0, first.dram_page, -1, checksums)
    (result,) = rig.run(rig.op("load", Direction.LOAD, [unknown, *others]))
    assert (result.status, result.failed) == (OpStatus.FAILED, (0,))
    check_delivery(rig, {0})


@pytest.mark.parametrize("error", ERRORS, ids=lambda e: type(e).__name__)
@pytest.mark.parametrize("bad", range(4))
def test_a_read_that_fails_fails_its_block_only(rig: Rig, bad: int, error: Exception) -> None:
    def on_io(kind: str, slot: int) -> None:
        if slot == bad:
            raise error

    rig.slots.on_io = on_io
    (result,) = rig.run(rig.op("load", Direction.LOAD, four_blocks(rig, ssd=True)))
    assert (result.status, result.failed, result.reason) == (OpStatus.FAILED, (bad,), "io")
    check_delivery(rig, {bad})


def test_a_load_of_which_nothing_is_good_touches_no_hbm(rig: Rig) -> None:
    blocks = four_blocks(rig)
    rig.pages.array[:] = 0
    (result,) = rig.run(rig.op("load", Direction.LOAD, blocks))
    assert (result.status, result.failed, result.moved_bytes) == (OpStatus.FAILED, (0, 1, 2, 3), 0)
    assert rig.device.calls == []


@pytest.mark.parametrize("error", ERRORS, ids=lambda e: type(e).__name__)
def test_a_gather_that_fails_fails_the_store(rig: Rig, error: Exception) -> None:
    rig.device.on_copy = fail_always(error)
    blocks = [BlockCopy(b"a", 0, 1, 10), BlockCopy(b"b", 1, 2, 11)]
    (result,) = rig.run(rig.op("store", Direction.STORE, blocks))
    assert (result.status, result.failed, result.reason) == (OpStatus.FAILED, (0, 1), "device")
    assert (result.checksums, result.moved_bytes, len(rig.device.calls)) == (b"", 0, 1)


@pytest.mark.parametrize("bad_group", [0, 1])
def test_a_scatter_that_fails_fails_its_group(rig: Rig, bad_group: int) -> None:
    def on_copy(call: Any) -> None:
        if call.group == bad_group:
            raise TransferError("copy")

    rig.device.on_copy = on_copy
    sources = [rig.put(b"k%d" % n, 10 + n, group=n % 2) for n in range(4)]
    blocks = [BlockCopy(s.key, s.group, n, s.dram_page, -1, s.checksums) for n, s in enumerate(sources)]
    (result,) = rig.run(rig.op("load", Direction.LOAD, blocks))
    bad = (0, 2) if bad_group == 0 else (1, 3)
    assert (result.status, result.failed, result.reason) == (OpStatus.FAILED, bad, "device")
    assert result.moved_bytes == (1000 if bad_group == 0 else 16_000)
    for n in set(range(4)) - set(bad):
        assert rig.hbm(n, n % 2) == rig.content(b"k%d" % n, n % 2)


@pytest.mark.parametrize("error", ERRORS, ids=lambda e: type(e).__name__)
def test_a_write_that_fails_fails_the_demotion(rig: Rig, error: Exception) -> None:
    def on_io(kind: str, slot: int) -> None:
        if slot == 6:
            raise error

    rig.slots.on_io = on_io
    blocks = [BlockCopy(b"%d" % n, 0, -1, 10 + n, 5 + n) for n in range(3)]
    (result,) = rig.run(rig.op("demote", Direction.DEMOTE, blocks))
    assert (result.status, result.failed, result.reason) == (OpStatus.FAILED, (0, 1, 2), "io")


def test_a_demotion_that_failed_writes_no_further(make_rig: Any) -> None:
    rig = make_rig(io_threads=1)
    rig.slots.on_io = fail_always(OSError(28, "No space left on device"))
    tried: list[int] = []
    fail = rig.slots.on_io
    rig.slots.on_io = lambda kind, slot: (tried.append(slot), fail())
    rig.run(rig.op("demote", Direction.DEMOTE, [BlockCopy(b"%d" % n, 0, -1, 10 + n, 5 + n) for n in range(3)]))
    assert tried == [5]


def test_a_load_of_which_nothing_is_good_does_not_wait_for_the_device(rig: Rig) -> None:
    gate = rig.hold_copies()
    rig.engine.submit([rig.op("store", Direction.STORE, [BlockCopy(b"a", 0, 1, 10)])])
    gate.wait_until_held()
    (result,) = rig.run(rig.op("load", Direction.LOAD, [BlockCopy(b"a", 0, 2, 11, -1, b"x" * 32)]))
    assert (result.status, result.reason) == (OpStatus.FAILED, "verify")


@pytest.mark.statement("connector", "58b")
def test_a_bug_between_the_steps_fails_the_op(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rig.engine, "is_running", fail_always(ZeroDivisionError("bug")))
    (result,) = rig.run(rig.op("load", Direction.LOAD, four_blocks(rig, ssd=True)))
    assert (result.status, result.failed, result.reason) == (OpStatus.FAILED, (0, 1, 2, 3), "internal")


@pytest.mark.parametrize("direction", [Direction.LOAD, Direction.DEMOTE])
def test_a_worker_without_ssd_refuses_its_slots(make_rig: Any, direction: Direction) -> None:
    rig = make_rig(ssd=False)
    (result,) = rig.run(rig.op("op", direction, [BlockCopy(b"a", 0, 1, 10, 3, b"x" * 32)]))
    assert (result.status, result.failed, result.reason) == (OpStatus.FAILED, (0,), "io")


@pytest.mark.parametrize("direction", Direction)
def test_an_unknown_kv_group_fails_the_op(rig: Rig, direction: Direction) -> None:
    (result,) = rig.run(rig.op("op", direction, [BlockCopy(b"a", 9, 1, 10, -1, b"x" * 32)]))
    assert (result.status, result.failed) == (OpStatus.FAILED, (0,))


def test_a_checksum_that_cannot_be_made_fails_the_store(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rig.pages, "page", fail_always(OSError(5, "page is gone")))
    (result,) = rig.run(rig.op("store", Direction.STORE, [BlockCopy(b"a", 0, 1, 10), BlockCopy(b"b", 0, 2, 11)]))
    assert (result.status, result.failed, result.checksums) == (OpStatus.FAILED, (0, 1), b"")
    assert result.reason == "internal"


@pytest.mark.parametrize("direction", Direction)
def test_an_op_that_makes_no_sense_fails_and_the_next_one_works(rig: Rig, direction: Direction) -> None:
    (result,) = rig.run(rig.op("nonsense", direction, [None]))
    assert (result.status, result.failed) == (OpStatus.FAILED, (0,))
    (result,) = rig.run(rig.op("sense", Direction.LOAD, four_blocks(rig)))
    assert result.status is OpStatus.DONE


@pytest.mark.statement("connector", "58a")
@pytest.mark.bug("B15")
@pytest.mark.parametrize("error", ERRORS, ids=lambda e: type(e).__name__)
def test_after_any_failure_the_next_hundred_transfers_work(rig: Rig, error: Exception) -> None:
    """Checklist 58a."""
    rig.device.on_copy = fail_always(error)
    rig.slots.on_io = fail_always(error)
    demotion = [BlockCopy(b"a", 0, -1, 1, 1)]
    bad = [
        rig.op("bad store", Direction.STORE, [BlockCopy(b"a", 0, 1, 1)]),
        rig.op("bad demotion", Direction.DEMOTE, demotion),
        rig.op("bad load", Direction.LOAD, four_blocks(rig, ssd=True)),
    ]
    assert {result.status for result in rig.run(*bad)} == {OpStatus.FAILED}
    rig.device.on_copy = rig.slots.on_io = no_fault
    for number in range(34):
        good = [
            rig.op(f"store {number}", Direction.STORE, [BlockCopy(b"a", 0, 5, 1)]),
            rig.op(f"demotion {number}", Direction.DEMOTE, demotion),
            rig.op(f"load {number}", Direction.LOAD, four_blocks(rig)),
        ]
        assert {result.status for result in rig.run(*good)} == {OpStatus.DONE}
        check_delivery(rig, set())


def test_the_observer_hears_of_every_op_once(rig: Rig) -> None:
    rig.run(rig.op("store", Direction.STORE, [BlockCopy(b"a", 0, 1, 10)]))
    rig.device.on_copy = fail_always(TransferError("copy"))
    rig.run(rig.op("broken", Direction.STORE, [BlockCopy(b"a", 0, 1, 10)]))
    rig.engine.submit([rig.op("never", Direction.LOAD, [], after=99)])
    rig.engine.cancel(["never"])
    rig.engine.poll()
    assert rig.engine.poll() == []
    told = [(op.direction, op.status, op.nbytes, op.reason) for op in rig.observer.ops]
    assert told == [
        ("store", "done", 8000, ""),
        ("store", "failed", 0, "device"),
        ("load", "cancelled", 0, "cancelled"),
    ]


class TestLog:
    def test_one_line_per_op_with_all_that_is_needed(self, rig: Rig, caplog: pytest.LogCaptureFixture) -> None:
        blocks = four_blocks(rig)
        rig.pages.array[10:12, 0] ^= 1
        rig.run(rig.op("load", Direction.LOAD, blocks))
        (record,) = caplog.records
        assert record.levelname == "WARNING"
        assert "load load of request request: 2 of 4 blocks failed (verify): VerificationError" in record.getMessage()

    def test_a_dead_disk_does_not_fill_it(self, make_rig: Any, caplog: pytest.LogCaptureFixture) -> None:
        clock = FakeClock()
        rig = make_rig(clock=clock)
        rig.slots.on_io = fail_always(OSError(5, "Input/output error"))
        demote = [BlockCopy(b"a", 0, -1, 1, 1)]
        for number in range(20):
            rig.run(rig.op(f"a{number}", Direction.DEMOTE, demote))
        assert len(caplog.records) == 1
        rig.run(rig.op("load", Direction.LOAD, four_blocks(rig, ssd=True)))
        assert len(caplog.records) == 2, "another direction is another matter"
        clock.advance(10.0)
        rig.run(rig.op("later", Direction.DEMOTE, demote))
        assert "19 more ops like this" in caplog.records[-1].getMessage()
        clock.advance(10.0)
        rig.run(rig.op("last", Direction.DEMOTE, demote))
        assert "more ops like this" not in caplog.records[-1].getMessage()
        assert len(caplog.records) == 4

    def test_what_was_cancelled_is_no_failure(self, rig: Rig, caplog: pytest.LogCaptureFixture) -> None:
        gate = rig.hold_io()
        rig.engine.submit([rig.op("load", Direction.LOAD, [BlockCopy(b"a", 0, 1, 1, 1, b"x" * 32)])])
        gate.wait_until_held()
        rig.engine.cancel(["load"])
        gate.open()
        assert rig.engine.close(60.0)
        assert caplog.records == []
