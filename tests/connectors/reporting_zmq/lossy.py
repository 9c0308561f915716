"""The stream of an engine over a connection that loses batches."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from umbp_connectors.config import resolve
from umbp_connectors.reporting.node import NodeFacts
from umbp_connectors.reporting.opening import open_reporter
from umbp_connectors.reporting.reporter import Reporter
from umbp_connectors.reporting.zmq_follower import Follower, Patience
from umbp_connectors.reporting.zmq_sequence import Event
from umbp_connectors.reporting.zmq_sockets import EngineStream, Happening

EVERY = 3


class LossyStream(EngineStream):
    """Loses every third batch that comes live, as a reader does that is too slow."""

    _seen = 0

    @property
    def lost(self) -> int:
        """How many batches."""
        return self._seen // EVERY

    def wait(self, timeout: float) -> list[Happening]:
        return [each for each in super().wait(timeout) if not self._is_lost(each)]

    def _is_lost(self, happening: Happening) -> bool:
        if happening.event is not Event.LIVE:
            return False
        self._seen += 1
        return self._seen % EVERY == 0


@contextmanager
def following(
    stream: LossyStream, facts: NodeFacts, node_id: str, master_address: str
) -> Iterator[tuple[Follower, Reporter]]:
    """Tell a master, under the name ``node_id``, what ``stream`` says."""
    reporter = open_reporter(resolve({"master_address": master_address, "node_id": node_id}, {}).config, facts)
    assert reporter is not None
    follower = Follower(stream, reporter, Patience(grace=0.5, idle=0.5))
    thread = threading.Thread(target=follower.run, name="follower")
    reporter.start()
    thread.start()
    try:
        yield follower, reporter
    finally:
        follower.stop()
        thread.join(60)
        reporter.close()
