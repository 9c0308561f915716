"""What offload policies admit, alone and together."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from umbp_core.errors import ConfigError, StateError
from umbp_core.offload import (
    DEFAULT_PRIORITY,
    AllOf,
    Frequency,
    OffloadPolicy,
    OffloadRun,
    PassAll,
    Presence,
    PriorityThreshold,
    prefix_priorities,
)
from umbp_core.testing.models_offload import longest_prefix

A, B, C, D = b"a", b"b", b"c", b"d"


def admitted(policy: OffloadPolicy, keys: list[bytes], priorities: list[int] | None = None, now: float = 0.0) -> bytes:
    """The keys that may go, joined."""
    run = OffloadRun(keys, priorities or ())
    return b"".join(key for key, answer in zip(keys, policy.admit(run, now), strict=True) if answer)


@pytest.mark.statement("connector", 21)
def test_of_the_priorities_80_80_10_two_blocks_have_at_least_30() -> None:
    run = prefix_priorities([80, 80, 10])
    assert admitted(PriorityThreshold(30), [A, B, C], run) == b"ab"
    assert admitted(PriorityThreshold(0), [A, B, C], run) == b"abc"


@pytest.mark.statement("connector", 22)
def test_behind_a_block_of_low_priority_no_other_one_goes() -> None:
    policy = PriorityThreshold(30)
    first = prefix_priorities([80, 10])
    then = prefix_priorities([80, 80], before=first[-1])
    assert admitted(policy, [A, B], first) == b"a"
    assert admitted(policy, [C, D], then) == b""
    assert admitted(policy, [A, B, C], [80, 10, 80]) == b"a"


@given(
    priorities=st.lists(st.integers(0, 100), max_size=12),
    least=st.integers(0, 100),
    cuts=st.lists(st.integers(0, 12), max_size=3),
)
@pytest.mark.statement("connector", 21)
@pytest.mark.statement("connector", 22)
def test_a_chain_in_any_pieces_gives_its_longest_prefix(priorities: list[int], least: int, cuts: list[int]) -> None:
    policy = PriorityThreshold(least)
    ends = sorted({min(cut, len(priorities)) for cut in cuts} | {len(priorities)})
    answers: list[bool] = []
    before = 100
    for start, end in zip([0, *ends], ends, strict=False):
        run = prefix_priorities(priorities[start:end], before)
        answers += policy.admit(OffloadRun([b"k"] * len(run), run), 0.0)
        before = run[-1] if run else before
    length = longest_prefix(priorities, least)
    assert answers == [True] * length + [False] * (len(priorities) - length)


def test_a_block_that_nobody_spoke_about_has_the_default_priority() -> None:
    assert admitted(PriorityThreshold(DEFAULT_PRIORITY), [A]) == b"a"
    assert admitted(PriorityThreshold(DEFAULT_PRIORITY + 1), [A]) == b""


def test_presence_leaves_out_what_is_there() -> None:
    there = {A, C}
    policy = Presence(lambda keys: [key in there for key in keys])
    assert admitted(policy, [A, B, C, D]) == b"bd"
    there.clear()
    assert admitted(policy, [A, B]) == b"ab"


@pytest.mark.statement("connector", 73)
def test_a_block_goes_when_it_is_seen_again_within_the_window() -> None:
    policy = Frequency()
    assert admitted(policy, [A, B], now=10.0) == b""
    assert admitted(policy, [A], now=599.0) == b"a"
    assert (policy.count(A), policy.count(B)) == (2, 1)
    policy.pass_time(600.0)
    assert (policy.count(A), policy.count(B)) == (1, 0)
    assert admitted(policy, [A, B], now=600.0) == b"a"


@pytest.mark.statement("connector", 73)
def test_more_sightings_can_be_asked_for() -> None:
    policy = Frequency(min_sightings=3)
    assert [admitted(policy, [A]) for _ in range(4)] == [b"", b"", b"a", b"a"]


@pytest.mark.statement("connector", 73)
def test_a_million_blocks_are_counted_and_the_next_one_makes_room() -> None:
    policy = Frequency()
    keys = [number.to_bytes(4, "big") for number in range(1_000_000)]
    policy.admit(OffloadRun(keys[:10]), 0.0)
    policy.admit(OffloadRun(keys), 0.0)
    assert policy.counted == 1_000_000
    assert admitted(policy, [A]) == b""
    # All counts were lowered by one: those of the ten that were seen twice are left.
    assert policy.counted == 11
    assert policy.kept <= 1_000_000
    assert admitted(policy, keys[:10]) == b"".join(keys[:10])


def test_what_is_over_is_forgotten_by_those_who_come() -> None:
    policy = Frequency()
    policy.admit(OffloadRun([b"%d" % number for number in range(80)]), 0.0)
    policy.admit(OffloadRun([b"new %d" % number for number in range(10)]), 600.0)
    assert policy.kept == policy.counted == 10


@pytest.mark.statement("connector", 76)
def test_all_have_to_agree_and_who_refuses_first_is_told_about() -> None:
    refused: list[tuple[str, int]] = []
    often = Frequency()
    policy = AllOf(
        {"priority": PriorityThreshold(30), "frequency": often, "all": PassAll()},
        lambda name, blocks: refused.append((name, blocks)),
    )
    assert admitted(policy, [A, B, C], [80, 80, 10]) == b""
    assert refused == [("priority", 1), ("frequency", 2)]
    # What an earlier policy refused was not seen by the next one.
    assert often.count(C) == 0
    assert admitted(policy, [A, B, C], [80, 80, 10]) == b"ab"
    assert admitted(AllOf({}, lambda name, blocks: None), [A]) == b"a"


def test_a_policy_that_does_not_answer_for_every_block_is_named() -> None:
    class Short:
        def admit(self, run: OffloadRun, now: float) -> list[bool]:
            return []

    with pytest.raises(StateError, match="'short' gave 0 answers for 1 blocks"):
        AllOf({"short": Short()}, lambda name, blocks: None).admit(OffloadRun([A]), 0.0)


@pytest.mark.parametrize("wrong", [{"min_sightings": 0}, {"window_s": 0}, {"capacity": 0}, {"min_sightings": 40}])
def test_counts_that_cannot_be_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match="give"):
        Frequency(**wrong)


@pytest.mark.parametrize("least", [-1, 101])
def test_a_priority_is_from_0_to_100(least: int) -> None:
    with pytest.raises(ConfigError, match="0 to 100"):
        PriorityThreshold(least)
