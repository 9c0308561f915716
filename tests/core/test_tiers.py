from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from umbp_core.tiers import Tier, TierSet

tier_sets = st.sets(st.sampled_from(Tier))


def test_numbers_are_those_of_the_umbp_wire() -> None:
    assert {tier.name: tier.value for tier in Tier} == {"UNKNOWN": 0, "HBM": 1, "DRAM": 2, "SSD": 3}


def test_preference_is_speed_and_unknown_is_last() -> None:
    assert sorted(Tier, key=lambda tier: tier.preference) == [Tier.HBM, Tier.DRAM, Tier.SSD, Tier.UNKNOWN]


@given(tier_sets)
def test_a_mask_holds_exactly_its_tiers(tiers: set[Tier]) -> None:
    mask = TierSet.of(*tiers)
    assert set(TierSet.members(mask)) == tiers
    assert mask == sum(tier.bit for tier in tiers)


@given(tier_sets)
def test_members_are_fastest_first(tiers: set[Tier]) -> None:
    members = TierSet.members(TierSet.of(*tiers))
    assert list(members) == sorted(tiers, key=lambda tier: tier.preference)
    assert TierSet.fastest(TierSet.of(*tiers)) is (members[0] if members else None)


@pytest.mark.parametrize("faster", [Tier.HBM, Tier.DRAM, Tier.SSD])
def test_unknown_is_never_preferred(faster: Tier) -> None:
    assert TierSet.fastest(TierSet.of(Tier.UNKNOWN, faster)) is faster


def test_a_tier_named_twice_counts_once() -> None:
    assert TierSet.of(Tier.SSD, Tier.SSD) == TierSet.of(Tier.SSD)
    assert TierSet.of() == TierSet.EMPTY
