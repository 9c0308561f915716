"""When to try again."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from umbp_core.breaker import TRANSITIONS, Backoff, Breaker, BreakerEvent, BreakerState
from umbp_core.errors import StateError
from umbp_core.testing.machines_telling import BreakerMachine

BreakerMachine.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
TestBreaker = BreakerMachine.TestCase


def steady(failures: int = 2) -> Breaker:
    """Delays of 1, 2 and then 4 seconds, without chance."""
    return Breaker(lambda: 0.0, Backoff(first=1.0, ceiling=4.0), failures)


def fail(breaker: Breaker, now: float) -> None:
    permit = breaker.attempt(now)
    assert permit is not None
    breaker.failed(permit, now)


@pytest.mark.parametrize(
    "bad", [{"first": 0.0}, {"first": 3.0, "ceiling": 2.0}, {"factor": 0.5}, {"jitter": 1.0}, {"jitter": -0.1}]
)
def test_a_backoff_that_does_not_back_off_is_refused(bad: dict[str, float]) -> None:
    with pytest.raises(StateError, match="grows from a positive"):
        Backoff(**bad)


@given(failures=st.integers(1, 10_000), random=st.floats(0, 1))
def test_delays_stay_between_the_jittered_first_and_the_ceiling(failures: int, random: float) -> None:
    backoff = Backoff(first=0.1, ceiling=2.0, jitter=0.5)
    delay = backoff.delay(failures, random)
    assert 0.05 <= delay <= 2.0
    assert delay <= backoff.delay(failures + 1, random)


def test_delays_double_up_to_the_ceiling() -> None:
    backoff = Backoff(first=0.5, ceiling=3.0, jitter=0.5)
    assert [backoff.delay(failures, 0.0) for failures in range(1, 6)] == [0.5, 1.0, 2.0, 3.0, 3.0]
    assert backoff.delay(1, 1.0) == 0.25


def test_a_backoff_can_be_kept_below_a_heartbeat() -> None:
    assert Backoff(first=0.5, ceiling=3.0).below(1.0) == Backoff(first=0.5, ceiling=1.0)
    assert Backoff(first=0.5, ceiling=3.0).below(0.25) == Backoff(first=0.25, ceiling=0.25)
    assert Backoff(first=0.5, ceiling=3.0).below(9.0) == Backoff(first=0.5, ceiling=3.0)


def test_a_breaker_that_is_never_closed_is_refused() -> None:
    with pytest.raises(StateError, match="at least 1"):
        Breaker(lambda: 0.0, failures=0)


def test_single_failures_are_borne() -> None:
    breaker = steady()
    for now in range(5):
        fail(breaker, now)
        permit = breaker.attempt(now)
        assert permit is not None
        breaker.succeeded(permit)
    assert (breaker.state, breaker.opened) == (BreakerState.CLOSED, 0)


def test_failures_in_a_row_open_it_and_one_trial_decides() -> None:
    breaker = steady()
    fail(breaker, 0.0)
    fail(breaker, 0.0)
    assert (breaker.state, breaker.due, breaker.attempt(0.9)) == (BreakerState.OPEN, 1.0, None)
    trial = breaker.attempt(1.0)
    assert trial is not None
    assert (breaker.state, breaker.attempt(1.0)) == (BreakerState.HALF_OPEN, None)
    breaker.succeeded(trial)
    assert (breaker.state, breaker.due) == (BreakerState.CLOSED, 0.0)


def test_trials_that_fail_come_less_and_less_often() -> None:
    breaker = steady(failures=1)
    fail(breaker, 0.0)
    dues = []
    for _ in range(4):
        dues.append(breaker.due)
        fail(breaker, breaker.due)
    assert dues == [1.0, 3.0, 7.0, 11.0]
    assert breaker.opened == 5


def test_after_a_success_delays_begin_small_again() -> None:
    breaker = steady(failures=1)
    fail(breaker, 0.0)
    fail(breaker, 1.0)
    trial = breaker.attempt(3.0)
    assert trial is not None
    breaker.succeeded(trial)
    fail(breaker, 5.0)
    assert breaker.due == 6.0


def test_results_of_calls_from_before_it_opened_say_nothing() -> None:
    breaker = steady()
    old = breaker.attempt(0.0)
    assert old is not None
    fail(breaker, 0.0)
    fail(breaker, 0.0)
    breaker.succeeded(old)
    breaker.failed(old, 0.5)
    assert (breaker.state, breaker.due) == (BreakerState.OPEN, 1.0)
    assert breaker.attempt(1.0) is not None
    breaker.succeeded(old)
    breaker.failed(old, 1.0)
    assert breaker.state is BreakerState.HALF_OPEN


def test_a_trial_whose_end_nobody_tells_is_followed_by_another() -> None:
    breaker = steady(failures=1)
    fail(breaker, 0.0)
    lost = breaker.attempt(1.0)
    assert breaker.attempt(4.9) is None
    trial = breaker.attempt(5.0)
    assert trial not in (None, lost)


def test_the_table_is_closed() -> None:
    assert {state for state, _ in TRANSITIONS} | set(TRANSITIONS.values()) == set(BreakerState)
    assert {event for _, event in TRANSITIONS} == set(BreakerEvent)
