"""The SQLite file of a catalogue: how it is opened, whatever happened to it, and how it is written."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from umbp_connectors.pool import catalogue_files
from umbp_connectors.pool.catalogue_schema import COLUMNS, TABLES, TYPED, CatalogueRow
from umbp_connectors.pool.salvage import StoredRow, salvage
from umbp_connectors.sqlite_errors import FULL, is_blameless
from umbp_core.errors import StateError, TierUnavailable
from umbp_core.ops import CHECKSUM_BYTES

BATCH_ROWS = 256
"""Rows per transaction; bounds the write-ahead log together with the checkpoint interval."""
_PAGE_BYTES = 4096
_CHECKPOINT_PAGES = 128
_LEAST_PAGES = 16
"""An empty catalogue needs five."""


class CatalogueFile:
    """Rows of objects in the file at ``path``.  One thread at a time.

    ``meta`` says whose they are, ``about`` is written down beside it.  ``slots`` bounds the rows, which have a checksum
    for each of ``ranks``; ``max_bytes`` bounds the file with its log, where it is not 0.  With ``durable`` a
    transaction is on the device when it has ended.
    """

    def __init__(
        self,
        path: Path,
        meta: Mapping[str, bytes],
        about: Mapping[str, bytes],
        ranks: int,
        slots: int,
        max_bytes: int,
        durable: bool,
    ) -> None:
        self.path = path
        self._meta = meta
        self._about = about
        self._ranks = ranks
        self._slots = slots
        self._max_bytes = max_bytes
        # With FULL every transaction is on the device when it has ended, with NORMAL those before a checkpoint are.
        self._synchronous = "FULL" if durable else "NORMAL"
        self._use = 0
        self.connection: sqlite3.Connection | None = None

    def open(self) -> list[CatalogueRow]:
        """Open or create the file, and read its rows, least recently recorded first.

        Rows that are not sound are left out and deleted.  A file that cannot be read is moved aside with one warning;
        then the list has what could still be read of it.  Raises ``TierUnavailable`` when not even an empty file can be
        made, or when it is not the file's fault that it cannot be read: then it stays where it is.
        """
        if not self.path.parent.is_dir():
            raise self._unavailable(FileNotFoundError(f"{self.path.parent} is not a folder"))
        try:
            return self._read()
        except OSError as error:
            self.close()
            raise self._unavailable(error) from error
        except _UNREADABLE as error:
            self.close()
            if not self.path.exists() or is_blameless(error, self.path):
                raise self._unavailable(error) from error
            found = salvage(self.path, self._meta)
            catalogue_files.move_aside(self.path, error, self._spare, len(found))
        try:
            return self._read(found)
        except (*_UNREADABLE, OSError) as error:
            self.close()
            raise self._unavailable(error) from error

    def commit(self, gone: Sequence[bytes], rows: Sequence[CatalogueRow], everything: bool = False) -> None:
        """Delete the rows of the keys ``gone``, or ``everything``, then write ``rows``: all or nothing.

        Raises ``sqlite3.Error``.
        """
        # Microseconds that only grow: the order of use, and for people the time.
        self._use = max(self._use, time.time_ns() // 1000)
        stamped = [(*row, self._use + number) for number, row in enumerate(rows, 1)]
        self._transact(
            ("DELETE FROM objects", [()] if everything else []),
            ("DELETE FROM objects WHERE key = ?", [] if everything else [(key,) for key in gone]),
            ("INSERT OR REPLACE INTO objects VALUES (?, ?, ?, ?, ?, ?)", stamped),
        )
        self._use += len(rows)

    def is_sound(self, row: CatalogueRow) -> bool:
        """Whether there is such a slot, and a checksum for every rank."""
        return 0 <= row.slot < self._slots and row.nbytes > 0 and len(row.checksums) == self._ranks * CHECKSUM_BYTES

    def close(self) -> None:
        """Let the file go; idempotent."""
        connection, self.connection = self.connection, None
        if connection is not None:
            connection.close()

    @property
    def _spare(self) -> int:
        """Bytes that other catalogues, and what was moved aside, may take."""
        return self._max_bytes // 3 if self._max_bytes else 1 << 62

    def _opened(self) -> sqlite3.Connection:
        if self.connection is None:
            raise StateError(f"{self.path} is not open")
        return self.connection

    def _read(self, found: Sequence[StoredRow] = ()) -> list[CatalogueRow]:
        """What the file has and what is ``found`` elsewhere, the most recent first, as far as it fits."""
        connection = self._connect()
        (tables,) = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
        if tables == 0:
            self._create(connection)
        self._verify(connection)
        rows, spoilt = self._rows(connection)
        self._tidy(spoilt)
        self._bound(connection)
        if found:
            self._refill(found)
            rows, _ = self._rows(connection)
        return rows

    def _connect(self) -> sqlite3.Connection:
        connection = sqlite3.connect(self.path, timeout=0.0, isolation_level=None, check_same_thread=False)
        self.connection = connection
        connection.execute(f"PRAGMA page_size={_PAGE_BYTES}")
        # One owner, no readers: then the log needs no shared memory, and no reader can hold back its truncation.
        connection.execute("PRAGMA locking_mode=EXCLUSIVE")
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute(f"PRAGMA synchronous={self._synchronous}")
        connection.execute("PRAGMA cache_spill=OFF")
        connection.execute(f"PRAGMA wal_autocheckpoint={_CHECKPOINT_PAGES}")
        connection.execute(f"PRAGMA journal_size_limit={_CHECKPOINT_PAGES * _PAGE_BYTES}")
        return connection

    def _create(self, connection: sqlite3.Connection) -> None:
        self.path.chmod(0o600)
        connection.execute("BEGIN IMMEDIATE")
        for statement in TABLES:
            connection.execute(statement)
        connection.executemany("INSERT INTO meta VALUES (?, ?)", self._meta.items())
        connection.execute("COMMIT")

    def _verify(self, connection: sqlite3.Connection) -> None:
        found = dict(connection.execute("SELECT name, value FROM meta"))
        for name, value in self._meta.items():
            if found.get(name) != value:
                raise _Mismatch(f"its {name} is another one")
        (verdict,) = connection.execute("PRAGMA quick_check(1)").fetchone()
        if verdict != "ok":
            raise sqlite3.DatabaseError(verdict)

    def _rows(self, connection: sqlite3.Connection) -> tuple[list[CatalogueRow], list[bytes]]:
        """Those that can be used, and the keys of those that cannot."""
        rows: list[CatalogueRow] = []
        spoilt: list[bytes] = []
        for *columns, last_used in connection.execute(
            f"SELECT {COLUMNS} FROM objects WHERE {TYPED} ORDER BY last_used"
        ):
            row = CatalogueRow(*columns)
            self._use = max(self._use, last_used)
            if self.is_sound(row):
                rows.append(row)
            else:
                spoilt.append(row.key)
        return rows, spoilt

    def _tidy(self, spoilt: Sequence[bytes]) -> None:
        """Write down what the file is about, and delete the rows that cannot be used.

        A full disk, which has no room for that, does not keep anybody from what is stored.
        """
        try:
            self._transact(
                ("INSERT OR REPLACE INTO meta VALUES (?, ?)", list(self._about.items())),
                (f"DELETE FROM objects WHERE NOT ({TYPED})", [()]),
                ("DELETE FROM objects WHERE key = ?", [(key,) for key in spoilt]),
            )
        except sqlite3.OperationalError as error:
            if FULL not in str(error):
                raise

    def _bound(self, connection: sqlite3.Connection) -> None:
        """Keep the file so small that with its log and the other catalogues it stays within ``max_bytes``.

        The log holds at most what one checkpoint interval and one transaction write, the latter no more than the file.
        """
        if not self._max_bytes:
            return
        kept = catalogue_files.prune(self.path, self._spare)
        log = _CHECKPOINT_PAGES * _PAGE_BYTES
        pages = max(_LEAST_PAGES, (self._max_bytes - kept - log) // 2 // _PAGE_BYTES)
        (used,) = connection.execute("PRAGMA page_count").fetchone()
        if used > pages:
            connection.execute("VACUUM")
            connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        connection.execute(f"PRAGMA max_page_count={pages}")

    def _refill(self, found: Sequence[StoredRow]) -> None:
        for start in range(0, len(found), BATCH_ROWS):
            rows = found[start : start + BATCH_ROWS]
            try:
                self._transact(("INSERT OR IGNORE INTO objects VALUES (?, ?, ?, ?, ?, ?)", rows))
            except sqlite3.OperationalError as error:
                if FULL not in str(error):
                    raise
                return

    def _transact(self, *work: tuple[str, Sequence[Sequence[object]]]) -> None:
        """Execute each statement for each of its rows of values: all of it or nothing.  Raises ``sqlite3.Error``."""
        connection = self._opened()
        try:
            connection.execute("BEGIN IMMEDIATE")
            for statement, values in work:
                connection.executemany(statement, values)
            connection.execute("COMMIT")
        except sqlite3.Error:
            if connection.in_transaction:
                connection.execute("ROLLBACK")
            raise

    def _unavailable(self, error: Exception) -> TierUnavailable:
        return TierUnavailable(
            f"{self.path}: the SSD tier's catalogue cannot be used ({error}); "
            "check that the SSD folder is writable, has space and belongs to one engine only"
        )


class _Mismatch(Exception):
    """A readable catalogue that belongs to something else."""


_UNREADABLE = (sqlite3.Error, UnicodeDecodeError, _Mismatch)
"""What reading a catalogue raises that cannot be used: also text that is none any more."""
