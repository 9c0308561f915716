"""Daemons and clients in processes of their own, which a test can kill at the wrong moment.

``python processes.py ROLE SOCKET`` is a client: ``write`` stops in the middle of a copy into the daemon's memory,
``read`` in the middle of one out of it; both say ``ready`` then.  ``work`` puts and gets without end, compares every
byte, says ``ready`` after the first round, and ends with its input.

``serve`` is a daemon whose leases last a minute, with ``brief`` a second.

``leader`` and ``rank`` are the processes of one engine: the leader has stored objects 0 and 1, borrowed object 0, and
has four pages left, half of the first of which is written; the rank has the memory mapped.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

from tests.connectors.daemon.engine import Engine, soon, wanted
from tests.connectors.daemon.kit import SIZE, client_of, get, key_of, object_of, put
from tests.connectors.waiting import until
from umbp_connectors.daemon.pages import RankArena
from umbp_connectors.pool import copies
from umbp_connectors.pool.checksums import copy_checksummed

PROGRAM = "from umbp_connectors.cli import main; main()"
UNHURRIED = "from umbp_connectors.pool import local; local._FORGET_S = 60.0; "
"""Before the program: a disk that others use has time to take what is cleared."""
DRAINING = "from umbp_connectors.daemon.server import DaemonServer; DaemonServer.stop.__defaults__ = (300.0,); "
"""Before the program: when it is told to end it waits for what is held for as long as it takes."""


def environment() -> dict[str, str]:
    """That of this process, with the packages of this repository and without any key of ours."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("UMBP_")}
    return {**kept, "PYTHONPATH": os.pathsep.join(part for part in sys.path if part)}


class Process:
    """One of them."""

    def __init__(self, command: list[str], ready: str) -> None:
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment(), text=True
        )
        assert self.process.stdout is not None
        self.first_line = self.process.stdout.readline()
        assert self.first_line.startswith(ready), (self.first_line, self.kill())

    @property
    def pid(self) -> int:
        return self.process.pid

    def kill(self) -> str:
        """Kill it at once; what it wrote to standard error."""
        self.process.kill()
        return self.end()

    def terminate(self) -> str:
        """Ask it to end, and wait for that; what it wrote to standard error."""
        self.process.send_signal(signal.SIGTERM)
        return self.end()

    def end(self) -> str:
        """Close its input and wait for its end; what it wrote to standard error."""
        if self.process.returncode is not None:
            return ""
        _, told = self.process.communicate(timeout=60)
        return told


def daemon(path: Path, *options: str, program: str = PROGRAM) -> Process:
    """A real daemon at ``path``."""
    command = [sys.executable, "-c", program, "daemon", "--socket", str(path), "--set", "dram_prefault=false"]
    return Process([*command, *options], "umbp daemon ready: ")


def client(role: str, path: Path) -> Process:
    """A client in that role."""
    return Process([sys.executable, __file__, role, str(path)], "ready")


class Stopped:
    """A process that does nothing while this is entered, as if it hung."""

    def __init__(self, process: Process) -> None:
        self._pid = process.pid

    def __enter__(self) -> None:
        os.kill(self._pid, signal.SIGSTOP)
        until(lambda: all(_state(task) == "T" for task in Path(f"/proc/{self._pid}/task").iterdir()))

    def __exit__(self, *_: object) -> None:
        os.kill(self._pid, signal.SIGCONT)


def _state(task: Path) -> str:
    """Whether a thread runs, sleeps or is stopped."""
    return (task / "stat").read_text(encoding="ascii").rpartition(")")[2].split()[0]


def _say_ready() -> None:
    sys.stdout.write("ready\n")
    sys.stdout.flush()


def _stop_half_way(key: bytes, target: Any, source: Any) -> bytes:
    half = target.nbytes // 2
    copy_checksummed(key, target[:half], source[:half])
    _say_ready()
    threading.Event().wait()
    return b""


def _leader(path: Path) -> None:
    engine = Engine(path, 2)
    engine.open()
    pages = engine.take(6)
    engine.store(pages[:2], {number: object_of(number, 2 * SIZE) for number in range(2)})
    engine.leader.borrow([key_of(0)], soon())
    engine.ranks[0].pages[pages[2], : SIZE // 2] = 7
    _say_ready()
    threading.Event().wait()


def _rank(path: Path) -> None:
    arena = RankArena(wanted(path, 2), 1, prefault=False)
    arena.open(soon())
    _say_ready()
    threading.Event().wait()


def _serve(path: Path, lease_s: float = 60.0) -> None:
    from tests.connectors.daemon.conftest import Daemon

    Daemon(path, lease_s=lease_s)
    _say_ready()
    threading.Event().wait()


def main() -> None:
    role, path = sys.argv[1], Path(sys.argv[2])
    if role in _PARTS:
        _PARTS[role](path)
    pool = client_of(path)
    pool.open()
    if role == "work":
        threading.Thread(target=lambda: (sys.stdin.read(), os._exit(0)), daemon=True).start()
        told = False
        for number in range(1 << 30):
            numbers = range(number % 40, number % 40 + 8)
            put(pool, numbers)
            hits = [status.hit for status in get(pool, numbers)]
            if all(hits) and not told:
                told = True
                _say_ready()
    put(pool, range(4))
    copies.copy_checksummed = _stop_half_way  # type: ignore[attr-defined]
    if role == "write":
        pool.put([key_of(number) for number in range(10, 14)], [object_of(number) for number in range(10, 14)])
    else:
        get(pool, range(4))


_PARTS = {"leader": _leader, "rank": _rank, "serve": _serve, "brief": lambda path: _serve(path, 1.0)}

if __name__ == "__main__":
    main()
