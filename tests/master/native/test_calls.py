"""Every call over a real socket, by the blocking client and by the asyncio one."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.master.native.harness import DEADLINE, DRAM, HBM, SSD, Master, client, hashes_of
from umbp_connectors.client.native_async import NativeAsyncClient
from umbp_connectors.client.native_blocking import NativeBlockingClient
from umbp_core.errors import AlreadyRegistered, InvalidRequest
from umbp_core.index_gate import Action, ActionKind, Batch, Verdict
from umbp_core.index_match import TierRun
from umbp_core.journal import Bundle, Delta
from umbp_core.master.model import (
    ExternalMatch,
    Heartbeat,
    NodeStatus,
    PutOutcome,
    Registration,
    TierCapacity,
)
from umbp_core.master.samples import CounterDelta, GaugeValue, HistogramDelta, MetricSample
from umbp_core.master.transport import NativeTransport

A, B = "node-a", "node-b"


class Waiting:
    """The asyncio client, called as the blocking one is."""

    native = True

    def __init__(self, address: str | tuple[str, int]) -> None:
        self._loop = asyncio.new_event_loop()
        self._client = NativeAsyncClient(address)

    def __getattr__(self, name: str) -> Callable[..., Any]:
        call = getattr(self._client, name)
        return lambda *args: self._loop.run_until_complete(call(*args))

    def close(self) -> None:
        self._client.close()
        self._loop.run_until_complete(asyncio.sleep(0))
        self._loop.close()


@pytest.fixture(params=["blocking over unix", "blocking over tcp", "asyncio over unix", "asyncio over tcp"])
def ask(request: pytest.FixtureRequest, running: Master, path: str) -> Iterator[NativeTransport]:
    kind, _, way = request.param.split()
    address: Any = path if way == "unix" else ("127.0.0.1", running.serve()[1])
    if kind == "blocking":
        with client(address) as it:
            yield it
    else:
        waiting = Waiting(address)
        yield waiting  # type: ignore[misc]
        waiting.close()


def register(ask: NativeTransport, *nodes: str, incarnation: int = 0) -> None:
    for node in nodes:
        capacities = (TierCapacity(DRAM, 1000, 1000),)
        ask.register(Registration(node, "host", f"{node}:1", b"d", capacities, ("x=y",), incarnation), DEADLINE)


def test_both_clients_have_every_call() -> None:
    for name, call in inspect.getmembers(NativeTransport, inspect.isfunction):
        if name.startswith("_"):
            continue
        expected = list(inspect.signature(call).parameters)
        for kind in (NativeBlockingClient, NativeAsyncClient):
            assert list(inspect.signature(getattr(kind, name)).parameters) == expected, (kind, name)


def test_nodes(ask: NativeTransport) -> None:
    assert ask.list_nodes(DEADLINE) == []
    ack = ask.register(
        Registration(A, "10.0.0.1", "10.0.0.1:9", b"\0engine", (TierCapacity(DRAM, 10, 4),), ("a=1", "b"), 5), DEADLINE
    )
    assert (ack.heartbeat_interval_ms, ack.ack_seq) == (5000, 0)
    [info] = ask.list_nodes(DEADLINE)
    assert (info.node_id, info.status, info.node_address, info.peer_address) == (
        A, NodeStatus.ALIVE, "10.0.0.1", "10.0.0.1:9",
    )  # fmt: skip
    assert (info.tags, info.incarnation, info.capacities) == (("a=1", "b"), 5, (TierCapacity(DRAM, 10, 4),))
    with pytest.raises(AlreadyRegistered, match="already alive"):
        ask.register(Registration(A), DEADLINE)
    with pytest.raises(InvalidRequest, match="node_id"):
        ask.register(Registration(""), DEADLINE)
    ask.unregister(A, DEADLINE)
    assert ask.list_nodes(DEADLINE) == []
    ask.unregister(A, DEADLINE)


def test_heartbeats_and_routes(ask: NativeTransport) -> None:
    assert ask.heartbeat(Heartbeat(A), DEADLINE).status is NodeStatus.UNKNOWN
    register(ask, A, B)
    deltas = (Delta(b"k1", DRAM, 10), Delta(b"k2", SSD, 20), Delta(b"k3", DRAM, 30))
    reply = ask.heartbeat(Heartbeat(A, [Bundle(1, deltas), Bundle(2, (Delta(b"k3", DRAM, None),))]), DEADLINE)
    assert (reply.status, reply.acked_seq, reply.request_full_sync) == (NodeStatus.ALIVE, 2, False)
    assert ask.heartbeat(Heartbeat(A, [Bundle(9, deltas)]), DEADLINE).request_full_sync
    assert ask.lookup([b"k1", b"k2", b"k3", b"", b"k1"], DEADLINE) == [True, True, False, False, True]
    first, missing, second = ask.route_get(B, [b"k1", b"no", b"k2"], [], DEADLINE)
    assert missing is None
    assert first is not None
    assert second is not None
    assert (*first, *second) == (A, DRAM, 10, f"{A}:1", A, SSD, 20, f"{A}:1")
    assert ask.route_get(B, [b"k1"], [A], DEADLINE) == [None]
    ask.heartbeat(Heartbeat(B, capacities=(TierCapacity(DRAM, 1000, 900),), counts={DRAM: 0}), DEADLINE)
    exists, routed = ask.route_put(A, [b"k1", b"new"], [1, 100], [A], DEADLINE)
    assert exists.outcome is PutOutcome.ALREADY_EXISTS
    assert (exists.node_id, exists.peer_address) == ("", "")
    assert (routed.outcome, routed.node_id, routed.tier, routed.peer_address) == (
        PutOutcome.ROUTED, B, DRAM, f"{B}:1",
    )  # fmt: skip
    [nowhere] = ask.route_put(A, [b"new"], [10**15], [], DEADLINE)
    assert nowhere.outcome is PutOutcome.UNAVAILABLE
    full = ask.heartbeat(Heartbeat(A, [Bundle(9, (Delta(b"k9", HBM, 1),))], full_sync=True, baseline=9), DEADLINE)
    assert (full.acked_seq, full.request_full_sync) == (9, False)
    assert ask.lookup([b"k1", b"k9"], DEADLINE) == [False, True]


def test_reports_matches_and_hits(ask: NativeTransport) -> None:
    hashes = hashes_of(*range(40))
    assert ask.report(A, hashes, DRAM, DEADLINE) is False
    register(ask, A, B)
    assert ask.report(A, hashes[:30], DRAM, DEADLINE) is True
    ask.report(A, hashes[10:20], HBM, DEADLINE)
    ask.report(B, hashes[:5], SSD, DEADLINE)
    query = [*hashes[8:12], b"unknown", *hashes[28:32], hashes[8]]
    assert ask.match(query, True, DEADLINE) == [
        ExternalMatch(A, f"{A}:1", {HBM: hashes[10:12], DRAM: [*hashes[8:12], *hashes[28:30], hashes[8]]})
    ]
    found = {match.node_id: match.tiers for match in ask.match(hashes[:3], False, DEADLINE)}
    assert found == {A: {DRAM: hashes[:3]}, B: {SSD: hashes[:3]}}
    assert ask.match([], True, DEADLINE) == []
    assert ask.match([b"unknown"], True, DEADLINE) == []
    assert ask.hit_counts([b"unknown", hashes[9], hashes[8], hashes[9]], DEADLINE) == [(hashes[9], 1), (hashes[8], 1)]
    ask.revoke(A, hashes[10:12], DRAM, DEADLINE)
    assert ask.match(hashes[10:12], False, DEADLINE)[0].tiers == {HBM: hashes[10:12]}
    ask.clear_tier(A, HBM, DEADLINE)
    assert ask.match(hashes[10:12], False, DEADLINE) == []
    ask.clear_node(A, DEADLINE)
    assert ask.match(hashes[5:], False, DEADLINE) == []
    with pytest.raises(InvalidRequest, match="hashes"):
        ask.report(A, [], DRAM, DEADLINE)
    with pytest.raises(InvalidRequest, match="UMBP_HIT_QUERY_MAX_BATCH"):
        ask.hit_counts([b"h"] * 5000, DEADLINE)


def test_large_requests_are_answered_too(ask: NativeTransport) -> None:
    register(ask, A)
    hashes = hashes_of(*range(10**18, 10**18 + 30_000))
    ask.report(A, hashes, DRAM, DEADLINE)
    assert ask.match(hashes, True, DEADLINE) == [ExternalMatch(A, f"{A}:1", {DRAM: hashes})]
    [prefix] = ask.match_prefix(hashes, None, DEADLINE)
    assert prefix.length == 30_000
    ask.revoke(A, hashes[::2], DRAM, DEADLINE)
    assert ask.match(hashes, False, DEADLINE) == [ExternalMatch(A, f"{A}:1", {DRAM: hashes[1::2]})]
    bundles = [Bundle(1, tuple(Delta(key, DRAM, 7) for key in hashes))]
    assert ask.heartbeat(Heartbeat(A, bundles), DEADLINE).acked_seq == 1
    assert ask.lookup(hashes[:10_000], DEADLINE) == [True] * 10_000
    routes = ask.route_get("", hashes[:10_000], [], DEADLINE)
    assert {route and route[:3] for route in routes} == {(A, DRAM, 7)}
    outcomes = ask.route_put("", [b"new", *hashes[:9_999]], [1] * 10_000, [], DEADLINE)
    assert [route.outcome for route in outcomes[:2]] == [PutOutcome.ROUTED, PutOutcome.ALREADY_EXISTS]
    assert len(outcomes) == 10_000


def test_batches(ask: NativeTransport) -> None:
    register(ask, A, incarnation=7)
    hashes = hashes_of(1, 2, 3)
    report, revoke = Action(ActionKind.REPORT, DRAM, hashes), Action(ActionKind.REVOKE, DRAM, hashes[:1])
    answer = ask.apply_batch(A, Batch(7, 1, [report], full_sync=True), DEADLINE)
    assert (answer.verdict, answer.incarnation, answer.acked, answer.request_full_sync) == (
        Verdict.APPLY, 7, 1, False,
    )  # fmt: skip
    assert ask.apply_batch(A, Batch(7, 2, [revoke]), DEADLINE).acked == 2
    assert ask.apply_batch(A, Batch(7, 2, [revoke]), DEADLINE).verdict is Verdict.REPLAY
    assert ask.apply_batch(A, Batch(7, 4, [revoke]), DEADLINE).request_full_sync
    assert ask.apply_batch(A, Batch(6, 9, [revoke]), DEADLINE).verdict is Verdict.STALE
    assert ask.apply_batch("nobody", Batch(1, 1, []), DEADLINE).verdict is Verdict.UNREGISTERED
    assert ask.probe(A, 7, 2, DEADLINE).verdict is Verdict.REPLAY
    assert ask.probe(A, 7, 3, DEADLINE).verdict is Verdict.GAP
    assert ask.match(hashes, False, DEADLINE)[0].tiers == {DRAM: hashes[1:]}
    ask.apply_batch(A, Batch(7, 3, [Action(ActionKind.CLEAR, DRAM)]), DEADLINE)
    assert ask.match(hashes, False, DEADLINE) == []


def test_prefixes(ask: NativeTransport) -> None:
    register(ask, A, B)
    hashes = hashes_of(*range(10))
    ask.report(A, hashes[:6], DRAM, DEADLINE)
    ask.report(A, hashes[2:4], HBM, DEADLINE)
    ask.report(B, hashes[:3], SSD, DEADLINE)
    first, second = ask.match_prefix(hashes, None, DEADLINE)
    assert (first.node, first.length, first.runs) == (A, 6, [TierRun(DRAM, 2), TierRun(HBM, 2), TierRun(DRAM, 2)])
    assert (second.node, second.length, second.runs, second.cost) == (B, 3, [TierRun(SSD, 3)], 0.0)
    assert ask.match_prefix(hashes, None, DEADLINE, 1) == [first]
    assert ask.match_prefix(hashes, None, DEADLINE, 3) == [first, second]
    [weighted] = ask.match_prefix(hashes, {DRAM: 0.5, HBM: 0.25}, DEADLINE)
    assert (weighted.node, weighted.cost) == (A, 2.5)
    assert ask.match_prefix([b"unknown"], None, DEADLINE) == []
    with pytest.raises(InvalidRequest, match="weight"):
        ask.match_prefix(hashes, {DRAM: float("nan")}, DEADLINE)


def test_listing_blocks(ask: NativeTransport) -> None:
    register(ask, A)
    hashes = hashes_of(*range(1000))
    ask.report(A, hashes, DRAM, DEADLINE)
    found, cursor = [], 0
    while True:
        page = ask.list_blocks(A, DRAM, cursor, 300, DEADLINE)
        assert len(page.hashes) <= 300
        found += page.hashes
        cursor = page.cursor
        if not cursor:
            break
    assert sorted(found) == sorted(hashes)
    assert ask.list_blocks(A, SSD, 0, 10, DEADLINE).hashes == []


def test_nodes_from_another_wire_have_other_bounds(ask: NativeTransport, running: Master) -> None:
    node = "n" * 5000
    capacity, tags = TierCapacity(DRAM, 2**64 - 1, 2**64 - 1), tuple(map(str, range(1000)))
    running.loop.call_soon_threadsafe(
        running.service.register, Registration(node, "h" * 2000, "p" * 2000, b"", (capacity,), tags)
    )
    ask.lookup([], DEADLINE)
    [info] = ask.list_nodes(DEADLINE)
    assert (info.node_id, info.capacities, info.tags) == (node, (capacity,), tags)
    running.run(running.service.report(node, [b"1"], DRAM))
    assert ask.match([b"1"], False, DEADLINE) == [ExternalMatch(node, "p" * 2000, {DRAM: [b"1"]})]
    assert ask.match_prefix([b"1"], None, DEADLINE)[0].node == node


@pytest.mark.parametrize("field", ["node_id", "node_address", "peer_address"])
def test_no_node_has_a_name_that_no_answer_can_carry(running: Master, field: str) -> None:
    with pytest.raises(InvalidRequest, match="at most 8192 characters"):
        running.state.register(Registration(**{"node_id": "n", field: "x" * 8193}), running.now)
    longest = Registration(**{"node_id": "n", field: "\U0001f600" * 8192})
    running.state.register(longest, running.now)


def test_explaining(ask: NativeTransport, running: Master) -> None:
    register(ask, A)
    ask.report(A, [b"1", b"2"], DRAM, DEADLINE)
    running.now += 2.5
    ask.revoke(A, [b"1"], DRAM, DEADLINE)
    gone, there = ask.explain(A, b"1", DEADLINE), ask.explain(A, b"2", DEADLINE)
    assert (gone.status, gone.tiers, [change.kind for change in gone.changes]) == (NodeStatus.ALIVE, (), ["revoked"])
    assert there.tiers == (DRAM,)
    assert [(change.kind, change.age) for change in there.changes] == [("reported", 2.5)]
    assert ask.explain("nobody", b"1", DEADLINE).status is NodeStatus.UNKNOWN
    assert gone.text
    assert gone.text != there.text


def test_metrics(ask: NativeTransport, running: Master) -> None:
    register(ask, A)
    samples = [
        MetricSample("requests", CounterDelta(2.0), "how many", (("rank", "0"),)),
        MetricSample("room", GaugeValue(0.5)),
        MetricSample("seconds", HistogramDelta((0.1, 1.0), (3, 4), 5, 6.5)),
    ]
    ask.report_metrics(A, samples, DEADLINE)
    assert running.observer.metrics == [(A, ("x=y",), samples)]


def test_calls_are_counted_under_their_names(blocking: NativeBlockingClient, running: Master) -> None:
    register(blocking, A)
    blocking.report(A, [b"1"], DRAM, DEADLINE)
    blocking.match([b"1"], False, DEADLINE)
    with pytest.raises(AlreadyRegistered):
        register(blocking, A)
    assert running.observer.calls == [
        ("native", "RegisterClient", "OK"),
        ("native", "ReportExternalKvBlocks", "OK"),
        ("native", "MatchExternalKv", "OK"),
        ("native", "RegisterClient", "ALREADY_REGISTERED"),
    ]
