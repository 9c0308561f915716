"""The files of a catalogue: its log, what was moved aside, and the catalogues of other layouts beside it."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path

from umbp_core.errors import TierUnavailable

logger = logging.getLogger(__name__)

_ASIDE = ".corrupt-"
_PARTS = ("", "-wal", "-shm", "-journal")


def bytes_of(path: Path) -> int:
    """Bytes of the catalogue at ``path``, its log and what was moved aside."""
    return _size(path.parent.glob(f"{path.name}*"))


def prune(path: Path, most: int) -> int:
    """Let what is not the catalogue at ``path`` but lies beside it take at most ``most`` bytes.

    Least recently used first.  Returns the bytes that stay.  Raises ``OSError``.
    """
    others = [other for other in path.parent.glob("catalogue-*") if not _belongs(other, path)]
    others += path.parent.glob(f"{path.name}{_ASIDE}*")
    by_age = sorted(filter(Path.is_file, others), key=lambda other: (other.stat().st_mtime, other.name))
    kept = _size(by_age)
    for other in by_age:
        if kept <= most:
            break
        kept -= other.stat().st_size
        other.unlink()
    return kept


def move_aside(path: Path, why: Exception, most: int, found: int) -> None:
    """Take the catalogue at ``path`` out of the way, with one warning.

    It is kept as ``<name>.corrupt-<n>`` for whoever wants to look at it: the latest only, and only while it has at
    most ``most`` bytes.  ``found`` objects of it were read before.  Raises ``TierUnavailable`` when it cannot be moved.
    """
    earlier = list(path.parent.glob(f"{path.name}{_ASIDE}*"))
    numbers = [int(tail) for old in earlier if (tail := old.name.rpartition(_ASIDE)[2]).isdigit()]
    aside = f"{path.name}{_ASIDE}{max(numbers, default=-1) + 1}"
    try:
        for old in earlier:
            old.unlink()
        keep = bytes_of(path) <= most
        for part in _PARTS:
            file = path.with_name(path.name + part)
            if file.exists() and keep:
                file.rename(file.with_name(aside + part))
            elif file.exists():
                file.unlink()
    except OSError as error:
        raise TierUnavailable(f"{path} cannot be read ({why}) nor moved aside ({error.strerror}); remove it") from error
    outcome = f"moved to {aside}" if keep else "removed"
    begins = f"with the {found} objects that it still tells of" if found else "empty"
    logger.warning("%s cannot be used (%s) and was %s; the SSD tier starts %s", path, why, outcome, begins)


def _belongs(file: Path, path: Path) -> bool:
    return file.name in {path.name + part for part in _PARTS} or file.name.startswith(path.name + _ASIDE)


def _size(files: Iterable[Path]) -> int:
    return sum(file.stat().st_size for file in files)
