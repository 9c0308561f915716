"""Objects of a pool that somebody else reads in place, from the arena's memory."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import NamedTuple, final

from umbp_connectors.pool.outcomes import GetStatus


class ArenaOffer(NamedTuple):
    """The memory that lent objects lie in: the arena's memfd, and how it is cut into pages."""

    fd: int
    page_bytes: int
    pages: int


class LentObject(NamedTuple):
    """One object of a loan: where its bytes begin (a page of the arena), how many, and their checksum.

    ``status`` says where it was found; unless that is a hit, the rest means nothing.
    """

    status: GetStatus
    page: int = 0
    nbytes: int = 0
    checksum: bytes = b""


@final
class Loan:
    """Objects that stay where they are until :meth:`release`, which whoever got the loan has to call.  Any thread."""

    def __init__(self, objects: Sequence[LentObject], release: Callable[[], None]) -> None:
        self.objects = tuple(objects)
        self._release = release
        self._lock = threading.Lock()
        self._ended = False

    def release(self) -> None:
        """Nobody reads these objects any more; idempotent."""
        with self._lock:
            ended, self._ended = self._ended, True
        if not ended:
            self._release()
