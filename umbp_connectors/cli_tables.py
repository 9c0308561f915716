"""Tables for people, in which nothing is cut off: a key or a path that is shown can be copied."""

from __future__ import annotations

import os
import sys
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Column, Table

_UNBOUNDED = 1 << 16
"""Columns of what is no terminal; a table is only as wide as what stands in it."""


def table(*headers: str, **options: Any) -> Table:
    """A table without rows.  A value that is wider than its column goes on in the next line."""
    return Table(*(Column(header, overflow="fold") for header in headers), box=box.SIMPLE, pad_edge=False, **options)


def console(*, highlight: bool = True) -> Console:
    """Standard output: as wide as the terminal or ``COLUMNS`` say; a pipe or a file has a line for each row."""
    bounded = sys.stdout.isatty() or bool(os.environ.get("COLUMNS"))
    return Console(width=None if bounded else _UNBOUNDED, soft_wrap=True, highlight=highlight)
