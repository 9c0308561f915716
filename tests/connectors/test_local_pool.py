"""The local pool through its public doors: batches, statuses, tiers, failures."""

from __future__ import annotations

import errno
import logging
import os
import sqlite3
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from tests.connectors.gate import Gate
from tests.connectors.pool_memory import memory_of
from umbp_connectors.pool import copies
from umbp_connectors.pool.checksums import copy_checksummed
from umbp_connectors.pool.local import GetStatus, LocalPool, LocalPoolConfig, PutStatus
from umbp_core.errors import ConfigError, StateError
from umbp_core.eviction import PrefixAwareLruPolicy
from umbp_core.ids import Identity, RankScope
from umbp_core.tiers import Tier

SIZE = 64 << 10
IDENTITY = Identity("model", b"\x11" * 32, RankScope())


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Callable[..., LocalPool]]:
    made: list[LocalPool] = []

    def make(identity: Identity = IDENTITY, pages: int = 8, slots: int = 0, **options: object) -> LocalPool:
        ssd = {"ssd_dir": tmp_path / "ssd", "ssd_capacity": (1 << 20) + slots * (SIZE + 768)} if slots else {}
        config = LocalPoolConfig(SIZE, pages * SIZE, patience_s=0, **ssd, **options)  # type: ignore[arg-type]
        made.append(LocalPool(identity, config))
        made[-1].open()
        return made[-1]

    yield make
    for pool in made:
        pool.close()


def _keys(count: int, label: str = "key") -> list[bytes]:
    return [f"{label}{index:033d}".encode() for index in range(count)]


def _objects(count: int, nbytes: int = SIZE, seed: int = 0) -> list[np.ndarray]:
    return list(np.random.default_rng(seed).integers(0, 256, (count, nbytes), dtype=np.uint8))


def _read(pool: LocalPool, keys: list[bytes], nbytes: int = SIZE) -> tuple[list[GetStatus], list[np.ndarray]]:
    buffers = [np.zeros(nbytes, dtype=np.uint8) for _ in keys]
    return pool.get(keys, buffers), buffers


def _same(left: list[np.ndarray], right: list[np.ndarray]) -> bool:
    return len(left) == len(right) and all(map(np.array_equal, left, right))


def test_private_memory_is_offered_to_nobody(make: Callable[..., LocalPool]) -> None:
    pool = make(slots=20, shared_memory=False)
    with pytest.raises(StateError, match="open it as shared"):
        pool.arena_offer()
    keys, objects = _keys(8), _objects(8)
    assert pool.put(keys, objects) == [PutStatus.STORED] * 8
    assert pool.flush(30)
    others = _keys(8, "other")
    assert pool.put(others, _objects(8, seed=1)) == [PutStatus.STORED] * 8
    statuses, found = _read(pool, keys)
    assert statuses == [GetStatus.SSD] * 8
    assert _same(found, objects)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("count", [1, 7, 100])
def test_what_was_put_comes_back(make: Callable[..., LocalPool], count: int, threads: int) -> None:
    pool = make(pages=count, copy_threads=threads)
    keys, objects = _keys(count), _objects(count)
    assert pool.exists(keys) == [False] * count
    assert pool.put(keys, objects) == [PutStatus.STORED] * count
    assert pool.exists(keys) == [True] * count
    assert pool.count_prefix([*keys, b"more"]) == count
    statuses, found = _read(pool, keys)
    assert statuses == [GetStatus.DRAM] * count
    assert _same(found, objects)


@pytest.mark.parametrize("nbytes", [1, 4095, 4096, 4097, SIZE])
def test_every_kind_of_buffer_and_size(make: Callable[..., LocalPool], nbytes: int) -> None:
    pool = make()
    data = os.urandom(nbytes)
    forms = [data, bytearray(data), memoryview(data), np.frombuffer(data, dtype=np.uint8)]
    keys = _keys(len(forms))
    assert pool.put(keys, forms) == [PutStatus.STORED] * len(forms)
    targets = [bytearray(nbytes), memoryview(bytearray(nbytes)), np.empty(nbytes, np.uint8), bytearray(nbytes)]
    assert pool.get(keys, targets) == [GetStatus.DRAM] * len(forms)
    assert all(bytes(target) == data for target in targets)


def test_arrays_of_any_type_and_shape_are_their_bytes(make: Callable[..., LocalPool]) -> None:
    pool = make()
    data = np.arange(600, dtype=np.float32).reshape(20, 30)
    assert pool.put([b"key"], [data]) == [PutStatus.STORED]
    target = np.zeros((30, 20), dtype=np.int32)
    assert pool.get([b"key"], [target]) == [GetStatus.DRAM]
    assert target.tobytes() == data.tobytes()
    with pytest.raises(ValueError, match="not contiguous"):
        pool.put([b"other"], [data[:, ::2]])
    column = np.zeros((4, 8), dtype=np.uint8)[:, 3]
    with pytest.raises(ValueError, match="not contiguous"):
        pool.get([b"key"], [column])


def test_rows_that_make_no_sense_are_forgotten(make: Callable[..., LocalPool], tmp_path: Path) -> None:
    pool = make(slots=8)
    pool.put(_keys(2), _objects(2))
    pool.close()
    (path,) = (tmp_path / "ssd").rglob("catalogue-*.sqlite")
    connection = sqlite3.connect(path)
    with connection:
        connection.execute("UPDATE objects SET nbytes = ? WHERE slot = 0", (SIZE + 1,))
        connection.execute("UPDATE objects SET checksums = ? WHERE slot = 1", (b"short",))
        for key, nbytes, last_used in ((1, "many", 9), (2, 100, 1 << 62), (3, -1, 9)):
            values = (bytes([key]), key + 1, nbytes, bytes(16), 0, last_used)
            connection.execute("INSERT INTO objects VALUES (?, ?, ?, ?, ?, ?)", values)
    connection.close()
    again = make(slots=8)
    assert again.exists(_keys(2)) == [False, False]
    assert again.counters().restored == 0


def test_the_first_writer_wins(make: Callable[..., LocalPool]) -> None:
    pool = make(slots=16)
    first, second = _objects(2)
    assert pool.put([b"key", b"key"], [first, second]) == [PutStatus.STORED, PutStatus.PRESENT]
    assert pool.put([b"key"], [second]) == [PutStatus.PRESENT]
    assert pool.flush(60)
    pool.put(_keys(8), _objects(8, seed=1))
    assert pool.put([b"key"], [second]) == [PutStatus.PRESENT], "it is on SSD only by now"
    statuses, buffers = _read(pool, [b"key"])
    assert statuses == [GetStatus.SSD]
    assert np.array_equal(buffers[0], first)


def test_sizes_must_match(make: Callable[..., LocalPool]) -> None:
    pool = make()
    statuses = pool.put(_keys(3), [b"", bytes(SIZE + 1), b"data"])
    assert statuses == [PutStatus.TOO_LARGE, PutStatus.TOO_LARGE, PutStatus.STORED]
    assert pool.get(_keys(3), [bytearray(4), bytearray(4), bytearray(5)]) == [
        GetStatus.MISS,
        GetStatus.MISS,
        GetStatus.SIZE_MISMATCH,
    ]


def test_a_batch_that_is_larger_than_the_tier_keeps_its_end(make: Callable[..., LocalPool]) -> None:
    pool = make(pages=20, copy_threads=1)
    keys, objects = _keys(50), _objects(50)
    assert pool.put(keys, objects) == [PutStatus.STORED] * 50
    held = pool.exists(keys)
    assert sum(held) == 20
    statuses, found = _read(pool, keys)
    assert [status.hit for status in statuses] == held
    assert all(np.array_equal(a, b) for a, b, hit in zip(found, objects, held, strict=True) if hit)


def test_what_is_used_stays(make: Callable[..., LocalPool]) -> None:
    pool = make(pages=4)
    pool.put(_keys(4), _objects(4))
    _read(pool, _keys(1))
    pool.put([b"new"], _objects(1, seed=1))
    assert pool.exists([*_keys(4), b"new"]) == [True, False, True, True, True]


def test_depth_counts_with_the_prefix_aware_policy(make: Callable[..., LocalPool]) -> None:
    pool = make(pages=4, eviction=PrefixAwareLruPolicy)
    pool.put(_keys(4), _objects(4), depths=[0, 1, 2, 3])
    pool.put([b"new"], _objects(1, seed=1))
    assert pool.exists(_keys(4)) == [True, True, True, False]


def test_two_identities_share_nothing(make: Callable[..., LocalPool]) -> None:
    pool = make(slots=8)
    pool.put([b"key"], _objects(1))
    assert pool.flush(60)
    pool.close()
    for other in (
        Identity("another model", IDENTITY.layout, IDENTITY.rank),
        Identity(IDENTITY.namespace, b"\x22" * 32, IDENTITY.rank),
        Identity(IDENTITY.namespace, IDENTITY.layout, RankScope(tp_rank=1, tp_size=2)),
    ):
        fresh = make(other, slots=8)
        assert fresh.exists([b"key"]) == [False]
        fresh.close()


def test_dram_copies_reach_ssd_and_come_back(make: Callable[..., LocalPool]) -> None:
    pool = make(pages=8, slots=40)
    keys, objects = _keys(30), _objects(30)
    for start in range(0, 30, 6):
        pool.put(keys[start : start + 6], objects[start : start + 6])
        assert pool.flush(60)
    assert pool.exists(keys) == [True] * 30
    statuses, found = _read(pool, keys[:6])
    assert statuses == [GetStatus.SSD] * 6
    assert _same(found, objects[:6])
    assert _read(pool, keys[:6])[0] == [GetStatus.DRAM] * 6, "they were promoted"
    counters = pool.counters()
    assert counters.demoted == 30
    assert counters.gets[GetStatus.SSD] == 6


def test_bounds_hold_exactly(make: Callable[..., LocalPool], tmp_path: Path) -> None:
    pool = make(pages=5, slots=9)
    for start in range(0, 60, 4):
        keys = _keys(60)[start : start + 4]
        pool.put(keys, _objects(4, seed=start))
        pool.flush(60)
        _read(pool, _keys(start + 1)[-8:])
        used = sum(path.stat().st_size for path in (tmp_path / "ssd").rglob("*") if path.is_file())
        assert used <= (1 << 20) + 9 * (SIZE + 768) + 4096
    dram, ssd = pool.stats(Tier.DRAM), pool.stats(Tier.SSD)
    assert dram is not None
    assert ssd is not None
    assert (dram.total_pages, ssd.total_pages) == (5, 9)
    assert sum(pool.exists(_keys(60))) <= 14


def test_a_flipped_bit_in_dram_is_a_miss_and_the_ssd_copy_helps(make: Callable[..., LocalPool]) -> None:
    pool = make(slots=8)
    objects = _objects(2)
    pool.put(_keys(1), objects[:1])
    assert pool.flush(60)
    memory_of(pool)[:] ^= 1
    statuses, found = _read(pool, _keys(1))
    assert statuses == [GetStatus.SSD]
    assert _same(found, objects[:1])
    assert _read(pool, _keys(1))[0] == [GetStatus.DRAM]


def test_a_flipped_bit_in_dram_alone_is_a_miss(make: Callable[..., LocalPool]) -> None:
    pool = make()
    objects = _objects(1)
    pool.put([b"key"], objects)
    memory_of(pool)[0, 77] ^= 4
    assert _read(pool, [b"key"])[0] == [GetStatus.CORRUPT]
    assert pool.exists([b"key"]) == [False]
    assert pool.put([b"key"], objects) == [PutStatus.STORED]
    assert _same(_read(pool, [b"key"])[1], objects)


@pytest.mark.parametrize("direct_io", [True, False])
def test_flipped_bits_in_the_slab_are_misses(make: Callable[..., LocalPool], tmp_path: Path, direct_io: bool) -> None:
    pool = make(slots=16, direct_io=direct_io)
    keys, objects = _keys(8), _objects(8)
    pool.put(keys, objects)
    assert pool.flush(60)
    pool.close()
    (slab,) = (tmp_path / "ssd").rglob("slab-*.bin")
    with slab.open("r+b") as file:
        for slot in range(0, 8, 2):
            file.seek(slot * SIZE + 100 * slot)
            byte = file.read(1)[0]
            file.seek(-1, os.SEEK_CUR)
            file.write(bytes([byte ^ 8]))
    again = make(slots=16, direct_io=direct_io)
    assert again.exists(keys) == [True] * 8
    statuses, found = _read(again, keys)
    assert sorted(status.value for status in statuses) == ["corrupt"] * 4 + ["ssd"] * 4
    for status, target, original in zip(statuses, found, objects, strict=True):
        assert np.array_equal(target, original) == status.hit
    assert again.exists(keys) == [status.hit for status in statuses]


def test_unreadable_slots_are_misses(make: Callable[..., LocalPool], monkeypatch: pytest.MonkeyPatch) -> None:
    pool = make(slots=8)
    pool.put(_keys(2), _objects(2))
    assert pool.flush(60)
    pool.close()
    again = make(slots=8)

    def broken(*_: object) -> int:
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(os, "preadv", broken)
        assert _read(again, _keys(2))[0] == [GetStatus.CORRUPT] * 2
    assert again.exists(_keys(2)) == [False, False]


@pytest.mark.parametrize(
    ("number", "warning"), [(errno.ENOSPC, "written to SSD for a while"), (errno.EIO, "DRAM only")]
)
def test_a_disk_that_refuses_writes_leaves_dram_working(
    make: Callable[..., LocalPool],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    number: int,
    warning: str,
) -> None:
    pool = make(slots=8, demote_threads=1)

    def broken(*_: object) -> int:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch, caplog.at_level(logging.WARNING):
        patch.setattr(os, "pwritev", broken)
        assert pool.put(_keys(1), _objects(1)) == [PutStatus.STORED]
        pool.flush(60)
    assert warning in caplog.text
    assert pool.counters().demotions_failed == 1
    assert _read(pool, _keys(1))[0] == [GetStatus.DRAM]
    ssd = pool.stats(Tier.SSD)
    assert ssd is not None
    assert (ssd.objects, ssd.reserved) == (0, 0)


def test_a_mistake_of_ours_does_not_end_demotion(
    make: Callable[..., LocalPool], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pool = make(slots=8, demote_threads=1)

    def broken(*_: object) -> int:
        raise RuntimeError("a mistake of ours")

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwritev", broken)
        pool.put(_keys(1), _objects(1))
        pool.flush(60)
    assert "stays in DRAM only" in caplog.text
    pool.put([b"next"], _objects(1))
    assert pool.flush(60)
    ssd = pool.stats(Tier.SSD)
    assert ssd is not None
    assert (ssd.objects, ssd.reserved, pool.counters().demotions_failed) == (1, 0, 1)


def test_an_ssd_folder_that_cannot_be_used_costs_one_warning(
    make: Callable[..., LocalPool], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "ssd").write_text("a file")
    with caplog.at_level(logging.WARNING):
        pool = make(slots=8)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "the SSD tier is off" in caplog.text
    assert pool.put(_keys(1), _objects(1)) == [PutStatus.STORED]
    assert pool.stats(Tier.SSD) is None
    assert pool.flush(1)


def test_a_second_pool_on_the_same_folder_works_without_ssd(
    make: Callable[..., LocalPool], caplog: pytest.LogCaptureFixture
) -> None:
    make(slots=8)
    with caplog.at_level(logging.WARNING):
        second = make(slots=8)
    assert f"in use by process {os.getpid()}" in caplog.text
    assert second.put(_keys(1), _objects(1)) == [PutStatus.STORED]


def test_ranks_of_one_namespace_share_the_capacity(make: Callable[..., LocalPool], tmp_path: Path) -> None:
    ranks = [
        make(Identity("model", b"\x11" * 32, RankScope(tp_rank=rank, tp_size=2)), slots=40, rank=rank, ranks=2)
        for rank in range(2)
    ]
    for pool in ranks:
        pool.put(_keys(4), _objects(4))
        assert pool.flush(60)
        ssd = pool.stats(Tier.SSD)
        assert ssd is not None
        assert ssd.objects == 4
    used = sum(path.stat().st_size for path in (tmp_path / "ssd").rglob("*") if path.is_file())
    assert used <= (1 << 20) + 40 * (SIZE + 768)


@pytest.mark.parametrize("dram", [0, SIZE - 1])
def test_a_dram_tier_without_room_for_one_object_is_a_configuration_error(dram: int) -> None:
    with pytest.raises(ConfigError, match="does not hold one object"):
        LocalPool(IDENTITY, LocalPoolConfig(SIZE, dram)).open()


def test_life(make: Callable[..., LocalPool]) -> None:
    pool = make()
    with pytest.raises(StateError, match="already open"):
        pool.open()
    pool.close()
    pool.close()
    for call in (
        lambda: pool.put([b"k"], [b"data"]),
        lambda: pool.get([b"k"], [bytearray(4)]),
        lambda: pool.exists([b"k"]),
        lambda: pool.flush(1),
        pool.clear,
        pool.counters,
    ):
        with pytest.raises(StateError, match="not open"):
            call()
    pool.open()
    assert pool.exists([b"k"]) == [False]


def test_arguments_must_match(make: Callable[..., LocalPool]) -> None:
    pool = make()
    with pytest.raises(ValueError, match="do not match"):
        pool.put([b"a", b"b"], [b"data"])
    with pytest.raises(ValueError, match="do not match"):
        pool.put([b"a"], [b"data"], depths=[])
    with pytest.raises(ValueError, match="as many buffers"):
        pool.get([b"a", b"b"], [bytearray(4)])
    with pytest.raises(ValueError, match="can be written"):
        pool.get([b"a"], [b"data"])
    assert pool.put([], []) == []
    assert pool.get([], []) == []


def test_clear_forgets_everything_for_good(make: Callable[..., LocalPool]) -> None:
    pool = make(slots=8)
    pool.put(_keys(4), _objects(4))
    assert pool.flush(60)
    assert pool.clear() == 8
    assert pool.exists(_keys(4)) == [False] * 4
    pool.close()
    assert make(slots=8).exists(_keys(4)) == [False] * 4


def test_close_waits_for_calls_under_way(make: Callable[..., LocalPool], monkeypatch: pytest.MonkeyPatch) -> None:
    pool, gate = make(copy_threads=1), Gate(copy_checksummed)
    monkeypatch.setattr(copies, "copy_checksummed", gate)
    statuses: list[PutStatus] = []
    writer = threading.Thread(target=lambda: statuses.extend(pool.put([b"key"], [b"data"])))
    writer.start()
    gate.wait_until_held()
    closer = threading.Thread(target=pool.close)
    closer.start()
    closer.join(0.05)
    assert closer.is_alive()
    gate.open()
    writer.join(60)
    closer.join(60)
    assert statuses == [PutStatus.STORED]
    assert not closer.is_alive()


def test_a_call_that_does_not_end_does_not_hold_up_a_close(
    make: Callable[..., LocalPool], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pool, gate = make(copy_threads=1), Gate(copy_checksummed)
    monkeypatch.setattr(copies, "copy_checksummed", gate)
    statuses: list[PutStatus] = []
    writer = threading.Thread(target=lambda: statuses.extend(pool.put([b"key"], [b"data"])))
    writer.start()
    gate.wait_until_held()
    pool.close(timeout=0)
    assert "calls are under way" in caplog.text
    gate.open()
    writer.join(60)
    assert statuses == [PutStatus.STORED], "its memory stayed valid for as long as it needed it"


def test_many_threads_at_once_never_see_wrong_bytes(make: Callable[..., LocalPool]) -> None:
    pool = make(pages=12, slots=30)
    objects = _objects(64)
    for start in range(0, 30, 6):  # some are on SSD only, however slow the disk is later
        pool.put(_keys(64)[start : start + 6], objects[start : start + 6])
        assert pool.flush(60)
    wrong: list[int] = []
    hits: list[GetStatus] = []

    def work(seed: int) -> None:
        order = np.random.default_rng(seed)
        for _ in range(40):
            picked = order.choice(64, 5, replace=False).tolist()
            keys = [_keys(64)[index] for index in picked]
            pool.put(keys, [objects[index] for index in picked])
            statuses, found = _read(pool, keys)
            hits.extend(status for status in statuses if status.hit)
            for index, status, target in zip(picked, statuses, found, strict=True):
                if status.hit and not np.array_equal(target, objects[index]):
                    wrong.append(index)
                if status is GetStatus.CORRUPT:
                    wrong.append(index)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert not wrong
    assert {GetStatus.DRAM, GetStatus.SSD} == set(hits)
    assert pool.flush(60)
    dram, ssd = pool.stats(Tier.DRAM), pool.stats(Tier.SSD)
    assert dram is not None
    assert ssd is not None
    assert (dram.pinned, dram.reserved, ssd.pinned, ssd.reserved) == (0, 0, 0, 0)


def test_what_sizes_cost_is_measured(make: Callable[..., LocalPool]) -> None:
    pool = make(pages=4)
    assert pool.put([b"a", b"b"], [bytes(100), bytes(SIZE)]) == [PutStatus.STORED] * 2
    stats = pool.stats(Tier.DRAM)
    assert stats is not None
    assert (stats.total_pages - stats.free_pages, stats.objects, stats.nbytes) == (2, 2, SIZE + 100)
    pool.clear()
    stats = pool.stats(Tier.DRAM)
    assert stats is not None
    assert stats.nbytes == 0
