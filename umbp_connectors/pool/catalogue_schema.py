"""The tables of a catalogue, and a row of the one that has the objects."""

from __future__ import annotations

from typing import NamedTuple

FORMAT_VERSION = 1

TABLES = (
    "CREATE TABLE meta (name TEXT PRIMARY KEY, value BLOB NOT NULL) WITHOUT ROWID",
    """CREATE TABLE objects (
        key BLOB PRIMARY KEY,
        slot INTEGER NOT NULL UNIQUE,
        nbytes INTEGER NOT NULL,
        checksums BLOB NOT NULL,
        depth INTEGER NOT NULL,
        last_used INTEGER NOT NULL
    ) WITHOUT ROWID""",
)

COLUMNS = "key, slot, nbytes, checksums, depth, last_used"
"""Of ``objects``."""

MOST = 1 << 60
"""What no number of a row is above."""

_NUMBERS = ("slot", "nbytes", "depth", "last_used")
TYPED = " AND ".join(
    [f"typeof({column}) = 'blob'" for column in ("key", "checksums")]
    + [f"typeof({column}) = 'integer' AND +{column} BETWEEN 0 AND {MOST}" for column in _NUMBERS]
)
"""SQLite keeps any type in any column: a row is read only if its values are what they should be.

With the plus SQLite does not look for such rows in the index of the slots, which may be damaged where the table is not.
"""


class CatalogueRow(NamedTuple):
    """An object on SSD: ``key`` is the block key, ``slot`` the same on every rank.

    ``nbytes`` is the object's size, ``checksums`` holds 16 bytes per rank in world-rank order, ``depth`` is the
    block's place in its prefix chain.
    """

    key: bytes
    slot: int
    nbytes: int
    checksums: bytes
    depth: int = 0
