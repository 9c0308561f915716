"""Objects that are parts of one block and of no use without each other: its K and its V, those of all ranks.

Only names tell: whoever makes the keys knows how they are made up.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence

BlockOf = Callable[[bytes], bytes | None]
"""The block that a key is a part of; ``None`` for an object that stands alone."""

_DIGITS = 64
_HASH = re.compile(rb"[0-9a-f]{64}")


def block_of_text(key: bytes) -> bytes | None:
    """The block of a key as SGLang's ``mori`` backend makes it: whatever is in front, 64 hexadecimal digits, a suffix.

    ``None`` without a suffix and for keys of another kind.
    """
    if len(key) <= _DIGITS:
        return None
    found = _HASH.search(key)
    return key[: found.end()] if found is not None and found.end() < len(key) else None


class BlockGroups:
    """The keys of one tier by the block that they are parts of.  One thread; O(1) per key."""

    __slots__ = ("_block_of", "_parts")

    def __init__(self, block_of: BlockOf) -> None:
        self._block_of = block_of
        self._parts: dict[bytes, dict[bytes, None]] = {}

    def __len__(self) -> int:
        """Blocks of which some part is there."""
        return len(self._parts)

    def added(self, keys: Iterable[bytes]) -> None:
        """``keys`` are there now."""
        block_of, parts = self._block_of, self._parts
        for key in keys:
            block = block_of(key)
            if block is not None:
                parts.setdefault(block, {})[key] = None

    def removed(self, keys: Iterable[bytes]) -> None:
        """``keys`` are gone."""
        block_of, parts = self._block_of, self._parts
        for key in keys:
            block = block_of(key)
            if block is not None:
                mates = parts[block]
                del mates[key]
                if not mates:
                    del parts[block]

    def together(self, key: bytes) -> Sequence[bytes]:
        """``key`` and the other parts of its block that are there, in the order in which they came."""
        block = self._block_of(key)
        return (key,) if block is None else list(self._parts[block])
