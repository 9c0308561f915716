"""Moves what a slab holds to where it fits after the configuration changed: fewer slots, or slots of another size.

Bytes are moved within the file, so that no more space is needed than the tier may have.  The catalogue follows in one
transaction.  Whoever is killed in between costs hits: a row then leads to other bytes, which do not verify.

Where several ranks share a catalogue that is their leader's, each moves what is in its own slab (:func:`move_within`),
and the leader has the catalogue follow when all have (:func:`follow_moves`).  Both read the same rows, so that both
come to the same moves.
"""

from __future__ import annotations

import contextlib
import logging
import mmap
import os
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from umbp_connectors.pool.buffers import round_up
from umbp_connectors.pool.catalogue_schema import TYPED
from umbp_connectors.pool.slab import ALIGNMENT

logger = logging.getLogger(__name__)

_LAYOUT_BYTES = 32
_MOVED_BYTES = 64 << 30
"""Of all ranks together, when slots become fewer."""
_WAIT_S = 2.0
"""How long a rank waits for others that read the same catalogue."""
_USED = -(1 << 60)
"""How many objects lie in a slot that has got its own: never none again, nor one."""
_UNUSABLE = (sqlite3.Error, OSError, LookupError, TypeError, ValueError)
"""What a catalogue that is not as it should be raises; it is its reader's matter then."""


@dataclass(frozen=True, slots=True)
class Move:
    """An object of ``nbytes`` from slot ``source`` of the old kind to slot ``target`` of the new kind."""

    source: int
    target: int
    nbytes: int


def refit(slab: Path, layout: bytes, slot_bytes: int, slots: int, direct_io: bool = True) -> None:
    """Fit what a catalogue beside ``slab`` knows of ``layout`` to ``slots`` slots of ``slot_bytes``.

    The most recently written objects stay, as many as there are slots.  The caller holds the folder, and nobody has
    the slab open.  What cannot be moved is forgotten; nothing is raised for it.
    """
    for path in _latest_first(slab.parent):
        with (
            contextlib.suppress(*_UNUSABLE),
            _opened(path) as connection,
        ):
            meta = dict(connection.execute("SELECT name, value FROM meta"))
            old_bytes = int(meta["slot_bytes"])
            # The parts of an object of several ranks lie where the size of its slot says.
            if meta["layouts"] == layout and (meta["ranks"] == b"1" or old_bytes == slot_bytes):
                _refit(connection, slab, old_bytes, slot_bytes, slots, direct_io)
                return


def move_within(slab: Path, rank: int, layout: bytes, slot_bytes: int, slots: int, direct_io: bool = True) -> bool:
    """Move what the catalogue of several ranks says to lie beyond slot ``slots`` of ``rank``'s ``slab`` to free slots.

    Whether the slab has everything where :func:`follow_moves` will say.  The caller holds the rank's folder, and nobody
    has the slab open.  Nothing is raised for what cannot be moved.
    """
    for path in _latest_first(slab.parent.parent):
        with (
            contextlib.suppress(*_UNUSABLE),
            contextlib.closing(sqlite3.connect(path, timeout=_WAIT_S, isolation_level=None)) as connection,
        ):
            (layouts,) = connection.execute("SELECT value FROM meta WHERE name = 'layouts'").fetchone()
            if layouts[_LAYOUT_BYTES * rank : _LAYOUT_BYTES * (rank + 1)] != layout:
                continue
            if slab.stat().st_size <= slots * slot_bytes:
                return True
            _, places = _fewer_slots(connection, slots)
            moves = iter([Move(source, target, slot_bytes) for source, target in places.items()])
            return len(list(_moved(slab, moves, slot_bytes, slot_bytes, direct_io))) == len(places)
    return False


def follow_moves(catalogue: Path, slots: int) -> None:
    """Let ``catalogue`` say where its objects are after every rank has done :func:`move_within`.

    The most recently written ones stay, as many as there are ``slots``.  Nothing is raised when that cannot be done.
    """
    if not catalogue.exists():
        return
    with contextlib.suppress(*_UNUSABLE), _opened(catalogue) as connection:
        gone, places = _fewer_slots(connection, slots)
        if not (gone or places):
            return
        connection.execute("BEGIN IMMEDIATE")
        connection.executemany("DELETE FROM objects WHERE key = ?", [(key,) for key in gone])
        moves = [(target, source) for source, target in places.items()]
        connection.executemany("UPDATE objects SET slot = ? WHERE slot = ?", moves)
        connection.execute("COMMIT")
        logger.info("%s: %d objects moved to other slots, %d had to go", catalogue, len(places), len(gone))


def _fewer_slots(connection: sqlite3.Connection, slots: int) -> tuple[list[bytes], dict[int, int]]:
    """The keys of what does not fit ``slots`` slots any more, and where what lies beyond them goes.

    An engine's start waits for that: no more is moved than a disk moves in about a minute.
    """
    (last,) = connection.execute("SELECT max(slot) FROM objects").fetchone()
    if last is None or last < slots:
        return [], {}
    meta = dict(connection.execute("SELECT name, value FROM meta"))
    most = _MOVED_BYTES // (int(meta["slot_bytes"]) * int(meta["ranks"]))
    rows = connection.execute(f"SELECT key, slot FROM objects WHERE {TYPED} ORDER BY last_used DESC, slot").fetchall()
    moves = plan_moves([(slot, 1) for _, slot in rows[:slots]], 1, 1, slots)
    places = {move.source: move.target for move in islice(moves, most)}
    gone = [key for number, (key, slot) in enumerate(rows) if number >= slots or (slot >= slots and slot not in places)]
    return gone, places


def _latest_first(folder: Path) -> list[Path]:
    with contextlib.suppress(OSError):
        return sorted(folder.glob("catalogue-*.sqlite"), key=lambda path: path.stat().st_mtime, reverse=True)
    return []


def plan_moves(stored: Sequence[tuple[int, int]], old_bytes: int, new_bytes: int, slots: int) -> Iterator[Move]:
    """In which order to move the objects ``stored`` (slot, bytes), at most ``slots`` of them, each into a slot.

    No move writes over an object that has not been moved yet, itself excepted.
    """
    if new_bytes <= old_bytes:
        yield from _closer(stored, old_bytes, new_bytes, slots)
    else:
        yield from _further(stored, old_bytes, new_bytes, slots)


def _closer(stored: Sequence[tuple[int, int]], old_bytes: int, new_bytes: int, slots: int) -> Iterator[Move]:
    """Slots that are not larger: everything moves towards the beginning, the first first."""
    if old_bytes == new_bytes:
        taken = {slot for slot, _ in stored}
        free = (slot for slot in range(slots) if slot not in taken)
        yield from (Move(slot, next(free), nbytes) for slot, nbytes in stored if slot >= slots)
        return
    for target, (slot, nbytes) in enumerate(sorted(stored)):
        yield Move(slot, target, nbytes)


def _further(stored: Sequence[tuple[int, int]], old_bytes: int, new_bytes: int, slots: int) -> Iterator[Move]:
    """Larger slots: first where nothing lies; where something lies in all of them, an object alone to its own place.

    There always is one that lies alone: no more objects than slots are left, each lies in two slots at most, and of
    those in the first slot that is left only one can reach beyond its end.
    """
    left = dict(sorted(stored))
    sources = list(left)
    lying = [0] * slots

    def slots_of(source: int) -> range:
        return range(source * old_bytes // new_bytes, min(slots, ((source + 1) * old_bytes - 1) // new_bytes + 1))

    for source in left:
        for target in slots_of(source):
            lying[target] += 1
    empty = [target for target in range(slots) if lying[target] == 0]
    single = [target for target in range(slots) if lying[target] == 1]
    while left:
        if empty:
            target = empty.pop()
            source = next(slot for slot in iter(sources.pop, None) if slot in left)
        else:
            target = next(slot for slot in iter(single.pop, None) if lying[slot] == 1)
            first, stop = target * new_bytes // old_bytes, ((target + 1) * new_bytes - 1) // old_bytes + 1
            source = next(slot for slot in range(first, stop) if slot in left)
        yield Move(source, target, left.pop(source))
        lying[target] = _USED
        for other in slots_of(source):
            lying[other] -= 1
            if lying[other] in (0, 1):
                (empty, single)[lying[other]].append(other)


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[sqlite3.Connection]:
    with contextlib.closing(sqlite3.connect(path, timeout=0.0, isolation_level=None)) as connection:
        connection.execute("PRAGMA locking_mode=EXCLUSIVE")
        yield connection


def _refit(
    connection: sqlite3.Connection, slab: Path, old_bytes: int, new_bytes: int, slots: int, direct: bool
) -> None:
    size = slab.stat().st_size if slab.exists() else 0
    if not size or old_bytes < ALIGNMENT or (old_bytes == new_bytes and size <= slots * new_bytes):
        return
    (verdict,) = connection.execute("PRAGMA quick_check(1)").fetchone()
    if verdict != "ok":
        return
    found = connection.execute(
        "SELECT key, slot, nbytes, checksums, depth, last_used FROM objects WHERE typeof(slot) = 'integer' AND "
        "typeof(nbytes) = 'integer' AND slot BETWEEN 0 AND ? AND nbytes BETWEEN 1 AND ? ORDER BY last_used DESC",
        (size // old_bytes - 1, new_bytes),
    ).fetchall()
    stored = {slot: round_up(nbytes, ALIGNMENT) for _, slot, nbytes, *_ in found[:slots]}
    places = {slot: slot for slot in stored if old_bytes == new_bytes and slot < slots}
    moves = plan_moves(list(stored.items()), old_bytes, new_bytes, slots)
    for move in _moved(slab, moves, old_bytes, new_bytes, direct):
        places[move.source] = move.target
    rows = [(key, places[slot], *rest) for key, slot, *rest in reversed(found[:slots]) if slot in places]
    connection.execute("BEGIN IMMEDIATE")
    connection.execute("DELETE FROM objects")
    connection.executemany("INSERT INTO objects VALUES (?, ?, ?, ?, ?, ?)", rows)
    connection.execute("UPDATE meta SET value = ? WHERE name = 'slot_bytes'", (str(new_bytes).encode(),))
    connection.execute("COMMIT")
    logger.info("%s: %d of %d objects fit %d slots of %d bytes", slab, len(rows), len(found), slots, new_bytes)


def _moved(slab: Path, moves: Iterator[Move], old_bytes: int, new_bytes: int, direct: bool) -> Iterator[Move]:
    """Do ``moves``; gives those that are done, until the disk refuses one."""
    buffer = mmap.mmap(-1, max(old_bytes, new_bytes))
    try:
        with _file(slab, direct) as fd:
            for move in moves:
                view = memoryview(buffer)[: move.nbytes]
                if _whole(os.preadv, fd, view, move.source * old_bytes) and _whole(
                    os.pwritev, fd, view, move.target * new_bytes
                ):
                    yield move
            os.fdatasync(fd)
    except OSError as error:
        logger.warning("%s: not all that was stored could be moved to other slots (%s)", slab, error.strerror)


def _whole(transfer: Callable[[int, list[memoryview], int], int], fd: int, view: memoryview, offset: int) -> bool:
    """Whether as much as ``view`` has was moved: a short transfer counts as none."""
    return transfer(fd, [view], offset) == view.nbytes


@contextlib.contextmanager
def _file(path: Path, direct: bool) -> Iterator[int]:
    """``path`` around the page cache, or through it where the file system cannot do that."""
    flags = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW
    try:
        fd = os.open(path, flags | (os.O_DIRECT if direct else 0))
    except OSError:
        fd = os.open(path, flags)
    try:
        yield fd
    finally:
        os.close(fd)
