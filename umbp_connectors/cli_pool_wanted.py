"""Which objects a command of ``umbp pool`` is about: keys, sizes and times as people write them."""

from __future__ import annotations

import os
import re
import time
from pathlib import Path
from typing import TYPE_CHECKING

from umbp_core.errors import ConfigError

if TYPE_CHECKING:
    from umbp_connectors.daemon.listing import ListObjects
    from umbp_connectors.pool.inspection import StoredObject

_TIME = re.compile(r"(\d+(?:\.\d+)?)([smhd]?)")
_SECONDS = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86_400}
_NAMESPACE = re.compile(r"[0-9a-f]{16}")
_HEX = re.compile(r"(?:[0-9a-fA-F]{2})+")


class Wanted:
    """Which objects a command is about."""

    def __init__(
        self, prefix: str = "", older_than: str = "", newer_than: str = "", min_size: str = "", max_size: str = ""
    ) -> None:
        now = time.time()
        self._prefixes = {prefix.encode(), bytes.fromhex(prefix)} if _HEX.fullmatch(prefix) else {prefix.encode()}
        self._before = now - _seconds(older_than) if older_than else None
        self._since = now - _seconds(newer_than) if newer_than else None
        self._least = size_of(min_size) or 0
        self._most = size_of(max_size)

    def in_memory(self, name: str, limit: int) -> ListObjects:
        """The same as a question to the daemon."""
        from umbp_connectors.daemon.listing import OBJECTS, ListObjects
        from umbp_connectors.daemon.messages import REVISION
        from umbp_core.tiers import Tier

        starts = [prefix for prefix in self._prefixes if prefix]
        most = (1 << 62) - 1 if self._most is None else self._most
        return ListObjects(REVISION, int(Tier.DRAM), name, starts, self._least, most, min(limit or OBJECTS, OBJECTS))

    def matches(self, stored: StoredObject) -> bool:
        """Whether it is about ``stored``."""
        written = stored.written or 0.0
        return (
            any(stored.key.startswith(prefix) for prefix in self._prefixes)
            and (self._before is None or written <= self._before)
            and (self._since is None or written >= self._since)
            and stored.nbytes >= self._least
            and (self._most is None or stored.nbytes <= self._most)
        )


def closed_folders(ssd_dir: Path) -> list[Path]:
    """The folders of namespaces and ranks below ``ssd_dir`` that this user may not look into."""
    homes = [path for path in sorted(ssd_dir.iterdir()) if _NAMESPACE.fullmatch(path.name) and path.is_dir()]
    folders = [folder for home in homes for folder in (home, *sorted(home.glob("rank*")))]
    return [folder for folder in folders if not os.access(folder, os.R_OK | os.X_OK)]


def key_of(text: str) -> bytes:
    """A key, written hexadecimally.  Raises ``ConfigError``."""
    if not _HEX.fullmatch(text):
        raise ConfigError(f"{text!r} is no key; give it hexadecimal, as `umbp pool ls` shows it")
    return bytes.fromhex(text)


def size_of(text: str) -> int | None:
    """Bytes; ``None`` for nothing.  Raises ``ConfigError``."""
    from umbp_connectors.config_model import parse_size

    if not text:
        return None
    try:
        return parse_size(int(text) if text.isdigit() else text)
    except ValueError as error:
        raise ConfigError(f"{text!r}: {error}") from None


def _seconds(text: str) -> float:
    match = _TIME.fullmatch(text)
    if match is None:
        raise ConfigError(f"{text!r} is no time; give a number with s, m, h or d")
    return float(match[1]) * _SECONDS[match[2]]


def age_text(seconds: float) -> str:
    """A time for people."""
    for unit, name in ((86_400, "d"), (3600, "h"), (60, "m")):
        if seconds >= unit:
            return f"{seconds / unit:.1f} {name}"
    return f"{max(0.0, seconds):.0f} s"
