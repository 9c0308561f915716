"""What callers said: in order, bounded, and nobody waits (law L5)."""

from __future__ import annotations

import threading
import time

from tests.master.client.fake_network import FakeClock
from umbp_connectors.client.intake import Barrier, Intake, Taken


def intake_of(clock: FakeClock, max_weight: int = 10, flush_weight: int = 5) -> Intake:
    return Intake(clock, max_weight, flush_weight, flush_interval=2.0)


def said(taken: Taken) -> list[str]:
    return [call.args[0] for call in taken.calls]


def test_calls_come_out_in_order_once() -> None:
    intake = intake_of(FakeClock())
    for word in "abc":
        intake.put(1, print, word)
    assert (intake.weight, said(intake.take()), intake.weight) == (3, ["a", "b", "c"], 0)
    assert said(intake.take()) == []


def test_a_barrier_divides_what_was_put_before_from_what_came_later() -> None:
    intake = intake_of(FakeClock())
    barrier = Barrier()
    intake.put(1, print, "a")
    intake.put_barrier(barrier)
    intake.put(2, print, "b")
    taken = intake.take()
    assert (said(taken), taken.barrier, intake.weight) == (["a"], barrier, 2)
    taken = intake.take()
    assert (said(taken), taken.barrier) == (["b"], None)


def test_more_than_the_bound_is_dropped_and_told_but_barriers_stay() -> None:
    intake = intake_of(FakeClock())
    barrier = Barrier()
    intake.put(9, print, "a")
    intake.put_barrier(barrier)
    intake.put(2, print, "b")
    intake.put(1, print, "c")
    assert intake.weight == 9
    taken = intake.take()
    assert (said(taken), taken.barrier, taken.overflowed, intake.weight) == ([], barrier, True, 0)
    intake.put(10, print, "d")
    taken = intake.take()
    assert (said(taken), taken.overflowed, intake.weight) == (["d"], False, 0)


def test_a_single_call_that_is_more_than_the_bound_is_dropped_too() -> None:
    intake = intake_of(FakeClock())
    intake.put(11, print, "a")
    taken = intake.take()
    assert (said(taken), taken.overflowed) == ([], True)


def test_a_wait_ends_at_once_when_it_is_time_or_enough_was_said() -> None:
    clock = FakeClock()
    intake = intake_of(clock)
    intake.wait(clock.now)
    intake.put(1, print, "a")
    clock.now += 2.0
    intake.wait(clock.now + 1000.0)
    assert said(intake.take()) == ["a"]
    intake.put(5, print, "b")
    intake.wait(clock.now + 1000.0)
    assert said(intake.take()) == ["b"]
    intake.kick()
    intake.wait(clock.now + 1000.0)
    assert said(intake.take()) == []


def woken_by(intake: Intake, action: threading.Event, until: float) -> threading.Thread:
    """A thread that waits, and sets ``action`` when it is through."""

    def wait() -> None:
        intake.wait(until)
        action.set()

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    return thread


def test_a_first_call_wakes_the_taker_when_the_interval_is_over() -> None:
    intake = Intake(time.monotonic, 100, 50, flush_interval=0.05)
    through = threading.Event()
    woken_by(intake, through, time.monotonic() + 60.0)
    began = time.monotonic()
    intake.put(1, print, "a")
    assert through.wait(10.0)
    assert time.monotonic() - began >= 0.05


def test_enough_calls_wake_the_taker_before_the_interval_is_over() -> None:
    intake = Intake(time.monotonic, 100, 50, flush_interval=60.0)
    through = threading.Event()
    woken_by(intake, through, time.monotonic() + 60.0)
    intake.put(1, print, "a")
    assert not through.wait(0.05)
    intake.put(49, print, "b")
    assert through.wait(10.0)


def test_after_a_barrier_what_waits_does_not_keep_the_taker_awake() -> None:
    intake = Intake(time.monotonic, 100, 1, flush_interval=0.0)
    intake.put_barrier(Barrier())
    intake.put(5, print, "a")
    intake.take()
    intake.wait(0.0)  # the kick of the barrier
    through = threading.Event()
    woken_by(intake, through, time.monotonic() + 60.0)
    assert not through.wait(0.05)
    intake.kick()
    assert through.wait(10.0)
