"""The catalogue of the SSD tier: which object lies in which slot, so that a restart finds it again.

Only the process that owns the directory opens a catalogue.  It may lag behind (by about 100 ms after a kill) and may
even lie, since a slot can be reused before its old row is gone: whatever it restores is verified on load (law L1), so
that the worst outcome is a miss.
"""

from __future__ import annotations

import logging
import sqlite3
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

from umbp_connectors.pool import catalogue_files
from umbp_connectors.pool.catalogue_schema import COLUMNS, FORMAT_VERSION, TABLES, TYPED
from umbp_connectors.pool.durability import Durability
from umbp_connectors.pool.pending import Batch, PendingWords
from umbp_connectors.pool.salvage import StoredRow, salvage
from umbp_core.errors import StateError, TierUnavailable
from umbp_core.ops import CHECKSUM_BYTES

logger = logging.getLogger(__name__)

_BATCH_ROWS = 256
"""Rows per transaction; bounds the write-ahead log together with the checkpoint interval."""
_BATCH_SECONDS = 0.1
_PAGE_BYTES = 4096
_CHECKPOINT_PAGES = 128
_LEAST_PAGES = 16
"""An empty catalogue needs five."""

NOTHING: Mapping[str, bytes] = MappingProxyType({})


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


class Catalogue:
    """Rows of objects in one SQLite file (write-ahead log), written behind by one thread.

    ``identity`` (32 bytes) says whose objects these are; a file with another identity, format, number of ``ranks``
    or ``slot_bytes`` is moved aside.  ``slots`` bounds the rows: one object per slot.  ``max_bytes`` bounds the file
    with its log; what does not fit is not recorded.  ``durability`` is the slab's.  ``about`` is written down for
    tools that read the file without knowing whose it is; it decides nothing.

    :meth:`record` and :meth:`forget` never wait for the disk.  At most ``max_pending`` unwritten records are kept;
    those beyond are dropped and counted, which costs hits after a restart and nothing else.  A forgotten key is never
    dropped, and the last word on a key or slot wins whatever was queued before.
    """

    def __init__(
        self,
        path: str | Path,
        identity: bytes,
        ranks: int,
        *,
        slots: int,
        slot_bytes: int = 0,
        max_bytes: int = 0,
        max_pending: int = 65536,
        durability: Durability = "batched",
        about: Mapping[str, bytes] = NOTHING,
    ) -> None:
        self.path = Path(path)
        self._ranks = ranks
        self._slots = slots
        self._max_bytes = max_bytes
        self._meta = {
            "format": str(FORMAT_VERSION).encode(),
            "identity": identity,
            "ranks": str(ranks).encode(),
            "slot_bytes": str(slot_bytes).encode(),
        }
        self._about = about
        # With FULL every transaction is on the device when it has ended, with NORMAL those before a checkpoint are.
        self._synchronous = "NORMAL" if durability == "relaxed" else "FULL"
        self._connection: sqlite3.Connection | None = None
        self._thread: threading.Thread | None = None
        self._changed = threading.Condition()
        self._pending: PendingWords[CatalogueRow] = PendingWords(max_pending)
        self._sealed = 0
        self._written = 0
        self._lost = False
        self._closing = False
        self._broken = False
        self._use = 0
        self._dropped = 0
        self._warned = False

    @property
    def dropped(self) -> int:
        """Records that were not written, since the queue was full or the disk refused them."""
        with self._changed:
            return self._dropped

    @property
    def bytes_used(self) -> int:
        """Bytes on disk: the file, its log and an earlier file that was moved aside."""
        return catalogue_files.bytes_of(self.path)

    @property
    def _spare(self) -> int:
        """Bytes that other catalogues, and what was moved aside, may take."""
        return self._max_bytes // 3 if self._max_bytes else 1 << 62

    def open(self) -> list[CatalogueRow]:
        """Open or create the file, start the writer, and return the rows, least recently recorded first.

        Rows for slots that do not exist (any more) or with malformed checksums are left out and forgotten.  A file
        that cannot be read is moved aside to ``<name>.corrupt-<n>`` with one warning; then the list has what could
        still be read of it.
        Raises ``TierUnavailable`` when not even an empty file can be made.
        """
        if self._connection is not None:
            raise StateError(f"{self.path} is already open")
        if not self.path.parent.is_dir():
            raise self._unavailable(FileNotFoundError(f"{self.path.parent} is not a folder"))
        try:
            rows = self._read()
        except _UNREADABLE as error:
            self._abandon()
            if not self.path.exists() or "locked" in str(error):
                raise self._unavailable(error) from error
            found = salvage(self.path, self._meta)
            catalogue_files.move_aside(self.path, error, self._spare, len(found))
            rows = self._read_fresh(found)
        self._closing = False
        self._thread = threading.Thread(target=self._write_behind, name="umbp-catalogue", daemon=True)
        self._thread.start()
        return rows

    def record(self, rows: Iterable[CatalogueRow]) -> None:
        """These objects are in these slots now, whose earlier ones are forgotten already.

        Any thread; does not wait for the disk.
        """
        with self._changed:
            idle = not self._pending
            for row in rows:
                self._check(row)
                if self._broken or not self._pending.record(row.key, row):
                    self._dropped += 1
                    self._lost = True
            self._wake(idle)

    def forget(self, keys: Iterable[bytes]) -> None:
        """These objects are not on SSD any more.  Any thread; does not wait for the disk."""
        with self._changed:
            idle = not self._pending
            for key in () if self._broken else keys:
                self._pending.forget(key)
            self._wake(idle)

    def flush(self, timeout: float) -> bool:
        """Wait until everything recorded and forgotten before is committed, for at most ``timeout`` seconds.

        True when it is; false when time ran out, the catalogue is closed, or something was dropped since the last
        flush.
        """
        return self.wait_written(self.seal(), timeout)

    def seal(self) -> int:
        """Begin what :meth:`flush` does; the barrier to :meth:`wait_written` for."""
        with self._changed:
            self._sealed = self._pending.seal()
            self._changed.notify_all()
            return self._sealed

    def wait_written(self, barrier: int, timeout: float) -> bool:
        """Wait until everything before ``barrier`` is committed; as :meth:`flush`."""
        with self._changed:
            self._changed.wait_for(lambda: self._written >= barrier or self._broken or self._thread is None, timeout)
            lost, self._lost = self._lost, False
            return self._written >= barrier and not lost

    def close(self, timeout: float = 10.0) -> None:
        """Write what is pending (for at most ``timeout`` seconds) and close; idempotent."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
            thread = self._thread
        if thread is None:
            return
        thread.join(timeout)
        if thread.is_alive():
            logger.warning("%s: the disk does not answer; what was not written is not found after a restart", self.path)
            return
        with self._changed:
            self._thread = None
            self._changed.notify_all()
        self._abandon()

    # -- opening

    def _read(self, found: Sequence[StoredRow] = ()) -> list[CatalogueRow]:
        """What the file has and what is ``found`` elsewhere, the most recent first, as far as it fits."""
        connection = self._connect()
        (tables,) = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
        if tables == 0:
            self._create(connection)
        self._verify(connection)
        connection.executemany("INSERT OR REPLACE INTO meta VALUES (?, ?)", self._about.items())
        connection.execute(f"DELETE FROM objects WHERE NOT ({TYPED})")
        rows = self._rows(connection)
        self._bound(connection)
        if not found:
            return rows
        self._refill(connection, found)
        return self._rows(connection)

    def _refill(self, connection: sqlite3.Connection, found: Sequence[StoredRow]) -> None:
        for start in range(0, len(found), _BATCH_ROWS):
            try:
                connection.execute("BEGIN IMMEDIATE")
                connection.executemany(
                    "INSERT OR IGNORE INTO objects VALUES (?, ?, ?, ?, ?, ?)", found[start : start + _BATCH_ROWS]
                )
                connection.execute("COMMIT")
            except sqlite3.OperationalError:  # it is full
                if connection.in_transaction:
                    connection.execute("ROLLBACK")
                return

    def _rows(self, connection: sqlite3.Connection) -> list[CatalogueRow]:
        """Those that can be used; the others are deleted."""
        rows: list[CatalogueRow] = []
        spoilt: list[tuple[bytes]] = []
        for *columns, last_used in connection.execute(f"SELECT {COLUMNS} FROM objects ORDER BY last_used"):
            row = CatalogueRow(*columns)
            self._use = max(self._use, last_used)
            if self._is_sound(row):
                rows.append(row)
            else:
                spoilt.append((row.key,))
        connection.executemany("DELETE FROM objects WHERE key = ?", spoilt)
        return rows

    def _read_fresh(self, found: Sequence[StoredRow]) -> list[CatalogueRow]:
        try:
            return self._read(found)
        except _UNREADABLE as error:
            self._abandon()
            raise self._unavailable(error) from error

    def _unavailable(self, error: Exception) -> TierUnavailable:
        return TierUnavailable(
            f"{self.path}: the SSD tier's catalogue cannot be used ({error}); "
            "check that the SSD folder is writable, has space and belongs to one engine only"
        )

    def _connect(self) -> sqlite3.Connection:
        connection = sqlite3.connect(self.path, timeout=0.0, isolation_level=None, check_same_thread=False)
        self._connection = connection
        connection.execute(f"PRAGMA page_size={_PAGE_BYTES}")
        # One owner, no readers: then the log needs no shared memory, and no reader can hold back its truncation.
        connection.execute("PRAGMA locking_mode=EXCLUSIVE")
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute(f"PRAGMA synchronous={self._synchronous}")
        connection.execute("PRAGMA cache_spill=OFF")
        connection.execute(f"PRAGMA wal_autocheckpoint={_CHECKPOINT_PAGES}")
        connection.execute(f"PRAGMA journal_size_limit={_CHECKPOINT_PAGES * _PAGE_BYTES}")
        return connection

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

    def _is_sound(self, row: CatalogueRow) -> bool:
        return 0 <= row.slot < self._slots and row.nbytes > 0 and len(row.checksums) == self._ranks * CHECKSUM_BYTES

    def _abandon(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()

    # -- writing

    def _wake(self, idle: bool) -> None:
        """Wake the writer when it has something to begin with or enough for a batch, not for every word between."""
        if idle or len(self._pending) >= _BATCH_ROWS:
            self._changed.notify_all()

    def _check(self, row: CatalogueRow) -> None:
        if not self._is_sound(row):
            raise StateError(
                f"object {row.key.hex()}: slot {row.slot} of {self._slots}, {row.nbytes} bytes and "
                f"{len(row.checksums)} bytes of checksums for {self._ranks} ranks cannot be recorded"
            )

    def _write_behind(self) -> None:
        """Thread: commit what is pending in batches, until closed."""
        try:
            self._write_until_closed()
        except Exception:  # thread top: whoever waits for a flush is told, and the pool goes on without a catalogue
            logger.exception("%s is not written any more; what is stored now is not found after a restart", self.path)
            with self._changed:
                self._broken = True
                self._changed.notify_all()

    def _write_until_closed(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._pending or self._closing or self._sealed > self._written)
                self._changed.wait_for(self._is_due, _BATCH_SECONDS)
                batch = self._pending.take(_BATCH_ROWS)
                if self._closing and not batch.words and batch.sealed == self._sealed == self._written:
                    return
            committed = not batch.words or self._commit(batch)
            with self._changed:
                if not committed:
                    self._dropped += sum(row is not None for _, row in batch.words)
                    self._lost = True
                self._written = batch.sealed
                self._changed.notify_all()

    def _is_due(self) -> bool:
        return self._closing or len(self._pending) >= _BATCH_ROWS or self._sealed > self._written

    def _commit(self, batch: Batch[CatalogueRow]) -> bool:
        connection = self._connection
        if connection is None:
            return False
        gone = [(key,) for key, row in batch.words if row is None]
        rows = [row for _, row in batch.words if row is not None]
        # Microseconds that only grow: the order of use, and for people the time.
        self._use = max(self._use, time.time_ns() // 1000)
        stamped = [(*row, self._use + number) for number, row in enumerate(rows, 1)]
        try:
            connection.execute("BEGIN IMMEDIATE")
            connection.executemany("DELETE FROM objects WHERE key = ?", gone)
            connection.executemany("INSERT OR REPLACE INTO objects VALUES (?, ?, ?, ?, ?, ?)", stamped)
            connection.execute("COMMIT")
        except sqlite3.Error as error:
            self._warn_once(error)
            if connection.in_transaction:
                connection.execute("ROLLBACK")
            return False
        self._use += len(rows)
        return True

    def _warn_once(self, error: sqlite3.Error) -> None:
        if not self._warned:
            self._warned = True
            logger.warning(
                "%s: %s; what cannot be recorded works now but is not found after a restart", self.path, error
            )


class _Mismatch(Exception):
    """A readable catalogue that belongs to something else."""


_UNREADABLE = (sqlite3.Error, UnicodeDecodeError, _Mismatch)
"""What reading a catalogue raises that cannot be used: also text that is none any more."""
