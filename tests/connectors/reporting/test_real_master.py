"""A reporter and a real master process: whatever becomes of either, the master knows the truth again within two
heartbeats, and the engine never waits (laws L5 and L11).
"""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path

import pytest

from tests.connectors.reporting.at_master import (
    HBM,
    SSD,
    Engine,
    known_at,
    open_node,
)
from tests.connectors.waiting import PATIENCE, eventually, until
from tests.master.app.master_process import ROOT, MasterProcess, environment
from umbp_connectors.client.master_client import MasterClient
from umbp_connectors.reporting.mirror import Mirror
from umbp_connectors.reporting.reporter import Reporter
from umbp_core.master.model import Registration

NODE = f"{socket.gethostname()}:8000:dp0:pp0:tp0"
INTERVAL = 1.0
"""Seconds between heartbeats of the masters here."""
SLACK = 10.0
"""What a busy machine may add to two of them."""
FAST = {"UMBP_HEARTBEAT_TTL_SEC": "2"}
DOORS = ["umbp://{native}", "grpc://{grpc}"]


@pytest.fixture
def cleanup() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def started(cleanup: ExitStack, address: str, **keys: object) -> tuple[Reporter, Engine]:
    reporter = open_node(address, **keys)  # type: ignore[arg-type]
    cleanup.enter_context(closing(reporter))
    engine = Engine(reporter)
    reporter.start()
    return reporter, engine


def run(engine: Engine, steps: int = 60) -> None:
    for _ in range(steps):
        engine.step()


@pytest.mark.parametrize("door", DOORS)
def test_every_tier_is_told_as_it_changes(cleanup: ExitStack, tmp_path: Path, door: str) -> None:
    master = cleanup.enter_context(MasterProcess(tmp_path, **FAST))
    reporter, engine = started(cleanup, door.format(**master.doors))
    for _ in range(4):
        run(engine)
        assert reporter.flush(PATIENCE)
        assert known_at(master, NODE) == engine.held()
    engine.reset()
    assert reporter.flush(PATIENCE)
    found = known_at(master, NODE)
    assert found == engine.held()
    assert HBM not in found
    stats = reporter.stats()
    assert stats.client.native == door.startswith("umbp")
    assert (stats.failures, stats.overflows, stats.resyncs, stats.client.refused) == (0, 0, 0, 0)
    assert {tier: count for tier, count in stats.held.items() if count} == {t: len(h) for t, h in found.items()}
    labels = f'dp="0",engine="vllm",http="127.0.0.1:8000",model="tiny",node="{NODE}",pp="0",role="both",tier="SSD"'
    metric = f'mori_umbp_external_kv_live_count{{{labels},tp="0",version="0.32.0"}} {float(len(found[SSD]))}'
    assert metric in master.get("/metrics")[1]
    assert reporter.close(PATIENCE)
    assert known_at(master, NODE) == {}


@pytest.mark.parametrize("memory", ["embedded", "none"])
@pytest.mark.parametrize("door", DOORS)
def test_a_master_that_is_killed_and_comes_back_knows_all_within_two_heartbeats(
    cleanup: ExitStack, tmp_path: Path, door: str, memory: str
) -> None:
    options = [f"--state-dir={tmp_path / 'state'}", f"--metadata-backend={memory}"]
    first = cleanup.enter_context(MasterProcess(tmp_path, *options, **FAST))
    ports = [f"--listen={first.doors['grpc']}", f"--native-listen={first.doors['native']}"]
    reporter, engine = started(cleanup, door.format(**first.doors))
    run(engine)
    assert reporter.flush(PATIENCE)
    engine.step()
    assert first.end(signal.SIGKILL) == -signal.SIGKILL
    run(engine)
    assert not reporter.flush(0.2)
    second = cleanup.enter_context(MasterProcess(tmp_path, *options, *ports, **FAST))
    assert eventually(lambda: known_at(second, NODE) == engine.held(), 2 * INTERVAL + SLACK)
    run(engine)
    assert reporter.flush(PATIENCE)
    assert known_at(second, NODE) == engine.held()
    assert engine.slowest < SLACK


@pytest.mark.parametrize("door", DOORS)
def test_a_master_that_hangs_makes_nobody_wait(cleanup: ExitStack, tmp_path: Path, door: str) -> None:
    master = cleanup.enter_context(MasterProcess(tmp_path, **FAST))
    reporter, engine = started(cleanup, door.format(**master.doors))
    run(engine)
    assert reporter.flush(PATIENCE)
    master.process.send_signal(signal.SIGSTOP)
    try:
        began = time.monotonic()
        run(engine)
        assert time.monotonic() - began < SLACK
        assert not reporter.flush(0.5)
        assert eventually(lambda: reporter.stats().held == {t: len(h) for t, h in engine.held().items()}, SLACK), (
            "the mirror waits for nobody"
        )
    finally:
        master.process.send_signal(signal.SIGCONT)
    assert eventually(lambda: known_at(master, NODE) == engine.held(), 2 * INTERVAL + SLACK)


def test_a_reporter_closes_in_time_whatever_the_master_does(cleanup: ExitStack, tmp_path: Path) -> None:
    master = cleanup.enter_context(MasterProcess(tmp_path, **FAST))
    reporter, engine = started(cleanup, f"umbp://{master.doors['native']}")
    run(engine)
    assert reporter.flush(PATIENCE)
    master.process.send_signal(signal.SIGSTOP)
    try:
        engine.step()
        began = time.monotonic()
        reporter.close(1.0)
        assert time.monotonic() - began < 1.0 + SLACK
    finally:
        master.process.send_signal(signal.SIGCONT)
    until(lambda: not any(thread.name == "umbp-reporter" for thread in threading.enumerate()))


@pytest.mark.parametrize("door", DOORS)
def test_an_engine_that_was_away_longer_than_its_expiry_is_known_again(
    cleanup: ExitStack, tmp_path: Path, door: str
) -> None:
    """The master is stopped, not the engine: to the master that is the same."""
    master = cleanup.enter_context(MasterProcess(tmp_path, **FAST, UMBP_MAX_MISSED_HEARTBEATS="1"))
    reporter, engine = started(cleanup, door.format(**master.doors))
    run(engine)
    assert reporter.flush(PATIENCE)
    master.process.send_signal(signal.SIGSTOP)
    threading.Event().wait(2.5)
    master.process.send_signal(signal.SIGCONT)
    run(engine)
    assert eventually(lambda: known_at(master, NODE) == engine.held(), 2 * INTERVAL + SLACK)


ENGINE = """
import sys
from tests.connectors.reporting.at_master import Engine, open_node
reporter = open_node(sys.argv[1])
engine = Engine(reporter, seed=int(sys.argv[2]))
reporter.start()
for _ in range(50):
    engine.step()
print(reporter.flush(60), flush=True)
sys.stdin.read()
"""


def test_an_engine_that_is_killed_and_comes_back_counts_for_what_it_holds_now(
    cleanup: ExitStack, tmp_path: Path
) -> None:
    master = cleanup.enter_context(MasterProcess(tmp_path))
    address = f"umbp://{master.doors['native']}"
    dead = subprocess.Popen(
        [sys.executable, "-c", ENGINE, address, "1"],
        env=environment(tmp_path),
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with dead:
        assert dead.stdout is not None
        assert dead.stdout.readline() == "True\n"
        dead.kill()
    before = known_at(master, NODE)
    assert before, "it is known until somebody notices"
    reporter, engine = started(cleanup, address)
    run(engine, 5)
    assert reporter.flush(PATIENCE)
    assert known_at(master, NODE) == engine.held() != before


def test_an_engine_that_is_killed_is_forgotten_when_it_expires(cleanup: ExitStack, tmp_path: Path) -> None:
    variables = {"UMBP_HEARTBEAT_TTL_SEC": "1", "UMBP_MAX_MISSED_HEARTBEATS": "1", "UMBP_REAPER_INTERVAL_SEC": "0.2"}
    master = cleanup.enter_context(MasterProcess(tmp_path, **variables))
    command = [sys.executable, "-c", ENGINE, f"umbp://{master.doors['native']}", "1"]
    with subprocess.Popen(
        command, env=environment(tmp_path), cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as dead:
        assert dead.stdout is not None
        assert dead.stdout.readline() == "True\n"
        dead.kill()
    assert eventually(lambda: known_at(master, NODE) == {})


class SlowRoad:
    """Carries bytes to the master and back, a few at a time and late; can be cut."""

    def __init__(self, target: str, delay: float) -> None:
        host, _, port = target.rpartition(":")
        self._target = (host, int(port))
        self._delay = delay
        self._ended = threading.Event()
        self._server = socket.create_server(("127.0.0.1", 0))
        self._server.settimeout(0.1)
        self._open: list[socket.socket] = []
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    @property
    def address(self) -> str:
        return f"umbp://127.0.0.1:{self._server.getsockname()[1]}"

    def cut(self) -> None:
        """End every connection at once."""
        for end in self._open:
            try:
                end.shutdown(socket.SHUT_RDWR)
            except OSError:
                continue

    def close(self) -> None:
        self._ended.set()
        self.cut()
        for thread in self._threads:
            thread.join(PATIENCE)
        for end in self._open:
            end.close()
        self._server.close()

    def _accept(self) -> None:
        while not self._ended.is_set():
            try:
                here, _ = self._server.accept()
            except TimeoutError:
                continue
            there = socket.create_connection(self._target)
            self._open += [here, there]
            for pair in ((here, there), (there, here)):
                thread = threading.Thread(target=self._carry, args=pair)
                self._threads.append(thread)
                thread.start()

    def _carry(self, source: socket.socket, sink: socket.socket) -> None:
        try:
            while data := source.recv(1 << 16):
                self._ended.wait(self._delay)
                sink.sendall(data)
            sink.shutdown(socket.SHUT_RDWR)
        except OSError:
            return


def test_a_slow_master_gets_fewer_and_larger_batches(cleanup: ExitStack, tmp_path: Path) -> None:
    master = cleanup.enter_context(MasterProcess(tmp_path, **FAST))
    road = cleanup.enter_context(closing(SlowRoad(master.doors["native"], delay=0.1)))
    reporter, engine = started(cleanup, road.address, report_interval_ms=0)
    assert reporter.flush(PATIENCE)
    began, before = time.monotonic(), reporter.stats().client.batches
    never = threading.Event()
    for _ in range(200):
        engine.step()
        never.wait(0.005)
    assert reporter.flush(PATIENCE)
    assert known_at(master, NODE) == engine.held()
    assert reporter.stats().client.batches - before <= (time.monotonic() - began) / 0.2 + 2


def test_connections_that_break_again_and_again_lose_nothing(cleanup: ExitStack, tmp_path: Path) -> None:
    master = cleanup.enter_context(MasterProcess(tmp_path, **FAST))
    road = cleanup.enter_context(closing(SlowRoad(master.doors["native"], delay=0.0)))
    reporter, engine = started(cleanup, road.address, report_interval_ms=1)
    assert reporter.flush(PATIENCE), "there is a connection to break"
    never = threading.Event()
    for _ in range(8):
        run(engine, 10)
        never.wait(0.03)
        road.cut()
    assert reporter.flush(PATIENCE)
    assert known_at(master, NODE) == engine.held()
    until(lambda: reporter.stats().client.failures >= 1)


def test_more_than_may_wait_is_told_as_a_whole(cleanup: ExitStack, tmp_path: Path) -> None:
    master = cleanup.enter_context(MasterProcess(tmp_path, **FAST))
    mirror = Mirror()
    client = MasterClient(f"umbp://{master.doors['native']}", Registration(NODE), snapshot=mirror.snapshot)
    reporter = cleanup.enter_context(closing(Reporter(client, mirror, interval=60.0, max_waiting=500)))
    engine = Engine(reporter)
    reporter.start()
    run(engine, 300)
    assert reporter.stats().overflows >= 2
    assert reporter.stats().waiting <= 1000
    assert reporter.flush(PATIENCE)
    assert known_at(master, NODE) == engine.held()
    assert reporter.stats().failures == 0
