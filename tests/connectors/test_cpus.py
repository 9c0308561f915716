"""Copying threads that stay off each other's processors."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest

from umbp_connectors.cpus import Apart, take_share
from umbp_connectors.transfer.lanes import Lanes

ALLOWED = frozenset(os.sched_getaffinity(0))
several = pytest.mark.skipif(len(ALLOWED) < 2, reason="this machine has a single processor")


def in_a_thread(work: Callable[[], None]) -> frozenset[int]:
    """The processors that a new thread may use after ``work``."""

    def run() -> frozenset[int]:
        work()
        return frozenset(os.sched_getaffinity(0))

    with ThreadPoolExecutor(1) as pool:
        return pool.submit(run).result(60)


@several
def test_shares_are_disjoint_and_leave_nothing_out() -> None:
    first, second = (in_a_thread(lambda: take_share(0, 2)), in_a_thread(lambda: take_share(1, 2)))
    assert first | second == ALLOWED
    assert not first & second


def test_more_threads_than_processors_run_anywhere() -> None:
    assert in_a_thread(lambda: take_share(0, len(ALLOWED) + 1)) == ALLOWED
    assert in_a_thread(lambda: take_share(0, 1)) == ALLOWED


def test_processors_that_are_gone_cost_nothing() -> None:
    away = Apart(frozenset({max(ALLOWED) + 1000, max(ALLOWED) + 1001}))
    assert in_a_thread(away.from_here(lambda: None)) == ALLOWED


@several
def test_a_helper_leaves_the_processor_of_the_thread_it_helps() -> None:
    apart = Apart(ALLOWED)
    here = min(ALLOWED)

    def ask() -> Callable[[], None]:
        os.sched_setaffinity(0, {here})
        return apart.from_here(lambda: None)

    with ThreadPoolExecutor(1) as caller:
        work = caller.submit(ask).result(60)
    assert in_a_thread(work) == ALLOWED - {here}


def test_arguments_and_results_pass_through() -> None:
    helped = Apart(ALLOWED).from_here(divmod)
    with ThreadPoolExecutor(1) as helper:
        assert helper.submit(helped, 7, 2).result(60) == (3, 1)
        with pytest.raises(ZeroDivisionError):
            helper.submit(helped, 7, 0).result(60)


def test_with_one_processor_work_is_handed_on_as_it_is() -> None:
    assert Apart(frozenset({0})).from_here(divmod) is divmod


@several
def test_lanes_that_stand_apart_never_meet() -> None:
    lanes, seen, met = Lanes("test", 2, apart=True), [], threading.Barrier(3)

    def look() -> None:
        seen.append(frozenset(os.sched_getaffinity(0)))
        met.wait(60)

    lanes.start()
    for _ in range(2):
        lanes.put(0, look)
    met.wait(60)
    lanes.stop()
    assert lanes.join(60)
    assert not seen[0] & seen[1]
