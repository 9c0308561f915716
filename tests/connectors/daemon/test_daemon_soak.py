"""A daemon under pressure whose clients come, go and are killed: right bytes, and nothing of it that grows.

``make soak`` does it for minutes; here it is some seconds.
"""

from __future__ import annotations

import contextlib
import os
import random
import time
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from tests.connectors.daemon.kit import IDENTITY, client_of, get, key_of, put
from tests.connectors.daemon.processes import PROGRAM, UNHURRIED, client, daemon
from tests.connectors.waiting import PATIENCE, until
from umbp_connectors.daemon.link import inspect, manage
from umbp_core.outcomes import GetStatus, PutStatus

SECONDS = float(os.environ.get("SOAK_SECONDS", "3"))
KEYS = 60
CAPACITY = 1500 << 10
SLACK = 24 << 20
"""What an allocator may keep for itself, in bytes."""
HITS, ON_SSD = 20, 3
"""More than this came back, and went to SSD and came from there, when it was tried."""


@dataclass(frozen=True)
class Footprint:
    """What a process has of the system."""

    resident: int
    threads: int
    files: int


def footprint(pid: int) -> Footprint:
    proc = Path(f"/proc/{pid}")
    pages = int((proc / "statm").read_text(encoding="ascii").split()[1])
    return Footprint(
        pages * os.sysconf("SC_PAGE_SIZE"), len(list((proc / "task").iterdir())), len(list((proc / "fd").iterdir()))
    )


def at_rest(path: Path) -> bool:
    """Whether the daemon has no client, and nobody holds anything."""
    (view,) = inspect(path, time.monotonic() + 30).pools
    return not view.clients and all(fill.pinned == fill.reserved == 0 for fill in view.fills)


def used_ssd(path: Path) -> bool:
    """Whether enough went to SSD, and came from there."""
    (view,) = inspect(path, time.monotonic() + 30).pools
    return min(view.counters["get_ssd"], view.counters["demoted"]) > ON_SSD


def use(path: Path, folder: Path, chance: random.Random, seconds: float) -> int:
    """Put, get, clear and evict beside two processes, one of which is killed now and then; how many hits there were.

    For longer than that on a machine that is too slow for anything to have been tried by then.
    """
    hits = 0
    with contextlib.ExitStack() as others:
        workers = [client("work", path) for _ in range(2)]
        others.callback(lambda: [worker.kill() for worker in workers if worker.process.returncode is None])
        pool = others.enter_context(closing(client_of(path)))
        pool.open()
        deadline = time.monotonic() + seconds
        next_kill = time.monotonic() + 0.7
        while (now := time.monotonic()) < deadline or (
            now < deadline + PATIENCE and not (hits > HITS and used_ssd(path))
        ):
            numbers = list({int(KEYS * chance.random() ** 2) for _ in range(6)})
            statuses = get(pool, numbers, timeout=30)
            assert GetStatus.TIMED_OUT not in statuses
            hits += sum(status.hit for status in statuses)
            assert PutStatus.TOO_LARGE not in put(pool, numbers, timeout=30)
            if chance.random() < 0.01:
                pool.clear()
            if chance.random() < 0.02:
                with closing(manage(path, IDENTITY.digest, folder, time.monotonic() + 30)) as link:
                    assert link.evict([key_of(number) for number in numbers], time.monotonic() + 30) <= len(numbers)
            used = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
            assert used <= CAPACITY + 4096, "L8: locks and identity.json are the rest"
            if time.monotonic() >= next_kill:
                assert "Traceback" not in workers.pop(0).kill(), "it never saw a wrong byte"
                workers.append(client("work", path))
                next_kill = time.monotonic() + 0.7
    until(lambda: at_rest(path))
    return hits


def test_nothing_of_a_daemon_grows_and_no_byte_is_wrong(tmp_path: Path) -> None:
    path, folder, chance = tmp_path / "run" / "daemon.sock", tmp_path / "ssd", random.Random(5)
    sizes = ("--dram-capacity", "512KiB", "--ssd-dir", str(folder), "--ssd-capacity", f"{CAPACITY >> 10}KiB")
    process = daemon(path, *sizes, program=UNHURRIED + PROGRAM)
    try:
        use(path, folder, chance, min(2.0, SECONDS / 3))
        before = footprint(process.pid)
        assert use(path, folder, chance, SECONDS) > HITS, "nothing came back, so nothing was tried"
        assert used_ssd(path), "the SSD was not used"
        until(lambda: footprint(process.pid).threads <= before.threads)
        until(lambda: footprint(process.pid).files <= before.files)
        assert footprint(process.pid).resident - before.resident <= SLACK
        assert "Traceback" not in process.terminate()
        assert process.process.returncode == 0
    finally:
        process.kill()
