"""The local pool with tiny tiers and a disk that may hang or fail, beside a plain dict of what was put."""

from __future__ import annotations

import errno
import random
import shutil
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tests.connectors.disk import Disk
from tests.connectors.pool_follower import Follower
from umbp_connectors.pool.local import GetStatus, LocalPool, LocalPoolConfig, PutStatus, StagedPut
from umbp_connectors.pool.rows import ObjectRows
from umbp_core.ids import Identity, RankScope
from umbp_core.testing.fakes import FakeClock
from umbp_core.tiers import Tier

SIZE = 8192

SHORT = 0.02
"""Seconds: for what is to run out of time."""
SIZES = st.sampled_from([1, 100, 4096, 8191, SIZE])
KEYS = st.lists(st.integers(0, 9).map(lambda number: b"key %d" % number), min_size=1, max_size=5, unique=True)


class PoolMachine(RuleBasedStateMachine):
    """A hit returns the first bytes that were put under the key since it was last known to be gone.

    While the disk hangs or fails, every call ends in its time and buffers that were given back stay as they are.
    """

    DRAM_PAGES = 3
    SLOTS = 5
    DEMOTE_THREADS = 4

    def __init__(self) -> None:
        super().__init__()
        self.patch = pytest.MonkeyPatch()
        self.disk = Disk(self.patch)
        self.sound = True
        self.folder = Path(tempfile.mkdtemp(prefix="umbp-pool-"))
        self.truth: dict[bytes, bytes] = {}
        self.staged: dict[StagedPut, dict[bytes, bytes | None]] = {}
        """What was copied; nothing where it was evicted since."""
        self.given_back: list[np.ndarray] = []
        self.number = 0
        self.follower = Follower()
        self.clock = FakeClock()
        self.pool = self._open()

    @property
    def capacity(self) -> int:
        return (1 << 20) + self.SLOTS * (SIZE + 768)

    def _open(self) -> LocalPool:
        config = LocalPoolConfig(
            SIZE,
            self.DRAM_PAGES * SIZE,
            self.folder,
            self.capacity,
            copy_threads=2,
            io_threads=2,
            demote_threads=self.DEMOTE_THREADS,
            prefault=False,
            patience_s=0,
            ssd_failures=1 << 30,
        )
        pool = LocalPool(Identity("model", b"\x11" * 32, RankScope()), config, self.clock)
        self.follower = Follower()
        pool.observe(self.follower)
        pool.open()
        return pool

    def teardown(self) -> None:
        self.heal()
        self.pool.close()
        self.patch.undo()
        shutil.rmtree(self.folder)

    @initialize()
    def geometry(self) -> None:
        dram, ssd = self.pool.stats(Tier.DRAM), self.pool.stats(Tier.SSD)
        assert dram is not None
        assert ssd is not None
        assert (dram.total_pages, ssd.total_pages) == (self.DRAM_PAGES, self.SLOTS)

    def _note_gone(self) -> None:
        """What cannot be read any more may be put anew with other bytes."""
        keys = list(self.truth)
        for key, there in zip(keys, self.pool.exists(keys), strict=True):
            if not there:
                del self.truth[key]

    def _objects(self, keys: list[bytes], nbytes: int) -> list[bytes]:
        self.number += len(keys)
        return [(b"%08d" % (self.number - index) * 1024)[:nbytes] for index, _ in enumerate(keys)]

    def _settle(self) -> None:
        """Until nothing moves that the next step could depend on; a disk that hangs is left alone."""
        if self.sound:
            assert self.pool.flush(30)
        self._note_gone()

    def _is_known(self, key: bytes) -> bool:
        return key in self.truth or any(key in objects for objects in self.staged.values())

    @rule(keys=KEYS, nbytes=SIZES, scattered=st.booleans())
    def put(self, keys: list[bytes], nbytes: int, scattered: bool) -> None:
        self._settle()
        objects = self._objects(keys, nbytes)
        buffers = [(data[:50], data[50:]) if scattered else data for data in objects]
        for key, data, status in zip(keys, objects, self.pool.put(keys, buffers, timeout=30), strict=True):
            assert status in (PutStatus.STORED, PutStatus.PRESENT, PutStatus.NO_ROOM)
            assert status is not PutStatus.PRESENT or self._is_known(key) or not self.sound
            if status is PutStatus.STORED:
                self.truth[key] = data

    @rule(keys=KEYS, nbytes=SIZES)
    def stage(self, keys: list[bytes], nbytes: int) -> None:
        self._settle()
        objects = self._objects(keys, nbytes)
        staged = self.pool.stage(keys, objects)
        copied: dict[bytes, bytes | None] = {
            key: data
            for key, data, status in zip(keys, objects, staged.statuses, strict=True)
            if status is PutStatus.STORED
        }
        # What was there before may have been evicted by this very call; nothing is there twice.
        assert not any(self.pool.exists(list(copied)))
        self.staged[staged] = copied

    @precondition(lambda self: self.staged)
    @rule(publish=st.booleans(), data=st.data())
    def end_stage(self, publish: bool, data: st.DataObject) -> None:
        staged = data.draw(st.sampled_from(list(self.staged)))
        copied = {key: data for key, data in self.staged.pop(staged).items() if data is not None}
        self._settle()
        if publish:
            assert staged.publish()
            self.truth.update(copied)
            assert all(self.pool.exists(list(copied)))
        staged.discard()
        assert staged.publish() == publish

    @rule(keys=KEYS, scattered=st.booleans())
    def get(self, keys: list[bytes], scattered: bool) -> None:
        sizes = [len(self.truth.get(key, b"?")) for key in keys]
        whole = [np.zeros(size + 7, dtype=np.uint8) for size in sizes]
        buffers = [
            (buffer[:1], buffer[1:size]) if scattered else buffer[:size]
            for buffer, size in zip(whole, sizes, strict=True)
        ]
        if self.sound:
            assert self.pool.flush(30)
        there = self.pool.exists(keys)
        statuses = self.pool.get(keys, buffers, timeout=30 if self.sound else SHORT)
        for key, buffer, size, status, found in zip(keys, whole, sizes, statuses, there, strict=True):
            if self.sound:
                assert status.hit or status is GetStatus.MISS
                assert status.hit == found
            if status.hit:
                assert buffer[:size].tobytes() == self.truth[key]
            assert not buffer[size:].any()
            buffer[...] = 0xA5
        self.given_back = [*self.given_back, *whole][-50:]

    @rule(keys=KEYS, nbytes=SIZES, order=st.randoms(use_true_random=False))
    def put_rows(self, keys: list[bytes], nbytes: int, order: random.Random) -> None:
        """As :meth:`put`, from rows of one array, now neighbours and now not."""
        self._settle()
        objects = self._objects(keys, nbytes)
        numbers = order.sample(range(len(keys)), len(keys)) if order.random() < 0.5 else list(range(len(keys)))
        whole = np.zeros((len(keys) + 1, nbytes), dtype=np.uint8)
        for number, data in zip(numbers, objects, strict=True):
            whole[number] = np.frombuffer(data, dtype=np.uint8)
        statuses = self.pool.put(keys, ObjectRows(whole, numbers), timeout=30)
        for key, data, status in zip(keys, objects, statuses, strict=True):
            assert status in (PutStatus.STORED, PutStatus.PRESENT, PutStatus.NO_ROOM)
            if status is PutStatus.STORED:
                self.truth[key] = data

    @rule(keys=KEYS, nbytes=SIZES)
    def get_rows(self, keys: list[bytes], nbytes: int) -> None:
        """As :meth:`get`, into rows; objects of another size do not come."""
        if self.sound:
            assert self.pool.flush(30)
        there = self.pool.exists(keys)
        whole = np.zeros((len(keys) + 1, nbytes), dtype=np.uint8)
        statuses = self.pool.get(keys, ObjectRows(whole, range(len(keys))), timeout=30 if self.sound else SHORT)
        for key, row, status, found in zip(keys, whole[:-1], statuses, there, strict=True):
            assert not status.hit or row.tobytes() == self.truth[key]
            assert not self.sound or status.hit == (found and len(self.truth[key]) == nbytes)
        assert not whole[-1].any()
        whole[...] = 0xA5
        self.given_back = [*self.given_back, whole][-50:]

    @rule(keys=KEYS, nbytes=SIZES)
    def without_time(self, keys: list[bytes], nbytes: int) -> None:
        assert self.pool.put(keys, self._objects(keys, nbytes), timeout=0) == [PutStatus.TIMED_OUT] * len(keys)
        assert self.pool.get(keys, [bytearray(9) for _ in keys], timeout=0) == [GetStatus.TIMED_OUT] * len(keys)

    @rule(key=st.integers(0, 9).map(lambda number: b"key %d" % number))
    def get_with_another_size(self, key: bytes) -> None:
        size = len(self.truth.get(key, b"")) + 1
        assert self.pool.get([key], [bytearray(size)])[0] in (GetStatus.SIZE_MISMATCH, GetStatus.MISS)

    @rule()
    def clear(self) -> None:
        self.pool.clear()
        assert not any(self.pool.exists(list(self.truth)))
        self.truth.clear()
        for staged in self.staged:
            assert not staged.publish()
        self.staged.clear()

    @rule(keys=KEYS)
    def evict(self, keys: list[bytes]) -> None:
        """By name, also what is being written."""
        if self.sound:
            assert self.pool.flush(30)
        before = sum(self.pool.exists(keys))
        assert self.pool.evict(keys) == before or not self.sound
        assert not any(self.pool.exists(keys))
        for key in keys:
            self.truth.pop(key, None)
            for objects in self.staged.values():
                if key in objects:
                    objects[key] = None

    @precondition(lambda self: self.sound)
    @rule(
        kinds=st.sampled_from([("read",), ("write",), ("read", "write")]),
        number=st.sampled_from([0, errno.EIO, errno.ENOSPC, errno.EROFS]),
    )
    def break_disk(self, kinds: tuple[str, ...], number: int) -> None:
        if number:
            self.disk.fail(*kinds, number=number)
        else:
            self.disk.hang(*kinds)
        self.sound = False

    @rule()
    def heal(self) -> None:
        self.disk.work()
        self.disk.wait_free()
        self.pool.flush(30)  # says whether anything was lost meanwhile
        self.clock.advance(1000)  # a disk that refused writes is not left alone any more
        self.sound = True

    @precondition(lambda self: self.sound)
    @rule()
    def restart(self) -> None:
        assert self.pool.flush(30)
        before = self.pool.stats(Tier.SSD)
        assert before is not None
        self.pool.close()
        assert not any(staged.publish() for staged in self.staged)
        self.staged.clear()
        self.pool = self._open()
        after = self.pool.stats(Tier.SSD)
        assert after is not None
        assert after.objects == before.objects
        assert self.pool.counters().restored == before.objects

    @rule(keys=KEYS)
    def exists(self, keys: list[bytes]) -> None:
        there = self.pool.exists(keys)
        assert all(key in self.truth for key, found in zip(keys, there, strict=True) if found)
        assert self.pool.count_prefix(keys) == (there + [False]).index(False) or not self.sound

    @invariant()
    def bounds(self) -> None:
        used = sum(path.stat().st_size for path in self.folder.rglob("*") if path.is_file())
        assert used <= self.capacity + 4096, "locks and identity.json are the rest"
        assert sum(self.pool.exists(list(self.truth))) <= self.DRAM_PAGES + self.SLOTS

    @invariant()
    def an_observer_knows_all_of_it(self) -> None:
        assert self.follower.faults == []

    @invariant()
    def buffers_that_were_given_back_are_the_callers(self) -> None:
        assert all(np.all(buffer == 0xA5) for buffer in self.given_back)


class RoomyPoolMachine(PoolMachine):
    """With one thread that writes several objects to SSD together."""

    DRAM_PAGES = 9
    SLOTS = 12
    DEMOTE_THREADS = 1


TestPool = PoolMachine.TestCase
TestPool.settings = settings(max_examples=40, stateful_step_count=25, deadline=None)
TestRoomyPool = RoomyPoolMachine.TestCase
TestRoomyPool.settings = settings(max_examples=15, stateful_step_count=25, deadline=None)
