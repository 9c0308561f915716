"""Objects that are parts of one block leave a tier together."""

from __future__ import annotations

import pytest

from umbp_core.directory import Directory, TierSpace
from umbp_core.eviction import POLICIES
from umbp_core.grouping import block_of_text
from umbp_core.pages import PageAllocator
from umbp_core.tiers import Tier

PAGE = 100
HASH = b"0123456789abcdef" * 4


def block(number: int) -> bytes:
    return HASH[:60] + b"%04x" % number


def parts(number: int) -> list[bytes]:
    """K and V of two ranks, as SGLang's `mori` backend names them."""
    return [block(number) + suffix for suffix in (b"_0_k", b"_0_v", b"_1_k", b"_1_v")]


def node(pages: int, policy: str = "prefix_aware_lru") -> Directory:
    allocator = PageAllocator(PAGE, [PAGE * pages])
    return Directory([TierSpace(Tier.DRAM, allocator, POLICIES[policy](), block_of=block_of_text)])


def put(there: Directory, *keys: bytes, depth: int = 0) -> None:
    for key in keys:
        assert there.reserve("writer", key, Tier.DRAM, PAGE, depth) is not None
        there.commit("writer", key, Tier.DRAM, b"sum")


@pytest.mark.parametrize("policy", POLICIES)
def test_one_part_that_has_to_go_takes_the_others_with_it(policy: str) -> None:
    there = node(12, policy)
    for number in range(3):
        put(there, *parts(number))
    put(there, parts(3)[0])
    assert there.contains_many(parts(0)) == [False] * 4
    assert all(there.contains_many(parts(1) + parts(2)))
    assert there.stats(Tier.DRAM).free_pages == 3


def test_of_the_oldest_the_deepest_block_goes_as_a_whole() -> None:
    there = node(8)
    put(there, *parts(0), depth=0)
    put(there, *parts(1), depth=1)
    put(there, b"alone")
    assert all(there.contains_many(parts(0)))
    assert not any(there.contains_many(parts(1)))


def test_a_block_stays_while_one_of_its_parts_is_read() -> None:
    there = node(8)
    put(there, *parts(0))
    put(there, *parts(1))
    there.pin("reader", parts(0)[2:3])
    put(there, b"alone")
    assert all(there.contains_many(parts(0)))
    assert not any(there.contains_many(parts(1)))


def test_a_leased_part_keeps_the_others_too() -> None:
    there = node(8)
    put(there, *parts(0))
    put(there, *parts(1))
    there.lease("request", parts(0)[:1], 10.0)
    put(there, b"alone")
    assert all(there.contains_many(parts(0)))


def test_parts_of_a_block_that_is_read_go_when_nothing_else_can() -> None:
    there = node(4)
    put(there, *parts(0))
    there.pin("reader", parts(0)[:1])
    put(there, b"alone")
    assert there.contains_many(parts(0)) == [True, False, True, True]


def test_a_batch_evicts_whole_blocks() -> None:
    there = node(8)
    put(there, *parts(0))
    put(there, *parts(1))
    assert all(there.reserve_many("writer", [(key, PAGE, 0) for key in parts(2)[:2]], Tier.DRAM))
    assert there.contains_many(parts(0) + parts(1)) == [False] * 4 + [True] * 4


def test_parts_that_are_dropped_or_cleared_are_not_missed() -> None:
    there = node(4)
    put(there, *parts(0))
    assert there.drop(parts(0)[1], Tier.DRAM)
    put(there, b"alone")
    put(there, *parts(1)[:2])
    assert not any(there.contains_many(parts(0)))
    assert there.clear(Tier.DRAM) == 3
    put(there, *parts(0))
    assert all(there.contains_many(parts(0)))


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        (HASH + b"_0_k", HASH),
        (HASH + b"_k", HASH),
        (b"org-model_" + HASH + b"_3_1_v", b"org-model_" + HASH),
        (HASH, None),
        (b"model_" + HASH, None),
        (HASH.upper() + b"_k", None),
        (bytes(range(100)), None),
        (b"k" * 36, None),
        (b"", None),
    ],
)
def test_the_block_of_a_key(key: bytes, expected: bytes | None) -> None:
    assert block_of_text(key) == expected
