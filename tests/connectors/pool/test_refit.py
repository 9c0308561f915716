"""Another capacity or slot size keeps what fits, in whatever slots it lay."""

from __future__ import annotations

import contextlib
import shutil
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.connectors.disk import Disk
from tests.connectors.pool_memory import memory_of
from umbp_connectors.pool.books import Filled
from umbp_connectors.pool.inspection import find_catalogues
from umbp_connectors.pool.local import GetStatus, LocalPool, LocalPoolConfig, PutStatus
from umbp_connectors.pool.maintenance import evict, verify
from umbp_connectors.pool.refit import Move, plan_moves
from umbp_core.ids import Identity, RankScope

IDENTITY = Identity("model", b"\x11" * 32, RankScope())
KEYS = [b"key %d" % number for number in range(24)]
SMALL, LARGE = 8192, 20480
Maker = Callable[..., LocalPool]


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Maker]:
    made: list[LocalPool] = []

    def make(size: int = SMALL, slots: int = 24, **options: object) -> LocalPool:
        capacity = (1 << 20) + slots * (size + 768)
        sizes = (size, 4 * size, tmp_path / "ssd", capacity)
        made.append(LocalPool(IDENTITY, LocalPoolConfig(*sizes, prefault=False, patience_s=0, **options)))  # type: ignore[arg-type]
        made[-1].open()
        return made[-1]

    yield make
    for pool in made:
        pool.close()


def object_of(key: bytes, nbytes: int) -> bytes:
    return (key * nbytes)[:nbytes]


def fill(pool: LocalPool, keys: list[bytes], nbytes: int = SMALL) -> None:
    for start in range(0, len(keys), 4):
        part = keys[start : start + 4]
        assert pool.put(part, [object_of(key, nbytes) for key in part]) == [PutStatus.STORED] * len(part)
        assert pool.flush(30)


def kept(pool: LocalPool, nbytes: int = SMALL) -> list[bytes]:
    """The keys that come, with the right bytes, from SSD."""
    found = []
    for key in KEYS:
        buffer = bytearray(nbytes)
        (status,) = pool.get([key], [buffer])
        if status is GetStatus.SSD:
            assert buffer == object_of(key, nbytes)
            found.append(key)
        else:
            assert status in (GetStatus.MISS, GetStatus.CORRUPT)
    return found


def leave_every_other(make: Maker, folder: Path) -> list[bytes]:
    """Fill 24 slots, then take half of the objects away: those in every other slot.  What stays."""
    pool = make()
    fill(pool, KEYS)
    pool.close()
    (catalogue,) = find_catalogues(folder)
    slot_of = {stored.key: stored.slot for stored in catalogue.objects()}
    assert evict(catalogue, [key for key in KEYS if slot_of[key] % 2 == 0]) == len(KEYS) // 2
    return [key for key in KEYS if slot_of[key] % 2]


def test_half_the_capacity_keeps_all_of_a_slab_that_is_half_full(make: Maker, tmp_path: Path) -> None:
    stay = leave_every_other(make, tmp_path / "ssd")
    pool = make(slots=12)
    assert sorted(kept(pool)) == sorted(stay)
    pool.close()
    (catalogue,) = find_catalogues(tmp_path / "ssd")
    assert verify(catalogue).problems == []


def test_of_more_than_fit_the_latest_stay(make: Maker) -> None:
    pool = make()
    fill(pool, KEYS)
    pool.close()
    pool = make(slots=8)
    assert kept(pool) == KEYS[-8:]


@pytest.mark.parametrize("direct_io", [True, False])
def test_smaller_slots_keep_what_is_not_too_large(make: Maker, direct_io: bool, tmp_path: Path) -> None:
    pool = make(LARGE, direct_io=direct_io)
    fill(pool, KEYS[:12])
    fill(pool, KEYS[12:16], LARGE)
    pool.close()
    pool = make(SMALL, direct_io=direct_io)
    assert kept(pool) == KEYS[:12]
    pool.close()
    (catalogue,) = find_catalogues(tmp_path / "ssd")
    assert verify(catalogue).problems == []
    assert not list(tmp_path.rglob("*.corrupt-*"))


@pytest.mark.parametrize("fragmented", [True, False])
def test_larger_slots_keep_as_many_as_there_are(make: Maker, tmp_path: Path, fragmented: bool) -> None:
    stay = KEYS
    if fragmented:
        stay = leave_every_other(make, tmp_path / "ssd")
    else:
        pool = make()
        fill(pool, KEYS)
        pool.close()
    pool = make(LARGE, slots=10)
    found = kept(pool)
    assert len(found) == 10
    assert set(found) <= set(stay)
    fill(pool, [key + b"!" for key in KEYS], LARGE)


def test_more_of_larger_slots_keep_everything(make: Maker) -> None:
    pool = make()
    fill(pool, KEYS)
    pool.close()
    assert kept(make(LARGE)) == KEYS


def test_there_and_back_again(make: Maker) -> None:
    pool = make(slots=40)
    fill(pool, KEYS)
    for size in (LARGE, SMALL, 3 * SMALL, SMALL, 4096 * 7, SMALL):
        pool.close()
        pool = make(size, slots=30)
        assert kept(pool) == KEYS, size


def test_objects_of_several_ranks_move_as_a_whole(make: Maker) -> None:
    prefixes = (bytes(32), b"\x02" * 32)
    pool = make(slots=24, prefixes=prefixes)
    stock = pool.stock()
    pages = memory_of(pool)
    for key in KEYS:
        (page,) = stock.take(1)
        pages[page] = np.frombuffer(object_of(key, SMALL), dtype=np.uint8)
        filled = Filled(page, key, SMALL, 0, pool.stripes.checksum(key, pages[page]))
        assert stock.publish([filled]) == [PutStatus.STORED]
        assert pool.flush(30)
    stock.close()
    pool.close()
    pool = make(slots=10, prefixes=prefixes)
    found = [key for key, there in zip(KEYS, pool.exists(KEYS), strict=True) if there]
    assert found == KEYS[-10:]
    pages = memory_of(pool)
    for key in found:
        loan = pool.lend([key], 10)
        (lent,) = loan.objects
        assert pages[lent.page].tobytes() == object_of(key, SMALL)
        loan.release()


@pytest.mark.parametrize("kind", ["read", "write"])
@pytest.mark.parametrize("size", [SMALL, LARGE])
def test_a_disk_that_refuses_in_the_middle_costs_the_rest(
    make: Maker, monkeypatch: pytest.MonkeyPatch, kind: str, size: int
) -> None:
    pool = make(4 * SMALL if size == SMALL else SMALL)
    fill(pool, KEYS)
    pool.close()
    with monkeypatch.context() as patch:
        disk = Disk(patch)
        disk.fail_after(6, kind)
        pool = make(size)
        disk.work()
        disk.fail_after(1 << 60, kind)
    found = kept(pool)
    assert 1 <= len(found) < len(KEYS)
    fill(pool, [key + b"!" for key in KEYS[:4]])


@pytest.mark.parametrize("size", [SMALL, LARGE])
def test_a_kill_before_the_catalogue_follows_costs_hits_only(make: Maker, tmp_path: Path, size: int) -> None:
    pool = make(4 * SMALL if size == SMALL else SMALL)
    fill(pool, KEYS)
    pool.close()
    (catalogue,) = tmp_path.rglob("catalogue-*.sqlite")
    shutil.copyfile(catalogue, tmp_path / "before")
    make(size).close()
    shutil.copyfile(tmp_path / "before", catalogue)
    pool = make(size)
    found = kept(pool)
    assert [key for key in KEYS if pool.exists([key])[0]] == found, "what did not verify is gone"
    pool.clear()
    fill(pool, KEYS[:4])


@pytest.mark.parametrize("spoil", [b"", b"not a database" * 1000, None])
def test_a_catalogue_that_cannot_be_read_starts_empty(make: Maker, tmp_path: Path, spoil: bytes | None) -> None:
    pool = make()
    fill(pool, KEYS)
    pool.close()
    (catalogue,) = tmp_path.rglob("catalogue-*.sqlite")
    if spoil is None:
        with contextlib.closing(sqlite3.connect(catalogue)) as connection, connection:
            connection.execute("UPDATE meta SET value = x'' WHERE name = 'slot_bytes'")
    else:
        catalogue.write_bytes(spoil)
    pool = make(LARGE, slots=10)
    assert kept(pool) == []
    fill(pool, KEYS[:4], LARGE)


@given(
    taken=st.sets(st.integers(0, 39), min_size=1),
    new=st.integers(1, 12),
    old=st.integers(1, 12),
    spare=st.integers(0, 5),
)
@settings(max_examples=400, deadline=None)
def test_no_move_overwrites_what_is_still_to_be_moved(taken: set[int], new: int, old: int, spare: int) -> None:
    """On a file of one cell for each byte, with as few slots as there are objects, or some more."""
    slots = len(taken) + spare
    length = min(old, new)
    file: dict[int, int] = {slot * old + at: slot for slot in taken for at in range(length)}
    stored = [(slot, length) for slot in taken]
    moves = list(plan_moves(stored, old, new, slots))
    place = {slot: slot for slot in taken} if old == new else {}
    for move in moves:
        assert move.nbytes == length
        assert [file[move.source * old + at] for at in range(length)] == [move.source] * length
        file.update({move.target * new + at: move.source for at in range(length)})
        place[move.source] = move.target
    assert sorted(place) == sorted(taken)
    assert len(set(place.values())) == len(place)
    assert all(0 <= target < slots for target in place.values())
    for slot, target in place.items():
        assert [file[target * new + at] for at in range(length)] == [slot] * length


def test_what_fits_where_it_lies_stays_there() -> None:
    assert list(plan_moves([(0, 4096), (7, 4096), (2, 4096)], 4096, 4096, 4)) == [Move(7, 1, 4096)]
