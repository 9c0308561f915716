"""How a console script begins and ends: its streams, and the one sentence when it cannot go on."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Literal, NoReturn, TextIO

from umbp_core.errors import UmbpError


def run(command: Callable[[], object], name: str) -> None:
    """Be the console script ``name``.  An error of ours, or of the system, is one sentence and exit code 2.

    A standard stream that is closed is an empty one, and takes everything.  A character that standard output does not
    have is printed as its escape.
    """
    _open_streams()
    try:
        try:
            command()
        finally:
            sys.stdout.flush()
    except UmbpError as error:
        _end(name, error)
    except BrokenPipeError:
        _shut_output()
        sys.exit(1)
    except OSError as error:
        _shut_output()
        _end(name, error)


def _end(name: str, error: Exception) -> NoReturn:
    sys.stderr.write(f"{name}: {error}\n")
    sys.exit(2)


def _open_streams() -> None:
    """In this order, so that each takes its own number where it was closed."""
    if sys.stdin is None:
        sys.stdin = _nothing("r")
    if sys.stdout is None:
        sys.stdout = _nothing("w")
    if sys.stderr is None:
        sys.stderr = _nothing("w")
    _escape_what_is_not_there(sys.stdout)


def _escape_what_is_not_there(out: TextIO) -> None:
    """A name of a file that is no text is printed as it is where UTF-8 allows that."""
    if isinstance(out, io.TextIOWrapper) and (out.errors == "strict" or not out.encoding.lower().startswith("utf")):
        out.reconfigure(errors="backslashreplace")


def _nothing(mode: Literal["r", "w"]) -> TextIO:
    return Path(os.devnull).open(mode, encoding="utf-8")


def _shut_output() -> None:
    """What waits to be printed is lost; the interpreter would try it again when it ends."""
    with contextlib.suppress(OSError):  # what a test puts in its place has no number
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, sys.stdout.fileno())
        os.close(null)
