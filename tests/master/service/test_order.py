"""Changes of one node keep their order, callers may go, and nobody sees half of anything."""

from __future__ import annotations

import asyncio

import pytest

from tests.master.service.kit import DRAM, HBM, KEYS, A, B, add, beat, run, small, turns
from umbp_core.errors import InvalidRequest
from umbp_core.index_gate import Action, ActionKind, Batch, Verdict


async def ended(tasks: list[asyncio.Task[object]]) -> list[object]:
    return list(await asyncio.gather(*tasks))


# Order.


def test_changes_of_a_node_keep_their_order() -> None:
    async def scenario() -> None:
        made = small()
        service = made.service
        calls = [
            service.report("n1", KEYS, HBM),
            service.revoke("n1", KEYS[:50], HBM),
            service.report("n1", KEYS[:1], HBM),
            service.report("n2", KEYS[:1], HBM),
        ]
        tasks: list[asyncio.Task[object]] = [asyncio.ensure_future(call) for call in calls]
        await turns(1)
        assert (made.held("n1"), made.held("n2")) == (0, 1)
        await ended(tasks)
        assert made.held("n1") == 51
        await service.revoke("n1", KEYS, HBM)
        assert made.held("n1") == 0

    run(scenario())


def test_a_small_change_is_made_at_once() -> None:
    async def scenario() -> None:
        made = small()
        call = made.service.report("n1", KEYS[:8], HBM)
        with pytest.raises(StopIteration):
            call.send(None)
        assert made.held() == 8

    run(scenario())


def test_others_are_served_between_the_steps_of_a_large_change() -> None:
    async def scenario() -> None:
        made = small()
        task = asyncio.ensure_future(made.service.report("n1", KEYS, HBM))
        seen = set()
        while not task.done():
            seen.add(len(made.service.match_now(KEYS[:8] + KEYS[-8:], False)))
            seen.add(made.held())
            await turns(1)
        assert {8, 16, 80} <= seen
        assert made.held() == 100

    run(scenario())


def test_a_change_whose_caller_is_gone_is_made_to_its_end() -> None:
    async def scenario() -> None:
        made = small()
        first = asyncio.ensure_future(made.service.report("n1", KEYS, HBM))
        second = asyncio.ensure_future(made.service.revoke("n1", KEYS[:10], HBM))
        await turns(3)
        assert 0 < made.held() < 100
        first.cancel()
        second.cancel()
        await made.service.report("n1", [A], HBM)
        assert made.held() == 91
        assert first.cancelled()

    run(scenario())


@pytest.mark.parametrize("clear", ["tier", "node", "unregister"])
def test_a_clear_comes_after_what_was_called_for_before_it(clear: str) -> None:
    async def scenario() -> None:
        made = small()
        tasks: list[asyncio.Task[object]] = [
            asyncio.ensure_future(made.service.report("n1", KEYS, HBM)),
            asyncio.ensure_future(made.service.report("n1", [A], HBM)),
        ]
        await turns(3)
        assert made.held() > 0
        calls = {
            "tier": lambda: made.service.clear_tier("n1", HBM),
            "node": lambda: made.service.clear_node("n1"),
            "unregister": lambda: made.service.unregister("n1"),
        }
        calls[clear]()
        assert made.held() == 0
        assert await ended(tasks) == [True, True]
        assert made.held() == 0
        if clear != "unregister":
            await made.service.report("n1", [B], HBM)
            assert made.held() == 1

    run(scenario())


def test_a_change_that_is_refused_holds_nobody_up() -> None:
    async def scenario() -> None:
        made = small()
        many = [add(b"%d" % tier, tier) for tier in range(40)]
        task = asyncio.ensure_future(made.service.heartbeat(beat("n1", *many)))
        await turns(1)
        after = asyncio.ensure_future(made.service.report("n1", [A], HBM))
        with pytest.raises(InvalidRequest, match="more than 32 tiers"):
            await task
        assert await after
        with pytest.raises(InvalidRequest, match="hashes must not be empty"):
            await made.service.report("n1", [], HBM)

    run(scenario())


def test_a_large_batch() -> None:
    async def scenario() -> None:
        made = small()
        batch = Batch(5, 1, [Action(ActionKind.REPORT, HBM, KEYS), Action(ActionKind.CLEAR, DRAM)])
        task = asyncio.ensure_future(made.service.apply_batch("n1", batch))
        await turns(3)
        assert 0 < made.held() < 100
        assert made.service.probe("n1", 5, 0).acked == 0
        assert (await task).verdict is Verdict.APPLY
        assert made.held() == 100
        assert (await made.service.apply_batch("n1", batch)).verdict is Verdict.REPLAY

    run(scenario())


# Nobody sees half of anything.


def test_readers_see_a_full_sync_as_a_whole() -> None:
    async def scenario() -> None:
        made = small()
        service = made.service
        old, new = KEYS[:50], KEYS[50:]
        await service.heartbeat(beat("n1", *map(add, old), full_sync=True))
        seen = set()
        for seq, keys in enumerate((new, old, new, old), start=2):
            task = asyncio.ensure_future(service.heartbeat(beat("n1", *map(add, keys), seq=seq, full_sync=True)))
            while not task.done():
                found = service.lookup(KEYS)
                seen.add((all(found[:50]), any(found[:50]), all(found[50:]), any(found[50:])))
                routes = service.route_get("n2", KEYS, ())
                assert sum(route is not None for route in routes) == 50
                await turns(1)
        assert seen == {(True, True, False, False), (False, False, True, True)}

    run(scenario())


def test_long_questions_see_a_cleared_node_wholly_or_not_at_all() -> None:
    async def scenario() -> None:
        made = small()
        service = made.service
        answers = set()
        for wait in range(20):
            await service.report("n1", KEYS, HBM)
            await service.report("n2", KEYS, HBM)
            match = asyncio.ensure_future(service.match(KEYS, False))
            positions = asyncio.ensure_future(service.match_positions(KEYS, False))
            prefix = asyncio.ensure_future(service.match_prefix(KEYS, None))
            await turns(wait)
            service.clear_node("n1")
            by_hash = {found.node: len(found.tiers[HBM]) for found in await match}
            by_position = {found.node: found.matched() for found in await positions}
            lengths = {found.node: found.length for found in await prefix}
            for answer in (by_hash, by_position, lengths):
                assert answer in ({"n2": 100}, {"n1": 100, "n2": 100})
                answers.add(len(answer))
        assert answers == {1, 2}

    run(scenario())


def test_writers_and_readers_side_by_side() -> None:
    async def scenario() -> None:
        made = small()
        service = made.service
        stop = False

        async def read() -> None:
            while not stop:
                for match in await service.match(KEYS, True):
                    assert match.tiers[HBM] == sorted(match.tiers[HBM])
                    assert set(match.tiers[HBM]) <= set(KEYS)
                await turns(1)

        async def write(node: str) -> None:
            for _ in range(20):
                await service.report(node, KEYS, HBM)
                await service.revoke(node, KEYS[::2], HBM)
                assert made.held(node) == 50
                service.clear_node(node)
                assert made.held(node) == 0

        readers = [asyncio.ensure_future(read()) for _ in range(3)]
        await asyncio.gather(write("n1"), write("n2"))
        stop = True
        await asyncio.gather(*readers)
        service.state.sweep(10**6)
        assert service.state.index.stats().keys == 0

    run(scenario())


def test_of_two_heartbeats_with_one_number_one_is_applied() -> None:
    async def scenario() -> None:
        made = small()
        first, second = (beat("n1", *(add(key, size=size) for key in KEYS)) for size in (1, 2))
        replies = await asyncio.gather(made.service.heartbeat(first), made.service.heartbeat(second))
        assert [reply.acked_seq for reply in replies] == [1, 1]
        routes = made.service.route_get("n2", KEYS, ())
        assert {route.size for route in routes if route is not None} == {1}

    run(scenario())


def test_hits_of_many_readers_are_all_counted() -> None:
    async def scenario() -> None:
        made = small()
        await made.service.report("n1", KEYS, HBM)
        await asyncio.gather(*(made.service.match(KEYS[: 5 + 95 * (number % 2)], True) for number in range(500)))
        assert made.service.hit_counts([KEYS[0], KEYS[-1]]) == [(KEYS[0], 500), (KEYS[-1], 250)]

    run(scenario())


def test_nobody_is_sent_to_a_node_that_went() -> None:
    async def scenario() -> None:
        made = small()
        service = made.service
        going = True

        async def come_and_go() -> None:
            for _ in range(30):
                await service.heartbeat(beat("n1", *map(add, KEYS), full_sync=True))
                service.unregister("n1")
                made.register("n1")

        async def read() -> int:
            found = 0
            while going:
                routes = [route for route in await service.batch_route_get("n2", KEYS[:20], ()) if route is not None]
                assert all(route.peer_address == "n1.host:1" for route in routes)
                found += len(routes)
                await turns(1)
            return found

        reader = asyncio.ensure_future(read())
        await come_and_go()
        await service.heartbeat(beat("n1", *map(add, KEYS), full_sync=True))
        await turns(3)
        going = False
        assert await reader > 0

    run(scenario())
