"""A put in two steps: copied, then published or not."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import final

from umbp_connectors.pool.outcomes import PutStatus


@final
class StagedPut:
    """Objects whose bytes are in the pool and cannot be read yet.

    Whichever of :meth:`publish` and :meth:`discard` comes first counts; until then their pages are taken.  As a context
    manager it discards at its end what was not published.  Any thread.
    """

    def __init__(self, statuses: Sequence[PutStatus], settle: Callable[[bool], bool]) -> None:
        self._statuses = tuple(statuses)
        self._settle = settle
        self._lock = threading.Lock()
        self._published: bool | None = None

    @property
    def statuses(self) -> list[PutStatus]:
        """What became of each object; ``STORED`` means staged."""
        return list(self._statuses)

    def publish(self) -> bool:
        """Make all that is staged readable at once; whether it is, also when asked again.

        False after :meth:`discard`, and when the pool was cleared or closed meanwhile.
        """
        return self._end(True)

    def discard(self) -> None:
        """Give the pages back, unless it is published; idempotent."""
        self._end(False)

    def __enter__(self) -> StagedPut:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.discard()

    def _end(self, publish: bool) -> bool:
        with self._lock:
            if self._published is None:
                self._published = self._settle(publish)
            return self._published
