"""Routing over UMBP's wire: outcomes, columns, references and refusals."""

import asyncio
from typing import Any

import grpc
import pytest

from tests.master.grpc.harness import DRAM, HBM, SSD, RunningMaster, Stub, message

INVALID = grpc.StatusCode.INVALID_ARGUMENT
UNAVAILABLE, ROUTED, ALREADY_EXISTS = 0, 1, 2


def room(tier: int, total: int) -> Any:
    return message("TierCapacity")(tier=tier, total_capacity_bytes=total, available_capacity_bytes=total)


def holds(call: Stub, node: str, *blocks: tuple[str, int, int]) -> None:
    events = [message("KvEvent")(key=key, tier=tier, size=size) for key, tier, size in blocks]
    bundles = [message("EventBundle")(seq=1, events=events)]
    assert call("Heartbeat", node_id=node, bundles=bundles).acked_seq == 1


def register(call: Stub, node: str, address: str, *capacities: Any) -> None:
    call("RegisterClient", node_id=node, peer_address=address, tier_capacities=capacities)


def entry(answer: Any) -> tuple[int, str, int, str]:
    return answer.outcome, answer.node_id, answer.tier, answer.peer_address


def test_empty_keys_are_refused_one_by_one_only(call: Stub) -> None:
    assert call.error("RoutePut", key="") == (INVALID, "key cannot be empty")
    assert call.error("RouteGet", key="") == (INVALID, "key cannot be empty")
    assert list(call("BatchRouteGet", keys=[""]).node_ref) == [0]
    assert [entry.outcome for entry in call("BatchRoutePut", keys=[""], block_sizes=[1]).entries] == [UNAVAILABLE]
    assert list(call("BatchLookup", keys=["", "k"]).found) == [False, False]


def test_keys_and_sizes_have_the_same_length(call: Stub) -> None:
    code, details = call.error("BatchRoutePut", keys=["a", "b"], block_sizes=[1])
    assert code is INVALID
    assert details.startswith("keys and block_sizes must have the same length")


def test_put_goes_to_hbm_then_dram_and_never_to_ssd(call: Stub) -> None:
    register(call, "fast", "f:1", room(HBM, 10))
    register(call, "large", "l:1", room(DRAM, 100), room(SSD, 10_000))
    assert entry(call("RoutePut", key="k", node_id="x", block_size=10)) == (ROUTED, "fast", HBM, "f:1")
    assert entry(call("RoutePut", key="k", node_id="x", block_size=11)) == (ROUTED, "large", DRAM, "l:1")
    assert entry(call("RoutePut", key="k", node_id="x", block_size=101)) == (UNAVAILABLE, "", 0, "")
    assert entry(call("RoutePut", key="k", block_size=10, exclude_nodes=["fast"]))[1] == "large"
    assert entry(call("RoutePut", key="k", block_size=0))[0] == ROUTED


def test_what_somebody_holds_is_not_put_again(call: Stub) -> None:
    register(call, "n", "n:1", room(DRAM, 100))
    holds(call, "n", ("held", DRAM, 10))
    assert entry(call("RoutePut", key="held", block_size=10)) == (ALREADY_EXISTS, "", 0, "")
    answer = call("BatchRoutePut", node_id="x", keys=["new", "held", "too large"], block_sizes=[10, 10, 1000])
    assert [entry(part) for part in answer.entries] == [
        (ROUTED, "n", DRAM, "n:1"),
        (ALREADY_EXISTS, "", 0, ""),
        (UNAVAILABLE, "", 0, ""),
    ]


def test_one_batch_sees_the_room_that_it_takes(call: Stub) -> None:
    register(call, "a", "a:1", room(DRAM, 100))
    register(call, "b", "b:1", room(DRAM, 90))
    keys = [f"k{number}" for number in range(5)]
    for _ in range(2):  # the projection of one batch is not kept for the next
        answer = call("BatchRoutePut", keys=keys, block_sizes=[40] * 5)
        nodes = [part.node_id for part in answer.entries]
        assert sorted(nodes) == ["", "a", "a", "b", "b"]


def test_observed_columns_of_batch_route_get(call: Stub) -> None:
    register(call, "hb", "10.0.0.9:1")
    holds(call, "hb", ("k1", DRAM, 10), ("k3", SSD, 5))
    answer = call("BatchRouteGet", node_id="x", keys=["k1", "nobody", "k3"])
    assert [(node.node_id, node.peer_address) for node in answer.nodes] == [("hb", "10.0.0.9:1")]
    assert (list(answer.node_ref), list(answer.tier), list(answer.size)) == ([1, 0, 1], [DRAM, 0, SSD], [10, 0, 5])
    assert answer.ByteSize() == 33


def test_nodes_are_named_once_in_the_columns(call: Stub) -> None:
    register(call, "a", "a:1")
    register(call, "b", "b:1")
    holds(call, "a", ("k1", DRAM, 1), ("k2", DRAM, 2))
    holds(call, "b", ("k3", HBM, 3))
    answer = call("BatchRouteGet", keys=["k3", "k1", "k2", "k3"])
    names = [node.node_id for node in answer.nodes]
    assert sorted(names) == ["a", "b"]
    assert [names[ref - 1] for ref in answer.node_ref] == ["b", "a", "a", "b"]
    assert list(answer.size) == [3, 1, 2, 3]
    assert list(call("BatchRouteGet", keys=["k1", "k3"], exclude_nodes=["a"]).node_ref) == [0, 1]
    assert call("BatchRouteGet").ByteSize() == 0


def test_get_prefers_the_fastest_tier_and_there_the_requester(call: Stub) -> None:
    for node, tier in (("a", DRAM), ("b", HBM), ("c", HBM)):
        register(call, node, f"{node}:1")
        holds(call, node, ("k", tier, 1))
    for requester, wanted in (("b", {"b"}), ("c", {"c"}), ("a", {"b", "c"})):
        answer = call("RouteGet", key="k", node_id=requester)
        assert answer.node_id in wanted
        assert answer.tier == HBM
        assert answer.peer_address == f"{answer.node_id}:1"
    assert call("RouteGet", key="k", exclude_nodes=["b", "c"]).node_id == "a"
    assert not call("RouteGet", key="nobody").found


def test_lookups_are_free_of_side_effects_and_in_order(master: RunningMaster, call: Stub) -> None:
    register(call, "n", "n:1")
    holds(call, "n", ("k1", DRAM, 1), ("k2", DRAM, 1))
    assert list(call("BatchLookup", keys=["k2", "x", "k1", "k2"]).found) == [True, False, True, True]
    transport = master.transport()
    assert transport.lookup([b"x", b"k1"], 5) == [False, True]


@pytest.mark.parametrize("count", [0, 1, 9000])
def test_batches_of_any_size_keep_their_order(call: Stub, count: int) -> None:
    register(call, "n", "n:1", room(DRAM, 1 << 40))
    keys = [f"k{number}" for number in range(count)]
    holds(call, "n", *((key, DRAM, number) for number, key in enumerate(keys)))
    got = call("BatchRouteGet", keys=keys)
    assert list(got.size) == list(range(count))
    assert list(call("BatchLookup", keys=keys).found) == [True] * count
    put = call("BatchRoutePut", keys=[f"new {key}" for key in keys], block_sizes=[1] * count)
    assert [part.outcome for part in put.entries] == [ROUTED] * count


def test_a_large_batch_of_puts_lets_others_in(
    master: RunningMaster, call: Stub, monkeypatch: pytest.MonkeyPatch
) -> None:
    register(call, "n", "n:1", room(DRAM, 1 << 40))
    steps_of = master.state.route_put_steps
    turns: list[int] = []
    turn = 0

    def watched(*arguments: Any) -> Any:
        steps = steps_of(*arguments)

        def each() -> Any:
            while True:
                try:
                    next(steps)
                except StopIteration as stop:
                    return stop.value
                turns.append(turn)
                yield

        return each()

    def count() -> None:
        nonlocal turn, handle
        turn += 1
        handle = loop.call_soon(count)

    monkeypatch.setattr(master.state, "route_put_steps", watched)
    loop = master.tell(asyncio.get_running_loop)
    handle = master.tell(lambda: loop.call_soon(count))
    keys = [str(number) for number in range(10_000)]
    assert [entry.outcome for entry in call("BatchRoutePut", keys=keys, block_sizes=[1] * 10_000).entries] == [
        ROUTED
    ] * 10_000
    master.tell(lambda: handle.cancel())
    assert len(turns) > 10
    assert len(set(turns)) == len(turns), "two steps in one turn of the loop"


def test_an_answer_that_fits_no_message_is_refused_with_a_sentence(call: Stub) -> None:
    name = "n" * 8192
    keys = [str(number) for number in range(8500)]
    register(call, name, "n:1", room(DRAM, len(keys)))
    code, details = call.error("BatchRoutePut", keys=keys, block_sizes=[1] * len(keys))
    assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "at once" in details
    assert len(call("BatchRoutePut", keys=keys[:2], block_sizes=[1, 1]).entries) == 2
