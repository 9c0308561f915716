"""Questions are answered in time, or with nothing (law L5)."""

from __future__ import annotations

import threading

import pytest

from tests.master.client.fake_network import GRPC, NATIVE, FakeNetwork
from umbp_connectors.client.addresses import MasterAddress
from umbp_connectors.client.dialects import Dialect
from umbp_connectors.client.queries import Queries
from umbp_core.breaker import Backoff, Breaker, BreakerState
from umbp_core.errors import InvalidRequest, MasterUnavailable
from umbp_core.index_match import PrefixMatch, TierRun
from umbp_core.master.model import ExternalMatch, Registration
from umbp_core.master.transport import MasterTransport

A, B, C = b"a", b"b", b"c"
HBM, DRAM = 1, 2
NOTHING: list[ExternalMatch] = []


class Asker:
    """Queries on a network; ``address`` is where the client has a master."""

    def __init__(self, network: FakeNetwork, address: MasterAddress | None = NATIVE) -> None:
        self.network = network
        self.address = address
        self.breaker = Breaker(lambda: 0.0, Backoff(first=1.0, ceiling=2.0), failures=1)
        self.queries = Queries(lambda: self.address, network.dial, self.breaker, network.clock)

    def match(self) -> list[ExternalMatch]:
        return self.queries.ask(lambda dialect, left: dialect.transport.match([A, B], False, left), NOTHING, 0.25)


def network() -> FakeNetwork:
    """With a node that holds A and B."""
    made = FakeNetwork()
    transport = made.dial(NATIVE, 1.0)
    transport.register(Registration("node", peer_address="peer:1"), 1.0)
    transport.report("node", [A, B], HBM, 1.0)
    transport.report("node", [B], DRAM, 1.0)
    return made


def test_an_answer_comes_over_a_connection_that_is_kept() -> None:
    asker = Asker(network())
    dials = asker.network.dials
    assert asker.match() == asker.match() == [ExternalMatch("node", "peer:1", {HBM: [A, B], DRAM: [B]})]
    assert asker.network.dials == dials + 1
    assert (asker.queries.questions, asker.queries.degraded) == (2, 0)


def test_without_a_master_nothing_is_tried() -> None:
    asker = Asker(network(), address=None)
    dials = asker.network.dials
    assert asker.match() == []
    assert (asker.network.dials, asker.queries.degraded, asker.breaker.state) == (dials, 1, BreakerState.CLOSED)


def test_a_failing_master_costs_one_deadline_and_then_a_trial_now_and_then() -> None:
    asker = Asker(network())
    asker.match()
    asker.network.partitioned = True
    began = asker.network.clock.now
    assert asker.match() == []
    assert asker.network.clock.now - began == pytest.approx(0.25)
    for _ in range(50):
        assert asker.match() == []
    assert asker.network.clock.now - began == pytest.approx(0.25)
    asker.network.clock.now += 1.0
    assert asker.match() == []
    assert asker.network.clock.now - began == pytest.approx(1.5)
    asker.network.partitioned = False
    asker.network.clock.now += 2.0
    assert len(asker.match()) == 1
    assert asker.queries.degraded == 52
    assert [transport.closed for transport in asker.network.transports[1:]] == [True, False]


def test_a_question_that_the_master_refuses_is_no_failure_of_the_master() -> None:
    asker = Asker(network())

    def question(dialect: Dialect, left: float) -> list[ExternalMatch]:
        raise InvalidRequest("too many")

    assert asker.queries.ask(question, NOTHING, 1.0) == []
    assert (asker.queries.degraded, asker.breaker.state) == (1, BreakerState.CLOSED)


def test_when_the_client_moves_so_do_the_questions() -> None:
    asker = Asker(network())
    asker.match()
    asker.address = GRPC
    assert len(asker.match()) == 1
    asker.network.native_door = False
    assert len(asker.match()) == 1


@pytest.mark.parametrize("address", [NATIVE, GRPC])
def test_of_many_nodes_the_best_are_named(address: MasterAddress) -> None:
    asker = Asker(network(), address)
    transport = asker.network.dial(NATIVE, 1.0)
    for name, held in (("short", [A]), ("long", [A, B, C])):
        transport.register(Registration(name), 1.0)
        transport.report(name, held, DRAM, 1.0)

    def named(limit: int) -> list[str]:
        found = asker.queries.ask(lambda dialect, left: dialect.match_prefix([A, B, C], None, left, limit), [], 1.0)
        return [match.node for match in found]

    assert [named(limit) for limit in (1, 2, 4, 0)] == [
        ["long"],
        ["long", "node"],
        ["long", "node", "short"],
        ["long", "node", "short"],
    ]


def test_a_prefix_is_worked_out_here_where_the_master_knows_no_such_question() -> None:
    def answers(address: MasterAddress) -> list[list[PrefixMatch]]:
        asker = Asker(network(), address)
        return [
            asker.queries.ask(lambda dialect, left, w=weights: dialect.match_prefix([A, B, C], w, left), [], 1.0)
            for weights in (None, {HBM: 2.0, DRAM: 1.0})
        ]

    assert answers(NATIVE) == answers(GRPC)
    assert [[match.runs for match in found] for found in answers(GRPC)] == [
        [[TierRun(HBM, 2)]],
        [[TierRun(HBM, 1), TierRun(DRAM, 1)]],
    ]


def test_after_the_close_there_are_no_answers() -> None:
    asker = Asker(network())
    asker.match()
    asker.queries.close()
    asker.queries.close()
    assert asker.match() == []


def test_while_one_caller_connects_another_waits_no_longer_than_it_may() -> None:
    net = network()
    connecting, go_on = threading.Event(), threading.Event()

    def slow(address: MasterAddress, timeout: float) -> MasterTransport:
        connecting.set()
        assert go_on.wait(10.0)
        raise MasterUnavailable("at last")

    queries = Queries(lambda: NATIVE, slow, Breaker(lambda: 0.0, failures=3), net.clock)
    first = threading.Thread(target=lambda: queries.ask(lambda dialect, left: 1, 0, 0.01), daemon=True)
    first.start()
    assert connecting.wait(10.0)
    assert queries.ask(lambda dialect, left: 1, 0, 0.01) == 0
    go_on.set()
    first.join(10.0)
    assert (first.is_alive(), queries.degraded) == (False, 2)


def test_callers_that_come_together_share_one_connection() -> None:
    net = network()
    queries = Queries(lambda: NATIVE, lambda to, t: slow(to, t), Breaker(lambda: 0.0), net.clock)
    dials = net.dials
    connecting, go_on, answers = threading.Event(), threading.Event(), []

    def slow(address: MasterAddress, timeout: float) -> MasterTransport:
        connecting.set()
        assert go_on.wait(10.0)
        return net.dial(address, timeout)

    def ask() -> None:
        answers.append(queries.ask(lambda dialect, left: dialect.transport.match([A], False, left), NOTHING, 10.0))

    threads = [threading.Thread(target=ask, daemon=True) for _ in range(4)]
    for thread in threads:
        thread.start()
    assert connecting.wait(10.0)
    threads[1].join(0.05)
    assert all(thread.is_alive() for thread in threads)
    go_on.set()
    for thread in threads:
        thread.join(10.0)
    assert [len(answer) for answer in answers] == [1, 1, 1, 1]
    assert net.dials == dials + 1


def test_a_connection_that_is_made_during_the_close_is_closed() -> None:
    net = network()

    def dial(address: MasterAddress, timeout: float) -> MasterTransport:
        queries.close()
        return net.dial(address, timeout)

    queries = Queries(lambda: NATIVE, dial, Breaker(lambda: 0.0), net.clock)
    assert queries.ask(lambda dialect, left: dialect.transport.match([A], False, left), NOTHING, 1.0) == []
    assert net.transports[-1].closed
