"""The service: what it answers, tells and keeps; large requests beside small ones."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable
from contextlib import aclosing

import pytest

from tests.master.service.kit import DRAM, HBM, KEYS, QUICK, A, B, C, add, beat, master, run, small, turns
from umbp_connectors.master.service import MasterService
from umbp_core.index_gate import Action, ActionKind, Batch
from umbp_core.master.changes import Slices
from umbp_core.master.model import GetRoute, NodeStatus, PositionMatch, PutOutcome, Registration
from umbp_core.master.samples import MetricSample

# Answers, and what observers are told.


def test_external_blocks() -> None:
    async def scenario() -> None:
        made = small()
        service = made.service
        assert await service.report("n1", [A, B], HBM)
        assert not await service.report("ghost", [A], HBM)
        await service.report("n1", [A], DRAM)
        (match,) = await service.match([A, B, C], True)
        assert (match.node, match.tiers) == ("n1", {HBM: [A, B], DRAM: [A]})
        bitmaps = PositionMatch("n1", {HBM: b"\3", DRAM: b"\1"})
        assert await service.match_positions([A, B, C], False) == [bitmaps]
        (prefix,) = await service.match_prefix([A, B, C], None)
        assert (prefix.node, prefix.length) == ("n1", 2)
        assert service.hit_counts([A, C]) == [(A, 1)]
        assert service.list_blocks("n1", DRAM, 0, 10).hashes == [A]
        assert service.explain("n1", C).tiers == ()
        await service.revoke("n1", [B], HBM)
        service.clear_tier("n1", DRAM)
        service.clear_node("n1")
        assert await service.match([A, B], False) == []
        assert made.notes.take() == [
            ("reported", "n1", HBM, 2, True),
            ("reported", "ghost", HBM, 1, False),
            ("reported", "n1", DRAM, 1, True),
            ("matched", 3, 2),
            ("matched", 3, 2),
            ("revoked", "n1", HBM, 1),
            ("revoked", "n1", DRAM, None),
            ("revoked", "n1", None, None),
            ("matched", 2, 0),
        ]

    run(scenario())


@pytest.mark.parametrize("count", [8, 100])
def test_matched_hashes_are_counted_per_node(count: int) -> None:
    async def scenario() -> None:
        made = small()
        keys = KEYS[:count]
        await made.service.report("n1", keys, HBM)
        await made.service.report("n1", keys[::2], DRAM)
        await made.service.report("n2", keys, HBM)
        await made.service.report("n2", keys, DRAM)
        made.notes.take()
        await made.service.match(keys, False)
        await made.service.match_positions(keys, False)
        assert made.notes.take() == [("matched", count, 2 * count)] * 2
        (prefix, _) = await made.service.match_prefix(keys, None)
        assert prefix.length == count

    run(scenario())


def test_blocks_that_nodes_own() -> None:
    async def scenario() -> None:
        made = small()
        service = made.service
        made.register("n3", room=50)
        assert (await service.heartbeat(beat("n1", add(A)))).acked_seq == 1
        assert (await service.heartbeat(beat("ghost", add(A)))).status is NodeStatus.UNKNOWN
        assert (await service.heartbeat(beat("n1", add(B), seq=7))).request_full_sync
        made.notes.take()
        assert service.route_get("n2", [A, B], ()) == [GetRoute("n1", DRAM, 10, "n1.host:1"), None]
        assert service.route_get("n2", [B], (), batch=False) == [None]
        routes = service.route_put("n2", [A, B, C], [10, 10, 90], ())
        assert [(route.outcome, route.node_id) for route in routes] == [
            (PutOutcome.ALREADY_EXISTS, ""),
            (PutOutcome.ROUTED, "n3"),
            (PutOutcome.UNAVAILABLE, ""),
        ]
        service.route_put("n2", [B], [10], (), batch=False)
        service.route_get("n2", [A], (), batch=False)
        assert service.lookup([A, B], "n2") == [True, False]
        assert service.lookup([A]) == [True]
        assert made.notes.take() == [
            ("routed", "batch_route_get", "n2", 1),
            ("routed", "batch_route_put", "n2", 1),
            ("routed", "route_put", "n2", 1),
            ("routed", "route_get", "n2", 1),
            ("routed", "lookup", "n2", 2),
        ]

    run(scenario())


def test_large_batches_of_routes() -> None:
    async def scenario() -> None:
        made = master(slices=Slices(keys=8))
        made.register("n1", room=1000)
        service = made.service
        await service.heartbeat(beat("n1", *map(add, KEYS[:50])))
        made.notes.take()
        gets = asyncio.ensure_future(service.batch_route_get("n1", KEYS, ()))
        await turns(2)
        assert not gets.done()
        assert await gets == service.route_get("n1", KEYS, ())
        puts = await service.batch_route_put("n1", KEYS, [10] * 100, ())
        assert puts == service.route_put("n1", KEYS, [10] * 100, ())
        assert await service.batch_lookup(KEYS, "n1") == service.lookup(KEYS)
        assert made.notes.take() == [
            ("routed", "batch_route_get", "n1", 50),
            ("routed", "batch_route_get", "n1", 50),
            ("routed", "batch_route_put", "n1", 50),
            ("routed", "batch_route_put", "n1", 50),
            ("routed", "lookup", "n1", 100),
        ]

    run(scenario())


def test_heartbeats_and_metrics_are_told() -> None:
    async def scenario() -> None:
        made = small()
        await made.service.heartbeat(beat("n1", add(A), add(B)))
        await made.service.heartbeat(beat("n1", add(A), seq=9))
        await made.service.heartbeat(beat("ghost"))
        sample = MetricSample("name", "help", (), 1.0)
        made.service.report_metrics("n1", [sample])
        made.service.report_metrics("ghost", [sample, sample])
        assert made.notes.take() == [
            ("heartbeat", "n1", 2, False),
            ("heartbeat", "n1", 1, True),
            ("metrics", "n1", ("rack=3",), 1),
            ("metrics", "ghost", (), 2),
        ]

    run(scenario())


def test_nodes_come_and_go() -> None:
    async def scenario() -> None:
        made = master()
        made.register("n1")
        assert made.service.peer_address("n1") == "n1.host:1"
        assert [info.node_id for info in made.service.list_nodes()] == ["n1"]
        info = made.service.node("n1")
        assert info is not None
        assert info.status is NodeStatus.ALIVE
        made.service.unregister("n1")
        made.service.unregister("n1")
        assert made.service.node("n1") is None
        assert made.notes.take() == [("changed", "n1"), ("gone", "n1")]

    run(scenario())


def test_a_node_that_comes_back_is_told_of() -> None:
    async def scenario() -> None:
        made = master(QUICK)
        made.register("n1", "n2", "n3", incarnation=5)
        made.clock.now += 1
        made.service.state.tick(made.clock.now)
        made.notes.take()
        await made.service.heartbeat(beat("n1"))
        made.service.probe("n2", 5, 0)
        await made.service.apply_batch("n3", Batch(5, 1, []))
        for node in ("n1", "n2", "n3"):
            assert made.notes.notes.count(("changed", node)) == 1
        made.notes.take()
        await made.service.heartbeat(beat("n1"))
        made.service.probe("n2", 5, 0)
        assert made.notes.take() == [("heartbeat", "n1", 0, True)]

    run(scenario())


# What is kept.


def test_nodes_are_kept_for_the_next_master() -> None:
    async def scenario() -> None:
        first = master()
        first.register("n1", "n2")
        first.service.unregister("n2")
        second = master(store=first.store)
        assert second.service.restore() == 1
        assert second.notes.take() == [("changed", "n1")]
        assert second.service.peer_address("n1") == "n1.host:1"
        second.service.register(Registration("n1", "n1.host"))
        assert second.store.records["n1"].peer_address == "n1.host:1"

    run(scenario())


# Following.


def test_changes_are_told_as_they_come() -> None:
    async def scenario() -> None:
        made = small()
        service = made.service
        snapshot = service.snapshot()
        followed = []

        async def follow() -> None:
            async with aclosing(service.subscribe(snapshot.incarnation, snapshot.cursor, 1)) as pages:
                async for page in pages:
                    followed.extend((change.kind.name, change.node, change.hashes) for change in page.changes)
                    if len(followed) == 5:
                        return

        task = asyncio.ensure_future(follow())
        await turns(2)
        await service.report("n1", [A, B], HBM)
        await turns(3)
        assert followed == [("REPORTED", "n1", (A, B))]
        await service.revoke("n1", [A], HBM)
        await service.apply_batch("n2", Batch(5, 1, [Action(ActionKind.REPORT, HBM, [C])]))
        service.clear_tier("n1", HBM)
        service.unregister("n2")
        await task
        assert [kind for kind, _, _ in followed] == ["REPORTED", "REVOKED", "REPORTED", "CLEARED", "CLEARED"]

    run(scenario())


CHANGES: dict[str, Callable[[MasterService], object]] = {
    "report": lambda service: service.report("n1", [B], HBM),
    "revoke": lambda service: service.revoke("n1", [A], HBM),
    "clear a tier": lambda service: service.clear_tier("n1", HBM),
    "clear a node": lambda service: service.clear_node("n1"),
    "unregister": lambda service: service.unregister("n1"),
    "begin a life": lambda service: service.register(Registration("n1", incarnation=6)),
    "batch": lambda service: service.apply_batch("n1", Batch(5, 1, [Action(ActionKind.REPORT, HBM, [B])])),
}


@pytest.mark.parametrize("change", CHANGES)
def test_whatever_changes_is_told_at_once(change: str) -> None:
    async def scenario() -> None:
        made = small()
        await made.service.report("n1", [A], HBM)
        waiting = asyncio.ensure_future(made.service.changed())
        await turns(1)
        assert not waiting.done()
        done = CHANGES[change](made.service)
        if inspect.isawaitable(done):
            await done
        await turns(1)
        assert waiting.done()

    run(scenario())


def test_who_missed_changes_is_told_once() -> None:
    async def scenario() -> None:
        made = small()
        pages = [page async for page in made.service.subscribe(99, 0)]
        assert [(page.lost, page.changes) for page in pages] == [(True, [])]

    run(scenario())


def test_who_stops_waiting_is_forgotten() -> None:
    async def scenario() -> None:
        made = small()
        waiting = asyncio.ensure_future(made.service.changed())
        going = asyncio.ensure_future(made.service.changed())
        await turns(1)
        going.cancel()
        await made.service.report("n1", [A], HBM)
        await waiting
        with pytest.raises(asyncio.CancelledError):
            await going

    run(scenario())
