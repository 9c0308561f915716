"""Which block hashes vLLM's own prefix cache can serve, followed without its KV events.

vLLM's events are no record of that: a hash may be cached in several blocks and one of them is evicted (``BlockRemoved``
although another serves it), a block is announced again when a request reuses it, entries move between blocks without an
event.  And they cost the scheduler several microseconds per block, for token ids that nobody here wants.

So the scheduler's thread only notes *which blocks were touched*, a reference to a list per call of the block pool, and
the reporter's thread reads from the blocks themselves what they hold now.  Every change is followed by a note of its
block, so that the last reading of a block is right, whatever happens between the change and the reading.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

from umbp_connectors.reporting.words import Word
from umbp_core.tiers import Tier
from umbp_vllm import block_hooks
from umbp_vllm.published import GroupWords


class All(enum.Enum):
    """What happened to all blocks at once."""

    EMPTIED = "emptied"
    """The prefix cache was emptied."""
    UNKNOWN = "unknown"
    """All have to be read, whatever was known of them."""


Note: TypeAlias = "Sequence[Any] | All"
"""Blocks (vLLM's ``KVCacheBlock``) that were touched; the list does not change any more."""


class BlockLog:
    """The scheduler thread's half: what was touched and is not told yet."""

    def __init__(self) -> None:
        self._notes: list[Note] = []

    def note(self, note: Note) -> None:
        """Blocks may hold something else than before."""
        self._notes.append(note)

    def take(self) -> list[Note]:
        """What was noted since the last call."""
        if not self._notes:
            return self._notes
        notes, self._notes = self._notes, []
        return notes


class BlockMirror:
    """The reporter thread's half: what every block held when it was last read, and how many blocks hold a key."""

    def __init__(self, block_pool: Any, words: GroupWords) -> None:
        self._blocks: Sequence[Any] = block_pool.blocks
        self._more: Mapping[int, Iterable[bytes]] = block_hooks.further_hashes(block_pool)
        self._words = words
        self._keys: list[tuple[bytes, ...]] = []
        self._holders: dict[bytes, int] = {}
        self._forget()

    def decode(self, notes: Sequence[Note]) -> Iterator[Word]:
        """The words for ``notes``, in which nothing stands before the last one for all blocks."""
        touched: list[Sequence[Any]] = []
        for note in notes:
            if isinstance(note, All):
                touched = []
                self._forget()
                if note is All.UNKNOWN:
                    self._read([self._blocks])
                    yield self._words.replaced(Tier.HBM, self._holders)
                else:
                    yield self._words.cleared(Tier.HBM)
            else:
                touched.append(note)
        changed = self._read(touched)
        came = [key for key, held in changed.items() if held]
        gone = [key for key, held in changed.items() if not held]
        yield from self._words.changed(Tier.HBM, came, gone)

    def _forget(self) -> None:
        self._keys = [()] * len(self._blocks)
        self._holders = {}

    def _read(self, touched: Iterable[Sequence[Any]]) -> dict[bytes, bool]:
        """Read blocks; the keys that a first block holds now (true), and those that no block holds any more (false)."""
        keys_of, more = self._keys, self._more
        changed: dict[bytes, bool] = {}
        for blocks in touched:
            for block in blocks:
                key, number = block.block_hash, block.block_id
                now = () if key is None else (key, *more.get(number, ()))
                before = keys_of[number]
                if now != before:
                    keys_of[number] = now
                    self._release(before, changed)
                    self._hold(now, changed)
        return changed

    def _hold(self, keys: Iterable[bytes], changed: dict[bytes, bool]) -> None:
        holders = self._holders
        for key in keys:
            others = holders.get(key, 0)
            holders[key] = others + 1
            if not others:
                changed[key] = True

    def _release(self, keys: Iterable[bytes], changed: dict[bytes, bool]) -> None:
        holders = self._holders
        for key in keys:
            others = holders[key] - 1
            if others:
                holders[key] = others
            else:
                del holders[key]
                changed[key] = False
