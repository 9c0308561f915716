"""What the scheduler is made of: deadlines and the worker's progress."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from umbp_core.deadlines import Deadlines
from umbp_core.ops import Requirement, RequirementKind
from umbp_core.progress import Progress


class TestDeadlines:
    def test_keys_expire_in_the_order_of_their_deadlines_and_once(self) -> None:
        deadlines = Deadlines()
        for key, deadline in [("c", 3.0), ("a", 1.0), ("b", 2.0)]:
            deadlines.set(key, deadline)
        assert deadlines.next() == 1.0
        assert deadlines.pop_expired(2.0) == ["a", "b"]
        assert deadlines.pop_expired(2.0) == []
        assert (len(deadlines), deadlines.next()) == (1, 3.0)

    def test_keys_of_one_deadline_expire_in_the_order_of_their_names(self) -> None:
        deadlines = Deadlines()
        for key in ("b", "c", "a"):
            deadlines.set(key, 1.0)
        assert deadlines.pop_expired(1.0) == ["a", "b", "c"]

    def test_the_last_deadline_counts(self) -> None:
        deadlines = Deadlines()
        deadlines.set("a", 1.0)
        deadlines.set("a", 5.0)
        assert deadlines.pop_expired(4.0) == []
        assert deadlines.pop_expired(5.0) == ["a"]
        deadlines.set("b", 9.0)
        deadlines.set("b", 6.0)
        assert deadlines.pop_expired(6.0) == ["b"]
        assert deadlines.pop_expired(math.inf) == []

    def test_discarded_keys_do_not_expire_and_unknown_ones_do_no_harm(self) -> None:
        deadlines = Deadlines()
        deadlines.set("a", 1.0)
        deadlines.discard("a")
        deadlines.discard("b")
        assert deadlines.next() is None
        assert deadlines.pop_expired(math.inf) == []

    @given(st.lists(st.tuples(st.sampled_from("abcdef"), st.one_of(st.none(), st.integers(0, 9)))), st.integers(0, 9))
    def test_beside_a_dict(self, changes: list[tuple[str, int | None]], now: int) -> None:
        deadlines, model = Deadlines(), {}
        for key, deadline in changes:
            if deadline is None:
                deadlines.discard(key)
                model.pop(key, None)
            else:
                deadlines.set(key, deadline)
                model[key] = deadline
        expected = sorted((deadline, key) for key, deadline in model.items() if deadline <= now)
        assert deadlines.next() == min(model.values(), default=None)
        assert deadlines.pop_expired(now) == [key for _, key in expected]
        assert len(deadlines) == len(model) - len(expected)

    def test_a_long_life_of_short_keys_under_one_that_stays(self) -> None:
        deadlines = Deadlines()
        deadlines.set("stays", 0.5)
        for number in range(1000):
            deadlines.set(f"k{number}", 1.0 + number)
            deadlines.discard(f"k{number}")
        for number in range(100):
            deadlines.set(f"late{number}", 5000.0 - number)
        assert deadlines.pop_expired(math.inf) == ["stays", *(f"late{number}" for number in reversed(range(100)))]


def at(kind: RequirementKind, iteration: int, name: str = "", index: int = -1) -> Requirement:
    return Requirement(kind, iteration, name, index)


ITERATION = RequirementKind.ITERATION_COMPLETE
BY_NAME = RequirementKind.LAYER_NAME_COMPLETE
BY_INDEX = RequirementKind.LAYER_COMPLETE


class TestProgress:
    def test_no_requirement_holds_at_once(self) -> None:
        assert Progress().wait("op", Requirement())

    def test_the_end_of_an_iteration_and_not_its_begin(self) -> None:
        progress = Progress()
        assert not progress.wait("op", at(ITERATION, 3))
        progress.begin_iteration(3)
        assert not progress.holds(at(ITERATION, 3))
        assert progress.end_iteration(2) == []
        assert progress.end_iteration(3) == ["op"]
        assert progress.wait("later", at(ITERATION, 3))

    def test_a_step_whose_end_was_never_told_ends_with_the_next(self) -> None:
        progress = Progress()
        progress.wait("first", at(ITERATION, 3))
        progress.wait("second", at(ITERATION, 4))
        assert progress.end_iteration(4) == ["first", "second"]
        assert (progress.current, progress.completed, len(progress)) == (4, 4, 0)

    def test_a_replay_releases_nothing_twice(self) -> None:
        progress = Progress()
        progress.wait("op", at(ITERATION, 3))
        assert progress.end_iteration(3) == ["op"]
        assert progress.end_iteration(3) == []
        progress.wait("op", at(ITERATION, 4))
        progress.begin_iteration(2)
        assert (progress.current, progress.end_iteration(2)) == (3, [])

    @pytest.mark.parametrize("requirement", [at(BY_NAME, 3, name="model.1"), at(BY_INDEX, 3, index=1)])
    def test_exactly_that_layer_of_exactly_that_iteration(self, requirement: Requirement) -> None:
        progress = Progress()
        progress.begin_iteration(2)
        assert not progress.wait("op", requirement)
        assert progress.layer_done("model.1", 1) == []
        progress.begin_iteration(3)
        assert progress.layer_done("model.0", 0) == []
        assert progress.layer_done("model.1", 1) == ["op"]
        assert progress.holds(requirement)
        progress.end_iteration(3)
        assert progress.holds(requirement)

    @pytest.mark.parametrize("requirement", [at(BY_NAME, 3, name="model.1"), at(BY_INDEX, 3, index=1)])
    def test_a_layer_of_the_last_iteration_does_not_count(self, requirement: Requirement) -> None:
        progress = Progress()
        progress.begin_iteration(2)
        progress.layer_done("model.1", 1)
        progress.begin_iteration(3)
        assert not progress.wait("op", requirement)

    @pytest.mark.parametrize("requirement", [at(BY_NAME, 3, name="no such layer"), at(BY_INDEX, 3, index=99)])
    def test_a_layer_that_never_ends_is_met_by_its_iteration(self, requirement: Requirement) -> None:
        progress = Progress()
        progress.begin_iteration(3)
        progress.wait("op", requirement)
        progress.layer_done("model.0", 0)
        assert progress.end_iteration(3) == ["op"]

    def test_who_no_longer_waits_is_not_released(self) -> None:
        progress = Progress()
        for key in ("stays", "goes"):
            progress.wait(key, at(ITERATION, 1))
        progress.wait("alone", at(BY_INDEX, 1, index=0))
        for key in ("goes", "alone", "unknown"):
            progress.discard(key)
        progress.begin_iteration(1)
        assert progress.layer_done("l", 0) == []
        assert progress.end_iteration(1) == ["stays"]
