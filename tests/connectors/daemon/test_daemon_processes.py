"""Daemons and clients that are killed, stopped and started, in processes of their own."""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.connectors.daemon.conftest import Daemon
from tests.connectors.daemon.kit import IDENTITY, SIZE, client_of, get, key_of, object_of, put
from tests.connectors.daemon.processes import PROGRAM, Process, client, daemon, environment
from tests.connectors.later import pass_time
from tests.connectors.waiting import eventually, until
from umbp_connectors.config_model import UmbpConfig
from umbp_connectors.daemon import client as pool_client
from umbp_connectors.daemon import links
from umbp_connectors.daemon.client import DaemonPool
from umbp_connectors.daemon.launch import Launcher, listens
from umbp_connectors.daemon.making import pool_maker
from umbp_connectors.daemon.metrics import FAMILIES
from umbp_connectors.pool.local import LocalPoolConfig
from umbp_connectors.pool.outcomes import GetStatus, PutStatus
from umbp_core.breaker import Backoff

Start = Callable[..., Daemon]
Connect = Callable[..., DaemonPool]
KEYS = [key_of(number) for number in range(40)]


@pytest.fixture
def run(path: Path) -> Iterator[Callable[..., Process]]:
    """Starts real daemons at the path, or clients of a role; kills what is left of them."""
    made: list[Process] = []

    def run(role: str, *options: str) -> Process:
        made.append(daemon(path, *options) if role == "daemon" else client(role, path))
        return made[-1]

    yield run
    for process in made:
        if process.process.poll() is None:
            process.kill()


def _ssd(tmp_path: Path) -> tuple[str, ...]:
    return "--dram-capacity", "2MiB", "--ssd-dir", str(tmp_path / "ssd"), "--ssd-capacity", "16MiB"


@pytest.mark.parametrize("role", ["write", "read"])
def test_a_client_that_is_killed_in_a_copy_leaves_nothing_behind(
    start: Start, connect: Connect, run: Callable[..., Process], role: str
) -> None:
    here, other = start(), connect()
    put(other, range(20, 30))
    victim = run(role)
    held = 4
    assert here.pinned() == held
    if role == "write":
        assert other.exists(KEYS[10:14]) == [False] * 4
        assert put(other, [10]) == [PutStatus.PRESENT], "it is being written"
    victim.kill()
    until(lambda: here.pinned() == 0)
    until(lambda: here.server.connections == 2)
    assert other.exists(KEYS[10:14]) == [False] * 4
    assert put(other, range(10, 14)) == [PutStatus.STORED] * 4
    assert get(other, [*range(4), *range(10, 14), *range(20, 30)]) == [GetStatus.DRAM] * 18


def test_a_client_that_hangs_in_a_read_loses_its_lease(
    start: Start, run: Callable[..., Process], connect: Connect
) -> None:
    here = start(lease_s=0.3)
    run("read")
    until(lambda: here.pinned() == 0)
    pool = connect()
    assert eventually(lambda: get(pool, range(4)) == [GetStatus.DRAM] * 4), "within a lease"


def test_two_processes_share_what_a_third_one_left(run: Callable[..., Process], connect: Connect) -> None:
    run("daemon", "--dram-capacity", "64MiB")
    run("work").kill()
    workers = [run("work"), run("work")]
    pool = connect()
    until(lambda: pool.count_prefix(KEYS) == 40)
    workers[0].kill()
    assert get(pool, range(40)) == [GetStatus.DRAM] * 40
    assert workers[1].process.poll() is None
    assert workers[1].end() == ""
    assert workers[1].process.returncode == 0, "it never saw a wrong byte"


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_a_restart_of_the_daemon_keeps_what_is_on_ssd(
    run: Callable[..., Process], connect: Connect, tmp_path: Path, how: signal.Signals
) -> None:
    first = run("daemon", *_ssd(tmp_path))
    pool = connect()
    assert put(pool, range(40)) == [PutStatus.STORED] * 40
    if how is signal.SIGKILL:
        assert pool.flush(30)  # a graceful end does this by itself
    first.process.send_signal(how)
    assert "Traceback" not in first.end()
    assert get(pool, range(40)) == [GetStatus.MISS] * 40
    run("daemon", *_ssd(tmp_path))
    until(lambda: pool.count_prefix(KEYS) == 40)
    assert get(pool, range(40)) == [GetStatus.SSD] * 40
    assert get(pool, range(40)) == [GetStatus.DRAM] * 40


def test_the_daemon_is_killed_under_load(run: Callable[..., Process], connect: Connect, tmp_path: Path) -> None:
    first = run("daemon", *_ssd(tmp_path))
    workers = [run("work"), run("work")]
    for _ in range(2):
        first.kill()
        first = run("daemon", *_ssd(tmp_path))
        pool = connect()
        until(lambda: any(status.hit for status in get(pool, range(40))))  # noqa: B023
    for worker in workers:
        assert worker.process.poll() is None
        assert "Traceback" not in worker.end()
        assert worker.process.returncode == 0, "it never saw a wrong byte"


def test_a_daemon_that_hangs_costs_the_time_of_a_few_calls(
    run: Callable[..., Process], connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(links, "Backoff", lambda: Backoff(120.0, 120.0))
    hanging = run("daemon", "--dram-capacity", "2MiB")
    pool = connect(timeout_s=0.2)
    assert put(pool, range(8), timeout=30) == [PutStatus.STORED] * 8
    before = pool.failed
    os.kill(hanging.pid, signal.SIGSTOP)
    # A call that has no time left when it begins asks nobody.
    until(lambda: get(pool, range(8)) == [GetStatus.TIMED_OUT] * 8 and pool.failed == before + 1)
    until(lambda: pool.exists(KEYS[:1]) == [False] and pool.failed == before + 2)
    until(lambda: put(pool, [9]) == [PutStatus.TIMED_OUT] and pool.failed == before + 3)
    assert get(pool, range(8), timeout=30) == [GetStatus.MISS] * 8, "it is not asked any more"
    os.kill(hanging.pid, signal.SIGCONT)
    pass_time(monkeypatch, 120.0, links, pool_client)
    until(lambda: get(pool, range(8), timeout=30) == [GetStatus.DRAM] * 8)


def test_the_socket_is_for_this_user_only(run: Callable[..., Process], path: Path) -> None:
    line = run("daemon", "--dram-capacity", "2MiB").first_line
    assert line == f"umbp daemon ready: {path}, DRAM 0.00 GiB, no SSD\n"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700


def _command(*options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", PROGRAM, "daemon", *options]
    return subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=60, check=False)


def test_a_second_daemon_is_turned_away(run: Callable[..., Process], path: Path, connect: Connect) -> None:
    run("daemon", "--dram-capacity", "2MiB")
    pool = connect()
    put(pool, range(4))
    second = _command("--socket", str(path))
    assert second.returncode == 2
    assert "a daemon is running at" in second.stderr
    assert get(pool, range(4)) == [GetStatus.DRAM] * 4


def test_what_is_wrong_is_one_sentence(path: Path, tmp_path: Path) -> None:
    for options, message in (
        (["--dram-capacity", "lots"], "dram_capacity = 'lots'"),
        (["--dram-capacity", "900TiB"], "does not fit this machine"),
        (["--metrics-listen", "nowhere"], "an address is HOST:PORT"),
        (["--metrics-listen", "192.0.2.1:1"], "metrics cannot be served"),
        (["--set", "daemon_qota=1"], "did you mean 'daemon_quota'"),
        (["--set", "eviction_policy=none"], "eviction_policy 'none'"),
    ):
        done = _command("--socket", str(path), *options)
        assert (done.returncode, "Traceback" in done.stderr) == (2, False)
        assert message in done.stderr
    tmp_path.chmod(0o755)
    assert "can be entered by others" in _command("--socket", str(tmp_path / "s")).stderr


def test_metrics(run: Callable[..., Process], connect: Connect) -> None:
    process = run("daemon", "--dram-capacity", "4MiB", "--metrics-listen", "127.0.0.1:0")
    pool = connect()
    put(pool, range(5))
    get(pool, range(7))
    address = process.first_line.split()[-1]
    with urllib.request.urlopen(f"http://{address}/metrics", timeout=30) as answer:
        page = answer.read().decode()
    labels = f'{{namespace="shared",pool="{IDENTITY.digest.hex()[:12]}",'
    assert f'umbp_daemon_objects{labels}tier="dram"}} 5.0' in page
    assert f'umbp_daemon_puts_total{labels}status="stored"}} 5.0' in page
    assert f'umbp_daemon_gets_total{labels}status="miss"}} 2.0' in page
    assert [name for family in FAMILIES if f"# TYPE {(name := family.name)}" not in page] == []
    with pytest.raises(urllib.error.HTTPError, match="404"):
        urllib.request.urlopen(f"http://{address}/", timeout=30)


def test_metrics_over_ipv6(run: Callable[..., Process]) -> None:
    address = run("daemon", "--dram-capacity", "2MiB", "--metrics-listen", "[::1]:0").first_line.split()[-1]
    assert address.startswith("[::1]:")
    with urllib.request.urlopen(f"http://{address}/metrics", timeout=30) as answer:
        assert b"\numbp_daemon_connections 0.0\n" in answer.read()


def test_an_ssd_folder_that_cannot_be_used_is_said_at_the_start(
    run: Callable[..., Process], connect: Connect, tmp_path: Path
) -> None:
    (tmp_path / "file").write_bytes(b"")
    options = "--dram-capacity", "2MiB", "--ssd-dir", str(tmp_path / "file"), "--ssd-capacity", "16MiB"
    process = run("daemon", *options)
    assert process.first_line.endswith(", DRAM 0.00 GiB, no SSD\n")
    said = f"the SSD tier is off: the SSD folder {tmp_path / 'file'} cannot be used (File exists); "
    assert process.terminate().count(said) == 1, "before any client"
    run("daemon", *options)
    assert put(connect(), range(4)) == [PutStatus.STORED] * 4


def test_status(run: Callable[..., Process], path: Path, connect: Connect) -> None:
    assert _command("--socket", str(path), "--status").returncode == 1
    process = run("daemon", "--dram-capacity", "4MiB")
    put(connect(label="engine 7"), range(5))
    told = _told(path)
    (pool,) = told["pools"]
    assert (told["pid"], told["dram_bytes"], pool["clients"]) == (process.pid, 4 << 20, ["engine 7"])
    assert (pool["identity"], pool["fills"][0]["objects"]) == (IDENTITY.digest.hex(), 5)
    assert "engine 7" in _command("--socket", str(path), "--status").stdout


def test_without_clients_it_ends_by_itself(run: Callable[..., Process], path: Path) -> None:
    made: list[tuple[Process, DaemonPool]] = []

    def came_in_time() -> bool:
        """Whether a client came to a daemon before that ended for want of one."""
        made.append((run("daemon", "--dram-capacity", "2MiB", "--idle-exit", "0.5"), client_of(path)))
        made[-1][1].open()
        return put(made[-1][1], [1]) == [PutStatus.STORED]

    until(came_in_time)
    process, pool = made[-1]
    with pytest.raises(subprocess.TimeoutExpired):
        process.process.wait(1.0)
    pool.close()
    assert "no client for 0.5 seconds" in process.end()
    assert process.process.returncode == 0
    assert not path.exists()


def test_engines_that_want_a_daemon_start_one(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in environment().items():
        monkeypatch.setenv(name, value)
    config = UmbpConfig(
        mode="daemon",
        daemon_socket=path,
        daemon_auto_start=True,
        daemon_idle_exit_s=4.0,
        dram_capacity=4 << 20,
        dram_prefault=False,
        call_timeout_ms=30_000,
        ssd_dir=tmp_path / "ssd",
        ssd_capacity=16 << 20,
    )
    make = pool_maker(config)
    pools = [make(IDENTITY, LocalPoolConfig(SIZE, 2 << 20)) for _ in range(4)]
    with ThreadPoolExecutor(4) as threads:
        list(threads.map(lambda pool: pool.open(), pools))
    pid = _told(path)["pid"]
    try:
        assert pools[0].put([key_of(1)], [object_of(1)]) == [PutStatus.STORED]
        for pool in pools:
            back = bytearray(SIZE)
            assert pool.get([key_of(1)], [back]) == [GetStatus.DRAM]
            assert back == object_of(1)
        assert pools[0].flush(30)
        os.kill(pid, signal.SIGKILL)
        until(lambda: pools[0].exists([key_of(1)]) == [True])
        assert _told(path)["pid"] != pid, "another one was started"
        assert pools[1].get([key_of(1)], [bytearray(SIZE)]) == [GetStatus.SSD]
    finally:
        for pool in pools:
            pool.close()
    until(lambda: not listens(path))  # these connections are no use of it


def test_a_daemon_that_cannot_start_costs_a_warning(
    path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for name, value in environment().items():
        monkeypatch.setenv(name, value)
    launcher = Launcher(path, UmbpConfig(dram_capacity=900 << 40))
    assert not launcher.start(120)
    assert "says why" in caplog.text
    assert "does not fit this machine" in path.with_name("daemon.sock.log").read_text(encoding="utf-8")
    assert not Launcher(path.parent / "daemon.sock.log" / "deeper" / "s", UmbpConfig()).start(1)


def _told(path: Path) -> dict[str, Any]:
    """What the daemon says about itself."""
    done = _command("--socket", str(path), "--status", "--json")
    assert done.returncode == 0, done.stderr
    told: dict[str, Any] = json.loads(done.stdout)
    return told
