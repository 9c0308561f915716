"""What SGLang calls a page in its event stream, for a page that its storage knows by another name.

A page of a request without ``extra_key``, ``cache_salt`` and adapter has one name: the stream publishes the first
eight bytes of the hash that the storage is given.  For all others SGLang computes two chains of hashes, and only its
tree has the tokens that both are made of.  So whoever hands pages to the storage or asks it for some describes them,
and here both chains are computed, and kept for as long as the pages are.

No threads and no I/O; the reporter's thread owns it.
"""

from __future__ import annotations

import struct
import subprocess
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

_REFUSALS = (ImportError, OSError, RuntimeError, TypeError, ValueError, subprocess.SubprocessError)
"""SGLang compiles its hash at the first use, which may fail in any of these ways."""

KEPT = 1 << 17
"""Names of pages that the pool does not hold, of which so many are remembered at least."""


class Description(NamedTuple):
    """Consecutive pages of one request's prefix, as SGLang's tree has them."""

    key: Any
    """SGLang's ``RadixKey`` of their tokens, with the request's namespace."""
    parent: str | None
    """The storage hash of the page before them, ``None`` at the start of the prefix."""
    hashes: Sequence[str]
    """Their storage hashes."""


class Chains(Protocol):
    """SGLang's functions of hashes.  What they cannot do raises one of ``_REFUSALS``."""

    def stored(self, key: Any, parent: str | None, pages: int) -> list[str]:
        """The storage hashes of the ``pages`` pages of ``key`` that follow ``parent``."""

    def events(self, key: Any, parent: str | None, pages: int) -> list[str]:
        """The hashes that the event stream's names are made of; ``parent`` is one of these."""

    def published(self, key: Any, event: str) -> int:
        """The name of the page with the event hash ``event``, as it is published."""


def short(key: bytes) -> bytes:
    """What is kept of a storage hash: as much of it as the event stream publishes."""
    return key[:8]


def published_form(ids: Sequence[bytes]) -> list[bytes]:
    """``ids`` as routers ask for them: signed integers in decimal."""
    return [b"%d" % number for number in struct.unpack(f">{len(ids)}q", b"".join(ids))]


class PageIds:
    """The published id of every page that was described; both are eight bytes.

    A page that nobody described counts as one whose request had no namespace.
    """

    def __init__(self, chains: Chains, kept: int = KEPT) -> None:
        self._chains = chains
        self._kept = kept
        self._prune_at = 2 * kept
        self._ids: dict[bytes, bytes | None] = {}
        self._events: dict[bytes, str] = {}
        self._pages: dict[bytes, set[bytes]] = {}
        self.unknown = 0
        """Pages that were described and whose published id cannot be told."""

    def __len__(self) -> int:
        return len(self._ids)

    def of(self, page: bytes) -> bytes | None:
        """The published id of ``page``; ``None`` when it has one and it is not known."""
        return self._ids.get(page, page)

    def pages_of(self, published: bytes) -> list[bytes]:
        """Every page that may stand behind an id: pages of several namespaces can have the same."""
        pages = list(self._pages.get(published, ()))
        return pages if published in self._ids else [published, *pages]

    def learn(self, description: Description) -> list[tuple[bytes, bytes | None]]:
        """Take a description in; the pages whose id it changed, with the id that they had before."""
        key, _, hashes = description
        pages = [bytes.fromhex(each[:16]) for each in hashes]
        if all(map(self._ids.get, pages)):
            return []
        events = self._event_hashes(description)
        if events is None:
            new = [page for page in pages if page not in self._ids]
            self.unknown += len(new)
            self._ids.update(dict.fromkeys(new))
            return [(page, page) for page in new]
        changed = []
        for page, event in zip(pages, events, strict=True):
            published = self._chains.published(key, event).to_bytes(8, "big", signed=True)
            before = self._ids.get(page, page)
            self._ids[page] = published
            self._events[page] = event
            self._pages.setdefault(published, set()).add(page)
            if before != published:
                changed.append((page, before))
        return changed

    def prune(self, held: Callable[[bytes], bool]) -> None:
        """Forget pages that are not ``held`` when there are too many of them, those described long ago first."""
        if len(self._ids) < self._prune_at:
            return
        recent = set(list(self._ids)[-self._kept :])
        for page in [page for page in self._ids if page not in recent and not held(page)]:
            self._forget(page)
        self._prune_at = max(2 * self._kept, 2 * len(self._ids))

    def _event_hashes(self, description: Description) -> list[str] | None:
        """The event chain of the pages; ``None`` when its beginning is not known, or the tokens are not theirs."""
        key, parent, hashes = description
        before = None if parent is None else self._events.get(bytes.fromhex(parent[:16]))
        if parent is not None and before is None:
            return None
        try:
            if self._chains.stored(key, parent, len(hashes)) != list(hashes):
                return None
            return self._chains.events(key, before, len(hashes))
        except _REFUSALS:
            return None

    def _forget(self, page: bytes) -> None:
        published = self._ids.pop(page)
        self._events.pop(page, None)
        if published is not None:
            others = self._pages[published]
            others.discard(page)
            if not others:
                del self._pages[published]
