"""Which prefixes can be restored, beside the plainest way to say it."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from umbp_sglang.hits import PrefixHits, leading_groups, prefixes_up_to, prefixes_with_tail

PRESENT = st.lists(st.booleans(), max_size=30)


@given(PRESENT, st.integers(0, 6))
def test_a_tail_must_be_there(present: list[bool], tail: int) -> None:
    legal = prefixes_with_tail(present, tail).tolist()
    want = [all(present[max(0, end - max(1, tail)) : end]) for end in range(1, len(present) + 1)]
    assert legal[1:] == want


@given(PRESENT, st.integers(1, 5))
def test_groups_count_until_one_is_not_whole(present: list[bool], size: int) -> None:
    want = 0
    while (want + 1) * size <= len(present) and all(present[want * size : (want + 1) * size]):
        want += 1
    assert leading_groups(present, size) == want


@given(st.integers(0, 12), st.lists(st.tuples(st.booleans(), PRESENT, st.integers(1, 4)), max_size=3))
def test_every_pool_must_allow_a_prefix(anchor: int, pools: list[tuple[bool, list[bool], int]]) -> None:
    hits = PrefixHits(anchor)
    legal = set(range(1, anchor + 1))
    for number, (whole, pattern, tail) in enumerate(pools):
        present = (pattern + [True] * anchor)[:anchor]
        if whole:
            boundary = next((i for i, there in enumerate(present) if not there), anchor)
            mine = set(range(1, boundary + 1))
            hits.restrict(str(number), prefixes_up_to(anchor, boundary))
        else:
            mine = {end for end in range(1, anchor + 1) if all(present[max(0, end - tail) : end])}
            hits.restrict(str(number), prefixes_with_tail(present, tail))
        assert hits.boundaries.get(str(number), 0) == max(mine, default=0)
        legal &= mine
    assert hits.restorable == sorted(legal)
    assert hits.usable == max(legal, default=0)
    assert hits.boundaries.get("kv", 0) == anchor
