"""Numbered messages: each is carried out once, in order, and a gap is seen once and is final."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from umbp_core.intake import Intake


def numbers() -> Intake[int]:
    return Intake(lambda message: message)


def test_in_order_each_is_due_once() -> None:
    intake = numbers()
    for number in (1, 2, 3):
        assert intake.take(number)
        assert intake.due() == [number]
        assert intake.due() == []
    assert intake.missed() == []


@pytest.mark.statement("connector", 43)
def test_what_was_not_carried_out_is_carried_to_the_next() -> None:
    intake = numbers()
    for number in (1, 2):
        intake.take(number)
    assert intake.due() == [1, 2]


@pytest.mark.statement("connector", 43)
def test_what_was_not_carried_out_is_late_when_the_next_one_is_there() -> None:
    intake = numbers()
    assert intake.late() == []
    intake.take(1)
    assert intake.late() == []
    intake.take(2)
    intake.take(3)
    assert (intake.late(), intake.late(), intake.due()) == ([1, 2], [], [3])


@pytest.mark.statement("connector", 28)
def test_a_gap_is_told_once_and_what_it_held_is_ignored_when_it_comes_late() -> None:
    intake = numbers()
    intake.take(1)
    assert intake.take(5)
    assert (intake.missed(), intake.missed()) == ([(2, 4)], [])
    for late in (1, 2, 3, 4, 5):
        assert not intake.take(late)
    assert intake.due() == [1, 5]


@given(st.lists(st.integers(1, 9), max_size=20))
def test_whatever_arrives_all_numbers_are_either_due_or_missed(arrivals: list[int]) -> None:
    intake = numbers()
    taken = [number for number in arrivals if intake.take(number)]
    missed = {number for first, last in intake.missed() for number in range(first, last + 1)}
    assert intake.due() == taken == sorted(set(taken))
    assert missed | set(taken) == set(range(1, max(arrivals, default=0) + 1))
    assert not missed & set(taken)
