"""Side pools' pages that wait for the KV pages they belong to.

SGLang writes the side pools of a node first and its KV then, in other calls.  A page of a side pool is copied at
once, and published together with the KV page of the same hash; if that is never stored, it is given up.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass

from umbp_sglang.pools import StagedPages


@dataclass(slots=True)
class _Waiting:
    pages: StagedPages
    anchors: set[bytes]


class Sidecars:
    """What waits, and which KV pages must not be stored because a part of theirs could not be.  Any thread.

    Where this rank ``stores_kv`` not at all, no KV pages come: none of them is remembered then.
    """

    def __init__(self, stores_kv: bool = True) -> None:
        self._stores_kv = stores_kv
        self._lock = threading.Lock()
        self._waiting: list[_Waiting] = []
        self._barred: set[bytes] = set()
        self._settled = False

    def begin(self) -> None:
        """A node's side pools come: what is left of a node whose KV pages came already will not be completed."""
        with self._lock:
            stale, self._waiting = (self._waiting, []) if self._settled else ([], self._waiting)
            if self._settled:
                self._barred.clear()
            self._settled = False
        _discard(stale)

    def add(self, pages: StagedPages, anchors: Sequence[bytes]) -> None:
        """Publish ``pages`` as soon as :meth:`ready` was told of all ``anchors``; at once when there are none."""
        if not anchors:
            pages.publish()
            return
        with self._lock:
            self._waiting.append(_Waiting(pages, set(anchors)))

    def bar(self, anchors: Sequence[bytes]) -> None:
        """A part that these KV pages cannot do without could not be stored."""
        if self._stores_kv:
            with self._lock:
                self._barred.update(anchors)

    def come(self) -> None:
        """A node's KV pages come.  What waits for some that are not stored then is given up by :meth:`begin`."""
        with self._lock:
            self._settled = True

    def allowed(self, anchors: Sequence[bytes]) -> int:
        """How many of ``anchors``, from the first on, may be stored."""
        with self._lock:
            if not self._barred:
                return len(anchors)
            return next((i for i, anchor in enumerate(anchors) if anchor in self._barred), len(anchors))

    def awaited(self, anchors: Sequence[bytes]) -> bool:
        """Whether something waits for one of ``anchors``."""
        with self._lock:
            return any(not waiting.anchors.isdisjoint(anchors) for waiting in self._waiting)

    def ready(self, anchors: Sequence[bytes]) -> None:
        """``anchors`` are stored, or are about to be: publish what has waited for nothing else."""
        with self._lock:
            for waiting in self._waiting:
                waiting.anchors.difference_update(anchors)
            complete = [waiting for waiting in self._waiting if not waiting.anchors]
            self._waiting = [waiting for waiting in self._waiting if waiting.anchors]
        for waiting in complete:
            waiting.pages.publish()

    def clear(self) -> None:
        """Give up everything that waits."""
        with self._lock:
            stale, self._waiting = self._waiting, []
            self._barred.clear()
        _discard(stale)


def _discard(waiting: Sequence[_Waiting]) -> None:
    for entry in waiting:
        entry.pages.discard()
