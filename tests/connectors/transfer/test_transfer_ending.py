"""Cancellation, deadlines, waiting and closing, in every phase of an op (laws L3, L4 and L5)."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest

from umbp_connectors.transfer import Limits
from umbp_core.errors import StateError
from umbp_core.ops import BlockCopy, Direction, OpStatus
from umbp_core.testing.fakes import FakeClock

Rig = Any

PATIENCE = 60.0


def ssd_load(rig: Rig, op_id: str = "load", hbm: int = 1, slot: int = 4, timeout_s: float = 30.0) -> Any:
    source = rig.put(op_id.encode(), 20 + slot, slot=slot)
    return rig.op(
        op_id, Direction.LOAD, [BlockCopy(source.key, 0, hbm, 20 + slot, slot, source.checksums)], timeout_s=timeout_s
    )


def dram_load(rig: Rig, op_id: str, hbm: int, page: int) -> Any:
    source = rig.put(op_id.encode(), page)
    return rig.op(op_id, Direction.LOAD, [BlockCopy(source.key, 0, hbm, page, -1, source.checksums)])


def store(rig: Rig, op_id: str, hbm: int = 1, page: int = 10, **options: Any) -> Any:
    return rig.op(op_id, Direction.STORE, [BlockCopy(op_id.encode(), 0, hbm, page)], **options)


class TestCancel:
    @pytest.mark.statement("connector", 65)
    @pytest.mark.parametrize("how", ["cancel", "cancel_request"])
    @pytest.mark.parametrize("paired", [False, True])
    def test_an_op_that_waits_is_dropped(self, rig: Rig, paired: bool, how: str) -> None:
        rig.engine.submit([store(rig, "op", after=5)], paired=paired)
        rig.engine.cancel(["op", "unknown"]) if how == "cancel" else rig.engine.cancel_request("request")
        (result,) = rig.engine.poll()
        assert (result.status, result.failed, result.quarantined) == (OpStatus.CANCELLED, (0,), False)
        rig.engine.end_iteration(5, "fence")
        rig.run(store(rig, "later"))
        assert [call.pages for call in rig.device.calls] == [(10,)], "only the later one was copied"

    @pytest.mark.statement("connector", 65)
    @pytest.mark.statement("connector", 46)
    def test_a_load_that_reads_is_reported_at_once_and_never_touches_hbm(self, rig: Rig) -> None:
        gate = rig.hold_io()
        before = rig.hbm(1)
        rig.engine.submit([ssd_load(rig)])
        gate.wait_until_held()
        rig.engine.cancel(["load"])
        (result,) = rig.engine.poll()
        assert (result.status, result.quarantined) == (OpStatus.CANCELLED, True)
        assert (rig.engine.quarantined(), rig.engine.take_released()) == (frozenset({"load"}), [])
        gate.open()
        assert rig.engine.close(PATIENCE)
        assert (rig.engine.quarantined(), rig.engine.take_released()) == (frozenset(), ["load"])
        assert (rig.hbm(1), rig.device.calls, rig.engine.poll()) == (before, [], [])

    def test_a_store_that_waits_for_the_copy_thread_does_not_touch_its_page(self, rig: Rig) -> None:
        gate = rig.hold_copies()
        rig.engine.submit([store(rig, "first", page=10), store(rig, "second", page=11)])
        gate.wait_until_held()
        rig.engine.cancel(["second"])
        (result,) = rig.engine.poll()
        assert (result.op_id, result.status, result.quarantined) == ("second", OpStatus.CANCELLED, True)
        gate.open()
        (first,) = rig.results("first")
        rig.run(store(rig, "third", page=12))
        assert first.status is OpStatus.DONE
        assert not rig.pages.array[11].any()
        assert rig.engine.take_released() == ["second"]

    def test_a_demotion_that_waits_for_a_thread_does_not_touch_its_slot(self, make_rig: Any) -> None:
        rig = make_rig(io_threads=1)
        gate = rig.hold_io()
        rig.engine.submit([ssd_load(rig)])
        gate.wait_until_held()
        rig.engine.submit([rig.op("demote", Direction.DEMOTE, [BlockCopy(b"a", 0, -1, 1, 9)])])
        rig.engine.cancel(["demote"])
        gate.open()
        load, demote = rig.results("load", "demote")
        rig.run(ssd_load(rig, "another", slot=5))
        assert (load.status, demote.status) == (OpStatus.DONE, OpStatus.CANCELLED)
        assert 9 not in rig.slots.data

    @pytest.mark.statement("connector", 65)
    @pytest.mark.parametrize("direction", [Direction.STORE, Direction.LOAD])
    def test_what_is_being_copied_runs_to_its_end(self, rig: Rig, direction: Direction) -> None:
        gate = rig.hold_copies()
        op = store(rig, "op") if direction is Direction.STORE else dram_load(rig, "op", 1, 10)
        rig.engine.submit([op])
        gate.wait_until_held()
        rig.engine.cancel(["op"])
        rig.engine.cancel_request("request")
        assert rig.engine.poll() == []
        gate.open()
        (result,) = rig.results("op")
        assert (result.status, result.quarantined) == (OpStatus.DONE, False)

    @pytest.mark.statement("connector", 65)
    @pytest.mark.parametrize("direction", Direction)
    def test_a_cancellation_right_before_the_first_byte_wins(
        self, rig: Rig, direction: Direction, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        commit, before = rig.engine.commit, rig.hbm(1)

        def lose_the_race(op_id: str) -> bool:
            rig.engine.cancel([op_id])
            return bool(commit(op_id))

        monkeypatch.setattr(rig.engine, "commit", lose_the_race)
        op = {
            Direction.LOAD: dram_load(rig, "op", 1, 11),
            Direction.STORE: store(rig, "op", page=10),
            Direction.DEMOTE: rig.op("op", Direction.DEMOTE, [BlockCopy(b"a", 0, -1, 11, 9)]),
        }[direction]
        (result,) = rig.run(op)
        assert (result.status, result.quarantined) == (OpStatus.CANCELLED, True)
        assert rig.engine.close(PATIENCE)
        assert (rig.hbm(1), rig.device.calls, rig.slots.data) == (before, [], {})
        assert not rig.pages.array[10].any()
        assert rig.engine.take_released() == ["op"]

    def test_a_dropped_load_reads_no_further(self, make_rig: Any) -> None:
        rig = make_rig(io_threads=1)
        gate = rig.hold_io(lambda kind, slot: slot == 1)
        reads: list[int] = []
        hold = rig.slots.on_io
        rig.slots.on_io = lambda kind, slot: (reads.append(slot), hold(kind, slot))
        sources = [rig.put(b"k%d" % slot, 20 + slot, slot=slot) for slot in (1, 2)]
        blocks = [BlockCopy(s.key, 0, s.ssd_slot, s.dram_page, s.ssd_slot, s.checksums) for s in sources]
        rig.engine.submit([rig.op("load", Direction.LOAD, blocks)])
        gate.wait_until_held()
        rig.engine.cancel(["load"])
        gate.open()
        assert rig.engine.close(PATIENCE)
        assert reads == [1]

    def test_a_cancelled_op_lets_the_next_one_start(self, make_rig: Any) -> None:
        rig = make_rig(limits=Limits(loads=1))
        gate = rig.hold_io()
        rig.engine.submit([ssd_load(rig), dram_load(rig, "next", 2, 11)])
        gate.wait_until_held()
        rig.engine.cancel(["load"])
        rig.results("load", "next")
        assert rig.hbm(2) == rig.content(b"next")


class TestDeadlines:
    @pytest.mark.statement("connector", 46)
    def test_a_read_that_hangs_is_reported_and_its_page_kept_apart(self, make_rig: Any) -> None:
        clock = FakeClock()
        rig = make_rig(clock=clock)
        gate = rig.hold_io()
        before = rig.hbm(1)
        rig.engine.submit([ssd_load(rig, timeout_s=5.0)])
        gate.wait_until_held()
        clock.advance(4.9)
        assert rig.engine.poll() == []
        clock.advance(0.1)
        (result,) = rig.engine.poll()
        assert (result.status, result.failed, result.reason) == (OpStatus.EXPIRED, (0,), "deadline_started")
        assert result.quarantined
        assert rig.engine.quarantined() == {"load"}
        gate.open()
        assert rig.engine.close(PATIENCE)
        assert rig.engine.take_released() == ["load"]
        assert (rig.hbm(1), rig.engine.poll()) == (before, [])

    @pytest.mark.statement("connector", 44)
    @pytest.mark.statement("connector", 46)
    def test_a_dead_disk_costs_nothing_but_its_own_hits(self, make_rig: Any) -> None:
        clock = FakeClock()
        rig = make_rig(clock=clock, limits=Limits(loads=2))
        gate = rig.hold_io()
        for number in range(3):
            hung = [ssd_load(rig, f"hung{number}{n}", slot=2 * number + n, timeout_s=1.0) for n in range(2)]
            rig.engine.submit(hung)
            gate.wait_until_held(2 if number < 2 else 0)
            clock.advance(1.0)
            assert {result.status for result in rig.engine.poll()} == {OpStatus.EXPIRED}
        good, written = rig.run(dram_load(rig, "good", 2, 11), store(rig, "store", page=12))
        assert (good.status, written.status) == (OpStatus.DONE, OpStatus.DONE)
        assert rig.hbm(2) == rig.content(b"good")
        gate.open()
        assert rig.engine.close(PATIENCE)
        assert len(rig.engine.take_released()) == 6

    def test_a_committed_copy_is_not_expired(self, make_rig: Any) -> None:
        clock = FakeClock()
        rig = make_rig(clock=clock)
        gate = rig.hold_copies()
        rig.engine.submit([store(rig, "op", timeout_s=1.0)])
        gate.wait_until_held()
        clock.advance(100.0)
        assert rig.engine.poll() == []
        gate.open()
        (result,) = rig.results("op")
        assert (result.status, result.seconds) == (OpStatus.DONE, 100.0)

    @pytest.mark.statement("connector", 46)
    def test_an_iteration_that_never_ends_is_noticed_while_waiting(self, rig: Rig) -> None:
        rig.engine.submit([store(rig, "op", after=9, timeout_s=0.05)])
        started = time.monotonic()
        assert rig.engine.wait(["op"], PATIENCE)
        assert time.monotonic() - started < PATIENCE / 2
        (result,) = rig.engine.poll()
        assert (result.status, result.reason) == (OpStatus.EXPIRED, "deadline_waiting")


class TestWait:
    def test_for_what_ended_or_was_never_seen(self, rig: Rig) -> None:
        rig.run(store(rig, "op"))
        assert rig.engine.wait(["op", "unknown"], 0.0)
        assert rig.engine.wait([], 0.0)

    def test_no_longer_than_asked(self, rig: Rig) -> None:
        gate = rig.hold_copies()
        rig.engine.submit([store(rig, "op")])
        gate.wait_until_held()
        assert not rig.engine.wait(["op"], 0.02)
        assert not rig.engine.wait(["op"], 0.0)
        gate.open()
        assert rig.engine.wait(["op"], PATIENCE)

    def test_for_the_first_of_several(self, rig: Rig) -> None:
        rig.engine.submit([store(rig, op_id, after=9) for op_id in ("a", "b", "c")])
        assert not rig.engine.wait(["a", "b", "c"], 0.01, first=True)
        rig.engine.cancel(["b"])
        assert rig.engine.wait(["a", "b", "c"], PATIENCE, first=True)
        assert not rig.engine.wait(["a", "c"], 0.01, first=True)
        assert not rig.engine.wait(["a", "b"], 0.01)
        assert rig.engine.wait([], 0.0, first=True)

    def test_another_thread_may_end_it(self, rig: Rig) -> None:
        rig.engine.submit([store(rig, "op", after=9)])
        other = threading.Thread(target=lambda: rig.engine.cancel(["op"]))
        other.start()
        assert rig.engine.wait(["op"], PATIENCE)
        other.join(PATIENCE)


def test_the_forward_thread_is_never_held_up(rig: Rig) -> None:
    """Law L5: with every thread hanging in a copy, a read or a write, each call returns."""
    copies, io = rig.hold_copies(), rig.hold_io()
    rig.engine.submit([store(rig, "s"), ssd_load(rig, "l")])
    rig.engine.submit([rig.op("d", Direction.DEMOTE, [BlockCopy(b"a", 0, -1, 1, 9)])])
    copies.wait_until_held()
    io.wait_until_held(2)
    calls = {
        "submit": lambda: rig.engine.submit([store(rig, "more", after=2)]),
        "begin_iteration": lambda: rig.engine.begin_iteration(2),
        "layer_done": lambda: rig.engine.layer_done("model.0", 0, "fence"),
        "end_iteration": lambda: rig.engine.end_iteration(2, "fence"),
        "poll": rig.engine.poll,
        "cancel": lambda: rig.engine.cancel(["more"]),
        "pending": rig.engine.pending,
        "quarantined": rig.engine.quarantined,
    }
    for name, call in calls.items():
        thread = threading.Thread(target=call, daemon=True)
        thread.start()
        thread.join(PATIENCE / 4)
        assert not thread.is_alive(), f"{name} waits for a transfer"


class TestClose:
    def test_of_an_idle_engine_ends_its_threads(self, make_rig: Any) -> None:
        rig = make_rig(start=False)
        others = set(threading.enumerate())
        rig.engine.start()
        mine = {t for t in set(threading.enumerate()) - others if t.name.startswith("umbp-")}
        rig.run(store(rig, "op"))
        assert mine
        assert rig.engine.close(PATIENCE)
        assert not any(thread.is_alive() for thread in mine if thread.name.startswith(("umbp-d", "umbp-i", "umbp-h")))
        assert rig.engine.close(PATIENCE), "a second close changes nothing"

    def test_drops_what_has_not_begun_and_lets_a_copy_end(self, rig: Rig) -> None:
        gate = rig.hold_copies()
        rig.engine.submit([store(rig, "copying")])
        gate.wait_until_held()
        rig.engine.submit([store(rig, "waiting", after=9), store(rig, "queued")])
        closer = threading.Thread(target=lambda: rig.engine.close(PATIENCE))
        closer.start()
        assert rig.engine.wait(["waiting", "queued"], PATIENCE)
        gate.open()
        closer.join(PATIENCE)
        results = {result.op_id: result for result in rig.engine.poll()}
        assert results["copying"].status is OpStatus.DONE
        for op_id in ("waiting", "queued"):
            assert (results[op_id].status, results[op_id].reason) == (OpStatus.CANCELLED, "closed")
        assert len(rig.observer.ops) == 3

    @pytest.mark.parametrize("hold", ["io", "copies"])
    def test_is_bounded_when_a_disk_or_a_device_hangs(self, rig: Rig, hold: str) -> None:
        gate = rig.hold_io() if hold == "io" else rig.hold_copies()
        rig.engine.submit([ssd_load(rig)])
        gate.wait_until_held()
        started = time.monotonic()
        assert not rig.engine.close(0.2)
        assert time.monotonic() - started < PATIENCE / 4
        (result,) = rig.engine.poll()
        assert (result.status, result.quarantined) == (OpStatus.CANCELLED, True)
        assert rig.engine.pending() == 0
        gate.open()
        assert rig.engine.close(PATIENCE)
        assert (rig.engine.poll(), len(rig.observer.ops)) == ([], 1)
        assert rig.engine.take_released() == ["load"]

    def test_wakes_who_waits_for_a_copy_that_hangs(self, rig: Rig) -> None:
        gate = rig.hold_copies()
        rig.engine.submit([store(rig, "hangs")])
        gate.wait_until_held()
        woken: list[bool] = []
        waiter = threading.Thread(target=lambda: woken.append(rig.engine.wait(["hangs"], PATIENCE)))
        waiter.start()
        assert not rig.engine.close(0.2)
        waiter.join(PATIENCE / 2)
        assert woken == [True]

    def test_refuses_what_comes_later(self, rig: Rig) -> None:
        rig.engine.close(PATIENCE)
        rig.engine.submit([store(rig, "late")])
        (result,) = rig.engine.poll()
        assert (result.status, result.reason, rig.device.calls) == (OpStatus.CANCELLED, "closed", [])

    def test_of_an_engine_that_never_started(self, make_rig: Any) -> None:
        rig = make_rig(start=False)
        rig.engine.submit([store(rig, "op")])
        started = time.monotonic()
        assert rig.engine.close(PATIENCE)
        assert time.monotonic() - started < PATIENCE / 2, "there is nobody to wait for"
        (result,) = rig.engine.poll()
        assert result.status is OpStatus.CANCELLED
        with pytest.raises(StateError, match="once"):
            rig.engine.start()

    def test_an_engine_starts_once_and_with_what_it_was_given_before(self, make_rig: Any) -> None:
        rig = make_rig(start=False)
        rig.engine.submit([store(rig, "early")])
        rig.engine.start()
        (result,) = rig.results("early")
        assert result.status is OpStatus.DONE
        with pytest.raises(StateError, match="once"):
            rig.engine.start()
