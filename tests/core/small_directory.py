"""A directory of two small tiers, and what tests do with it all the time."""

from __future__ import annotations

from umbp_core.directory import Directory, TierSpace
from umbp_core.eviction import LruPolicy
from umbp_core.pages import PageAllocator
from umbp_core.tiers import Tier

PAGE = 100
A, B, C, D = (bytes([letter]) * 36 for letter in b"abcd")


def directory(dram: int = 4, ssd: int = 4) -> Directory:
    return Directory(
        [
            TierSpace(Tier.DRAM, PageAllocator(PAGE, [PAGE * dram]), LruPolicy()),
            TierSpace(Tier.SSD, PageAllocator(PAGE, [PAGE * ssd]), LruPolicy()),
        ]
    )


def put(node: Directory, *keys: bytes, tier: Tier = Tier.DRAM, nbytes: int = PAGE) -> None:
    for key in keys:
        assert node.reserve("writer", key, tier, nbytes) is not None
        node.commit("writer", key, tier, b"sum-" + key[:1])


def readable(node: Directory) -> list[bytes]:
    return [key for key in (A, B, C, D) if node.tiers_of(key)]
