"""Reads what lies in an SSD folder without touching it, also while an engine uses it.

An engine keeps its catalogue locked, therefore it is copied and the copy is read: what is seen is some moment of the
last tenths of a second.  Slabs are opened for reading.  Nothing here takes a lock that an engine would wait for.
"""

from __future__ import annotations

import contextlib
import shutil
import sqlite3
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from umbp_connectors.pool.capacity import LOCKS, read_identity
from umbp_connectors.pool.locks import is_locked, unusable
from umbp_connectors.pool.slab import ALIGNMENT, SlabFile
from umbp_core.errors import ConfigError, StateError, TierUnavailable, TransferError
from umbp_core.ids import IDENTITY_BYTES
from umbp_core.ops import CHECKSUM_BYTES

_TRIES = 20
"""Copies until one is of a single moment; an engine writes for some milliseconds ten times a second at most."""
_COUNTERS_END = 1 << 48
"""``last_used`` below this counts records (files of early releases), above it are microseconds."""


@dataclass(frozen=True, slots=True)
class StoredObject:
    """A row of a catalogue.  ``written`` is in seconds since 1970, or ``None`` where the file does not say."""

    key: bytes
    slot: int
    nbytes: int
    checksums: bytes
    depth: int
    written: float | None


@dataclass(frozen=True, slots=True)
class StoredCatalogue:
    """One catalogue of a folder and what it says about itself: whose ``identity`` (a digest) its objects have.

    ``ranks`` share it; each has its ``layouts`` and ``prefixes`` entry (32 bytes), where the file says so.  ``folders``
    are the ranks', with a slab each, unless it is ``striped``: then a slot has the parts of all of them side by side.
    ``in_use`` says that a running engine owns it.
    """

    path: Path
    identity: bytes
    namespace: str
    ranks: int
    slot_bytes: int
    layouts: tuple[bytes, ...]
    prefixes: tuple[bytes, ...]
    folders: tuple[Path, ...]
    in_use: bool

    @property
    def name(self) -> str:
        """How people tell it from the others: its path below the folder."""
        return "/".join(self.path.parts[-3:] if self.path.parent.name.startswith("rank") else self.path.parts[-2:])

    @property
    def striped(self) -> bool:
        """Whether the ranks share not only the catalogue but each slot, as in a daemon."""
        return self.ranks > 1 and len(self.folders) == 1 and self.path.parent == self.folders[0]

    def part(self, stored: StoredObject, rank: int) -> slice:
        """Which of the bytes of an object are those of ``rank``."""
        if not self.striped:
            return slice(0, stored.nbytes)
        each = self.slot_bytes // self.ranks
        return slice(rank * each, stored.nbytes - (self.ranks - 1 - rank) * each)

    def slab(self, rank: int = 0) -> SlabFile:
        """The slab of a rank, open for reading; the caller closes it.

        Raises ``TierUnavailable`` when it is not there: a plug-in may hold the slots.
        """
        rank = 0 if self.striped else rank
        if rank >= len(self.layouts):
            raise TierUnavailable(f"{self.path} does not say where the bytes of rank {rank} are")
        path = self.folders[rank] / f"slab-{self.layouts[rank].hex()[:12]}.bin"
        try:
            slots = path.stat().st_size // self.slot_bytes
        except OSError as error:
            raise TierUnavailable(f"{path} cannot be read ({error.strerror}); a plug-in may hold the slots") from error
        if slots < 1:
            raise TierUnavailable(f"{path} is shorter than one slot")
        slab = SlabFile(path, self.slot_bytes, slots)
        slab.open(read_only=True)
        return slab

    def objects(self) -> list[StoredObject]:
        """Its rows, the longest ago written first.  Raises ``TierUnavailable`` when it cannot be read."""
        with _copied(self.path) as connection:
            found = connection.execute(
                "SELECT key, slot, nbytes, checksums, depth, last_used FROM objects ORDER BY last_used"
            ).fetchall()
        return [
            StoredObject(key, slot, nbytes, checksums, depth, used / 1e6 if used >= _COUNTERS_END else None)
            for key, slot, nbytes, checksums, depth, used in found
        ]


def read_object(slab: SlabFile, stored: StoredObject) -> bytearray:
    """The bytes of one object, not verified.  Raises ``TransferError`` when they cannot be had."""
    whole = bytearray(-(-stored.nbytes // ALIGNMENT) * ALIGNMENT)
    try:
        slab.read_into(stored.slot, whole)
    except StateError as error:
        raise TransferError(f"slot {stored.slot} is not in {slab.path}, or too small for the object") from error
    return whole[: stored.nbytes]


def checksum_of(stored: StoredObject, rank: int) -> bytes:
    """What the bytes of ``rank`` are to hash to."""
    return stored.checksums[rank * CHECKSUM_BYTES : (rank + 1) * CHECKSUM_BYTES]


def find_catalogues(ssd_dir: Path) -> list[StoredCatalogue]:
    """Every catalogue of ours below ``ssd_dir``, those that cannot be read left out.

    Raises ``ConfigError`` when there is no such folder, ``TierUnavailable`` when it cannot be listed.
    """
    if not ssd_dir.is_dir():
        raise ConfigError(f"{ssd_dir} is no folder; name the SSD folder with --dir or ssd_dir")
    try:
        homes = [home for home in sorted(ssd_dir.iterdir()) if home.is_dir() and not home.is_symlink()]
    except OSError as error:
        raise unusable(ssd_dir, error) from error
    found: list[StoredCatalogue] = []
    for home in homes:
        identity = read_identity(home)
        if identity is not None:
            namespace = str(identity.get("namespace", ""))
            for path in sorted([*home.glob("catalogue-*.sqlite"), *home.glob("rank*/catalogue-*.sqlite")]):
                found += _described(path, namespace)
    return found


def unreadable_catalogues(ssd_dir: Path) -> list[Path]:
    """Catalogues that an engine moved aside, or that cannot be read."""
    readable = {catalogue.path for catalogue in find_catalogues(ssd_dir)}
    files = [*ssd_dir.glob("*/catalogue-*.sqlite*"), *ssd_dir.glob("*/rank*/catalogue-*.sqlite*")]
    return sorted(path for path in files if ".corrupt-" in path.name or _is_lost(path, readable))


def _is_lost(path: Path, readable: set[Path]) -> bool:
    return path.suffix == ".sqlite" and path not in readable


def _described(path: Path, namespace: str) -> Iterator[StoredCatalogue]:
    try:
        with _copied(path) as connection:
            meta = dict(connection.execute("SELECT name, value FROM meta").fetchall())
        ranks, slot_bytes = int(meta["ranks"]), int(meta["slot_bytes"])
    except (TierUnavailable, KeyError, ValueError, TypeError):
        return
    own = path.parent.name.startswith("rank")
    home = path.parent.parent if own else path.parent
    layouts = _split(meta.get("layouts", b""))
    writers = [int(part) for part in bytes(meta.get("writers", b"")).split(b",") if part.isdigit()]
    folders = (path.parent,) if own else tuple(home / f"rank{rank}" for rank in writers or range(ranks))
    locks = (folder / name for folder in {path.parent, *folders} for name in LOCKS)
    in_use = any(is_locked(lock) for lock in locks)
    (whose, *_) = *_split(meta.get("identity", b"")), b""
    yield StoredCatalogue(
        path, whose, namespace, ranks, slot_bytes, layouts, _split(meta.get("prefixes", b"")), folders, in_use
    )


def _split(joined: object) -> tuple[bytes, ...]:
    data = joined if isinstance(joined, bytes) else b""
    return tuple(data[start : start + IDENTITY_BYTES] for start in range(0, len(data), IDENTITY_BYTES))


@contextlib.contextmanager
def _copied(path: Path) -> Iterator[sqlite3.Connection]:
    """A connection to a copy of the catalogue at ``path`` and its log, as of one moment."""
    with tempfile.TemporaryDirectory(prefix="umbp-catalogue-") as folder:
        copy = Path(folder) / "copy.sqlite"
        try:
            if not any(_copy(path, copy) for _ in range(_TRIES)):
                raise TierUnavailable(f"{path} is written all the time; try again")
            connection = sqlite3.connect(copy, isolation_level=None)
        except (OSError, sqlite3.Error) as error:
            raise TierUnavailable(f"{path} cannot be read ({error})") from error
        with contextlib.closing(connection):
            try:
                (verdict,) = connection.execute("PRAGMA quick_check(1)").fetchone()
                if verdict != "ok":
                    raise TierUnavailable(f"{path} cannot be read ({verdict})")
                yield connection
            except sqlite3.Error as error:
                raise TierUnavailable(f"{path} cannot be read ({error})") from error


def _copy(path: Path, copy: Path) -> bool:
    """Copy file and log; false when they changed meanwhile."""
    log, copied_log = path.with_name(f"{path.name}-wal"), copy.with_name(f"{copy.name}-wal")
    before = _state(path), _state(log)
    copied_log.unlink(missing_ok=True)
    shutil.copyfile(path, copy)
    if before[1] is not None:
        shutil.copyfile(log, copied_log)
    return (_state(path), _state(log)) == before


def _state(path: Path) -> tuple[int, int] | None:
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    return found.st_mtime_ns, found.st_size
