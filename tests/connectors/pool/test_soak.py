"""Put, get, clear and flush under pressure from several threads: right bytes, and neither memory nor files that grow.

``make soak`` does it for minutes; here it is some seconds.
"""

from __future__ import annotations

import os
import random
import threading
import time
from contextlib import closing
from pathlib import Path

import pytest

from tests.connectors.waiting import PATIENCE, until
from umbp_connectors.pool import local
from umbp_connectors.pool.local import LocalPool, LocalPoolConfig
from umbp_core.ids import Identity, RankScope
from umbp_core.tiers import Tier

SECONDS = float(os.environ.get("SOAK_SECONDS", "4"))
SIZE = 64 << 10
PAGES, SLOTS, KEYS, THREADS = 64, 200, 600, 3
CAPACITY = (1 << 20) + SLOTS * (SIZE + 768)
HITS = 100
"""More than these came back when it was tried."""
SLACK = 24 << 20
"""What an allocator may keep for itself, in bytes."""


def resident() -> int:
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def held(pool: LocalPool) -> int:
    """What somebody reads or writes, in both tiers."""
    tiers = [pool.stats(tier) for tier in (Tier.DRAM, Tier.SSD)]
    assert None not in tiers
    return sum(stats.pinned + stats.reserved for stats in tiers if stats is not None)


def object_of(number: int) -> bytes:
    return (b"%08d" % number * (SIZE // 8))[: SIZE - number % 3]


class Worker(threading.Thread):
    """Uses the pool until told to stop; ``wrong`` are the keys whose bytes were not what was put."""

    def __init__(self, pool: LocalPool, seed: int, stop: threading.Event) -> None:
        super().__init__()
        self.wrong: list[int] = []
        self.hits = 0
        self._pool = pool
        self._chance = random.Random(seed)
        self._stopped = stop

    def run(self) -> None:
        while not self._stopped.is_set():
            # Some are asked for much more often than others, as prompts are.
            numbers = list({int(KEYS * self._chance.random() ** 3) for _ in range(6)})
            keys = [b"key %d" % number for number in numbers]
            buffers = [bytearray(SIZE - number % 3) for number in numbers]
            statuses = self._pool.get(keys, buffers, timeout=10)
            for number, buffer, status in zip(numbers, buffers, statuses, strict=True):
                self.hits += status.hit
                if status.hit and buffer != object_of(number):
                    self.wrong.append(number)
            self._pool.put(keys, [object_of(number) for number in numbers], numbers, timeout=10)
            if self._chance.random() < 0.002:
                self._pool.clear()


def test_nothing_grows_and_no_byte_is_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "_FORGET_S", 60.0)  # a worker clears while the disk is busy
    config = LocalPoolConfig(SIZE, PAGES * SIZE, tmp_path, CAPACITY)
    with closing(LocalPool(Identity("model", b"\x11" * 32, RankScope()), config)) as pool:
        pool.open()
        pool.wait_prefaulted(60)
        stop = threading.Event()
        workers = [Worker(pool, seed, stop) for seed in range(THREADS)]
        for worker in workers:
            worker.start()
        threading.Event().wait(min(2.0, SECONDS / 2))
        memory, threads = resident(), threading.active_count()
        deadline = time.monotonic() + SECONDS
        while (left := deadline - time.monotonic()) > 0 or (
            left > -PATIENCE and sum(worker.hits for worker in workers) <= HITS
        ):
            used = sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file())
            assert used <= CAPACITY + 4096, "L8: locks and identity.json are the rest"
            threading.Event().wait(min(0.5, max(0.0, left)))
        grown = resident() - memory
        stop.set()
        for worker in workers:
            worker.join(60)
        assert not any(worker.is_alive() for worker in workers)
        assert [worker.wrong for worker in workers] == [[]] * THREADS
        assert sum(worker.hits for worker in workers) > HITS, "nothing came back, so nothing was tried"
        assert grown <= SLACK
        assert threading.active_count() <= threads
        assert pool.flush(60)
        until(lambda: held(pool) == 0)  # a read that came too late for its call ends as well
    assert resident() - memory <= SLACK
