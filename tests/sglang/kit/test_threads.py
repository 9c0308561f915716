"""The four threads that SGLang has in a backend at once: one asks, one reads, one writes, and the scheduler."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.sglang.kit.conftest import World
from tests.sglang.kit.proxies import first_slots, raw
from tests.sglang.kit.rig import UMBP, Setup
from tests.sglang.kit.shapes import FULL

BATCH = 12
ROUNDS = 60
KEYS = [hashlib.sha256(bytes([number])).hexdigest() for number in range(96)]
"""More than fit at once, so that pages are evicted and written again meanwhile."""


def page_of(pool: Any, key: str) -> torch.Tensor:
    """The page that belongs to a key, flat."""
    like = pool.get_data_page(0, flat=True)
    data = hashlib.shake_128(key.encode()).digest(like.nbytes)
    return torch.frombuffer(bytearray(data), dtype=torch.uint8).view(like.dtype)


def batch(number: int) -> list[str]:
    start = number * 7 % len(KEYS)
    return [KEYS[(start + offset) % len(KEYS)] for offset in range(BATCH)]


class Threads:
    """Calls that run at once, a fixed number of times each; what one of them found wrong is kept."""

    def __init__(self) -> None:
        self.faults: list[str] = []
        self._threads: list[threading.Thread] = []

    def add(self, work: Callable[[int], str | None]) -> None:
        def run() -> None:
            for number in range(ROUNDS):
                try:
                    fault = work(number)
                except Exception as error:  # noqa: BLE001 - whatever a thread dies of fails the test
                    fault = repr(error)
                if fault:
                    self.faults.append(fault)
                    return

        self._threads.append(threading.Thread(target=run, daemon=True))

    def run(self) -> None:
        for thread in self._threads:
            thread.start()
        for thread in self._threads:
            thread.join(60)
        assert not any(thread.is_alive() for thread in self._threads), "a call did not end"
        assert self.faults == []


@pytest.mark.parametrize("dram", ["64KiB", "16MiB"], ids=["evicting", "roomy"])
def test_four_threads_at_once(world: World, dram: str) -> None:
    engine = world.engine(Setup(UMBP, FULL, extra={"dram_capacity": dram, "ssd_enabled": False}), ledger=False)
    store, pool = engine.backend, engine.cache.host_pool_group.anchor_entry.host_pool
    writing, reading = (pool.alloc(BATCH * pool.page_size) for _ in range(2))
    written, read = threading.Event(), threading.Event()
    latest = batch(0)

    def write(number: int) -> str | None:
        nonlocal latest
        keys = batch(number)
        for key, slot in zip(keys, first_slots(pool, writing), strict=True):
            pool.set_from_flat_data_page(slot, page_of(pool, key))
        done = store.batch_set_v1(keys, writing)
        latest = keys
        written.set()
        for slot in first_slots(pool, writing):
            pool.set_from_flat_data_page(slot, torch.zeros_like(page_of(pool, KEYS[0])))
        return None if len(done) == len(keys) else "results are missing"

    def get(number: int) -> str | None:
        written.wait(60)
        keys = latest if number % 2 == 0 else batch(number * 5)
        given = store.batch_get_v1(keys, reading)
        for key, there, slot in zip(keys, given, first_slots(pool, reading), strict=True):
            if there and raw(pool.get_data_page(slot, flat=True)) != raw(page_of(pool, key)):
                return f"{key[:8]} holds other bytes"
        if any(given):
            read.set()
        return None

    def ask(number: int) -> str | None:
        keys = batch(number * 3)
        return None if 0 <= store.batch_exists(keys) <= len(keys) else "more exist than were asked for"

    def schedule(number: int) -> str | None:
        store.get_stats()
        if number % 20 == 19:
            read.wait(60)  # what was written last is there until the first clear
            store.clear()
        return None

    threads = Threads()
    for work in (write, get, ask, schedule):
        threads.add(work)
    threads.run()
    assert read.is_set(), "nothing was read, so nothing was compared"


def test_a_close_amid_calls_leaves_misses(world: World) -> None:
    """Detaching joins SGLang's threads first; a process that exits may not have done so."""
    engine = world.engine(Setup(UMBP, FULL), ledger=False)
    store, pool = engine.backend, engine.cache.host_pool_group.anchor_entry.host_pool
    writing, reading = (pool.alloc(BATCH * pool.page_size) for _ in range(2))

    def close(number: int) -> None:
        if number == ROUNDS // 2:
            store.close()

    threads = Threads()
    threads.add(lambda number: None if len(store.batch_set_v1(batch(number), writing)) == BATCH else "results missing")
    threads.add(lambda number: None if len(store.batch_get_v1(batch(number), reading)) == BATCH else "results missing")
    threads.add(lambda number: None if store.batch_exists(batch(number)) <= BATCH else "too many")
    threads.add(close)
    threads.run()
    assert store.batch_exists(batch(0)) == 0
    assert store.batch_get_v1(batch(0), reading) == [False] * BATCH
    assert store.batch_set_v1(batch(0), writing) == [False] * BATCH
