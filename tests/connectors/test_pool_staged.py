"""Puts in two steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from umbp_connectors.pool import copies
from umbp_connectors.pool.local import GetStatus, LocalPool, LocalPoolConfig, PutStatus
from umbp_core.errors import StateError
from umbp_core.ids import Identity, RankScope
from umbp_core.tiers import Tier

SIZE = 8192
KEYS = [b"key 0", b"key 1", b"key 2"]
OBJECTS = [bytes([number]) * SIZE for number in range(1, 4)]


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Callable[..., LocalPool]]:
    made: list[LocalPool] = []

    def make(pages: int = 8, **options: object) -> LocalPool:
        config = LocalPoolConfig(
            SIZE, pages * SIZE, tmp_path / "ssd", (1 << 20) + 20 * (SIZE + 768), prefault=False, patience_s=0, **options
        )  # type: ignore[arg-type]
        made.append(LocalPool(Identity("model", b"\x11" * 32, RankScope()), config))
        made[-1].open()
        return made[-1]

    yield make
    for pool in made:
        pool.close()


def _bytes_of(pool: LocalPool) -> list[bytes]:
    buffers = [bytearray(SIZE) for _ in KEYS]
    assert pool.get(KEYS, buffers) == [GetStatus.DRAM] * 3
    return [bytes(buffer) for buffer in buffers]


def _reserved(pool: LocalPool) -> int:
    stats = pool.stats(Tier.DRAM)
    assert stats is not None
    return stats.reserved


def test_nothing_is_there_before_it_is_published_and_all_of_it_after(make: Callable[..., LocalPool]) -> None:
    pool = make()
    staged = pool.stage(KEYS, OBJECTS)
    assert staged.statuses == [PutStatus.STORED] * 3
    assert pool.exists(KEYS) == [False] * 3
    assert pool.get(KEYS, [bytearray(SIZE) for _ in KEYS]) == [GetStatus.MISS] * 3
    assert pool.counters().puts[PutStatus.STORED] == 0
    assert staged.publish()
    assert staged.publish(), "again"
    staged.discard()
    assert _bytes_of(pool) == OBJECTS
    assert pool.counters().puts[PutStatus.STORED] == 3
    assert pool.flush(60)
    ssd = pool.stats(Tier.SSD)
    assert ssd is not None
    assert ssd.objects == 3, "what is published goes to SSD like any other"


def test_what_is_discarded_leaves_nothing(make: Callable[..., LocalPool]) -> None:
    pool = make()
    staged = pool.stage(KEYS, OBJECTS)
    assert _reserved(pool) == 3
    staged.discard()
    staged.discard()
    assert not staged.publish()
    assert _reserved(pool) == 0
    assert pool.exists(KEYS) == [False] * 3
    assert pool.put(KEYS, OBJECTS) == [PutStatus.STORED] * 3


def test_the_end_of_a_with_block_discards_what_was_not_published(make: Callable[..., LocalPool]) -> None:
    pool = make()
    with pool.stage(KEYS[:1], OBJECTS[:1]):
        assert _reserved(pool) == 1
    assert pool.exists(KEYS[:1]) == [False]
    with pool.stage(KEYS[:1], OBJECTS[:1]) as staged:
        assert staged.publish()
    assert pool.exists(KEYS[:1]) == [True]


def test_others_are_told_that_somebody_writes(make: Callable[..., LocalPool]) -> None:
    pool = make()
    pool.put(KEYS[:1], OBJECTS[:1])
    staged = pool.stage([*KEYS, KEYS[1], b"large"], [*OBJECTS, OBJECTS[2], bytes(SIZE + 1)])
    assert staged.statuses == [
        PutStatus.PRESENT,
        PutStatus.STORED,
        PutStatus.STORED,
        PutStatus.PRESENT,
        PutStatus.TOO_LARGE,
    ]
    assert pool.put(KEYS, OBJECTS[::-1]) == [PutStatus.PRESENT] * 3
    assert staged.publish()
    assert _bytes_of(pool) == OBJECTS


def test_what_is_staged_cannot_be_evicted(make: Callable[..., LocalPool]) -> None:
    pool = make(pages=4, copy_threads=1)
    staged = pool.stage(KEYS, OBJECTS)
    many = [b"other %d" % number for number in range(9)]
    assert PutStatus.STORED in pool.put(many, [bytes(SIZE)] * 9)
    full = pool.stage(many[:2], [bytes(SIZE)] * 2)
    assert PutStatus.NO_ROOM in pool.stage([b"more", b"most"], [bytes(SIZE)] * 2).statuses
    full.discard()
    assert staged.publish()
    assert _bytes_of(pool) == OBJECTS


def test_a_clear_voids_what_is_staged(make: Callable[..., LocalPool]) -> None:
    pool = make()
    staged = pool.stage(KEYS, OBJECTS)
    assert pool.clear() == 0
    assert not staged.publish()
    assert pool.exists(KEYS) == [False] * 3
    assert _reserved(pool) == 0
    assert pool.put(KEYS, OBJECTS) == [PutStatus.STORED] * 3
    assert _bytes_of(pool) == OBJECTS


def test_a_closed_pool_publishes_nothing(make: Callable[..., LocalPool]) -> None:
    pool = make()
    staged = pool.stage(KEYS, OBJECTS)
    pool.close()
    assert not staged.publish()
    pool.open()
    assert pool.exists(KEYS) == [False] * 3
    pool.close()
    with pytest.raises(StateError, match="not open"):
        pool.stage(KEYS, OBJECTS)


def test_a_stage_whose_time_is_over_keeps_no_page(make: Callable[..., LocalPool]) -> None:
    pool = make()
    staged = pool.stage(KEYS, OBJECTS, timeout=0)
    assert staged.statuses == [PutStatus.TIMED_OUT] * 3
    assert _reserved(pool) == 0


def test_a_stage_that_fails_gives_everything_back(
    make: Callable[..., LocalPool], monkeypatch: pytest.MonkeyPatch
) -> None:
    pool = make()

    def broken(*_: object) -> bytes:
        raise RuntimeError("a mistake of ours")

    with monkeypatch.context() as patch:
        patch.setattr(copies, "copy_checksummed", broken)
        with pytest.raises(RuntimeError, match="of ours"):
            pool.stage(KEYS, OBJECTS)
        with pytest.raises(RuntimeError, match="of ours"):
            pool.put(KEYS, OBJECTS)
    assert _reserved(pool) == 0
    assert pool.put(KEYS, OBJECTS) == [PutStatus.STORED] * 3


def test_a_large_stage_uses_all_threads(make: Callable[..., LocalPool]) -> None:
    size = 1 << 20
    pool = LocalPool(Identity("m", b"\x11" * 32, RankScope()), LocalPoolConfig(size, 12 * size, copy_threads=3))
    pool.open()
    objects = list(np.random.default_rng(1).integers(0, 256, (9, size), dtype=np.uint8))
    keys = [b"%d" % number for number in range(9)]
    staged = pool.stage(keys, objects)
    assert staged.statuses == [PutStatus.STORED] * 9
    assert staged.publish()
    buffers = [np.zeros(size, dtype=np.uint8) for _ in keys]
    assert pool.get(keys, buffers) == [GetStatus.DRAM] * 9
    assert all(map(np.array_equal, buffers, objects))
    pool.close()
