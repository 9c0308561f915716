"""The local pool with tiny tiers, beside a plain dict of what was put."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from umbp_connectors.pool.local import GetStatus, LocalPool, LocalPoolConfig, PutStatus
from umbp_core.ids import Identity, RankScope
from umbp_core.tiers import Tier

SIZE = 8192
DRAM_PAGES = 3
SLOTS = 5
CAPACITY = (1 << 20) + SLOTS * (SIZE + 768)

KEYS = st.lists(st.integers(0, 9).map(lambda number: b"key %d" % number), min_size=1, max_size=5, unique=True)


class PoolMachine(RuleBasedStateMachine):
    """A hit returns the first bytes that were put under the key since it was last known to be gone."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(prefix="umbp-pool-"))
        self.truth: dict[bytes, bytes] = {}
        self.number = 0
        self.pool = self._open()

    def _open(self) -> LocalPool:
        config = LocalPoolConfig(
            SIZE, DRAM_PAGES * SIZE, self.folder, CAPACITY, copy_threads=2, io_threads=2, prefault=False, patience_s=0
        )
        pool = LocalPool(Identity("model", b"\x11" * 32, RankScope()), config)
        pool.open()
        return pool

    def teardown(self) -> None:
        self.pool.close()
        shutil.rmtree(self.folder)

    @initialize()
    def geometry(self) -> None:
        dram, ssd = self.pool.stats(Tier.DRAM), self.pool.stats(Tier.SSD)
        assert dram is not None
        assert ssd is not None
        assert (dram.total_pages, ssd.total_pages) == (DRAM_PAGES, SLOTS)

    def _note_gone(self) -> None:
        """What cannot be read any more may be put anew with other bytes."""
        keys = list(self.truth)
        for key, there in zip(keys, self.pool.exists(keys), strict=True):
            if not there:
                del self.truth[key]

    @rule(keys=KEYS, nbytes=st.sampled_from([1, 100, 4096, 8191, SIZE]))
    def put(self, keys: list[bytes], nbytes: int) -> None:
        self.pool.flush(30)
        self._note_gone()
        objects = []
        for _ in keys:
            self.number += 1
            objects.append((b"%08d" % self.number * 1024)[:nbytes])
        for key, data, status in zip(keys, objects, self.pool.put(keys, objects), strict=True):
            assert status in (PutStatus.STORED, PutStatus.PRESENT, PutStatus.NO_ROOM)
            assert status is not PutStatus.PRESENT or key in self.truth
            if status is PutStatus.STORED:
                self.truth[key] = data

    @rule(keys=KEYS)
    def get(self, keys: list[bytes]) -> None:
        buffers = [np.zeros(len(self.truth.get(key, b"?")), dtype=np.uint8) for key in keys]
        assert self.pool.flush(30)
        there = self.pool.exists(keys)
        for key, buffer, status, found in zip(keys, buffers, self.pool.get(keys, buffers), there, strict=True):
            assert status.hit or status is GetStatus.MISS
            assert status.hit == found
            if status.hit:
                assert buffer.tobytes() == self.truth[key]

    @rule(key=st.integers(0, 9).map(lambda number: b"key %d" % number))
    def get_with_another_size(self, key: bytes) -> None:
        size = len(self.truth.get(key, b"")) + 1
        assert self.pool.get([key], [bytearray(size)])[0] in (GetStatus.SIZE_MISMATCH, GetStatus.MISS)

    @rule()
    def clear(self) -> None:
        self.pool.flush(30)
        self.pool.clear()
        assert not any(self.pool.exists(list(self.truth)))
        self.truth.clear()

    @rule()
    def restart(self) -> None:
        assert self.pool.flush(30)
        before = self.pool.stats(Tier.SSD)
        assert before is not None
        self.pool.close()
        self.pool = self._open()
        after = self.pool.stats(Tier.SSD)
        assert after is not None
        assert after.objects == before.objects
        assert self.pool.counters().restored == before.objects

    @rule(keys=KEYS)
    def exists(self, keys: list[bytes]) -> None:
        there = self.pool.exists(keys)
        assert all(key in self.truth for key, found in zip(keys, there, strict=True) if found)
        assert self.pool.count_prefix(keys) == (there + [False]).index(False)

    @invariant()
    def bounds(self) -> None:
        used = sum(path.stat().st_size for path in self.folder.rglob("*") if path.is_file())
        assert used <= CAPACITY + 4096, "locks and identity.json are the rest"
        assert sum(self.pool.exists(list(self.truth))) <= DRAM_PAGES + SLOTS


TestPool = PoolMachine.TestCase
TestPool.settings = settings(max_examples=40, stateful_step_count=25, deadline=None)
