"""Fewer slots where several ranks share a catalogue: every rank moves its parts, and the catalogue follows."""

from __future__ import annotations

import random
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from umbp_connectors.leader.ssd import SsdCatalogue, open_ssd_catalogue
from umbp_connectors.pool import refit
from umbp_connectors.pool.folder import RankSlab, open_rank_slab
from umbp_core.directory import Change, Copy, Directory, EventKind, TierSpace
from umbp_core.eviction import LruPolicy
from umbp_core.pages import PageAllocator
from umbp_core.tiers import Tier

SLOT = 8192
RANKS = 2
LAYOUTS = [bytes([0x11 * (rank + 1)]) * 32 for rank in range(RANKS)]
MANY, FEW = 24, 10

Objects = dict[bytes, int]
"""Which slot has which object, the latest last."""


def part_of(key: bytes, rank: int) -> bytes:
    return (key + b" of rank %d " % rank).ljust(SLOT, b".")


def capacity_for(slots: int) -> int:
    return RANKS * slots * (SLOT + 1024) + (1 << 20)


@contextmanager
def slabs(folder: Path, slots: int) -> Iterator[list[RankSlab]]:
    with ExitStack() as stack:
        opened = []
        for rank, layout in enumerate(LAYOUTS):
            slab = open_rank_slab(folder, "model", rank, layout, SLOT, capacity_for(slots), RANKS, patience_s=0)
            stack.callback(slab.close)
            opened.append(slab)
        yield opened


@contextmanager
def leader(folder: Path, opened: Sequence[RankSlab]) -> Iterator[SsdCatalogue]:
    slots = min(slab.slots for slab in opened)
    fitted = all(slab.fitted for slab in opened)
    made = open_ssd_catalogue(folder, "model", layouts=LAYOUTS, slots=slots, slot_bytes=[SLOT] * RANKS, fitted=fitted)
    assert made is not None
    try:
        yield made
    finally:
        made.close()


def store(folder: Path, objects: Objects) -> int:
    """A first life; how many slots it has."""
    with slabs(folder, MANY) as opened, leader(folder, opened) as catalogue:
        for key, slot in objects.items():
            for rank, slab in enumerate(opened):
                slab.slab.write_from(slot, part_of(key, rank))
            copy = Copy(Tier.SSD, (slot,), SLOT, bytes(16 * RANKS))
            catalogue.follow([Change(EventKind.ADDED, Tier.SSD, (key,), (copy,))])
        return opened[0].slots


def found(catalogue: SsdCatalogue, opened: Sequence[RankSlab]) -> list[bytes]:
    """What a leader finds; every rank's part has to be the right one."""
    directory = Directory([TierSpace(Tier.SSD, PageAllocator(SLOT, [catalogue.slots * SLOT]), LruPolicy())])
    catalogue.restore(directory)
    for key, copy in directory.copies(Tier.SSD):
        for rank, slab in enumerate(opened):
            back = bytearray(SLOT)
            slab.slab.read_into(copy.pages[0], back)
            assert back == part_of(key, rank), (key, rank)
    return directory.keys(Tier.SSD)


def scattered(seed: int, count: int) -> Objects:
    rng = random.Random(seed)
    return {b"key %d" % number: slot for number, slot in enumerate(rng.sample(range(MANY), count))}


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("count", [1, 5, FEW, 17, MANY])
def test_the_latest_stay_on_every_rank_wherever_they_lay(tmp_path: Path, seed: int, count: int) -> None:
    objects = scattered(seed, count)
    assert store(tmp_path, objects) >= MANY
    with slabs(tmp_path, FEW) as opened, leader(tmp_path, opened) as catalogue:
        assert all(slab.fitted for slab in opened)
        assert FEW <= catalogue.slots < MANY
        assert found(catalogue, opened) == list(objects)[-catalogue.slots :]
    with slabs(tmp_path, FEW) as opened, leader(tmp_path, opened) as catalogue:
        assert found(catalogue, opened) == list(objects)[-catalogue.slots :], "the catalogue did not follow"


def test_no_more_is_moved_than_a_start_can_wait_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    objects = scattered(5, MANY)
    store(tmp_path, objects)
    monkeypatch.setattr(refit, "_MOVED_BYTES", 3 * SLOT * RANKS)
    with slabs(tmp_path, FEW) as opened, leader(tmp_path, opened) as catalogue:
        stay = list(objects)[-catalogue.slots :]
        beyond = [key for key in stay if objects[key] >= catalogue.slots]
        assert len(beyond) > 3
        assert found(catalogue, opened) == [key for key in stay if key not in beyond[:-3]]


def test_more_slots_move_nothing(tmp_path: Path) -> None:
    objects = scattered(3, 20)
    store(tmp_path, objects)
    with slabs(tmp_path, 2 * MANY) as opened, leader(tmp_path, opened) as catalogue:
        assert found(catalogue, opened) == list(objects)


def test_ranks_that_moved_for_a_leader_that_never_came(tmp_path: Path) -> None:
    objects = scattered(1, 12)
    store(tmp_path, objects)
    with slabs(tmp_path, FEW):
        pass
    with slabs(tmp_path, FEW) as opened, leader(tmp_path, opened) as catalogue:
        assert found(catalogue, opened) == list(objects)[-catalogue.slots :]


def test_a_rank_whose_disk_refuses_keeps_the_catalogue_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    objects = scattered(2, MANY)
    store(tmp_path, objects)
    whole: Callable[..., bool] = refit._whole
    refused = iter([True, True, False])

    def refuse(*arguments: object) -> bool:
        return whole(*arguments) and next(refused, True)

    monkeypatch.setattr(refit, "_whole", refuse)
    with slabs(tmp_path, FEW) as opened:
        assert sorted(slab.fitted for slab in opened) == [False, True]


@pytest.mark.parametrize("harm", ["gone", "torn", "another layout"])
def test_without_the_catalogue_nothing_moves_and_nothing_is_raised(tmp_path: Path, harm: str) -> None:
    store(tmp_path, scattered(4, MANY))
    (path,) = tmp_path.rglob("catalogue-*.sqlite")
    if harm == "gone":
        path.unlink()
    elif harm == "torn":
        path.write_bytes(path.read_bytes()[:5000])
    else:
        connection = sqlite3.connect(path)
        connection.execute("UPDATE meta SET value = ? WHERE name = 'layouts'", (b"\x77" * 64,))
        connection.commit()
        connection.close()
    with slabs(tmp_path, FEW) as opened, leader(tmp_path, opened) as catalogue:
        assert not any(slab.fitted for slab in opened)
        assert catalogue.slots < MANY
