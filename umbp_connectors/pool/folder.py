"""The SSD tier's folder: who owns what in it.

::

    <ssd_dir>/
      umbp.lock                          held while files are counted, made or removed
      <namespace, 16 hex digits>/
        LOCK                             held by the leader that owns the catalogue
        identity.json                    whose objects these are, and how many bytes a start has claimed
        catalogue-<digest, 12>.sqlite
        rank<k>/
          LOCK                           held by the worker that owns the slab
          CATALOGUE                      held by a worker that keeps a catalogue of its own here, as the leader's above
          slab-<layout digest, 12>.bin

Workers start before their leader and in other processes.  Each calls :func:`open_rank_slab`: it locks its rank's
folder, so that a second engine on the same namespace is turned away before it can touch a byte, and claims the
namespace's whole budget, so that an engine that starts at the same moment counts it.  The leader then takes the
namespace's own lock (:class:`NamespaceFolder`) and makes the catalogue there.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from umbp_connectors.pool.capacity import (
    CATALOGUE_LOCK,
    CapacityPlan,
    catalogue_allowance,
    namespace_dir,
    plan_capacity,
    read_identity,
    slab_path,
    write_identity,
)
from umbp_connectors.pool.catalogue import NOTHING, Catalogue
from umbp_connectors.pool.durability import Durability
from umbp_connectors.pool.locks import FolderInUse, FolderLock, unusable
from umbp_connectors.pool.refit import move_within, refit
from umbp_connectors.pool.slab import SlabFile
from umbp_core.errors import TierUnavailable

__all__ = [
    "CapacityPlan",
    "FolderInUse",
    "FolderLock",
    "NamespaceFolder",
    "RankFolder",
    "RankSlab",
    "catalogue_allowance",
    "namespace_dir",
    "open_rank_slab",
    "plan_capacity",
    "slab_path",
    "try_folder",
]


Result = TypeVar("Result")

PATIENCE_S = 5.0
"""How long a start waits for the folder of an engine that may be ending."""
_RETRY_S = 0.2
_LOCK = "umbp.lock"


@dataclass(slots=True)
class RankSlab:
    """One worker's share of the SSD tier: its slab, open, and the lock on its folder."""

    slab: SlabFile
    lock: FolderLock
    fitted: bool = False
    """What a catalogue of all ranks told of is where it is after :func:`~umbp_connectors.pool.refit.follow_moves`."""

    @property
    def slots(self) -> int:
        """How many objects fit; the leader uses the smallest number over all ranks."""
        return self.slab.slots

    @property
    def is_new(self) -> bool:
        """True when the slab was made now."""
        return self.slab.is_new

    def close(self, timeout: float = 10.0) -> None:
        """Close the slab, with ``timeout`` seconds for transfers under way, then let the folder go; idempotent."""
        self.slab.close(timeout)
        self.lock.release()


def try_folder(ssd_dir: str | os.PathLike[str]) -> None:
    """Make ``ssd_dir`` where it is missing, and write in it.  Waits for nobody.

    Raises ``TierUnavailable`` when it cannot be an SSD folder.
    """
    _make_dir(Path(ssd_dir), parents=True)
    lock = FolderLock(ssd_dir, _LOCK)
    with contextlib.suppress(FolderInUse):  # whoever has it can use the folder
        lock.acquire()
    lock.release()


def open_rank_slab(
    ssd_dir: str | os.PathLike[str],
    namespace: str,
    rank: int,
    layout_digest: bytes,
    slot_bytes: int,
    capacity_bytes: int,
    ranks: int = 1,
    direct_io: bool = True,
    *,
    own_catalogue: bool = False,
    engines: int = 1,
    share: float = 1.0,
    patience_s: float = PATIENCE_S,
    durability: Durability = "batched",
) -> RankSlab:
    """Lock rank ``rank``'s folder and open its slab with as many slots as fit.  Called once by each worker.

    ``capacity_bytes`` bounds everything of ours below ``ssd_dir``, for all ``ranks`` that share it together, and for
    all ``engines``, which get equal parts; where an engine has several namespaces, this one has ``share`` of its part.
    With ``own_catalogue`` the caller keeps a catalogue of this rank alone beside the slab, and what an earlier life
    stored in slots of another size or number is moved to where it fits; without, what lies beyond the last slot is.  A
    folder that is in use gets ``patience_s`` seconds to become free: a killed engine's last process may still be on its
    way out.

    Raises ``TierUnavailable``: not a folder, read-only, held by another engine, disk full, no room for an object.
    """
    home = namespace_dir(ssd_dir, namespace)
    path = slab_path(ssd_dir, namespace, rank, layout_digest)
    lock = FolderLock(path.parent)
    sizes = (slot_bytes, capacity_bytes, ranks, own_catalogue, engines, share)

    def claim() -> CapacityPlan:
        with _exclusively(Path(ssd_dir)):
            _make_dir(home)
            _make_dir(path.parent)
            lock.acquire()
            plan = plan_capacity(ssd_dir, namespace, rank, layout_digest, *sizes)
            for holding in plan.remove:
                holding.remove()
            write_identity(home, namespace, plan.claimed_bytes)
            return plan

    with contextlib.ExitStack() as undo:
        undo.callback(lock.release)
        plan = _patiently(claim, patience_s)
        if plan.slots < 1:
            raise TierUnavailable(
                f"{ssd_dir}: an SSD capacity of {capacity_bytes} bytes has no room for one object of {slot_bytes} "
                f"bytes on each of {ranks} ranks ({plan.claimed_bytes} bytes of it are theirs); "
                "set a larger SSD capacity"
            )
        shape = (layout_digest, slot_bytes, plan.slots, direct_io)
        if own_catalogue:
            refit(path, *shape)
        fitted = not own_catalogue and move_within(path, rank, *shape)
        slab = SlabFile(path, slot_bytes, plan.slots, direct_io, durability)
        slab.open()
        undo.pop_all()
    return RankSlab(slab, lock, fitted)


class NamespaceFolder:
    """The leader's side of a namespace's folder: its lock and its catalogue."""

    def __init__(self, ssd_dir: str | os.PathLike[str], namespace: str) -> None:
        self._ssd_dir = Path(ssd_dir)
        self._namespace = namespace
        self.path = namespace_dir(ssd_dir, namespace)
        self._lock = FolderLock(self.path)

    def open(self, patience_s: float = PATIENCE_S) -> None:
        """Make the folder if it is missing, and lock it; waits up to ``patience_s`` seconds for whoever holds it.

        Raises ``TierUnavailable`` when another engine holds it or the folder cannot be used.
        """
        _patiently(self._claim, patience_s)

    def catalogue(
        self,
        digest: bytes,
        identity: bytes,
        ranks: int,
        slots: int,
        slot_bytes: int = 0,
        durability: Durability = "batched",
        about: Mapping[str, bytes] = NOTHING,
    ) -> Catalogue:
        """The catalogue of the layout with this ``digest``, not open yet, bounded by its allowance."""
        return Catalogue(
            self.path / f"catalogue-{digest.hex()[:12]}.sqlite",
            identity,
            ranks,
            slots=slots,
            slot_bytes=slot_bytes,
            max_bytes=catalogue_allowance(slots, ranks),
            durability=durability,
            about=about,
        )

    def close(self) -> None:
        """Let the folder go; idempotent."""
        self._lock.release()

    def _claim(self) -> None:
        with _exclusively(self._ssd_dir):
            _make_dir(self.path)
            self._lock.acquire()
            if read_identity(self.path) is None:
                write_identity(self.path, self._namespace, 0)


class RankFolder:
    """The folder of one rank that keeps a catalogue of its own: made, marked as ours, and locked.

    The lock is another one than the slab's: the slots may be somewhere else.
    """

    def __init__(self, ssd_dir: str | os.PathLike[str], namespace: str, rank: int) -> None:
        self._ssd_dir = Path(ssd_dir)
        self._namespace = namespace
        self.path = namespace_dir(ssd_dir, namespace) / f"rank{rank}"
        self._lock = FolderLock(self.path, CATALOGUE_LOCK)

    def open(self, patience_s: float = PATIENCE_S) -> None:
        """Take the folder; as :meth:`NamespaceFolder.open`."""
        _patiently(self._claim, patience_s)

    def close(self) -> None:
        """Let the folder go; idempotent."""
        self._lock.release()

    def _claim(self) -> None:
        with _exclusively(self._ssd_dir):
            _make_dir(self.path.parent)
            _make_dir(self.path)
            self._lock.acquire()
            if read_identity(self.path.parent) is None:
                write_identity(self.path.parent, self._namespace, 0)


def _patiently(claim: Callable[[], Result], patience_s: float) -> Result:
    """``claim()``, again every 0.2 s while another process holds the folder, for ``patience_s`` seconds."""
    pause = threading.Event()
    deadline = time.monotonic() + patience_s
    while True:
        try:
            return claim()
        except FolderInUse:
            if time.monotonic() >= deadline:
                raise
        pause.wait(_RETRY_S)


@contextlib.contextmanager
def _exclusively(ssd_dir: Path) -> Iterator[None]:
    """Nobody else counts, makes or removes files below ``ssd_dir`` meanwhile; turns ``OSError`` into a sentence."""
    _make_dir(ssd_dir, parents=True)
    lock = FolderLock(ssd_dir, _LOCK)
    lock.acquire(wait=True)
    try:
        yield
    except OSError as error:
        raise unusable(ssd_dir, error) from error
    finally:
        lock.release()


def _make_dir(path: Path, parents: bool = False) -> None:
    try:
        path.mkdir(mode=0o700, parents=parents, exist_ok=True)
    except OSError as error:
        raise unusable(path, error) from error
