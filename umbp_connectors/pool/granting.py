"""Pages of a pool that somebody else writes in place, in the arena's memory."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import final

from umbp_connectors.pool.outcomes import PutStatus
from umbp_core.errors import StateError
from umbp_core.ops import CHECKSUM_BYTES


@final
class Grant:
    """Pages that are the writer's until it publishes what it wrote there, or discards them.

    ``places`` says for each object which page is its own, or why it has none.  Whichever of :meth:`publish` and
    :meth:`discard` comes first counts; whoever got the grant has to call one of them.  Any thread.
    """

    def __init__(
        self,
        keys: Sequence[bytes],
        places: Sequence[int | PutStatus],
        settle: Callable[[Mapping[bytes, bytes]], bool],
    ) -> None:
        self.places = tuple(places)
        self._granted = {key for key, place in zip(keys, places, strict=True) if not isinstance(place, PutStatus)}
        self._settle = settle
        self._lock = threading.Lock()
        self._published: bool | None = None

    @property
    def pages(self) -> int:
        """How many pages were granted."""
        return len(self._granted)

    def publish(self, written: Mapping[bytes, bytes]) -> bool:
        """Make readable what was written, given its checksums; the other pages are given back.

        False when nothing is: after :meth:`discard`, and when the pool was cleared or closed meanwhile.  Raises
        ``StateError``, with nothing changed, for a key that was not granted or what is no checksum.
        """
        if not self._granted.issuperset(written) or any(
            len(checksum) != CHECKSUM_BYTES for checksum in written.values()
        ):
            raise StateError("what is to be published was not granted, or has no checksum; publish what was written")
        return self._end(written)

    def discard(self) -> None:
        """Give all pages back, unless something is published; idempotent."""
        self._end({})

    def _end(self, written: Mapping[bytes, bytes]) -> bool:
        with self._lock:
            if self._published is None:
                self._published = self._settle(written) and bool(written)
            return self._published
