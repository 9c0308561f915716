"""How much of the SSD capacity is left for one rank, and what has to go for it (law L8).

Everything of ours below the SSD folder counts: other namespaces, other layouts of this one, folders of ranks that
do not exist any more, and an allowance for the catalogue.  Files that are not ours are neither counted nor touched.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import re
import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from umbp_connectors.pool.locks import is_locked

logger = logging.getLogger(__name__)

IDENTITY_FILE = "identity.json"
FORMAT = "umbp-ssd-1"

_NAMESPACE = re.compile(r"[0-9a-f]{16}")
_RANK = re.compile(r"rank(\d+)")
LOCKS = ("LOCK", "CATALOGUE")
"""Files that somebody who uses a folder holds locked."""
CATALOGUE_LOCK = "CATALOGUE"
_OURS = re.compile(r"LOCK|CATALOGUE|identity\.json(\.new)?|catalogue-[0-9a-f]{12}\.sqlite.*|slab-[0-9a-f]{12}\.bin")


def catalogue_allowance(slots: int, ranks: int) -> int:
    """Bytes set aside for the catalogues of ``slots`` objects with ``ranks`` checksums each.

    A full catalogue takes about a third: the rest is for its log and for an earlier one (of another layout, or moved
    aside as unreadable).
    """
    return (1 << 20) + slots * (704 + 64 * ranks)


def namespace_dir(ssd_dir: str | os.PathLike[str], namespace: str) -> Path:
    """The folder of ``namespace`` below ``ssd_dir``."""
    return Path(ssd_dir) / hashlib.sha256(namespace.encode()).hexdigest()[:16]


def slab_path(ssd_dir: str | os.PathLike[str], namespace: str, rank: int, layout_digest: bytes) -> Path:
    """Where the slab of world rank ``rank`` lies."""
    return namespace_dir(ssd_dir, namespace) / f"rank{rank}" / f"slab-{layout_digest.hex()[:12]}.bin"


@dataclass(frozen=True, slots=True)
class Holding:
    """Files of ours that go together: another namespace, a rank's folder, or a slab of another layout.

    ``nbytes`` is what they count for; ``in_use`` says that a running engine owns them.
    """

    path: Path
    nbytes: int
    last_used: float
    in_use: bool

    def remove(self) -> None:
        """Delete what is ours in it, and the folders when nothing else is left in them."""
        logger.warning(
            "%s (%.2f GiB, the least recently used) is removed to make room for the SSD tier",
            self.path,
            self.nbytes / 2**30,
        )
        files = [path for path, _ in our_files(self.path)]
        for path in files:
            path.unlink(missing_ok=True)
        for folder in sorted({path.parent for path in files if path != self.path}, reverse=True):
            with contextlib.suppress(OSError):
                folder.rmdir()


@dataclass(frozen=True, slots=True)
class CapacityPlan:
    """How many slots a rank gets.

    ``remove`` has to go first.  ``claimed_bytes`` is what all ranks of the namespace together may use then.
    """

    slots: int
    remove: tuple[Holding, ...]
    claimed_bytes: int


def plan_capacity(
    ssd_dir: str | os.PathLike[str],
    namespace: str,
    rank: int,
    layout_digest: bytes,
    slot_bytes: int,
    capacity_bytes: int,
    ranks: int = 1,
    own_catalogue: bool = False,
    engines: int = 1,
    share: float = 1.0,
) -> CapacityPlan:
    """Share out ``capacity_bytes`` over the ``ranks`` that use ``ssd_dir`` together; reads it and changes nothing.

    The ranks share one catalogue, unless each has its ``own_catalogue`` in its rank's folder.  They are those of one of
    ``engines`` that use the folder together, each with namespaces of its own and an equal part; this namespace may use
    ``share`` of it.

    What others hold stays while it leaves half of the capacity, or this namespace's part if that is less; beyond that,
    what nobody uses goes, least recently used first.  A rank's other layouts are treated the same within its share.
    The ranks of one start come to the same number in whatever order they ask: what they make does not count, and the
    first one's claim holds for all.
    """
    home = namespace_dir(ssd_dir, namespace)
    part = int(capacity_bytes * share) // engines
    remove, claimed = _claim(Path(ssd_dir), home, rank, ranks, capacity_bytes, part)
    own = claimed // ranks
    current = slab_path(ssd_dir, namespace, rank, layout_digest)
    stale_remove, stale_bytes = _make_room(_stale_slabs(current), own // 2)
    catalogued, sharing = (1, 1) if own_catalogue else (ranks, ranks)
    fixed = catalogue_allowance(0, catalogued)
    per_slot = slot_bytes + -(-(catalogue_allowance(1, catalogued) - fixed) // sharing)
    slots = (own - stale_bytes - -(-fixed // sharing)) // per_slot
    return CapacityPlan(max(0, slots), (*remove, *stale_remove), claimed)


def our_files(path: Path) -> Iterator[tuple[Path, os.stat_result]]:
    """The plain files of ours in a namespace's or rank's folder, or ``path`` itself when it is one."""
    try:
        found = path.lstat()
        children = sorted(path.iterdir()) if stat.S_ISDIR(found.st_mode) else []
    except OSError:
        return
    if stat.S_ISREG(found.st_mode) and _OURS.fullmatch(path.name):
        yield path, found
    for child in children:
        if _OURS.fullmatch(child.name) or _RANK.fullmatch(child.name):
            yield from our_files(child)


def read_identity(home: Path) -> dict[str, object] | None:
    """What ``identity.json`` in ``home`` says; ``None`` when the folder is not one of ours."""
    try:
        found = json.loads((home / IDENTITY_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) and found.get("format") == FORMAT else None


def write_identity(home: Path, namespace: str, claimed_bytes: int) -> None:
    """Say whose folder ``home`` is and what it may grow to; also marks it as used now.

    Raises ``OSError``, unless an earlier start said it already: a full disk must not keep an engine from what it has.
    """
    text = json.dumps({"format": FORMAT, "namespace": namespace, "claimed_bytes": claimed_bytes}, indent=1)
    fresh = home / f"{IDENTITY_FILE}.new"
    try:
        fresh.write_text(text + "\n", encoding="utf-8")
        fresh.replace(home / IDENTITY_FILE)
    except OSError as error:
        if read_identity(home) is None:
            raise
        logger.warning("%s keeps what an earlier start wrote (%s)", home / IDENTITY_FILE, error.strerror)


def _claim(ssd_dir: Path, home: Path, rank: int, ranks: int, capacity: int, part: int) -> tuple[list[Holding], int]:
    """What has to go, and how many bytes the namespace at ``home`` may then use."""
    identity = read_identity(home)
    siblings = (path / "LOCK" for path in home.glob("rank*") if path.name != f"rank{rank}")
    if identity is not None and any(is_locked(lock) for lock in siblings):
        return [], min(_claimed(identity), capacity)
    others = [*_other_namespaces(ssd_dir, home), *_surplus_ranks(home, ranks)]
    remove, taken = _make_room(others, capacity - min(part, capacity // 2))
    return remove, max(0, min(part, capacity - taken))


def _claimed(identity: dict[str, object]) -> int:
    claimed = identity.get("claimed_bytes")
    return claimed if isinstance(claimed, int) else 0


def _make_room(holdings: Iterable[Holding], keep: int) -> tuple[list[Holding], int]:
    """What has to go so that at most ``keep`` bytes stay, and what the others then count for."""
    held = sorted(holdings, key=lambda unit: (unit.last_used, unit.path))
    total = sum(unit.nbytes for unit in held)
    remove: list[Holding] = []
    for unit in held:
        if total <= keep:
            break
        if not unit.in_use:
            remove.append(unit)
            total -= unit.nbytes
    return remove, total


def _other_namespaces(ssd_dir: Path, home: Path) -> Iterator[Holding]:
    for path in ssd_dir.iterdir() if ssd_dir.is_dir() else ():
        if path == home or path.is_symlink() or not _NAMESPACE.fullmatch(path.name):
            continue
        identity = read_identity(path)
        if identity is not None:
            yield _folder(path, _claimed(identity))


def _surplus_ranks(home: Path, ranks: int) -> Iterator[Holding]:
    """Folders of ranks that this start does not have."""
    for path in home.glob("rank*"):
        match = _RANK.fullmatch(path.name)
        if match is not None and int(match[1]) >= ranks:
            yield _folder(path, 0)


def _folder(path: Path, claimed: int) -> Holding:
    """A folder as a unit; while somebody uses it, it counts for what it may grow to."""
    files = list(our_files(path))
    in_use = any(is_locked(file) for file, _ in files if file.name in LOCKS)
    nbytes = sum(found.st_size for _, found in files)
    last_used = max((found.st_mtime for _, found in files), default=0.0)
    return Holding(path, max(nbytes, claimed) if in_use else nbytes, last_used, in_use)


def _stale_slabs(current: Path) -> Iterator[Holding]:
    """Slabs of other layouts beside ``current``, whose folder the caller owns."""
    for path, found in our_files(current.parent):
        if path.suffix == ".bin" and path != current:
            yield Holding(path, found.st_size, found.st_mtime, in_use=False)
