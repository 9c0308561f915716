"""What a node holds, when several of its parts speak for one tier."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import settings

from umbp_core.holdings import Holdings
from umbp_core.testing.machines_holdings import HoldingsMachine

HBM, DRAM, SSD = 1, 2, 3

HoldingsMachine.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
TestHoldings = HoldingsMachine.TestCase


def test_a_hash_is_on_a_tier_while_any_source_has_it_there() -> None:
    holdings = Holdings()
    assert holdings.add("l2", DRAM, [b"a", b"b"]) == [b"a", b"b"]
    assert holdings.add("pool", DRAM, [b"b", b"c"]) == [b"c"]
    assert holdings.remove("l2", DRAM, [b"a", b"b"]) == [b"a"]
    assert sorted(holdings.clear("pool", DRAM)) == [b"b", b"c"]
    assert list(holdings.snapshot()) == []


def test_tiers_do_not_know_each_other() -> None:
    holdings = Holdings()
    holdings.add("pool", DRAM, [b"a"])
    assert holdings.add("pool", SSD, [b"a"]) == [b"a"]
    assert holdings.remove("pool", DRAM, [b"a"]) == [b"a"]
    assert list(holdings.snapshot()) == [(SSD, [b"a"])]
    assert holdings.counts() == {DRAM: 0, SSD: 1}


def test_what_was_said_before_a_list_counts_no_more() -> None:
    holdings = Holdings()
    holdings.add("pool", DRAM, [b"a", b"b"])
    assert holdings.replace("pool", DRAM, [b"b", b"c", b"c"]) == ([b"c"], [b"a"])
    added, removed = holdings.replace("pool", DRAM, [])
    assert (added, sorted(removed), holdings.count(DRAM)) == ([], [b"b", b"c"], 0)


def test_many_hashes_are_taken_piece_by_piece() -> None:
    many = [b"%d" % number for number in range(20_000)]
    holdings = Holdings()
    assert holdings.add("pool", DRAM, (key for key in many)) == many
    assert holdings.add("l2", DRAM, many[::2]) == []
    assert sorted(holdings.held(DRAM)) == sorted(many)
    added, removed = holdings.replace("pool", DRAM, many[1::2])
    assert (added, removed) == ([], [])
    assert holdings.remove("l2", DRAM, many + many) == many[::2]
    assert sorted(holdings.held(DRAM)) == sorted(many[1::2])


def test_a_snapshot_goes_on_while_things_change() -> None:
    holdings = Holdings()
    holdings.add("hbm", HBM, [b"a"])
    holdings.add("pool", SSD, [b"a"])
    pieces = holdings.snapshot()
    assert next(pieces) == (HBM, [b"a"])
    holdings.add("pool", DRAM, [b"b"])
    holdings.add("pool", SSD, [b"c"])
    tier, hashes = next(pieces)
    assert (tier, sorted(hashes)) == (SSD, [b"a", b"c"])
    assert next(pieces, None) is None


@pytest.mark.parametrize("change", ["add", "remove", "replace"])
def test_what_is_no_hash_changes_no_more_than_what_was_taken_before_it(change: str) -> None:
    many: list[Any] = [b"%d" % number for number in range(20_000)]
    holdings = Holdings()
    holdings.add("pool", DRAM, many[:100])
    with pytest.raises(TypeError):
        getattr(holdings, change)("pool", DRAM, [*many, ["no hash"]])
    assert holdings.count(DRAM) == len(holdings.held(DRAM)) == len(set(holdings.held(DRAM)))
    holdings.clear("pool", DRAM)
    assert (holdings.counts(), holdings.tiers()) == ({DRAM: 0}, [])
