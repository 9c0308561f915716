"""Whether a SQLite file is to blame for what SQLite says about it."""

from __future__ import annotations

import os
import sqlite3
from pathlib import Path

FULL = "full"
_SURROUNDINGS = ("locked", FULL, "unable to open", "disk I/O error", "access permission")
_READONLY = "readonly"


def is_blameless(error: Exception, path: Path) -> bool:
    """Whether ``error`` is no fault of the file at ``path``, which is left as it is then, and may be good tomorrow.

    So it is when its disk is full or fails, when it is locked, or when it may not be opened or written.
    """
    if not isinstance(error, sqlite3.OperationalError) or not path.is_file():
        return False
    words = str(error)
    return any(known in words for known in _SURROUNDINGS) or (_READONLY in words and not os.access(path, os.W_OK))
