"""What the demos show while they run: a line per step, or a bar on a terminal."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

WIDTH = 90
"""Columns of the output where it is not a terminal."""


def console() -> Console:
    """Where a demo prints."""
    return Console(width=None if sys.stdout.isatty() else WIDTH)


@contextlib.contextmanager
def progress(screen: Console, steps: int) -> Iterator[Callable[[str], None]]:
    """A bar that every call of what is yielded moves on by one step."""
    columns = (BarColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=screen) as progress:
        task = progress.add_task("", total=steps)

        def tell(text: str) -> None:
            progress.advance(task)
            progress.update(task, description=text)
            if not screen.is_terminal:
                screen.print(text, highlight=False)

        yield tell
