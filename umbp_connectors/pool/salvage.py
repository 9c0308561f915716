"""Reads what can still be read of a damaged catalogue.

A page of the file that is lost takes its own objects along and no others.  Rows may lie, like any row of a catalogue:
what they lead to is verified on load (law L1).
"""

from __future__ import annotations

import contextlib
import sqlite3
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from umbp_connectors.pool.catalogue_schema import COLUMNS, TYPED

_MOST_S = 10.0
"""A disk may take its time over each page that it cannot read; the start waits no longer than this."""
_DAMAGE = (sqlite3.Error, UnicodeDecodeError)
_SLOT, _LAST_USED = 1, 5
"""Places among the columns."""
_OBJECTS = f"SELECT {COLUMNS} FROM objects WHERE {TYPED}"

StoredRow = tuple[Any, ...]
"""The values of ``COLUMNS``."""


def salvage(path: Path, meta: Mapping[str, bytes]) -> list[StoredRow]:
    """The objects in the catalogue at ``path`` that can be read, the most recently recorded first.

    None when it does not say, or not that it is the one that ``meta`` describes.  The caller holds the folder, and
    nobody has the catalogue open.  Nothing is raised for what cannot be read.
    """
    deadline = time.monotonic() + _MOST_S
    rows: dict[bytes, StoredRow] = {}
    with contextlib.suppress(*_DAMAGE), contextlib.closing(_opened(path)) as connection:
        found = dict(connection.execute("SELECT name, value FROM meta"))
        if any(found.get(name) != value for name, value in meta.items()):
            return []
        for order in ("ASC", "DESC"):
            rows.update((row[0], row) for row in _readable(connection, f"{_OBJECTS} ORDER BY key {order}", ()))
        slots = {row[_SLOT] for row in rows.values()}
        for slot in _slots(connection):
            if time.monotonic() >= deadline:
                break
            if slot not in slots:
                rows.update((row[0], row) for row in _readable(connection, f"{_OBJECTS} AND slot = ?", (slot,)))
    return sorted(rows.values(), key=lambda row: int(row[_LAST_USED]), reverse=True)


def _opened(path: Path) -> sqlite3.Connection:
    connection = sqlite3.connect(path, timeout=0.0, isolation_level=None)
    connection.execute("PRAGMA locking_mode=EXCLUSIVE")
    return connection


def _slots(connection: sqlite3.Connection) -> Iterator[int]:
    """Those in use, as their index knows them without the table, from either end up to where it is damaged itself."""
    for order in ("ASC", "DESC"):
        for (slot,) in _readable(connection, f"SELECT slot FROM objects ORDER BY slot {order}", ()):
            yield slot


def _readable(connection: sqlite3.Connection, statement: str, values: StoredRow) -> Iterator[StoredRow]:
    """What ``statement`` finds, up to where it meets damage."""
    with contextlib.suppress(*_DAMAGE):
        yield from connection.execute(statement, values)
