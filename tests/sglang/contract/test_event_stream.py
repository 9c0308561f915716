"""SGLang's own publisher and events, followed by ``umbp follow``'s parts."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack

import pytest
from sglang.srt.disaggregation.kv_events import (
    AllBlocksCleared,
    BlockRemoved,
    BlockStored,
    KVEventBatch,
    StorageMedium,
    ZmqEventPublisher,
)

from tests.connectors.waiting import eventually
from umbp_connectors.config import resolve
from umbp_connectors.reporting.node import NodeFacts
from umbp_connectors.reporting.opening import open_reporter
from umbp_connectors.reporting.reporter import Reporter
from umbp_connectors.reporting.zmq_endpoints import endpoint_of
from umbp_connectors.reporting.zmq_follower import Follower, Patience
from umbp_connectors.reporting.zmq_sockets import EngineStream, StreamSettings
from umbp_core.tiers import Tier

RANK = 1


def stored(medium: StorageMedium | None, *hashes: int) -> BlockStored:
    return BlockStored(list(hashes), None, [1, 2, 3, 4], 4, None, medium, "salt", "session", "adapter")


@pytest.fixture
def cleanup() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def free_ports() -> tuple[int, int]:
    with socket.create_server(("127.0.0.1", 0)) as one, socket.create_server(("127.0.0.1", 0)) as other:
        return one.getsockname()[1] - RANK, other.getsockname()[1] - RANK


def followed(cleanup: ExitStack, stream: StreamSettings) -> tuple[Follower, Reporter]:
    """A follower, and a reporter whose master is not there: its mirror tells what it would say."""
    config = resolve({"master_address": "umbp+unix:///nowhere", "node_id": "n"}, {}).config
    reporter = open_reporter(config, NodeFacts("sglang", "tiny", "1", "both", "127.0.0.1", 8000, dp=RANK))
    assert reporter is not None
    follower = Follower(EngineStream(stream), reporter, Patience(grace=0.3))
    thread = threading.Thread(target=follower.run, name="follower")
    cleanup.callback(reporter.close)
    cleanup.callback(thread.join, 20)
    cleanup.callback(follower.stop)
    reporter.start()
    thread.start()
    return follower, reporter


def test_events_of_every_kind_and_a_replay(cleanup: ExitStack) -> None:
    port, replay = (f"tcp://*:{number}" for number in free_ports())
    publisher = ZmqEventPublisher(RANK, port, replay, buffer_steps=100, topic="kv")
    cleanup.callback(publisher.shutdown)
    publisher.publish(KVEventBatch(ts=1.0, events=[stored(StorageMedium.GPU, -1, 2), stored(None, 3)]))
    stream = StreamSettings(endpoint_of(port, RANK), endpoint_of(replay, RANK), "kv")
    follower, reporter = followed(cleanup, stream)
    assert eventually(lambda: reporter.stats().held.get(Tier.HBM) == 3)
    publisher.publish(
        KVEventBatch(
            ts=2.0,
            events=[
                stored(StorageMedium.CPU, -1),
                stored(StorageMedium.DISK, 2, 3),
                stored(StorageMedium.EXTERNAL, 9),
                BlockRemoved([2], StorageMedium.GPU),
                BlockRemoved([3]),
            ],
        )
    )
    held = {Tier.HBM: 1, Tier.DRAM: 1, Tier.SSD: 2}
    assert eventually(lambda: reporter.stats().held == held), reporter.stats()
    publisher.publish(KVEventBatch(ts=3.0, events=[AllBlocksCleared()]))
    assert eventually(lambda: reporter.stats().held == {Tier.HBM: 0, Tier.DRAM: 0, Tier.SSD: 2})
    stats = follower.stats()
    assert (stats.applied, stats.missed, stats.garbled, stats.unknown, stats.elsewhere) == (3, 0, 0, 0, 1)
    publisher.shutdown()
    assert eventually(lambda: follower.stats().cleared == {"gone": 1})
    assert eventually(lambda: reporter.stats().held[Tier.SSD] == 0)


def test_an_endpoint_that_names_a_host_is_connected_to_us(cleanup: ExitStack) -> None:
    port, _ = free_ports()
    publisher = ZmqEventPublisher(RANK, f"tcp://127.0.0.1:{port}")
    cleanup.callback(publisher.shutdown)
    _, reporter = followed(cleanup, StreamSettings(endpoint_of(f"tcp://127.0.0.1:{port}", RANK, True), bind=True))

    def told() -> bool:
        publisher.publish(KVEventBatch(ts=1.0, events=[stored(StorageMedium.GPU, 1)]))
        return reporter.stats().held.get(Tier.HBM) == 1

    assert eventually(told)
