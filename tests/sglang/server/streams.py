"""A server's own stream of KV events (ZMQ), followed by those who have nothing else: ``umbp follow``, and its parts."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager

from examples.server_process import free_port
from tests.connectors.reporting_zmq.lossy import LossyStream, following
from umbp_connectors.reporting.node import NodeFacts
from umbp_connectors.reporting.zmq_follower import Follower
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
    here = [place.replace("*", "127.0.0.1") for place in (stream.endpoint, stream.replay)]
    lossy = LossyStream(StreamSettings(*here))
    facts = NodeFacts("sglang", "random", "", "both", "127.0.0.1", 1)
    with following(lossy, facts, LOSSY, master_address) as (follower, _):
        yield follower, lossy
