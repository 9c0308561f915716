"""A damaged catalogue costs the objects that stood where the damage is, and no others."""

from __future__ import annotations

import contextlib
import logging
import os
import random
import shutil
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from umbp_connectors.pool.catalogue import Catalogue
from umbp_connectors.pool.catalogue_schema import CatalogueRow
from umbp_connectors.pool.salvage import salvage

IDENTITY = b"i" * 32
SLOTS = 4096
PAGE = 4096
ON_TWO_PAGES = 2 * PAGE // 64
"""Rows, at most: each has a key of 32 bytes, 16 bytes of checksum and numbers."""


@pytest.fixture(scope="module")
def stored() -> list[CatalogueRow]:
    """As many objects as make the file's tree three levels high."""
    chance = random.Random(5)
    return [
        CatalogueRow(chance.randbytes(32), slot, 4096, chance.randbytes(16), chance.randrange(64))
        for slot in chance.sample(range(SLOTS), SLOTS)
    ]


@pytest.fixture(scope="module")
def original(stored: list[CatalogueRow], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Their catalogue, closed."""
    path = tmp_path_factory.mktemp("whole") / "catalogue-0.sqlite"
    with opened(path) as catalogue:
        catalogue.record(stored)
        assert catalogue.flush(60)
    return path


@pytest.fixture
def path(original: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return Path(shutil.copy(original, tmp_path))


@contextlib.contextmanager
def opened(path: Path, max_bytes: int = 0) -> Iterator[Catalogue]:
    catalogue = Catalogue(path, IDENTITY, 1, slots=SLOTS, max_bytes=max_bytes)
    assert catalogue.open() == []
    yield catalogue
    catalogue.close()


def reopened(path: Path, max_bytes: int = 0) -> list[CatalogueRow]:
    catalogue = Catalogue(path, IDENTITY, 1, slots=SLOTS, max_bytes=max_bytes)
    rows = catalogue.open()
    catalogue.close()
    return rows


def leaves(path: Path, table: str) -> list[int]:
    """The numbers, from 0, of the pages at the bottom of the tree of ``table`` or of an index."""
    found: list[int] = []
    content = path.read_bytes()

    def walk(number: int) -> None:
        page = content[(number - 1) * PAGE : number * PAGE]
        if page[0] not in (2, 5):
            found.append(number - 1)
            return
        cells = int.from_bytes(page[3:5], "big")
        for cell in range(cells):
            place = int.from_bytes(page[12 + 2 * cell : 14 + 2 * cell], "big")
            walk(int.from_bytes(page[place : place + 4], "big"))
        walk(int.from_bytes(page[8:12], "big"))

    with contextlib.closing(sqlite3.connect(path)) as connection:
        ((root,),) = connection.execute("SELECT rootpage FROM sqlite_master WHERE name = ?", (table,)).fetchall()
    walk(root)
    return found


def lose(path: Path, page: int, content: bytes = bytes(PAGE)) -> None:
    with path.open("r+b") as file:
        file.seek(page * PAGE)
        file.write(content)


GARBAGE: dict[str, Callable[[], bytes]] = {
    "zeros": lambda: bytes(PAGE),
    "noise": lambda: b"\xfe" + os.urandom(PAGE - 1),
}


@pytest.mark.parametrize("kind", GARBAGE)
@pytest.mark.parametrize("place", [0.0, 0.4, 1.0])
def test_a_page_of_objects_takes_only_its_own_along(
    path: Path, stored: list[CatalogueRow], caplog: pytest.LogCaptureFixture, kind: str, place: float
) -> None:
    pages = leaves(path, "objects")
    lose(path, pages[int(place * (len(pages) - 1))], GARBAGE[kind]())
    with caplog.at_level(logging.WARNING):
        rows = reopened(path)
    kept = set(rows)
    assert kept <= set(stored)
    assert SLOTS - ON_TWO_PAGES <= len(rows) < SLOTS
    assert [row for row in stored if row in kept] == rows, "in the order in which they were recorded"
    (record,) = caplog.records
    assert f"the SSD tier starts with the {len(rows)} objects" in record.getMessage()
    assert reopened(path) == rows, "and from now on it is a catalogue like any other"


def test_pages_lost_here_and_there(path: Path, stored: list[CatalogueRow]) -> None:
    pages = leaves(path, "objects")
    for page in pages[3::9]:
        lose(path, page)
    rows = reopened(path)
    assert set(rows) <= set(stored)
    assert len(rows) >= SLOTS - len(pages[3::9]) * ON_TWO_PAGES
    assert len(rows) > SLOTS * 3 // 4


def test_without_the_index_of_slots_the_objects_are_all_there(path: Path, stored: list[CatalogueRow]) -> None:
    for page in leaves(path, "sqlite_autoindex_objects_2"):
        lose(path, page)
    assert reopened(path) == stored


def test_pages_of_objects_and_of_the_index(path: Path, stored: list[CatalogueRow]) -> None:
    """Between two lost pages only the index leads to objects; what neither leads to is gone."""
    objects, index = leaves(path, "objects"), leaves(path, "sqlite_autoindex_objects_2")
    lose(path, objects[len(objects) // 3])
    lose(path, objects[2 * len(objects) // 3])
    lose(path, index[len(index) // 2])
    rows = reopened(path)
    assert set(rows) <= set(stored)
    assert SLOTS - 3 * ON_TWO_PAGES <= len(rows) < SLOTS


def test_whose_objects_they_are_has_to_be_certain(path: Path) -> None:
    (page,) = leaves(path, "meta")
    lose(path, page)
    assert reopened(path) == []


def test_another_ones_objects_are_left_alone(path: Path) -> None:
    assert len(salvage(path, {"identity": IDENTITY})) == SLOTS
    assert salvage(path, {"identity": b"j" * 32}) == []


def test_no_more_than_may_be_is_kept(path: Path, stored: list[CatalogueRow]) -> None:
    """A file with less room than the damaged one takes the objects that were recorded last."""
    lose(path, leaves(path, "objects")[0])
    room = 1 << 20
    rows = reopened(path, max_bytes=room)
    assert 0 < len(rows) < SLOTS - ON_TWO_PAGES
    assert set(rows) <= set(stored[len(stored) // 2 :])
    assert sum(file.stat().st_size for file in path.parent.iterdir()) <= room
