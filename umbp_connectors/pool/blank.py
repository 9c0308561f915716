"""Pages of DRAM that somebody has before it knows the keys of what it writes there."""

from __future__ import annotations

from typing import NamedTuple


class Filled(NamedTuple):
    """What somebody wrote to a page that it had before it knew the key: all parts of ``nbytes`` bytes together."""

    page: int
    key: bytes
    nbytes: int
    depth: int
    checksum: bytes


class Blank(NamedTuple):
    """A page without a key: by what the directory knows it, and how many clears there were when it was given."""

    name: bytes
    clears: int


BLANK = bytes(512)
"""How the names of pages without keys begin: no key that a client may choose is as long."""
