"""What the service does between calls."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace

import pytest

from tests.master.service.kit import (
    DRAM,
    HBM,
    QUICK,
    A,
    B,
    Master,
    MemoryStore,
    Peers,
    add,
    beat,
    master,
    run,
    turns,
)
from umbp_core.index_gate import Action, ActionKind, Batch
from umbp_core.master.model import ClientRecord, NodeStatus, Registration, TierCapacity


@asynccontextmanager
async def kept(made: Master) -> AsyncIterator[asyncio.Task[None]]:
    task = asyncio.ensure_future(made.service.run_housekeeping())
    try:
        yield task
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


def test_silent_nodes_expire() -> None:
    async def scenario() -> None:
        made = master(QUICK)
        made.register("n1")
        await made.service.report("n1", [A], HBM)
        async with kept(made):
            change = asyncio.ensure_future(made.service.changed())
            await turns(1)
            made.clock.now += 0.4
            await made.notes.wait("gone", "n1")
            await change
        info = made.service.node("n1")
        assert info is not None
        assert info.status is NodeStatus.EXPIRED
        assert made.held() == 0
        assert "n1" in made.store.records

    run(scenario())


def test_nodes_that_are_forgotten_are_not_kept() -> None:
    class Deletions(MemoryStore):
        def delete(self, node_id: str) -> None:
            super().delete(node_id)
            deleted.set()

    deleted = asyncio.Event()

    async def scenario() -> None:
        made = master(replace(QUICK, expired_retention=0.5), store=Deletions())
        made.register("n1")
        async with kept(made):
            made.clock.now += 0.4
            await made.notes.wait("gone", "n1")
            made.clock.now += 0.4
            await deleted.wait()
        assert made.store.records == {}
        assert made.service.node("n1") is None

    run(scenario())


def test_nobody_expires_because_the_master_stood_still() -> None:
    async def scenario() -> None:
        made = master(QUICK, evictions=(peers := Peers()))
        made.register("n1", "n2", room=0)
        await made.service.heartbeat(beat("n2", add(A)))
        async with kept(made):
            await peers.asked.wait()
            peers.asked.clear()
            peers.answer.set()
            await turns(10)
            made.clock.now += 100
            await peers.asked.wait()  # the next round: the jump was seen
            assert made.service.state.is_alive("n1")
            made.clock.now += 0.4
            await made.notes.wait("gone", "n1")

    run(scenario())


def test_nor_because_it_stood_still_while_it_freed_memory() -> None:
    async def scenario() -> None:
        made = master(QUICK)
        made.register("n1", "n2")
        await made.service.report("n1", [b"%d" % number for number in range(50_000)], HBM)
        async with kept(made):
            made.service.clear_node("n1")
            while made.service.state.sweep(0) > 40_000:
                await turns(1)
            made.clock.now += 100
            while made.service.state.sweep(0):
                await turns(1)
            await asyncio.sleep(0.02)
            assert made.service.state.is_alive("n2")
            made.clock.now += 0.4
            await made.notes.wait("gone", "n2")

    run(scenario())


def everything_again(made: Master) -> object:
    return made.service.heartbeat(beat("n1", add(A), seq=9, full_sync=True))


def a_clearing_batch(made: Master) -> object:
    return made.service.apply_batch("n1", Batch(5, 1, [Action(ActionKind.CLEAR, HBM)]))


@pytest.mark.parametrize(
    "clear",
    [
        lambda made: made.service.clear_node("n1"),
        lambda made: made.service.clear_tier("n1", HBM),
        lambda made: made.service.unregister("n1"),
        lambda made: made.register("n1", incarnation=6),
        a_clearing_batch,
        everything_again,
    ],
)
def test_what_was_cleared_is_freed_at_once(clear: Callable[[Master], object]) -> None:
    async def scenario() -> None:
        made = master()
        made.register("n1", incarnation=5)
        keys = [b"%d" % number for number in range(10_000)]
        await made.service.report("n1", keys, HBM)
        await made.service.heartbeat(beat("n1", *map(add, keys)))
        async with kept(made):
            await turns(5)
            done = clear(made)
            if inspect.isawaitable(done):
                await done
            assert made.service.state.sweep(0) >= 10_000
            await turns(30)  # one slice in a turn, and far less than the second between two ticks
            assert made.service.state.sweep(0) == 0

    run(scenario())


def test_old_hit_counters_are_forgotten() -> None:
    async def scenario() -> None:
        made = master(replace(QUICK, heartbeat_ttl=1000.0, hit_ttl=0.5, hit_gc_interval=0.6))
        made.register("n1")
        keys = [b"%d" % number for number in range(20_000)]
        await made.service.report("n1", keys, HBM)
        await made.service.match(keys, True)
        async with kept(made):
            await turns(3)
            made.clock.now += 0.55
            await asyncio.sleep(0.01)
            assert len(made.service.state.index.hits) == 20_000
            made.clock.now += 0.55
            while len(made.service.state.index.hits):
                await turns(1)

    run(scenario())


def test_peers_are_asked_to_evict_one_order_at_a_time() -> None:
    async def scenario() -> None:
        peers = Peers()
        made = master(replace(QUICK, heartbeat_ttl=1000.0, eviction_interval=0.01), evictions=peers)
        made.register("n1", "n2")
        for node in ("n1", "n2"):
            await made.service.heartbeat(beat(node, *(add(b"%d" % number) for number in range(10))))
        async with kept(made):
            while len(peers.orders) < 2:
                await peers.asked.wait()
                peers.asked.clear()
            for _ in range(5):
                made.clock.now += 0.5
                await asyncio.sleep(0.005)
            assert [(order.node_id, len(order.keys), order.nbytes) for order in peers.orders] == [
                ("n1", 3, 30),
                ("n2", 3, 30),
            ]
            peers.answer.set()
            while peers.answered < 4:
                made.clock.now += 0.5
                await asyncio.sleep(0.001)
        assert made.service.lookup([b"0"]) == [True]

    run(scenario())


def test_without_a_sender_nobody_is_asked() -> None:
    async def scenario() -> None:
        made = master(replace(QUICK, eviction_interval=0.01))
        made.register("n1")
        await made.service.heartbeat(beat("n1", add(A)))
        async with kept(made):
            made.clock.now += 0.4
            await made.notes.wait("gone", "n1")
        assert made.service.lookup([A]) == [False]
        assert [node.status for node in made.service.list_nodes()] == [NodeStatus.EXPIRED]

    run(scenario())


def test_the_end_ends_what_is_under_way() -> None:
    async def scenario() -> None:
        peers = Peers()
        made = master(QUICK, evictions=peers)
        made.register("n1")
        await made.service.heartbeat(beat("n1", add(A), add(B)))
        before = asyncio.all_tasks()
        async with kept(made) as task:
            await peers.asked.wait()
        assert task.cancelled()
        assert peers.answered == 0
        assert asyncio.all_tasks() == before

    run(scenario())


def test_what_an_earlier_master_knew_is_known_as_soon_as_it_can_be_read() -> None:
    """A node that registered without its address before is routable then, and kept with it."""

    async def scenario() -> None:
        made = master(QUICK)
        made.service.restore()
        made.service.register(Registration("n1", "host"))
        assert made.service.peer_address("n1") == ""
        made.store.late = [ClientRecord(name, "host", f"host:{name}", b"", (), 0, ()) for name in ("n1", "n2")]
        async with kept(made):
            await made.notes.wait("changed", "n2")
        assert [made.service.peer_address(name) for name in ("n1", "n2")] == ["host:n1", "host:n2"]
        assert made.store.records["n1"].peer_address == "host:n1"

    run(scenario())


def test_a_master_that_begins_again_lets_go_of_nodes_that_are_gone() -> None:
    async def scenario() -> None:
        record = ClientRecord("n1", "host", "host:1", b"", (), 0, (TierCapacity(DRAM, 1, 1),))
        made = master(QUICK, store=MemoryStore({"n1": record}))
        made.service.restore()
        async with kept(made):
            assert made.service.peer_address("n1") == "host:1"
            made.clock.now += 0.4
            await made.notes.wait("gone", "n1")
        assert made.service.peer_address("n1") == ""

    run(scenario())
