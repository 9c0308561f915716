"""Answers that are kept say what would be answered anew, whatever happens in between."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from tests.core.master_kit import DRAM, EXPIRY, HBM, START, A, B, C, beat, master, register, registration
from umbp_core.errors import InvalidRequest
from umbp_core.index import PositionMatch
from umbp_core.master.model import MasterSettings
from umbp_core.master.state import MasterState

Rows = list[tuple[str, str, dict[int, bytes]]]
QUERIES = ([], [A], [B], [A, B], [A, B, C], [A, A], [C, A])


class Asker:
    """Asks the same again and again, and compares with what is answered anew."""

    def __init__(self, state: MasterState) -> None:
        self.state = state
        self.made = 0
        self.prepared = state.prepare(self.rows)

    def rows(self, matches: Sequence[PositionMatch]) -> Rows:
        self.made += 1
        return [(match.node, self.state.peer_address(match.node), match.tiers) for match in matches]

    def check(self, now: float = START) -> None:
        for hashes in QUERIES:
            matches = self.state.match_positions(hashes, False, now)
            expected = (self.rows(matches), sum(map(PositionMatch.matched, matches)))
            assert self.prepared.match(hashes, False, now) == self.prepared.match(hashes, False, now) == expected


@pytest.fixture
def asker() -> Asker:
    state = register(master(), "n1", "n2")
    state.report("n1", [A, B], HBM, START)
    state.report("n2", [A], HBM, START)
    asker = Asker(state)
    asker.check()
    return asker


def test_what_is_alike_is_made_once(asker: Asker) -> None:
    before = asker.made
    for _ in range(3):
        assert asker.prepared.match([B], False, START) == ([("n1", "n1.host:1", {HBM: b"\1"})], 1)
        assert asker.prepared.match([b"x"], False, START) == ([], 0)
    assert asker.made <= before + 1


def test_reports_and_revokes_are_seen(asker: Asker) -> None:
    state = asker.state
    state.report("n2", [A, B], DRAM, START)
    asker.check()
    state.revoke("n1", [A], HBM, START)
    asker.check()
    state.report("n1", [A, B, C], HBM, START)
    asker.check()


def test_what_is_cleared_is_not_answered(asker: Asker) -> None:
    state = asker.state
    state.clear_tier("n1", HBM, START)
    asker.check()
    state.report("n1", [A, B], HBM, START)
    asker.check()
    state.clear_node("n1", START)
    asker.check()
    while state.sweep(1):
        asker.check()
    state.report("n2", [A, B], DRAM, START)
    asker.check()


def test_addresses_are_those_of_now(asker: Asker) -> None:
    state = asker.state
    state.register(registration("n1", "elsewhere:1", incarnation=5), START)
    state.report("n1", [A, B], HBM, START)
    asker.check()
    state.register(registration("n1", "elsewhere:2", incarnation=5), START)
    assert asker.prepared.match([A, B], False, START)[0][0][1] == "elsewhere:2"
    asker.check()


def test_nodes_that_go_are_left_out(asker: Asker) -> None:
    state = asker.state
    state.unregister("n2", START)
    asker.check()
    late = START + EXPIRY + 1
    asker.check(late)
    assert asker.prepared.match([A], False, late) == ([], 0)
    state.tick(late)
    asker.check(late)
    beat(state, "n1", at=late)
    state.report("n1", [A], HBM, late)
    asker.check(late)


def test_hits_are_counted_each_time(asker: Asker) -> None:
    for _ in range(3):
        asker.prepared.match([B, B], True, START)
    asker.prepared.match([A, C], True, START)
    assert asker.state.hit_counts([A, B, C]) == [(A, 1), (B, 3)]


def test_too_many_hashes_are_refused() -> None:
    asker = Asker(master(MasterSettings(query_max=2)))
    with pytest.raises(InvalidRequest, match="3 hashes in one request, at most 2"):
        asker.prepared.match([A, B, C], False, START)


def test_no_more_than_so_many_are_kept() -> None:
    state = register(master(), "n1")
    keys = [b"%d" % number for number in range(1200)]
    state.report("n1", keys, HBM, START)
    asker = Asker(state)
    for _ in range(2):
        for count in range(1, len(keys)):
            ((_, _, tiers),), matched = asker.prepared.match(keys[:count], False, START)
            assert (int.from_bytes(tiers[HBM], "little"), matched) == ((1 << count) - 1, count)
    assert asker.made > len(keys)
