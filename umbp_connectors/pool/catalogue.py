"""The catalogue of the SSD tier: which object lies in which slot, so that a restart finds it again.

Only the process that owns the directory opens a catalogue.  It may lag behind (by about 100 ms after a kill) and may
even lie, since a slot can be reused before its old row is gone: whatever it restores is verified on load (law L1), so
that the worst outcome is a miss.
"""

from __future__ import annotations

import enum
import logging
import sqlite3
import threading
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

from umbp_connectors.pool import catalogue_files
from umbp_connectors.pool.catalogue_file import BATCH_ROWS, CatalogueFile
from umbp_connectors.pool.catalogue_schema import FORMAT_VERSION, CatalogueRow
from umbp_connectors.pool.durability import Durability
from umbp_connectors.pool.pending import Batch, PendingWords
from umbp_core.errors import StateError

logger = logging.getLogger(__name__)

_BATCH_SECONDS = 0.1
_RETRY_SECONDS = 0.5
"""How long a disk that did not even take that something is forgotten is left alone."""

NOTHING: Mapping[str, bytes] = MappingProxyType({})


class _Outcome(enum.Enum):
    """What was written of a batch."""

    ALL = enum.auto()
    NO_RECORD = enum.auto()
    """That its keys have no rows any more."""
    NOTHING = enum.auto()


class Catalogue:
    """Rows of objects in one SQLite file (write-ahead log), written behind by one thread.

    ``identity`` (32 bytes) says whose objects these are; a file with another identity, format, number of ``ranks``
    or ``slot_bytes`` is moved aside.  ``slots`` bounds the rows: one object per slot.  ``max_bytes`` bounds the file
    with its log; what does not fit is not recorded.  ``durability`` is the slab's.  ``about`` is written down for
    tools that read the file without knowing whose it is; it decides nothing.

    :meth:`record` and :meth:`forget` never wait for the disk.  At most ``max_pending`` unwritten records are kept;
    those beyond are dropped and counted, which costs hits after a restart and nothing else.  A forgotten key is never
    dropped while the catalogue is open, whatever the disk says, and the last word on a key or slot wins whatever was
    queued before.
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
        meta = {
            "format": str(FORMAT_VERSION).encode(),
            "identity": identity,
            "ranks": str(ranks).encode(),
            "slot_bytes": str(slot_bytes).encode(),
        }
        self._file = CatalogueFile(self.path, meta, about, ranks, slots, max_bytes, durability != "relaxed")
        self._thread: threading.Thread | None = None
        self._changed = threading.Condition()
        self._pending: PendingWords[CatalogueRow] = PendingWords(max_pending)
        self._sealed = 0
        self._written = 0
        self._failures = 0
        self._unrecorded: set[bytes] = set()
        self._closing = False
        self._broken = False
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

    def open(self) -> list[CatalogueRow]:
        """Open or create the file, start the writer, and return the rows, least recently recorded first.

        Rows for slots that do not exist (any more) or with malformed checksums are left out and forgotten.  A file
        that cannot be read is moved aside to ``<name>.corrupt-<n>`` with one warning; then the list has what could
        still be read of it.
        Raises ``TierUnavailable`` when not even an empty file can be made.
        """
        if self._file.connection is not None:
            raise StateError(f"{self.path} is already open")
        rows = self._file.open()
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
                    self._unrecorded.add(row.key)
                else:
                    self._unrecorded.discard(row.key)
            self._wake(idle)

    def forget(self, keys: Iterable[bytes]) -> None:
        """These objects are not on SSD any more.  Any thread; does not wait for the disk."""
        with self._changed:
            idle = not self._pending
            for key in keys:
                self._unrecorded.discard(key)
                if not self._broken:
                    self._pending.forget(key)
            self._wake(idle)

    def forget_all(self) -> None:
        """No object is on SSD any more.  Any thread; does not wait for the disk, which has as little to do for many."""
        with self._changed:
            idle = not self._pending
            self._unrecorded.clear()
            if not self._broken:
                self._pending.forget_all()
            self._wake(idle)

    def flush(self, timeout: float) -> bool:
        """Wait until everything recorded and forgotten before is committed, for at most ``timeout`` seconds.

        True when it is; false when time ran out, the disk refused something, the catalogue is closed, or something is
        not recorded that should be.
        """
        return self.wait_written(self.seal(), timeout) and not self.unrecorded()

    def unrecorded(self) -> set[bytes]:
        """Objects whose record was dropped: a restart does not find them."""
        with self._changed:
            return set(self._unrecorded)

    def seal(self) -> int:
        """Begin what :meth:`flush` does; the barrier to :meth:`wait_written` for."""
        with self._changed:
            self._sealed = self._pending.seal()
            self._changed.notify_all()
            return self._sealed

    def wait_written(self, barrier: int, timeout: float) -> bool:
        """Wait until everything before ``barrier`` is committed, what was dropped excepted; whether it is.

        For at most ``timeout`` seconds, and no longer once the disk refuses something.
        """
        with self._changed:
            failures = self._failures
            self._changed.wait_for(
                lambda: self._written >= barrier or self._failures > failures or self._broken or self._thread is None,
                timeout,
            )
            return self._written >= barrier

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
        self._file.close()

    def _wake(self, idle: bool) -> None:
        """Wake the writer when it has something to begin with or enough for a batch, not for every word between."""
        if idle or len(self._pending) >= BATCH_ROWS:
            self._changed.notify_all()

    def _check(self, row: CatalogueRow) -> None:
        if not self._file.is_sound(row):
            raise StateError(
                f"object {row.key.hex()}: slot {row.slot}, {row.nbytes} bytes and "
                f"{len(row.checksums)} bytes of checksums cannot be recorded"
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
                batch = self._pending.take(BATCH_ROWS)
                if self._closing and not self._says(batch) and batch.sealed == self._sealed == self._written:
                    return
            outcome = self._commit(batch)
            with self._changed:
                self._settle(batch, outcome)
                self._changed.notify_all()
                if outcome is _Outcome.NOTHING and not self._changed.wait_for(lambda: self._closing, _RETRY_SECONDS):
                    continue
                if outcome is _Outcome.NOTHING:
                    self._broken = True
                    return

    def _settle(self, batch: Batch[CatalogueRow], outcome: _Outcome) -> None:
        if outcome is not _Outcome.ALL:
            for key, row in batch.words:
                if row is not None:
                    self._dropped += 1
                    if key not in self._pending:
                        self._unrecorded.add(key)
        if outcome is _Outcome.NOTHING:
            self._failures += 1
            self._pending.give_back(batch)
        else:
            self._written = batch.sealed

    @staticmethod
    def _says(batch: Batch[CatalogueRow]) -> bool:
        """Whether there is something to write."""
        return bool(batch.words) or batch.everything

    def _is_due(self) -> bool:
        return self._closing or len(self._pending) >= BATCH_ROWS or self._sealed > self._written

    def _commit(self, batch: Batch[CatalogueRow]) -> _Outcome:
        """Write ``batch``; when there is no room for its records, at least that what they replace is gone."""
        rows = [row for _, row in batch.words if row is not None]
        everything = batch.everything
        if not self._says(batch):
            return _Outcome.ALL
        if self._wrote([key for key, row in batch.words if row is None], rows, everything):
            return _Outcome.ALL
        if rows and self._wrote([key for key, _ in batch.words], [], everything):
            return _Outcome.NO_RECORD
        return _Outcome.NOTHING

    def _wrote(self, gone: Sequence[bytes], rows: Sequence[CatalogueRow], everything: bool) -> bool:
        try:
            self._file.commit(gone, rows, everything)
        except sqlite3.Error as error:
            self._warn_once(error)
            return False
        return True

    def _warn_once(self, error: sqlite3.Error) -> None:
        if not self._warned:
            self._warned = True
            logger.warning(
                "%s: %s; what cannot be recorded works now but is not found after a restart", self.path, error
            )
