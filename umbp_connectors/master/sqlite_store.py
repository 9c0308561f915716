"""The embedded store of a master's nodes: one SQLite file in a folder that belongs to one master.

Whatever lies in the folder, the master starts: a file that cannot be used is moved aside with one sentence (law L9).
One that cannot be read today, as its disk is full or fails, is left where it is, and the store is not available.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import re
import sqlite3
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

from umbp_connectors.master.settings import MasterConfig
from umbp_connectors.master.stores import StoreUnavailable
from umbp_connectors.sqlite_errors import is_blameless

logger = logging.getLogger(__name__)

FORMAT_VERSION = 1
_FILE = "nodes.sqlite"
_LOCK = "lock"
_PARTS = ("", "-wal", "-shm", "-journal")
_BUSY_SECONDS = 1.0


class SqliteBackend:
    """A table of nodes in ``folder`` (write-ahead log, synced at every write), made when it is not there.

    The folder is locked while it is open: a second master gets ``StoreUnavailable``.
    """

    name = "sqlite"

    def __init__(self, folder: Path) -> None:
        self.path = folder / _FILE
        self._lock: IO[str] | None = None
        self._connection: sqlite3.Connection | None = None

    def open(self) -> Sequence[tuple[str, bytes]]:
        """Lock the folder, open or create the file, and read everything."""
        if self._lock is None:
            self._lock = self._locked()
        try:
            return self._read()
        except (sqlite3.Error, _Foreign) as error:
            self._disconnect()
            self._move_aside(error)
        try:
            return self._read()
        except (sqlite3.Error, _Foreign) as error:
            raise self._unavailable(error) from error

    def write(self, words: Mapping[str, bytes | None]) -> None:
        """Apply ``words`` in one transaction."""
        kept = [(node_id, word) for node_id, word in words.items() if word is not None]
        gone = [(node_id,) for node_id, word in words.items() if word is None]
        if self._connection is None:
            raise self._unavailable(sqlite3.ProgrammingError("it is not open"))
        try:
            with self._connection as transaction:
                transaction.executemany("INSERT OR REPLACE INTO nodes VALUES (?, ?)", kept)
                transaction.executemany("DELETE FROM nodes WHERE node_id = ?", gone)
        except sqlite3.Error as error:
            raise self._unavailable(error) from error

    def close(self) -> None:
        """Close the file and unlock the folder."""
        self._disconnect()
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def _locked(self) -> IO[str]:
        lock = None
        try:
            self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            lock = (self.path.parent / _LOCK).open("a+", encoding="ascii")
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            if lock is not None:
                lock.close()
            raise StoreUnavailable(
                f"the state folder {self.path.parent} belongs to a master that runs; give each its own by --state-dir"
            ) from error
        except OSError as error:
            if lock is not None:
                lock.close()
            raise self._unavailable(error) from error
        return lock

    def _read(self) -> Sequence[tuple[str, bytes]]:
        """Connect, check and read.  Raises ``sqlite3.Error`` or ``_Foreign``."""
        connection = sqlite3.connect(self.path, timeout=_BUSY_SECONDS, check_same_thread=False)
        self._connection = connection
        (version,) = connection.execute("PRAGMA user_version").fetchone()
        (tables,) = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
        fresh = version == 0 and tables == 0
        if version != FORMAT_VERSION and not fresh:
            raise _Foreign(f"its format is {version}, this release knows {FORMAT_VERSION}")
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = FULL")
        if fresh:
            with connection:
                connection.execute("CREATE TABLE nodes (node_id TEXT PRIMARY KEY, record BLOB NOT NULL) WITHOUT ROWID")
                connection.execute(f"PRAGMA user_version = {FORMAT_VERSION}")
        (verdict,) = connection.execute("PRAGMA quick_check(1)").fetchone()
        if verdict != "ok":
            raise _Foreign(str(verdict))
        rows = connection.execute("SELECT node_id, record FROM nodes").fetchall()
        return [(str(node_id), record if isinstance(record, bytes) else b"") for node_id, record in rows]

    def _move_aside(self, why: Exception) -> None:
        """Take the file out of the way, as ``nodes.sqlite.corrupt``, with one warning; an earlier one is replaced."""
        if not self.path.exists() or is_blameless(why, self.path):
            raise self._unavailable(why) from why
        aside = f"{_FILE}.corrupt"
        try:
            for part in _PARTS:
                with contextlib.suppress(FileNotFoundError):
                    self.path.with_name(_FILE + part).replace(self.path.with_name(aside + part))
        except OSError as error:
            raise self._unavailable(error) from error
        logger.warning(
            "umbp: %s cannot be used (%s) and was moved to %s; nodes are known again as they register",
            *(self.path, why, aside),
        )

    def _disconnect(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            with contextlib.suppress(sqlite3.Error):
                connection.close()

    def _unavailable(self, error: Exception) -> StoreUnavailable:
        why = (error.strerror or str(error)) if isinstance(error, OSError) else str(error)
        return StoreUnavailable(
            f"the nodes cannot be kept in {self.path} ({why}); name a folder that can be written by --state-dir"
        )


class _Foreign(Exception):
    """The file is not one of ours."""


def default_folder(config: MasterConfig, env: Mapping[str, str]) -> Path | None:
    """The folder of a master that was given none: below the user's state folder, by the address that it listens at.

    ``None`` when it listens at any free port, so that nobody would find it after a restart, or when there is no home.
    """
    name = config.native_socket.name if config.native_socket is not None else ""
    for endpoint in (config.native_endpoint, config.grpc_endpoint):
        name = str(endpoint) if endpoint is not None else name
    if name.endswith(":0"):
        return None
    root = env.get("XDG_STATE_HOME", "")
    home = env.get("HOME", "")
    if not Path(root).is_absolute():
        if not Path(home).is_absolute():
            return None
        root = f"{home}/.local/state"
    return Path(root) / "umbp" / f"master-{re.sub(r'[^A-Za-z0-9._-]', '_', name)}"
