"""Who follows what a pool of the daemon holds, and what each of them is told."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from umbp_connectors.daemon.news import KEYS, Changed, Listed, News, Turn
from umbp_connectors.pool.books import Contents
from umbp_core.directory import Change, EventKind
from umbp_core.tiers import Tier

MOST_WAITING = 1 << 17
"""Keys that wait for one who follows; beyond, everything is listed anew."""
QUIET_S = 1.0
"""After so long without anything new, that is said."""
GATHER_S = 0.01
"""What happens within this time is told together."""


class Watch:
    """What happened in a pool and is not told yet.  One thread notes, one takes, any may end it."""

    def __init__(self, most: int = MOST_WAITING) -> None:
        self._most = most
        self._news = threading.Condition()
        self._waiting: list[Change] = []
        self._keys = 0
        self._lost = True
        self._ended = threading.Event()

    @property
    def ended(self) -> bool:
        """Whether nothing more is to be told."""
        return self._ended.is_set()

    def note(self, changes: Sequence[Change]) -> None:
        """``changes`` happened; never waits."""
        with self._news:
            if self._lost:  # the listing that is to come has them
                return
            self._waiting += changes
            self._keys += sum([len(change.keys) for change in changes])
            if self._keys > self._most:
                self._drop()
                self._lost = True
            self._news.notify()

    def take(self, timeout: float) -> list[Change] | None:
        """What happened since the last call, which is waited for; ``None`` when everything has to be listed.

        What happens after a ``None`` is noted, so that a listing that begins then misses nothing.
        """
        with self._news:
            self._news.wait_for(lambda: self._waiting or self._lost or self.ended, timeout)
            if self._lost:
                self._lost = False
                return None
            return self._drop()

    def rest(self, seconds: float) -> None:
        """Wait so long, unless it is ended."""
        self._ended.wait(seconds)

    def end(self) -> None:
        """Nothing more is to be told.  Idempotent."""
        self._ended.set()
        with self._news:
            self._news.notify()

    def _drop(self) -> list[Change]:
        waiting, self._waiting = self._waiting, []
        self._keys = 0
        return waiting


class Watches:
    """All who follow one pool, as its only observer.  Any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._all: tuple[Watch, ...] = ()
        self._ended = False

    def changed(self, changes: Sequence[Change], contents: Contents) -> None:
        """See ``PoolObserver``."""
        for watch in self._all:
            watch.note(changes)

    @contextlib.contextmanager
    def watching(self) -> Iterator[Watch]:
        """One more, until this ends."""
        watch = Watch()
        with self._lock:
            self._all = (*self._all, watch)
            if self._ended:
                watch.end()
        try:
            yield watch
        finally:
            with self._lock:
                self._all = tuple(each for each in self._all if each is not watch)

    def end(self) -> None:
        """The pool is closed: nothing of it is to be told any more."""
        with self._lock:
            self._ended = True
            watches = self._all
        for watch in watches:
            watch.end()


def news_of(watch: Watch, holdings: Callable[[], Mapping[Tier, Sequence[bytes]]], quiet_s: float) -> Iterator[News]:
    """All that a pool holds, and what happens in it, until ``watch`` ends.  ``holdings`` lists what there is now.

    After ``quiet_s`` seconds without anything, an empty message.
    """
    while True:
        changes = watch.take(quiet_s)
        if watch.ended:
            return
        yield from _listing(holdings()) if changes is None else _told(changes)


def _listing(holdings: Mapping[Tier, Sequence[bytes]]) -> Iterator[Listed]:
    starts = [(tier, start) for tier, keys in holdings.items() for start in range(0, len(keys), KEYS)]
    parts = [(tier, list(holdings[tier][start : start + KEYS])) for tier, start in starts] or [(Tier.DRAM, [])]
    for number, (tier, part) in enumerate(parts, 1):
        yield Listed(tier, part, number == len(parts))


def _told(changes: Iterable[Change]) -> Iterator[Changed]:
    joined = _joined(changes)
    if not joined:
        yield Changed([])
    turns: list[Turn] = []
    room = KEYS
    for came, tier, keys in joined:
        start = 0
        while start < len(keys):
            part = keys[start : start + room]
            turns.append(Turn(came, tier, part))
            start, room = start + len(part), room - len(part)
            if not room:
                yield Changed(turns)
                turns, room = [], KEYS
    if turns:
        yield Changed(turns)


def _joined(changes: Iterable[Change]) -> list[tuple[bool, Tier, list[bytes]]]:
    """Changes of one kind that follow each other as one."""
    joined: list[tuple[bool, Tier, list[bytes]]] = []
    for change in changes:
        came = change.kind is EventKind.ADDED
        if joined and joined[-1][:2] == (came, change.tier):
            joined[-1][2].extend(change.keys)
        else:
            joined.append((came, change.tier, list(change.keys)))
    return joined
