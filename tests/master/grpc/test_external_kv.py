"""The external index over UMBP's wire: the checklist of the original's tests, and what was observed of its master."""

import threading

import grpc
import pytest

from tests.master.grpc.harness import DEADLINE, DRAM, HBM, SSD, RunningMaster, Stub, matches, message
from umbp_core.master.model import MasterSettings

INVALID = grpc.StatusCode.INVALID_ARGUMENT


@pytest.fixture
def nodes(call: Stub) -> None:
    """n1 with an address, n2 without."""
    call("RegisterClient", node_id="n1", peer_address="10.0.0.1:17000")
    call("RegisterClient", node_id="n2")


def report(call: Stub, node: str, tier: int, *hashes: str) -> None:
    call("ReportExternalKvBlocks", node_id=node, hashes=hashes, tier=tier)


def revoke(call: Stub, node: str, tier: int, *hashes: str) -> None:
    call("RevokeExternalKvBlocks", node_id=node, hashes=hashes, tier=tier)


def match(call: Stub, *hashes: str, count: bool = False) -> dict[str, dict[int, list[str]]]:
    return matches(call("MatchExternalKv", hashes=hashes, count_as_hit=count))


def hits(call: Stub, *hashes: str) -> dict[str, int]:
    answer = call("GetExternalKvHitCounts", hashes=hashes)
    return {entry.hash: entry.hit_count_total for entry in answer.entries}


# --- What was observed of the original.


@pytest.mark.usefixtures("nodes")
def test_observed_match(call: Stub) -> None:
    report(call, "n1", HBM, "a", "b", "c")
    report(call, "n1", DRAM, "a", "b")
    report(call, "n2", SSD, "a")
    answer = call("MatchExternalKv", hashes=["a", "b", "c", "zz"])
    assert matches(answer) == {"n1": {HBM: ["a", "b", "c"], DRAM: ["a", "b"]}, "n2": {SSD: ["a"]}}
    assert {m.node_id: m.peer_address for m in answer.matches} == {"n1": "10.0.0.1:17000", "n2": ""}


@pytest.mark.usefixtures("nodes")
def test_observed_duplicates_in_a_query_are_answered_as_often(call: Stub) -> None:
    report(call, "n1", HBM, "a")
    report(call, "n1", DRAM, "a")
    report(call, "n2", SSD, "a")
    assert match(call, "a", "a", "a") == {"n1": {HBM: ["a"] * 3, DRAM: ["a"] * 3}, "n2": {SSD: ["a"] * 3}}
    assert match(call) == {}


def test_observed_report_of_an_unknown_node_is_ok_and_not_stored(call: Stub) -> None:
    report(call, "ghost", HBM, "a")
    assert match(call, "a") == {}


@pytest.mark.parametrize("name", ["ReportExternalKvBlocks", "RevokeExternalKvBlocks"])
@pytest.mark.usefixtures("nodes")
def test_observed_words_of_refusals(call: Stub, name: str) -> None:
    assert call.error(name, node_id="", hashes=["a"], tier=HBM) == (INVALID, "node_id must not be empty")
    assert call.error(name, node_id="n1", hashes=[], tier=HBM) == (INVALID, "hashes must not be empty")


@pytest.mark.parametrize("name", ["RevokeAllExternalKvBlocksAtTier", "RevokeAllExternalKvBlocksForNode"])
def test_bulk_revokes_want_a_node(call: Stub, name: str) -> None:
    assert call.error(name, node_id="") == (INVALID, "node_id must not be empty")


@pytest.mark.usefixtures("nodes")
def test_observed_any_tier_and_any_hash_is_kept_as_it_is(call: Stub) -> None:
    """Tiers are an open enumeration, and the empty string is a hash; buckets come by number, UNKNOWN first."""
    report(call, "n1", 7, "a", "")
    report(call, "n1", HBM, "a")
    report(call, "n1", 0, "a")
    (found,) = call("MatchExternalKv", hashes=["a", ""]).matches
    assert [(part.tier, list(part.hashes)) for part in found.hashes_by_tier] == [
        (0, ["a"]),
        (HBM, ["a"]),
        (7, ["a", ""]),
    ]


@pytest.mark.usefixtures("nodes")
def test_a_negative_tier_is_a_number_like_others(call: Stub) -> None:
    report(call, "n1", -3, "a")
    assert match(call, "a") == {"n1": {-3: ["a"]}}


@pytest.mark.usefixtures("nodes")
def test_observed_revoke(call: Stub) -> None:
    report(call, "n1", HBM, "a", "b")
    report(call, "n1", DRAM, "a", "b")
    for _ in range(2):
        revoke(call, "n1", HBM, "a")
        assert match(call, "a", "b") == {"n1": {HBM: ["b"], DRAM: ["a", "b"]}}


@pytest.mark.usefixtures("nodes")
def test_observed_hit_counts(call: Stub) -> None:
    report(call, "n1", HBM, "a", "b")
    match(call, "a", "a", "b", "zz", count=True)
    match(call, "a", count=True)
    assert hits(call, "zz", "a", "b", "a") == {"a": 2, "b": 1}
    assert call.error("GetExternalKvHitCounts", hashes=["h"] * 4097) == (
        INVALID,
        "hashes size exceeds UMBP_HIT_QUERY_MAX_BATCH=4096",
    )
    assert hits(call, *map(str, range(4096))) == {}


@pytest.mark.usefixtures("nodes")
def test_observed_bulk_revokes_leave_counts_alone(call: Stub) -> None:
    report(call, "n1", HBM, "a")
    report(call, "n1", DRAM, "a")
    match(call, "a", count=True)
    call("RevokeAllExternalKvBlocksAtTier", node_id="n1", tier=DRAM)
    assert match(call, "a") == {"n1": {HBM: ["a"]}}
    call("RevokeAllExternalKvBlocksForNode", node_id="n1")
    assert match(call, "a") == {}
    assert hits(call, "a") == {"a": 1}


# --- The checklist of the original's test_external_kv_block_index, by its names.


@pytest.mark.usefixtures("nodes")
def test_register_is_additive_across_tiers_and_idempotent_at_one(call: Stub) -> None:
    """RegisterAndMatchBasic, RegisterIsAdditiveAcrossTiers, RegisterAtSameTierTwiceIsIdempotent."""
    report(call, "n1", HBM, "h1", "h2")
    assert match(call, "h1", "h2") == {"n1": {HBM: ["h1", "h2"]}}
    report(call, "n1", DRAM, "h1")
    report(call, "n1", DRAM, "h1")
    assert match(call, "h1", "h2") == {"n1": {HBM: ["h1", "h2"], DRAM: ["h1"]}}
    revoke(call, "n1", DRAM, "h1")
    assert match(call, "h1", "h2") == {"n1": {HBM: ["h1", "h2"]}}


@pytest.mark.usefixtures("nodes")
def test_unregister_takes_one_tier_and_the_last_drops_the_entry(call: Stub) -> None:
    """UnregisterRemovesOnlyOneTier, UnregisterLastTierDropsEntry, UnregisterAtMissingTierIsNoOp, ...NonExistentHash."""
    report(call, "n1", HBM, "h")
    report(call, "n1", DRAM, "h")
    revoke(call, "n1", SSD, "h")
    revoke(call, "n1", HBM, "nobody has this")
    revoke(call, "nobody", HBM, "h")
    assert match(call, "h") == {"n1": {HBM: ["h"], DRAM: ["h"]}}
    revoke(call, "n1", HBM, "h")
    assert match(call, "h") == {"n1": {DRAM: ["h"]}}
    revoke(call, "n1", DRAM, "h")
    assert match(call, "h") == {}


@pytest.mark.usefixtures("nodes")
def test_bulk_drops_across_hashes_of_one_node_only(call: Stub) -> None:
    """UnregisterByNodeAtTierBulkDropsAcrossHashes, UnregisterByNodeRemovesAllTiers, ...NonExistentNodeIsNoOp.

    UnregisterExternalKvByNodeWipesAllTiersOnly: the node stays, and so do its own blocks.
    """
    many = [f"h{number}" for number in range(500)]
    own = message("KvEvent")(kind=0, key="h1", tier=DRAM, size=10)
    call("Heartbeat", node_id="n1", bundles=[message("EventBundle")(seq=1, events=[own])])
    for node in ("n1", "n2"):
        report(call, node, HBM, *many)
        report(call, node, DRAM, *many)
    call("RevokeAllExternalKvBlocksAtTier", node_id="nobody", tier=HBM)
    call("RevokeAllExternalKvBlocksForNode", node_id="nobody")
    call("RevokeAllExternalKvBlocksAtTier", node_id="n1", tier=HBM)
    assert match(call, *many) == {"n1": {DRAM: many}, "n2": {HBM: many, DRAM: many}}
    call("RevokeAllExternalKvBlocksForNode", node_id="n1")
    assert match(call, *many) == {"n2": {HBM: many, DRAM: many}}
    assert list(call("BatchLookup", keys=["h1", "h2"]).found) == [True, False]
    report(call, "n1", SSD, "h1")
    assert match(call, "h1")["n1"] == {SSD: ["h1"]}


@pytest.mark.usefixtures("nodes")
def test_match_groups_by_node_and_splits_by_tier(master: RunningMaster, call: Stub) -> None:
    """MatchAcrossMultipleNodesCorrectGrouping, MatchSplitsHashesAcrossTiersOnSameNode, MatchWithNoHitsReturnsEmpty,

    MatchEmptyQueryReturnsEmpty, MatchedHashCountDeduplicatesAcrossTiers, GetKvCountDeduplicatesAcrossTiers.
    """
    report(call, "n1", HBM, "a", "b")
    report(call, "n1", DRAM, "b", "c")
    report(call, "n2", DRAM, "c", "a")
    assert match(call, "c", "b", "a") == {"n1": {HBM: ["b", "a"], DRAM: ["c", "b"]}, "n2": {DRAM: ["c", "a"]}}
    assert match(call, "x", "y") == match(call) == {}
    found = master.transport().match([b"a", b"b", b"c", b"a"], False, DEADLINE)
    assert {m.node_id: m.matched_hash_count() for m in found} == {"n1": 3, "n2": 2}


def test_reports_and_matches_at_once(master: RunningMaster) -> None:
    """ThreadSafetyConcurrentRegisterAndMatch: what is answered was reported as a whole."""
    chain = [f"h{number}" for number in range(64)]
    for node in ("w0", "w1", "w2"):
        master.stub()("RegisterClient", node_id=node)
    wrong: list[object] = []

    def write(node: str) -> None:
        call = master.stub()
        for _ in range(40):
            report(call, node, HBM, *chain)
            call("RevokeAllExternalKvBlocksAtTier", node_id=node, tier=HBM)

    def read() -> None:
        call = master.stub()
        for _ in range(80):
            wrong.extend(held for held in match(call, *chain).values() if held != {HBM: chain})

    threads = [threading.Thread(target=write, args=(f"w{number}",)) for number in range(3)]
    threads += [threading.Thread(target=read) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(DEADLINE)
        assert not thread.is_alive()
    assert wrong == []


# --- The checklist of the original's Python tests, as far as it concerns a master.


@pytest.mark.usefixtures("nodes")
def test_count_as_hit_counts_each_matched_hash_once(call: Stub) -> None:
    for node in ("n1", "n2"):
        report(call, node, HBM, "hot")
        report(call, node, DRAM, "hot")
    match(call, "hot", count=False)
    assert hits(call, "hot") == {}
    match(call, "hot", "hot", "missing", "hot", count=True)
    assert hits(call, "hot", "missing") == {"hot": 1}
    for _ in range(3):
        match(call, "hot", count=True)
    call("RevokeAllExternalKvBlocksForNode", node_id="n1")
    call("UnregisterClient", node_id="n2")
    match(call, "hot", count=True)
    assert hits(call, "hot") == {"hot": 4}


@pytest.mark.usefixtures("nodes")
def test_clear_allows_new_reports_and_another_clear(call: Stub) -> None:
    for _ in range(2):
        report(call, "n1", DRAM, "a", "b")
        assert match(call, "b") == {"n1": {DRAM: ["b"]}}
        call("RevokeAllExternalKvBlocksForNode", node_id="n1")
        call("RevokeAllExternalKvBlocksForNode", node_id="n1")
        assert match(call, "a", "b") == {}


@pytest.mark.usefixtures("nodes")
def test_a_batch_of_500_with_a_partial_revoke_and_a_subset_query(call: Stub) -> None:
    many = [f"h{number}" for number in range(500)]
    report(call, "n1", HBM, *many)
    revoke(call, "n1", HBM, *many[:250])
    assert match(call, *many) == {"n1": {HBM: many[250:]}}
    assert match(call, *many[240:260]) == {"n1": {HBM: many[250:260]}}


@pytest.mark.usefixtures("nodes")
def test_reports_after_unregistering_are_ignored(call: Stub) -> None:
    report(call, "n1", HBM, "a")
    call("UnregisterClient", node_id="n1")
    call("UnregisterClient", node_id="n1")
    report(call, "n1", HBM, "a")
    assert match(call, "a") == {}


# --- Large requests.


@pytest.mark.usefixtures("nodes")
def test_large_reports_and_matches_go_in_pieces(call: Stub) -> None:
    """The original takes 64 MiB; here 60 000 hashes of 64 characters, which a client of 4 MiB may still be sent."""
    many = [f"{number:064x}" for number in range(60_000)]
    report(call, "n1", HBM, *many)
    report(call, "n1", DRAM, *many[::2])
    assert match(call, *many) == {"n1": {HBM: many, DRAM: many[::2]}}
    revoke(call, "n1", HBM, *many)
    assert match(call, *many) == {"n1": {DRAM: many[::2]}}


@pytest.mark.usefixtures("nodes")
def test_observed_answers_above_4_mib_need_a_client_that_takes_them(master: RunningMaster, call: Stub) -> None:
    """60 000 hashes of 64 characters fit what a client of gRPC's default takes, 70 000 do not."""
    many = [f"{number:064x}" for number in range(70_000)]
    report(call, "n1", HBM, *many)
    plain = master.stub(grpc.insecure_channel(master.target))
    assert match(plain, *many[:60_000]) == {"n1": {HBM: many[:60_000]}}
    code, details = plain.error("MatchExternalKv", hashes=many)
    assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "4194304" in details
    assert match(call, *many) == {"n1": {HBM: many}}


def test_a_query_is_bounded() -> None:
    with RunningMaster(MasterSettings(query_max=3000)) as master:
        call = master.stub()
        call("RegisterClient", node_id="n1")
        many = [str(number) for number in range(3001)]
        for name, fields in {
            "MatchExternalKv": {"hashes": many},
            "ReportExternalKvBlocks": {"node_id": "n1", "hashes": many},
            "RevokeExternalKvBlocks": {"node_id": "n1", "hashes": many},
            "BatchLookup": {"keys": many},
            "BatchRouteGet": {"keys": many},
            "BatchRoutePut": {"keys": many, "block_sizes": [1] * len(many)},
        }.items():
            code, details = call.error(name, **fields)
            assert code is INVALID, name
            assert "3001" in details, name
            assert "3000" in details, name
        assert match(call, *many[:3000]) == {}


@pytest.mark.usefixtures("nodes")
def test_an_answer_that_fits_no_message_is_refused_with_a_sentence(call: Stub) -> None:
    long = "x" * (1 << 20)
    report(call, "n1", HBM, long)
    report(call, "n2", HBM, long)
    code, details = call.error("MatchExternalKv", hashes=[long] * 40)
    assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "ask for less" in details
    assert match(call, *[long] * 20) == {"n1": {HBM: [long] * 20}, "n2": {HBM: [long] * 20}}


@pytest.mark.usefixtures("nodes")
def test_observed_a_request_above_64_mib_is_refused(call: Stub) -> None:
    code, _ = call.error("ReportExternalKvBlocks", node_id="n1", hashes=["x" * (1 << 20)] * 70, tier=HBM)
    assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
