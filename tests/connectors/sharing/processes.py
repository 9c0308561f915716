"""The other side of a shared pool, in a process of its own that a test can kill.

``python processes.py serve SOCKET COUNT`` shares a pool with ``COUNT`` objects; ``python processes.py borrow SOCKET
COUNT`` borrows so many and keeps them.  Each says ``ready`` and ends with its input.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from umbp_connectors.pool.local import LocalPool, LocalPoolConfig
from umbp_connectors.pool.sharing import SharedPoolServer
from umbp_connectors.pool.sharing.link import connect
from umbp_core.ids import Identity, RankScope

SIZE = 64 << 10
PAGES = 64
IDENTITY = Identity("shared", b"\x11" * 32, RankScope(replicated=True))


def key_of(number: int) -> bytes:
    """The key of an object."""
    return b"%032d" % number


def object_of(number: int) -> bytes:
    """Its bytes."""
    return (b"%09d " % number * SIZE)[:SIZE]


def open_pool(count: int, ssd: Path | None = None, pages: int = PAGES, **options: object) -> LocalPool:
    """A pool that holds the first ``count`` objects."""
    capacity = (1 << 20) + 100 * (SIZE + 768)
    config = LocalPoolConfig(SIZE, pages * SIZE, ssd, capacity, prefault=False, patience_s=0, **options)  # type: ignore[arg-type]
    pool = LocalPool(IDENTITY, config)
    pool.open()
    pool.put([key_of(number) for number in range(count)], [object_of(number) for number in range(count)])
    return pool


class Other:
    """One such process."""

    def __init__(self, role: str, path: Path, count: int) -> None:
        env = {**os.environ, "PYTHONPATH": os.pathsep.join(part for part in sys.path if part)}
        self.process = subprocess.Popen(
            [sys.executable, __file__, role, str(path), str(count)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=env,
        )
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == b"ready\n"

    def signal(self, number: int) -> None:
        """Send it a signal."""
        self.process.send_signal(number)

    def stop(self) -> None:
        """Let it hang; returns when it does."""
        self.process.send_signal(signal.SIGSTOP)
        _, status = os.waitpid(self.process.pid, os.WUNTRACED)
        assert os.WIFSTOPPED(status)

    def end(self) -> None:
        """Kill it and wait for its end."""
        self.process.kill()
        self.process.communicate(timeout=60)


def main() -> None:
    """Play one side until the input ends."""
    role, path, count = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
    if role == "serve":
        kept: object = SharedPoolServer(open_pool(count), path)
        assert isinstance(kept, SharedPoolServer)
        kept.open()
    else:
        link = connect(path, IDENTITY.digest, wants_arena=True, deadline=time.monotonic() + 30)
        kept = link.borrow([key_of(number) for number in range(count)], time.monotonic() + 30), link
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    sys.stdin.read()
    del kept


if __name__ == "__main__":
    main()
