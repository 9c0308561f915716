"""The client with its thread, against masters that are not there, do not answer, or misbehave (laws L4 and L5)."""

from __future__ import annotations

import logging
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace

import pytest

from tests.connectors.waiting import eventually
from tests.master.client.fake_network import NATIVE, FakeNetwork
from umbp_connectors.client.addresses import MasterAddress
from umbp_connectors.client.master_client import MasterClient
from umbp_connectors.client.settings import ClientSettings
from umbp_core.breaker import Backoff, BreakerState
from umbp_core.errors import ConfigError
from umbp_core.journal import Delta
from umbp_core.master.model import PutOutcome, PutRoute, Registration, TierCapacity
from umbp_core.master.samples import GaugeValue, MetricSample
from umbp_core.master.transport import MasterTransport

A, B, C = b"a", b"b", b"c"
HBM, DRAM = 1, 2
PATIENCE = 60.0
NODE = Registration("node", peer_address="peer:1")
SOON = ClientSettings(
    flush_interval=0.001, query_timeout=PATIENCE, close_timeout=PATIENCE, backoff=Backoff(first=0.01, ceiling=0.02)
)


class RealTimeNetwork(FakeNetwork):
    """The fake network with the real clock; a lost call fails at once."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.clock.now = 0.0
        self.gate = threading.Lock()

    def dial(self, address: MasterAddress, timeout: float) -> MasterTransport:
        with self.gate:
            return super().dial(address, timeout)


def client_of(network: FakeNetwork, **options: object) -> MasterClient:
    return MasterClient([NATIVE], NODE, settings=SOON, dial=network.dial, **options)  # type: ignore[arg-type]


@pytest.fixture
def network() -> FakeNetwork:
    return RealTimeNetwork()


def test_what_is_told_is_known_after_a_flush(network: FakeNetwork) -> None:
    held = [(HBM, [A, B])]
    with closing(client_of(network, snapshot=lambda: held, blocks=lambda: [Delta(C, DRAM, 7)])) as client:
        client.start()
        client.start()
        assert client.flush(PATIENCE)
        assert network.external("node") == {(HBM, A), (HBM, B)}
        client.report([C], HBM)
        client.revoke([A], HBM)
        client.report([A], DRAM)
        client.clear(DRAM)
        client.record([Delta(C, DRAM, None), Delta(A, DRAM, 5)])
        client.set_capacities([TierCapacity(DRAM, 10, 4)])
        assert client.flush(PATIENCE)
        assert network.external("node") == {(HBM, B), (HBM, C)}
        assert network.owned("node") == {(A, DRAM): 5}
        stats = client.stats()
        assert (stats.registered, stats.native, stats.address) == (True, True, str(NATIVE))
        assert (stats.waiting, stats.overflows, stats.failures) == (0, 0, 0)
    assert network.state.list_nodes(0.0) == []


def test_questions_are_answered(network: FakeNetwork) -> None:
    with closing(client_of(network, blocks=lambda: [Delta(A, DRAM, 7)])) as client:
        client.start()
        client.set_capacities([TierCapacity(DRAM, 100, 100)])
        client.report([A, B], HBM)
        assert client.flush(PATIENCE)
        assert [match.tiers for match in client.match([A, B, C], count_as_hit=True)] == [{HBM: [A, B]}]
        assert [match.length for match in client.match_prefix([A, B, C])] == [2]
        assert [match.length for match in client.match_prefix([A, B, C], limit=1)] == [2]
        assert client.hit_counts([A, C, A, B]) == [(A, 1), (B, 1)]
        assert client.hit_counts([b"%d" % number for number in range(5000)]) == []
        assert client.lookup([A, B]) == [True, False]
        assert [route.outcome for route in client.route_put([B], [5])] == [PutOutcome.ROUTED]
        assert [route and route.peer_address for route in client.route_get([A, B])] == ["peer:1", None]
        assert client.report_metrics([MetricSample("x", GaugeValue(1.0))])
        assert client.stats().degraded == 0


def test_without_a_master_questions_are_answered_with_nothing_and_counted() -> None:
    client = MasterClient([NATIVE], NODE)
    assert client.match([A]) == []
    assert client.match_prefix([A]) == []
    assert client.hit_counts([A]) == []
    assert client.lookup([A, B]) == [False, False]
    assert client.route_put([A], [1]) == [PutRoute(PutOutcome.UNAVAILABLE)]
    assert client.route_get([A]) == [None]
    assert not client.report_metrics([])
    assert not client.flush(PATIENCE)
    assert (client.stats().questions, client.stats().degraded) == (7, 7)
    assert client.close()


def test_a_client_needs_addresses_that_it_understands() -> None:
    with pytest.raises(ConfigError, match="unknown scheme"):
        MasterClient("http://master:1", NODE)


def test_a_closed_client_takes_nothing_and_stays_closed(network: FakeNetwork) -> None:
    client = client_of(network)
    client.start()
    assert client.flush(PATIENCE)
    assert client.close()
    assert client.close()
    client.start()
    client.report([A], HBM)
    client.revoke([A], HBM)
    client.clear(HBM)
    client.record([Delta(A, DRAM, 1)])
    assert client.stats().waiting == 0
    assert not client.flush(PATIENCE)


def test_a_client_that_shall_come_back_stays_registered(network: FakeNetwork) -> None:
    client = client_of(network)
    client.start()
    assert client.flush(PATIENCE)
    assert client.close(unregister=False)
    assert [info.node_id for info in network.state.list_nodes(0.0)] == ["node"]


def test_a_flush_that_cannot_be_done_gives_up_in_time(network: FakeNetwork) -> None:
    network.native_door = False
    with closing(client_of(network)) as client:
        client.start()
        client.report([A], HBM)
        began = time.monotonic()
        assert not client.flush(0.1)
        assert 0.1 <= time.monotonic() - began < PATIENCE
        client.report([B], HBM)
        assert eventually(lambda: client.stats().waiting == 0, PATIENCE)
        network.native_door = True
        assert client.flush(PATIENCE)


def test_a_snapshot_that_raises_is_logged_and_asked_again(
    network: FakeNetwork, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("umbp_connectors.client.master_client._PAUSE_AFTER_A_BUG", 0.0)
    asked = []

    def snapshot() -> Iterator[tuple[int, list[bytes]]]:
        asked.append(1)
        yield HBM, [A]
        if len(asked) < 3:
            raise RuntimeError("dictionary changed size during iteration")

    settings = replace(SOON, batch_hashes=1)
    client = MasterClient([NATIVE], NODE, snapshot=snapshot, settings=settings, dial=network.dial)
    with closing(client), caplog.at_level(logging.ERROR):
        client.start()
        assert client.flush(PATIENCE)
    assert len(asked) == 3
    assert [record.message for record in caplog.records] == ["telling the master failed; everything is told anew"]


@pytest.fixture
def black_hole() -> Iterator[str]:
    """A socket that takes connections and never says anything."""
    with socket.create_server(("127.0.0.1", 0), backlog=64) as server:
        yield f"umbp://127.0.0.1:{server.getsockname()[1]}"


def test_a_master_that_never_answers_makes_nobody_wait(black_hole: str) -> None:
    settings = ClientSettings(connect_timeout=10 * PATIENCE, call_timeout=10 * PATIENCE, max_waiting=1000)
    client = MasterClient(black_hole, NODE, settings=settings)
    client.start()
    hashes = [b"%d" % number for number in range(100)]
    worst = 0.0
    for _ in range(500):
        began = time.perf_counter()
        client.report(hashes, HBM)
        client.revoke(hashes, HBM)
        client.clear(DRAM)
        client.record([Delta(A, DRAM, 1)])
        worst = max(worst, time.perf_counter() - began)
    assert worst < PATIENCE
    began = time.monotonic()
    assert client.match(hashes) == []
    assert time.monotonic() - began < PATIENCE
    assert client.stats().waiting <= 1000
    began = time.monotonic()
    client.close(1.0)
    assert time.monotonic() - began < PATIENCE


def test_a_close_ends_a_call_that_is_under_way(network: FakeNetwork) -> None:
    """The transport of a client that closes is closed, which ends its calls (see ``MasterTransport.close``)."""
    called, released = threading.Event(), threading.Event()

    class Hanging:
        native = True

        def register(self, registration: Registration, timeout: float) -> object:
            called.set()
            assert released.wait(PATIENCE)
            raise AssertionError("too late")

        def close(self) -> None:
            released.set()

    client = MasterClient([NATIVE], NODE, settings=SOON, dial=lambda address, timeout: Hanging())  # type: ignore[arg-type,return-value]
    client.start()
    assert called.wait(PATIENCE)
    client.close(0.1)
    assert released.is_set()
    assert client.close(), "the thread ends"
    assert client.stats().breaker is BreakerState.CLOSED
