"""External blocks at the master: the original's checklist, batches, pages, explanations."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.core.master_kit import (
    DRAM,
    EXPIRY,
    HBM,
    SSD,
    START,
    UNKNOWN,
    A,
    B,
    C,
    add,
    beat,
    master,
    matched,
    register,
    status,
)
from umbp_core.errors import InvalidRequest
from umbp_core.index import PrefixMatch, TierRun
from umbp_core.index_gate import Acknowledgement, Action, ActionKind, Batch, Verdict
from umbp_core.master.model import BlockPage, ExternalMatch, HashChange, MasterSettings, NodeStatus, PositionMatch
from umbp_core.master.state import PAGE_HASHES, MasterState

GHOST = "ghost"


@pytest.fixture
def state() -> MasterState:
    return register(master(), "n1", "n2")


# Reports and revokes.


def test_a_report_is_matched_by_node_and_tier(state: MasterState) -> None:
    assert state.report("n1", [A, B, C], HBM, START)
    assert state.report("n1", [A, B], DRAM, START)
    assert state.report("n2", [A], SSD, START)
    assert matched(state, [A, B, C, b"zz"]) == {
        "n1": [(HBM, [A, B, C]), (DRAM, [A, B])],
        "n2": [(SSD, [A])],
    }
    assert matched(state, [A, A]) == {"n1": [(HBM, [A, A]), (DRAM, [A, A])], "n2": [(SSD, [A, A])]}
    assert matched(state, []) == {}
    assert matched(state, [b"zz"]) == {}


def test_tiers_and_hashes_are_taken_as_they_are(state: MasterState) -> None:
    state.report("n1", [b""], 7, START)
    state.report("n1", [b""], UNKNOWN, START)
    assert matched(state, [b""]) == {"n1": [(UNKNOWN, [b""]), (7, [b""])]}


def test_only_living_nodes_report(state: MasterState) -> None:
    assert not state.report(GHOST, [A], HBM, START)
    state.tick(START + EXPIRY + 1)
    assert not state.report("n1", [A], HBM, START + EXPIRY + 1)
    assert state.index.stats().entries == 0
    beat(state, "n1", at=START + EXPIRY + 2)
    assert state.report("n1", [A], HBM, START + EXPIRY + 2)
    assert status(state, "n1") is NodeStatus.ALIVE


def test_a_revoke_takes_one_tier(state: MasterState) -> None:
    state.report("n1", [A, B], HBM, START)
    state.report("n1", [A], DRAM, START)
    assert state.revoke("n1", [A, C], HBM, START)
    assert matched(state, [A, B]) == {"n1": [(HBM, [B]), (DRAM, [A])]}
    assert state.revoke("n1", [A], HBM, START)
    assert state.revoke("n1", [A], DRAM, START)
    assert matched(state, [A]) == {}
    assert not state.revoke(GHOST, [A], HBM, START)


def test_a_tier_or_a_node_is_cleared_without_touching_others(state: MasterState) -> None:
    for node in ("n1", "n2"):
        state.report(node, [A, B], HBM, START)
        state.report(node, [A], DRAM, START)
    beat(state, "n1", (1, [add(A)]))
    assert state.clear_tier("n1", DRAM, START) == 1
    assert matched(state, [A, B])["n1"] == [(HBM, [A, B])]  # type: ignore[index]
    assert state.clear_node("n1", START) == 2
    assert matched(state, [A]) == {"n2": [(HBM, [A]), (DRAM, [A])]}
    assert state.lookup([A]) == [True]
    assert status(state, "n1") is NodeStatus.ALIVE
    assert state.clear_node(GHOST, START) == state.clear_tier(GHOST, HBM, START) == 0
    assert state.report("n1", [A], HBM, START)
    assert matched(state, [A])["n1"] == [(HBM, [A])]  # type: ignore[index]


def test_what_was_cleared_is_swept(state: MasterState) -> None:
    state.report("n1", [A, B], HBM, START)
    beat(state, "n1", (1, [add(A), add(B)]))
    state.unregister("n1", START)
    assert state.sweep(0) == 4
    assert state.sweep(1) == 2
    assert state.sweep(2) == 0
    assert (state.index.stats().keys, state.blocks.stats().keys) == (0, 0)


@pytest.mark.parametrize("call", [MasterState.report, MasterState.revoke])
def test_changes_need_a_node_and_hashes(state: MasterState, call: Callable[..., object]) -> None:
    with pytest.raises(InvalidRequest, match="node_id must not be empty"):
        call(state, "", [A], HBM, START)
    with pytest.raises(InvalidRequest, match="hashes must not be empty"):
        call(state, "n1", [], HBM, START)


def test_clears_and_pages_need_a_node(state: MasterState) -> None:
    with pytest.raises(InvalidRequest, match="node_id"):
        state.clear_tier("", HBM, START)
    with pytest.raises(InvalidRequest, match="node_id"):
        state.clear_node("", START)
    with pytest.raises(InvalidRequest, match="node_id"):
        state.list_blocks("", HBM, 0, 1)


def test_requests_are_bounded() -> None:
    state = register(master(MasterSettings(query_max=2)), "n1")
    three = [A, B, C]
    calls: list[Callable[[], object]] = [
        lambda: state.report("n1", three, HBM, START),
        lambda: state.revoke("n1", three, HBM, START),
        lambda: state.match(three, False, START),
        lambda: state.match_steps(three, False, START),
        lambda: state.match_positions(three, False, START),
        lambda: state.match_positions_steps(three, False, START),
        lambda: state.match_prefix(three, None, START),
        lambda: state.lookup(three),
        lambda: state.route_get("n1", three, (), START),
        lambda: state.route_put("n1", three, [1, 1, 1], (), START),
        lambda: state.apply_batch("n1", Batch(1, 1, [Action(ActionKind.REPORT, HBM, three)]), START),
    ]
    for call in calls:
        with pytest.raises(InvalidRequest, match=r"3 .* at most 2"):
            call()
    assert state.report("n1", three[:2], HBM, START)
    assert matched(state, three[:2]) == {"n1": [(HBM, [A, B])]}


def test_a_node_names_a_few_tiers_only(state: MasterState) -> None:
    for tier in range(32):
        state.report("n1", [A], tier, START)
    with pytest.raises(InvalidRequest, match="n1 names more than 32 tiers"):
        state.report("n1", [A], 32, START)
    assert state.report("n1", [B], 31, START)
    assert state.report("n2", [A], 32, START)


# Hits.


def test_hits_are_counted_when_asked_for(state: MasterState) -> None:
    state.report("n1", [A, B], HBM, START)
    state.report("n2", [A], DRAM, START)
    state.match([A, B], False, START)
    assert state.hit_counts([A, B]) == []
    state.match([A, A, B, b"zz"], True, START)
    state.match_positions([A, b"zz"], True, START)
    assert state.hit_counts([b"zz", B, A, A]) == [(B, 1), (A, 2)]
    state.unregister("n1", START)
    state.unregister("n2", START)
    state.match([A], True, START)
    assert state.hit_counts([A]) == [(A, 2)]


def test_hit_queries_are_bounded() -> None:
    state = master(MasterSettings(hit_query_max=2))
    assert state.hit_counts([A, B]) == []
    with pytest.raises(InvalidRequest, match="hashes size exceeds UMBP_HIT_QUERY_MAX_BATCH=2"):
        state.hit_counts([A, B, C])


def test_counters_are_forgotten_after_their_time() -> None:
    state = register(master(MasterSettings(hit_ttl=60.0)), "n1")
    state.report("n1", [A, B], HBM, START)
    state.match([A], True, START)
    state.match([B], True, START + 30)
    assert state.collect_hits(10, START + 61) == 1
    assert state.hit_counts([A, B]) == [(B, 1)]


# Other questions.


def test_positions_and_prefixes(state: MasterState) -> None:
    state.report("n1", [A, C], HBM, START)
    state.report("n1", [B], DRAM, START)
    assert state.match_positions([A, B, C], False, START) == [PositionMatch("n1", {HBM: b"\x05", DRAM: b"\x02"})]
    runs = [TierRun(HBM, 1), TierRun(DRAM, 1), TierRun(HBM, 1)]
    assert state.match_prefix([A, B, C], None, START) == [PrefixMatch("n1", 3, runs)]
    assert state.match_prefix([A, B, C], {HBM: 2.0}, START) == [PrefixMatch("n1", 1, [TierRun(HBM, 1)], 2.0)]


def test_a_match_as_a_client_is_told_counts_hashes_once() -> None:
    assert ExternalMatch("n1", "", {HBM: [A, B, A], DRAM: [A]}).matched_hash_count() == 2
    assert ExternalMatch("n1", "", {}).matched_hash_count() == 0


def test_blocks_are_listed_in_pages(state: MasterState) -> None:
    keys = [b"%d" % number for number in range(5)]
    state.report("n1", keys, HBM, START)
    listed: list[bytes] = []
    cursor, pages = 0, 0
    while pages == 0 or cursor:
        page = state.list_blocks("n1", HBM, cursor, 2)
        assert len(page.hashes) <= 2
        listed += page.hashes
        cursor, pages = page.cursor, pages + 1
    assert (sorted(listed), pages) == (keys, 3)
    assert state.list_blocks("n1", DRAM, 0, 2) == BlockPage([], 0)


def test_a_page_is_bounded(state: MasterState) -> None:
    state.report("n1", [b"%d" % number for number in range(PAGE_HASHES + 1)], HBM, START)
    page = state.list_blocks("n1", HBM, 0, 10**9)
    assert len(page.hashes) == PAGE_HASHES
    assert len(state.list_blocks("n1", HBM, page.cursor, 10**9).hashes) == 1
    assert len(state.list_blocks("n1", HBM, 0, 1).hashes) == 1


@pytest.mark.parametrize(("cursor", "limit"), [(-1, 1), (0, 0)])
def test_a_page_that_is_none_is_refused(state: MasterState, cursor: int, limit: int) -> None:
    with pytest.raises(InvalidRequest, match="begin with cursor 0"):
        state.list_blocks("n1", HBM, cursor, limit)


def test_changes_can_be_followed(state: MasterState) -> None:
    snapshot = state.snapshot()
    assert list(snapshot.slices) == []
    state.report("n1", [A], HBM, START)
    page = state.since(snapshot.incarnation, snapshot.cursor, 10)
    assert [(change.node, change.hashes) for change in page.changes] == [("n1", (A,))]
    assert not page.lost
    assert state.since(snapshot.incarnation + 1, 0, 10).lost


def test_why_a_hash_cannot_be_used(state: MasterState) -> None:
    answer = state.explain(GHOST, A, START)
    assert (answer.status, answer.tiers, answer.changes) == (NodeStatus.UNKNOWN, (), ())
    assert answer.text == (
        "node ghost is not registered; nothing that it reports is kept; "
        "node ghost never reported it, or longer ago than the master remembers"
    )
    assert "never reported" in state.explain("n1", A, START).text
    state.report("n1", [A], HBM, START)
    state.report("n1", [A], 7, START)
    assert state.explain("n1", A, START).text == "node n1 holds it on HBM, tier 7"
    state.clear_tier("n1", 7, START + 1)
    state.revoke("n1", [A], HBM, START + 2)
    answer = state.explain("n1", A, START + 4.5)
    assert answer.changes == (HashChange(HBM, "revoked", 2.5, ""), HashChange(7, "cleared", 3.5, "revoked"))
    assert answer.text == "HBM was revoked 2.5 s ago"
    state.report("n1", [A], HBM, START + 5)
    state.tick(START + 5 + EXPIRY)
    answer = state.explain("n1", A, START + 5 + EXPIRY)
    assert answer.status is NodeStatus.EXPIRED
    assert answer.text == "node n1 expired: it was silent for too long; HBM was cleared (expired) 0.0 s ago"


# Batches.


def batch(seq: int, *actions: Action, full_sync: bool = False, incarnation: int = 5) -> Batch:
    return Batch(incarnation, seq, actions, full_sync)


def report_of(*hashes: bytes, tier: int = HBM) -> Action:
    return Action(ActionKind.REPORT, tier, hashes)


@pytest.fixture
def native() -> MasterState:
    return register(master(), "n1", incarnation=5)


def acked(seq: int, verdict: Verdict = Verdict.APPLY) -> Acknowledgement:
    return Acknowledgement(verdict, 5, seq, request_full_sync=False)


def test_a_batch_does_several_things_in_order(native: MasterState) -> None:
    actions = [
        report_of(A, B),
        Action(ActionKind.REVOKE, HBM, [A]),
        report_of(A, tier=DRAM),
        report_of(C, tier=SSD),
        Action(ActionKind.CLEAR, SSD),
    ]
    assert native.apply_batch("n1", batch(1, *actions), START) == acked(1)
    assert matched(native, [A, B, C]) == {"n1": [(HBM, [B]), (DRAM, [A])]}


def test_batches_count_once_and_in_order(native: MasterState) -> None:
    native.apply_batch("n1", batch(1, report_of(A)), START)
    native.clear_node("n1", START)
    assert native.apply_batch("n1", batch(1, report_of(A)), START) == acked(1, Verdict.REPLAY)
    gap = Acknowledgement(Verdict.GAP, 5, 1, request_full_sync=True)
    assert native.apply_batch("n1", batch(3, report_of(A)), START) == gap
    assert matched(native, [A]) == {}
    assert native.apply_batch("n1", batch(9, report_of(B), full_sync=True), START) == acked(9)
    assert matched(native, [A, B]) == {"n1": [(HBM, [B])]}


def test_a_full_sync_voids_what_it_does_not_say(native: MasterState) -> None:
    native.apply_batch("n1", batch(1, report_of(A)), START)
    native.report("n1", [B], DRAM, START)
    native.apply_batch("n1", batch(2, report_of(C), full_sync=True), START)
    assert matched(native, [A, B, C]) == {"n1": [(HBM, [C])]}


@pytest.mark.parametrize(("node", "incarnation"), [(GHOST, 5), ("n1", 6)])
def test_a_life_that_did_not_register_has_to(native: MasterState, node: str, incarnation: int) -> None:
    answer = Acknowledgement(Verdict.UNREGISTERED, incarnation, 0, request_full_sync=True)
    sent = batch(1, report_of(A), full_sync=True, incarnation=incarnation)
    assert native.apply_batch(node, sent, START) == answer
    assert native.probe(node, incarnation, 0, START) == answer
    assert matched(native, [A]) == {}


def test_an_earlier_life_is_refused_and_no_sign_of_life(native: MasterState) -> None:
    stale = Acknowledgement(Verdict.STALE, 5, 0, request_full_sync=False)
    sent = batch(1, report_of(A), full_sync=True, incarnation=4)
    assert native.apply_batch("n1", sent, START + 20) == stale
    assert native.probe("n1", 4, 0, START + 20) == stale
    assert matched(native, [A]) == {}
    assert native.tick(START + EXPIRY + 1).expired == ("n1",)


def test_batches_and_probes_are_signs_of_life(native: MasterState) -> None:
    native.apply_batch("n1", batch(1), START + 20)
    assert native.tick(START + 20 + EXPIRY).expired == ()
    assert native.probe("n1", 5, 1, START + 40) == acked(1, Verdict.REPLAY)
    assert native.tick(START + 40 + EXPIRY).expired == ()
    assert native.tick(START + 41 + EXPIRY).expired == ("n1",)
    assert native.probe("n1", 5, 1, START + 72).request_full_sync
    assert status(native, "n1") is NodeStatus.ALIVE


def test_a_batch_names_a_few_tiers_only(native: MasterState) -> None:
    with pytest.raises(InvalidRequest, match="more than 32 tiers"):
        native.apply_batch("n1", batch(1, *(report_of(A, tier=tier) for tier in range(33))), START)
    assert native.apply_batch("n1", batch(1, report_of(A)), START) == acked(1)
