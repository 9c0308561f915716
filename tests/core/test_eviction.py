from __future__ import annotations

from itertools import islice

import pytest

from umbp_core.errors import StateError
from umbp_core.eviction import POLICIES, EvictionPolicy, LruPolicy, PrefixAwareLruPolicy, PriorityLruPolicy


def filled(policy: EvictionPolicy, *depths: int) -> list[bytes]:
    names = [bytes([letter]) for letter in range(ord("a"), ord("a") + len(depths))]
    for key, depth in zip(names, depths, strict=True):
        policy.added(key, depth)
    return names


def test_lru_gives_the_least_recently_used_first() -> None:
    policy = LruPolicy()
    filled(policy, 0, 0, 0)
    policy.touched(b"a")
    assert list(policy.victims()) == [b"b", b"c", b"a"]


def test_lru_does_not_care_about_depth() -> None:
    policy = LruPolicy()
    assert filled(policy, 9, 1, 5) == list(policy.victims())


def test_the_deepest_of_the_oldest_goes_first() -> None:
    policy = PrefixAwareLruPolicy(candidate_window=3)
    filled(policy, 0, 2, 1, 9)
    assert list(islice(policy.victims(), 1)) == [b"b"]
    assert list(policy.victims()) == [b"b", b"d", b"c", b"a"]


def test_equal_depths_go_oldest_first() -> None:
    policy = PrefixAwareLruPolicy(candidate_window=4)
    assert filled(policy, 3, 3, 3, 3) == list(policy.victims())


def test_a_window_of_one_is_plain_lru() -> None:
    policy = PrefixAwareLruPolicy(candidate_window=1)
    assert filled(policy, 1, 5, 3) == list(policy.victims())


def test_a_touched_key_leaves_the_window() -> None:
    policy = PrefixAwareLruPolicy(candidate_window=2)
    filled(policy, 0, 9, 1)
    policy.touched(b"b")
    assert next(policy.victims()) == b"c"


@pytest.mark.parametrize("window", [0, -1])
def test_a_window_without_candidates_is_refused(window: int) -> None:
    with pytest.raises(StateError, match="at least 1"):
        PrefixAwareLruPolicy(window)


@pytest.mark.statement("connector", 76)
def test_the_lowest_priority_goes_first_and_among_equals_the_oldest() -> None:
    policy = PriorityLruPolicy()
    filled(policy, 0, 0, 0, 0)
    policy.prioritise(b"a", 80)
    policy.prioritise(b"d", 10)
    policy.prioritise(b"x", 0)
    policy.touched(b"b")
    assert list(policy.victims()) == [b"d", b"c", b"b", b"a"]
    assert [policy.priority(key) for key in (b"a", b"b", b"d", b"x")] == [80, 35, 10, 35]
    policy.removed(b"d")
    policy.added(b"a", 0)
    assert list(policy.victims()) == [b"c", b"b", b"a"]


def test_the_built_in_policies_have_the_names_of_the_configuration() -> None:
    assert {name: type(make()) for name, make in POLICIES.items()} == {
        "lru": LruPolicy,
        "prefix_aware_lru": PrefixAwareLruPolicy,
        "priority_lru": PriorityLruPolicy,
    }


@pytest.mark.parametrize("name", POLICIES)
def test_unknown_keys_are_ignored(name: str) -> None:
    policy = POLICIES[name]()
    policy.touched(b"x")
    policy.removed(b"x")
    assert list(policy.victims()) == []


@pytest.mark.parametrize("name", POLICIES)
def test_a_key_added_again_is_new_again(name: str) -> None:
    policy = POLICIES[name]()
    filled(policy, 0, 0)
    policy.added(b"a", 0)
    assert list(policy.victims()) == [b"b", b"a"]
