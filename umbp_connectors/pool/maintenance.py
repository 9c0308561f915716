"""Checks what lies in an SSD folder, and takes things out of it while no engine uses it."""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from umbp_connectors.pool.capacity import CATALOGUE_LOCK, LOCKS, our_files
from umbp_connectors.pool.checksums import object_checksum
from umbp_connectors.pool.inspection import StoredCatalogue, StoredObject, checksum_of, read_object
from umbp_connectors.pool.locks import FolderLock, unusable
from umbp_connectors.pool.slab import SlabFile
from umbp_core.errors import ConfigError, StateError, TierUnavailable, TransferError, VerificationError

_KEYS_PER_TRANSACTION = 1000


@dataclass(slots=True)
class Verdict:
    """What a walk over a catalogue found.  ``problems`` has a sentence for each object that is not as it should be."""

    objects: int = 0
    nbytes: int = 0
    unverifiable: int = 0
    problems: list[str] = field(default_factory=list)
    bad: list[bytes] = field(default_factory=list)


def load(catalogue: StoredCatalogue, stored: StoredObject, rank: int = 0) -> bytearray:
    """The verified bytes of one object.

    Raises ``ConfigError`` when there is no such rank, ``TransferError`` when they cannot be read,
    ``VerificationError`` when they are not those that were stored, ``TierUnavailable`` when the slots or what
    verifies them are not known.
    """
    if rank >= catalogue.ranks:
        there = f"ranks 0 to {catalogue.ranks - 1}" if catalogue.ranks > 1 else "rank 0 alone"
        raise ConfigError(f"{catalogue.path} has no rank {rank}: it has {there}")
    if rank >= len(catalogue.prefixes):
        raise TierUnavailable(f"{catalogue.path} does not say whose objects these are; they cannot be verified")
    with contextlib.closing(catalogue.slab(rank)) as slab:
        data = read_object(slab, stored)
    _check(catalogue, stored, rank, data)
    return data[catalogue.part(stored, rank)]


def verify(catalogue: StoredCatalogue, progress: Callable[[int], None] = lambda _: None) -> Verdict:
    """Read everything that ``catalogue`` names and compare its checksums; also whether two objects claim one slot.

    What an engine replaced meanwhile does not count: what seems bad is looked up again.
    """
    verdict = Verdict()
    rows = catalogue.objects()
    with contextlib.ExitStack() as opened:
        slabs: list[SlabFile] = []
        try:
            slabs += [
                opened.enter_context(contextlib.closing(catalogue.slab(rank)))
                for rank in range(min(catalogue.ranks, len(catalogue.prefixes)))
            ]
        except TierUnavailable as error:
            verdict.problems.append(str(error))
        for number, stored in enumerate(rows, 1):
            problem = _examine(catalogue, slabs, stored)
            verdict.objects += 1
            verdict.nbytes += stored.nbytes
            verdict.unverifiable += not slabs
            if problem:
                verdict.bad.append(stored.key)
                verdict.problems.append(problem)
            progress(number)
        if verdict.bad and catalogue.in_use:
            _forgive(catalogue, slabs, rows, verdict)
    verdict.problems += _double_slots(rows)
    return verdict


def evict(catalogue: StoredCatalogue, keys: Sequence[bytes]) -> int:
    """Take ``keys`` out of the catalogue, so that their slots are free; returns how many were there.

    Raises ``StateError`` while an engine uses it, ``TierUnavailable`` when it cannot be written.
    """
    gone = 0
    with held([catalogue]):
        try:
            connection = sqlite3.connect(catalogue.path, timeout=0.0, isolation_level=None)
        except sqlite3.Error as error:
            raise TierUnavailable(f"{catalogue.path} cannot be opened ({error})") from error
        try:
            connection.execute("PRAGMA locking_mode=EXCLUSIVE")
            for start in range(0, len(keys), _KEYS_PER_TRANSACTION):
                connection.execute("BEGIN IMMEDIATE")
                for key in keys[start : start + _KEYS_PER_TRANSACTION]:
                    gone += connection.execute("DELETE FROM objects WHERE key = ?", (key,)).rowcount
                connection.execute("COMMIT")
        except sqlite3.Error as error:
            raise TierUnavailable(f"{catalogue.path} cannot be written ({error}); {gone} objects are gone") from error
        finally:
            connection.close()
    return gone


def clear(catalogues: Iterable[StoredCatalogue]) -> int:
    """Remove the files of these catalogues, slabs included; returns how many bytes that freed.

    Raises ``StateError`` while an engine uses one of them; then nothing is removed.
    """
    found, freed = list(catalogues), 0
    with held(found):
        for catalogue in found:
            try:
                freed += _remove(catalogue)
            except OSError as error:
                raise unusable(catalogue.path.parent, error) from error
    return freed


@contextlib.contextmanager
def held(catalogues: Iterable[StoredCatalogue]) -> Iterator[None]:
    """Nobody else may use these catalogues and their slabs meanwhile.  Raises ``StateError`` when somebody does."""
    folders = dict.fromkeys(folder for each in catalogues for folder in (each.path.parent, *each.folders))
    with contextlib.ExitStack() as undo:
        for folder in folders:
            for name in LOCKS:
                lock = FolderLock(folder, name)
                if not folder.is_dir() or (name == CATALOGUE_LOCK and not lock.path.exists()):
                    continue
                try:
                    lock.acquire()
                except TierUnavailable as error:
                    raise StateError(f"{folder} is in use: end the engine first, or ask it ({error})") from error
                undo.callback(lock.release)
        yield


def _remove(catalogue: StoredCatalogue) -> int:
    """Remove its files; how many bytes they had."""
    freed = 0
    files = [file for file, _ in our_files(catalogue.path.parent) if file.name.startswith(catalogue.path.name)]
    slabs = zip(catalogue.folders, catalogue.layouts, strict=False)
    files += [folder / f"slab-{layout.hex()[:12]}.bin" for folder, layout in slabs]
    for file in files:
        with contextlib.suppress(FileNotFoundError):
            nbytes = file.stat().st_size
            file.unlink()
            freed += nbytes
    return freed


def _examine(catalogue: StoredCatalogue, slabs: Sequence[SlabFile], stored: StoredObject) -> str:
    """What is wrong with an object; empty when nothing is."""
    for rank, slab in enumerate(slabs):
        try:
            _check(catalogue, stored, rank, read_object(slab, stored))
        except TransferError as error:
            return str(error)
    return ""


def _check(catalogue: StoredCatalogue, stored: StoredObject, rank: int, data: bytearray) -> None:
    expected = checksum_of(stored, rank)
    if object_checksum(catalogue.prefixes[rank] + stored.key, data[catalogue.part(stored, rank)]) != expected:
        raise VerificationError(
            f"object {stored.key.hex()}: the bytes in slot {stored.slot} of rank {rank} are not those "
            "that were stored; an engine counts it as a miss"
        )


def _forgive(
    catalogue: StoredCatalogue, slabs: Sequence[SlabFile], rows: Sequence[StoredObject], verdict: Verdict
) -> None:
    """Take back what only seemed bad, since the engine wrote there while it was read."""
    before = {stored.key: stored for stored in rows}
    now = {stored.key: stored for stored in catalogue.objects()}
    slots = {stored.slot: stored.key for stored in now.values()}
    still: list[tuple[bytes, str]] = []
    for key, problem in zip(verdict.bad, verdict.problems[-len(verdict.bad) :], strict=True):
        same = now.get(key) == before[key] and slots.get(before[key].slot) == key
        if same and _examine(catalogue, slabs, before[key]):
            still.append((key, problem))
    verdict.problems[-len(verdict.bad) :] = [problem for _, problem in still]
    verdict.bad = [key for key, _ in still]


def _double_slots(rows: Sequence[StoredObject]) -> list[str]:
    owners: dict[int, bytes] = {}
    return [
        f"slot {stored.slot} belongs to {first.hex()} and to {stored.key.hex()}"
        for stored in rows
        if (first := owners.setdefault(stored.slot, stored.key)) != stored.key
    ]


def catalogues_below(catalogues: Sequence[StoredCatalogue], name: str) -> list[StoredCatalogue]:
    """Those whose path or namespace contains ``name``; all when it is empty."""
    return [each for each in catalogues if name in str(Path(each.name)) or name in each.namespace]
