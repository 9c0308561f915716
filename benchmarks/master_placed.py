"""What a match costs where both processes share a processor, and where each has one of its own.

Who waits for an answer lets its processor go.  A virtual machine pays tens of microseconds to wake the other one, twice
a call, and finds its caches cold; which of the two it is, is the scheduler's choice and changes from run to run.
"""

from __future__ import annotations

import os
import random
from collections.abc import Sequence
from pathlib import Path

import _report
import master_floor
from master_process import TIMEOUT, Master


def placed(master: Master, held: Sequence[Sequence[bytes]], count: int) -> list[_report.Row]:
    """Medians of an empty call and of matches over the Unix socket, by placement (Linux); best of three rounds."""
    allowed = os.sched_getaffinity(0)
    first, last = min(allowed), max(allowed)
    choice = random.Random(5)
    client = master.native()

    def match(length: int) -> object:
        keys = held[choice.randrange(len(held))]
        start = choice.randrange(len(keys) - length)
        return client.match(keys[start : start + length], False, TIMEOUT)

    rows: list[_report.Row] = []
    with master_floor.echoes() as server, master_floor.unix_call(server.path) as empty:
        try:
            for name, processor in (("one for both", first), ("one each", last)):
                _hold(os.getpid(), {first})
                _hold(server.pid, {processor})
                _hold(master.pid, {processor})
                rows.append(
                    {
                        "processors": name,
                        "64 bytes and back, p50 us": master_floor.median(empty, count),
                        "match of 1, p50 us": master_floor.median(lambda: match(1), count),
                        "match of 128, p50 us": master_floor.median(lambda: match(128), count),
                    }
                )
        finally:
            for pid in (os.getpid(), master.pid):
                _hold(pid, allowed)
    client.close()
    return rows


def _hold(pid: int, processors: set[int]) -> None:
    """Let all threads of a process run on ``processors`` only."""
    for task in Path(f"/proc/{pid}/task").iterdir():
        os.sched_setaffinity(int(task.name), processors)
