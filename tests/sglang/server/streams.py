"""A server's own stream of KV events (ZMQ), followed by those who have nothing else: ``umbp follow``, and its parts."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from examples.server_process import free_port
from tests.connectors.reporting_zmq.lossy import LossyStream
from umbp_connectors.config import resolve
from umbp_connectors.reporting.node import NodeFacts
from umbp_connectors.reporting.opening import open_reporter
from umbp_connectors.reporting.zmq_follower import Follower, Patience
from umbp_connectors.reporting.zmq_sockets import StreamSettings

LOSSY = "loses batches"
"""The node of :func:`losing`."""


class Stream:
    """Where a server publishes, in each of its lives."""

    def __init__(self) -> None:
        self.endpoint, self.replay = (f"tcp://*:{free_port()}" for _ in range(2))

    def arguments(self) -> list[str]:
        """What the server is started with."""
        config = {"publisher": "zmq", "endpoint": self.endpoint, "replay_endpoint": self.replay}
        return ["--kv-events-config", json.dumps(config)]


@contextmanager
def losing(stream: Stream, master_address: str) -> Iterator[tuple[Follower, LossyStream]]:
    """A follower that loses batches, and has the server repeat them."""
    config = resolve({"master_address": master_address, "node_id": LOSSY}, {}).config
    reporter = open_reporter(config, NodeFacts("sglang", "random", "", "both", "127.0.0.1", 1))
    assert reporter is not None
    here = [place.replace("*", "127.0.0.1") for place in (stream.endpoint, stream.replay)]
    lossy = LossyStream(StreamSettings(*here))
    follower = Follower(lossy, reporter, Patience(grace=0.5, idle=0.5))
    thread = threading.Thread(target=follower.run, name="follower")
    reporter.start()
    thread.start()
    try:
        yield follower, lossy
    finally:
        follower.stop()
        thread.join(60)
        reporter.close()
