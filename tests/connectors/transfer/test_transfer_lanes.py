"""The threads under the engine."""

from __future__ import annotations

import threading

import pytest

from umbp_connectors.transfer.lanes import Lanes

PATIENCE = 60.0


@pytest.mark.filterwarnings("error")
def test_tasks_run_most_urgent_first_and_in_order() -> None:
    lanes = Lanes("test", 1)
    ran: list[str] = []
    finished = threading.Event()
    for number in range(3):
        lanes.put(2, lambda n=number: ran.append(f"demote{n}"))
        lanes.put(1, lambda n=number: ran.append(f"store{n}"))
        lanes.put(0, lambda n=number: ran.append(f"load{n}"))
    lanes.put(9, finished.set)
    lanes.start()
    assert finished.wait(PATIENCE)
    lanes.stop()
    assert lanes.join(PATIENCE)
    assert ran == [f"{kind}{n}" for kind in ("load", "store", "demote") for n in range(3)]


@pytest.mark.bug("B15")
def test_a_task_that_fails_is_logged_and_takes_no_thread_away(caplog: pytest.LogCaptureFixture) -> None:
    lanes = Lanes("test", 1)
    finished = threading.Event()
    lanes.put(0, lambda: 1 // 0)
    lanes.put(1, finished.set)
    lanes.start()
    assert finished.wait(PATIENCE)
    lanes.stop()
    assert lanes.join(PATIENCE)
    assert "ZeroDivisionError" in caplog.text


def test_stopping_does_not_wait_for_what_is_queued_and_joining_is_bounded() -> None:
    lanes = Lanes("test", 1)
    holding, release = threading.Event(), threading.Event()

    def hold() -> None:
        holding.set()
        assert release.wait(PATIENCE)

    ran: list[str] = []
    lanes.put(0, hold)
    lanes.start()
    assert holding.wait(PATIENCE)
    lanes.put(1, lambda: ran.append("too late"))
    lanes.stop()
    assert not lanes.join(0.01)
    release.set()
    assert lanes.join(PATIENCE)
    assert ran == []


def test_as_many_tasks_run_at_once_as_there_are_threads() -> None:
    lanes = Lanes("test", 3)
    meeting = threading.Barrier(4)
    for _ in range(3):
        lanes.put(0, lambda: meeting.wait(PATIENCE))
    lanes.start()
    meeting.wait(PATIENCE)
    lanes.stop()
    assert lanes.join(PATIENCE)


def test_threads_do_not_keep_an_interpreter_alive() -> None:
    lanes = Lanes("daemonic", 2)
    lanes.start()
    mine = [thread for thread in threading.enumerate() if thread.name.startswith("umbp-daemonic")]
    assert [thread.daemon for thread in mine] == [True, True]
    lanes.stop()
    assert lanes.join(PATIENCE)
