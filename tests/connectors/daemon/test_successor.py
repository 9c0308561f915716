"""A daemon that is started while the last one at its path still closes its pools."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.connectors.daemon.conftest import Daemon
from tests.connectors.daemon.engine import soon
from tests.connectors.daemon.kit import get, key_of, object_of, put
from tests.connectors.daemon.processes import DRAINING, PROGRAM, Process, Stopped, daemon, environment
from tests.connectors.gate import Gate
from tests.connectors.waiting import until
from umbp_connectors.config_model import UmbpConfig
from umbp_connectors.daemon.client import DaemonPool
from umbp_connectors.daemon.launch import Launcher, listens
from umbp_connectors.daemon.link import inspect
from umbp_connectors.daemon.server import DaemonEnding
from umbp_connectors.pool.local import LocalPool
from umbp_connectors.pool.locks import FolderLock
from umbp_connectors.pool.outcomes import GetStatus, PutStatus
from umbp_core.errors import ConfigError

Start = Callable[..., Daemon]
Connect = Callable[..., DaemonPool]


@pytest.fixture
def last(path: Path) -> Iterator[FolderLock]:
    """What a daemon at the path holds that listens no more."""
    path.parent.mkdir(mode=0o700)
    lock = FolderLock(path.parent, f"{path.name}.lock")
    lock.acquire()
    yield lock
    lock.release()


def _daemon(path: Path, program: str = PROGRAM) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", program, "daemon", "--socket", str(path), "--dram-capacity", "2MiB"]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, env=environment(), text=True)


def _told(process: subprocess.Popen[str], what: str) -> str:
    """The first line of the log that says so."""
    assert process.stderr is not None
    return next(line for line in process.stderr if what in line)


def test_the_path_is_free_when_the_pools_are_closed(
    start: Start, connect: Connect, monkeypatch: pytest.MonkeyPatch, path: Path
) -> None:
    closing = LocalPool.close
    gate = Gate(closing)
    first, pool = start(), connect()
    put(pool, [1])
    with ThreadPoolExecutor(1) as threads, monkeypatch.context() as patch:
        patch.setattr(LocalPool, "close", lambda pool, *timeout: gate(pool, *timeout))
        ending = threads.submit(first.close)
        gate.wait_until_held()
        assert not listens(path)
        with pytest.raises(DaemonEnding, match="has not ended yet"):
            start()
        gate.open()
        ending.result()
    start()
    with pytest.raises(ConfigError, match="a daemon is running"):
        start()
    first.server.close()
    assert listens(path), "it is not the first one's any more"


def test_an_engine_starts_a_daemon_while_the_last_one_ends(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, connect: Connect, closing: contextlib.ExitStack
) -> None:
    for name, value in environment().items():
        monkeypatch.setenv(name, value)
    ssd = {"ssd_dir": tmp_path / "ssd", "ssd_capacity": 16 << 20}
    config = UmbpConfig(dram_capacity=2 << 20, dram_prefault=False, daemon_idle_exit_s=60.0, **ssd)
    options = [part for key, value in ssd.items() for part in ("--set", f"{key}={value}")]
    first = daemon(path, "--dram-capacity", "2MiB", *options, program=DRAINING + PROGRAM)
    closing.callback(first.kill)
    pool = connect()
    assert put(pool, range(8)) == [PutStatus.STORED] * 8
    staged = pool.stage([key_of(9)], [object_of(9)])
    with ThreadPoolExecutor(1) as threads:
        with _Ending(first, path):  # it lets the staged object come to its end
            second = threads.submit(Launcher(path, config).start, 120.0)
            log = path.with_name("daemon.sock.log")
            until(lambda: path.exists() or (log.exists() and "waiting for the last daemon" in log.read_text()))
            assert not path.exists()
        assert staged.publish()
        assert second.result(), log.read_text()
    first.end()
    assert first.process.returncode == 0
    until(lambda: pool.count_prefix([key_of(number) for number in range(8)]) == 8)
    assert get(pool, [*range(8), 9]) == [GetStatus.SSD] * 9
    os.kill(inspect(path, soon()).pid, signal.SIGTERM)
    pool.close()
    until(lambda: not listens(path))


class _Ending(Stopped):
    """A daemon that was told to end and listens no more, stopped there while this is entered."""

    def __init__(self, process: Process, path: Path) -> None:
        super().__init__(process)
        self._process = process
        self._path = path

    def __enter__(self) -> None:
        self._process.process.terminate()
        until(lambda: not self._path.exists())
        super().__enter__()


def test_a_daemon_that_waits_for_the_last_one_can_be_told_to_end(last: FolderLock, path: Path) -> None:
    with _daemon(path) as process:
        assert str(path) in _told(process, "waiting for the last daemon")
        process.terminate()
        told, log = process.communicate(timeout=60)
    assert (told, "Traceback" in log) == ("", False)
    ended = process.returncode == 0 and "SIGTERM: the daemon does not start" in log
    assert ended or process.returncode == -signal.SIGTERM, "between two looks the system ends it; it holds nothing yet"


def test_a_daemon_starts_when_the_last_one_lets_go(last: FolderLock, path: Path, connect: Connect) -> None:
    with _daemon(path) as process:
        _told(process, "waiting for the last daemon")
        last.release()
        assert process.stdout is not None
        assert process.stdout.readline().startswith("umbp daemon ready: ")
        assert put(connect(pages=4), [1]) == [PutStatus.STORED]
        process.terminate()
        process.communicate(timeout=60)
    assert process.returncode == 0


def test_a_daemon_does_not_wait_for_ever(last: FolderLock, path: Path) -> None:
    program = "from umbp_connectors.daemon import process; process.PREDECESSOR_S = 0.2; " + PROGRAM
    with _daemon(path, program) as process:
        _, log = process.communicate(timeout=60)
    assert (process.returncode, "Traceback" in log) == (2, False)
    assert f"umbp: the last daemon at {path} has not ended yet" in log.splitlines()[-1]
