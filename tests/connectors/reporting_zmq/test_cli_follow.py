"""``umbp follow`` as a process, between publishers and a real master."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import socket
import subprocess
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, closing
from pathlib import Path
from typing import Any

import pytest

from tests.connectors.reporting.at_master import CALL, DRAM, HBM, known_at
from tests.connectors.reporting_zmq.publisher import Publisher, batch, removed, stored
from tests.connectors.waiting import eventually
from tests.master.app.master_process import DEADLINE, ROOT, MasterProcess, running_umbp, umbp
from umbp_connectors.config import resolve
from umbp_connectors.reporting.node import NodeFacts
from umbp_connectors.reporting.opening import open_reporter
from umbp_connectors.reporting.zmq_follower import Follower
from umbp_connectors.reporting.zmq_meter import HELPS, FollowMeter
from umbp_connectors.reporting.zmq_sequence import Event, Why
from umbp_connectors.reporting.zmq_sockets import EngineStream, Happening, StreamSettings
from umbp_core.master.model import NodeInfo


@pytest.fixture(scope="module")
def master(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MasterProcess]:
    with MasterProcess(tmp_path_factory.mktemp("follow")) as running:
        yield running
        assert running.end() == 0


def following(folder: Path, master: MasterProcess, *arguments: str) -> AbstractContextManager[subprocess.Popen[str]]:
    return running_umbp(folder, "follow", "--master", f"umbp://{master.doors['native']}", *arguments)


def node(master: MasterProcess, name: str) -> NodeInfo | None:
    with closing(master.native()) as client:
        return next((info for info in client.list_nodes(CALL) if info.node_id == name), None)


def test_an_engine_is_a_node_for_as_long_as_it_is_followed(tmp_path: Path, master: MasterProcess) -> None:
    name = f"{socket.gethostname()}:8001:dp0:pp0:tp0:decode"
    with ExitStack() as stack:
        engine = stack.enter_context(Publisher(topic=b"kv"))
        engine.publish(stored(1, 2), stored(b"\xab", medium="CPU_PINNED"))
        arguments = ["--engine", "sglang", "--model", "tiny", "--role", "decode", "--node-tag", "zone=a", "--topic=kv"]
        process = stack.enter_context(
            following(
                tmp_path,
                master,
                *(engine.endpoint, "--replay", engine.replay, "--http", "127.0.0.1:8001", "--json", *arguments),
            )
        )
        assert eventually(lambda: known_at(master, name) == {HBM: {b"1", b"2"}, DRAM: {b"ab"}})
        engine.publish(removed(1))
        assert eventually(lambda: known_at(master, name) == {HBM: {b"2"}, DRAM: {b"ab"}})
        told = node(master, name)
        assert told is not None
        assert {"engine=sglang", "model=tiny", "role=decode", "zone=a", "http=127.0.0.1:8001"} <= set(told.tags)
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=DEADLINE)
        assert process.returncode == 0, err
    counters: dict[str, Any] = json.loads(out)
    assert (counters["applied"], counters["missed"], counters["expected"]) == (2, 0, 2)
    assert "connected to" in err
    left = node(master, name)
    assert left is None or left.external_counts == {}


@pytest.mark.statement("connector", 86)
def test_every_rank_is_a_node_of_its_own(tmp_path: Path, master: MasterProcess) -> None:
    port = free_ports(4)
    with ExitStack() as stack:
        for rank in range(2):
            engine = stack.enter_context(
                Publisher(f"tcp://127.0.0.1:{port + rank}", f"tcp://127.0.0.1:{port + 2 + rank}")
            )
            engine.publish(stored(rank))
        process = stack.enter_context(
            following(
                tmp_path,
                master,
                *(
                    f"tcp://*:{port}",
                    "--replay",
                    f"tcp://*:{port + 2}",
                    "--http",
                    "127.0.0.1:8002",
                    "--dp-size",
                    "2",
                    "--node-id",
                    "ranks",
                ),
            )
        )
        for rank in range(2):
            name = f"ranks:dp{rank}:pp0:tp0"
            assert eventually(lambda name=name, rank=rank: known_at(master, name) == {HBM: {b"%d" % rank}})
        process.send_signal(signal.SIGINT)
        assert process.wait(DEADLINE) == 0


def free_ports(count: int) -> int:
    """The first of so many ports in a row that nobody listens at."""
    candidates = list(range(20_000, 30_000, count))
    random.Random(os.getpid()).shuffle(candidates)  # other runs of this test look for some, too
    for first in candidates:
        with ExitStack() as stack:
            try:
                for port in range(first, first + count):
                    stack.enter_context(socket.create_server(("127.0.0.1", port)))
            except OSError:
                continue
            return first
    raise AssertionError("no ports are free")


def test_counters_are_handed_to_the_master(tmp_path: Path, master: MasterProcess) -> None:

    config = resolve({"master_address": f"umbp://{master.doors['native']}", "node_id": "metered"}, {}).config
    reporter = open_reporter(config, NodeFacts("vllm", "tiny", "1", "both", "127.0.0.1", 8000))
    assert reporter is not None
    follower = Follower(EngineStream(StreamSettings("tcp://127.0.0.1:1")), reporter)
    meter = FollowMeter(follower, reporter)
    follower._take(Happening(Event.CONNECTED))
    follower._take(Happening(Event.LIVE, 3, b"\xc1"))
    assert not meter.send(CALL), "nobody takes it yet"
    with closing(reporter):
        reporter.start()
        assert eventually(lambda: meter.send(CALL))
        follower._take(Happening(Event.LIVE, 5, b"\xc1"))
        follower._take(Happening(Event.LIVE, 6, batch(removed(1, 2))))
        assert eventually(lambda: meter.send(CALL))
        _, page = master.get("/metrics")
    pattern = re.compile(r'mori_umbp_follow_(\w+)_total\{(?=.*node="metered").*wh(?:at|y)="(\w+)".*\} (\S+)')
    values = {(name, what): float(value) for name, what, value in pattern.findall(page)}
    assert values["batches", "applied"] == 3
    assert values["left_out", "absent"] == 2
    assert values["batches", "missed"] == 1
    assert values["clears", "garbled"] == 2
    assert values["clears", "gap"] == 1


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["inproc://x", "--http", "h:1"], "stays inside the engine's process"),
        (["--http", "h"], "--http 'h' is no server of an engine"),
        (["--http", "h:1", "--replay", "x"], "'x' is no endpoint of an event stream"),
        (["--http", "h:1", "--node-tag", "x"], "'x' is no tag"),
        (["--http", "h:1", "--master", "http://x"], "unknown scheme 'http'"),
        (["tcp://203.0.113.1:9", "--bind", "--http", "h:1"], "cannot be bound"),
    ],
)
def test_what_does_not_work_is_one_sentence(tmp_path: Path, arguments: list[str], sentence: str) -> None:
    done = umbp(tmp_path, "follow", "--timeout", "1", *arguments)
    assert (done.returncode, done.stdout) == (2, "")
    last = done.stderr.splitlines()
    assert any(sentence in line for line in last)
    assert "Traceback" not in done.stderr


def test_reports_that_are_switched_off_leave_nothing_to_do(tmp_path: Path) -> None:
    done = umbp(tmp_path, "follow", "--http", "h:1", UMBP_REPORT="0")
    assert done.returncode == 2
    assert done.stderr == (
        "umbp: reporting is switched off (UMBP_REPORT=0), and umbp follow does nothing else; unset it\n"
    )


def test_every_counter_is_on_the_page() -> None:
    page = (ROOT / "docs" / "reporting.md").read_text(encoding="utf-8")
    assert [name for name in HELPS if f"mori_umbp_{name}{{" not in page] == []
    assert {f"`{why.value}`" for why in Why} | {"`garbled`"} <= set(re.findall(r"`[a-z]+`", page))
