"""A vLLM without our connector, followed by its ZMQ stream: the master knows what its prefix cache could serve.

Every third batch is lost on the way, and repeated by the engine.
"""

from __future__ import annotations

import random
import socket
import threading
from pathlib import Path
from typing import Any

from tests.connectors.reporting_zmq.lossy import LossyStream, following
from tests.master.app.master_process import MasterProcess
from tests.vllm.engine.local import Ask, Engine, engine
from tests.vllm.harness.reported import FLUSH, Held, held_by, known_at
from tests.vllm.models import prompt
from umbp_connectors.reporting.node import NodeFacts
from umbp_connectors.reporting.reporter import Reporter
from umbp_connectors.reporting.zmq_follower import Follower
from umbp_connectors.reporting.zmq_sockets import StreamSettings
from umbp_core.tiers import Tier

DEADLINE = 60.0
NODE = "followed"
FACTS = NodeFacts("vllm", "tiny", "1", "both", "127.0.0.1", 8000)


def free_ports() -> tuple[int, int]:
    with socket.create_server(("127.0.0.1", 0)) as one, socket.create_server(("127.0.0.1", 0)) as other:
        return one.getsockname()[1], other.getsockname()[1]


class Published:
    """How many batches the engine has handed to its publisher."""

    def __init__(self, opened: Engine) -> None:
        self._publisher: Any = opened.core.scheduler.kv_event_publisher
        self._original = self._publisher.publish
        self.count = 0
        self._publisher.publish = self._publish

    def _publish(self, events: Any) -> None:
        self.count += 1
        self._original(events)


def until(follower: Follower, expected: int | None, state: str = "steady") -> None:
    pause = threading.Event()
    for _ in range(int(DEADLINE / 0.02)):
        stats = follower.stats()
        if (stats.state, stats.expected) == (state, expected):
            return
        pause.wait(0.02)
    raise AssertionError(f"the follower never came to batch {expected}: {follower.stats()}")


def known(master: MasterProcess, reporter: Reporter) -> Held:
    assert reporter.flush(FLUSH)
    client = master.native()
    try:
        return known_at(client, NODE)
    finally:
        client.close()


def test_the_master_knows_what_the_engine_could_serve(llama: Path, tmp_path: Path) -> None:
    port, replay = free_ports()
    events = {
        "enable_kv_cache_events": True,
        "publisher": "zmq",
        "endpoint": f"tcp://*:{port}",
        "replay_endpoint": f"tcp://127.0.0.1:{replay}",
    }
    stream = LossyStream(StreamSettings(f"tcp://127.0.0.1:{port}", f"tcp://127.0.0.1:{replay}"))
    rng = random.Random(3)
    with MasterProcess(tmp_path) as master:
        with engine(llama, kv_events_config=events) as opened:
            published = Published(opened)
            opened.ask_one(Ask(prompt(300, seed=1)))  # before anybody listens
            address = f"umbp://{master.doors['native']}"
            with following(stream, FACTS, NODE, address) as (follower, reporter):
                until(follower, published.count)
                assert known(master, reporter) == held_by(opened.core.scheduler, None)
                texts = [prompt(rng.randrange(40, 330), seed=100 + seed) for seed in range(16)]
                for _ in range(12):
                    opened.ask(
                        *[Ask(rng.choice(texts)[: rng.randrange(33, 330)], rng.randrange(1, 8)) for _ in range(6)]
                    )
                    until(follower, published.count)
                    told, truth = known(master, reporter)[Tier.HBM], held_by(opened.core.scheduler, None)[Tier.HBM]
                    assert told <= truth, "no more than there is"
                    assert len(truth - told) <= len(truth) // 4, "of a hash with two copies, one went"
                assert follower.stats().cleared == {}
                assert opened.llm.reset_prefix_cache()
                opened.ask_one(Ask(prompt(64, seed=9)))
                until(follower, published.count)
                assert known(master, reporter) == held_by(opened.core.scheduler, None)
                assert (follower.stats().missed, follower.stats().elsewhere) == (0, 0)
                assert stream.lost > 0
                assert follower.stats().replays > 1
                opened.core.scheduler.shutdown()
                until(follower, None, "away")
                assert follower.stats().cleared == {"gone": 1}
                assert known(master, reporter)[Tier.HBM] == set()
        assert master.end() == 0
