"""From the pool's threads to the reporter's: which pages of L3 came to a tier or left it.

A page of L3 is told when all of it can be read: every range of its heads, and its page in every side pool that SGLang
reads whole (an indexer's, a draft model's).  Side pools of which the last pages are enough are not waited for.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator, Mapping, Sequence

from umbp_connectors.pool.books import Contents, PoolObserver
from umbp_connectors.reporting.feed import Feed
from umbp_connectors.reporting.words import Word
from umbp_core.directory import Change, EventKind
from umbp_core.tiers import Tier
from umbp_sglang.joined_parts import JoinedParts
from umbp_sglang.page_ids import Description
from umbp_sglang.stored_pages import StoredPages

KV = "kv"
WHOLE_POOLS = (KV, "indexer", "draft", "draft_indexer")
"""SGLang's pools of which every page of a prefix is needed."""

_MAX_DESCRIPTIONS = 1 << 14
"""Should nobody read them, since no pool could be opened, the oldest go."""

Item = Sequence[Change] | dict[Tier, list[bytes]]
"""Changes, or everything that is there."""


class PoolTeller:
    """The L3 of one rank, over all lives of its pool.

    Observers are called under the locks of their pools; the teller's own lock is taken last and held for an append.
    ``described`` may be called by any thread, the scheduler's too: it appends, and nothing else.
    """

    def __init__(self, pages: StoredPages) -> None:
        self._pages = pages
        self._lock = threading.Lock()
        self._feed: Feed[Item] | None = None
        self._life = 0
        self._joined: JoinedParts | None = None
        self._now: Contents = list
        self._descriptions: deque[Description] = deque(maxlen=_MAX_DESCRIPTIONS)

    def use(self, feed: Feed[Item]) -> None:
        """Where to tell; before anything is told."""
        self._feed = feed

    def begin(self, parts: Mapping[str, int]) -> list[tuple[str, int]]:
        """A pool is about to be opened, or was closed: what was told is void.

        ``parts`` says how many parts of each page this rank keeps of each of SGLang's pools.  Returns the parts that
        want an observer, see :meth:`observer`.
        """
        pools = WHOLE_POOLS if KV in parts else ()
        wanted = [(name, part) for name in pools for part in range(parts.get(name, 0))]
        with self._lock:
            self._life += 1
            self._joined = JoinedParts(len(wanted)) if len(wanted) > 1 else None
            self._now = list
            self._tell(1, {})
        return wanted

    def observer(self, part: int) -> PoolObserver:
        """Who follows the part with the number ``part`` of those that :meth:`begin` returned last."""
        return _Part(self, self._life, part)

    def described(self, description: Description) -> None:
        """Pages of a namespace are about to be stored, or were asked for."""
        self._descriptions.append(description)

    @property
    def pending(self) -> bool:
        """Whether descriptions wait to be read: have the pool call its observer, should nothing change in it."""
        return bool(self._descriptions)

    def changed(self, life: int, part: int, changes: Sequence[Change], contents: Contents) -> None:
        """What an observer was told."""
        with self._lock:
            if life != self._life:
                return
            if self._joined is not None:
                joined = self._joined
                self._now = joined.holdings
                changes = joined.apply(part, changes)
            else:
                self._now = contents
            if changes or self._descriptions:
                self._tell(sum([len(change.keys) for change in changes]), changes)

    def whole(self) -> Item:
        """Everything that is there; only from within the feed."""
        return dict(self._now())

    def decode(self, item: Item) -> Iterator[Word]:
        """What ``item`` says; in the reporter's thread."""
        yield from self._pages.learn(self._taken())
        if isinstance(item, dict):
            yield from self._pages.replace(item)
            return
        for change in item:
            if change.kind is EventKind.ADDED:
                yield self._pages.add(change.tier, change.keys)
            else:
                yield self._pages.remove(change.tier, change.keys)

    def _taken(self) -> Iterator[Description]:
        while self._descriptions:
            yield self._descriptions.popleft()

    def _tell(self, weight: int, item: Item) -> None:
        if self._feed is not None:
            self._feed.tell(weight, item)


class _Part:
    """The observer of one part of the pages, in one life of the pool."""

    def __init__(self, teller: PoolTeller, life: int, part: int) -> None:
        self._teller = teller
        self._life = life
        self._part = part

    def changed(self, changes: Sequence[Change], contents: Contents) -> None:
        """See ``PoolObserver``."""
        self._teller.changed(self._life, self._part, changes, contents)
