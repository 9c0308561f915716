"""What a node holds by what its sources said, and how its changes are passed on."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Protocol

from umbp_connectors.reporting.words import Word, WordKind
from umbp_core.holdings import Holdings

_BYTES = frozenset({bytes})


class Told(Protocol):
    """Who is told; ``MasterClient`` is one.  Lists that were handed over are not changed afterwards."""

    def report(self, hashes: Sequence[bytes], tier: int) -> None:
        """``hashes`` came to ``tier``."""
        ...

    def revoke(self, hashes: Sequence[bytes], tier: int) -> None:
        """``hashes`` left ``tier``."""
        ...

    def clear(self, tier: int) -> None:
        """Everything left ``tier``."""
        ...


class Mirror:
    """What the node holds.  One thread changes it, any thread reads it.

    It is what a master's client tells when the master has to be told everything, so it changes before the change is
    passed on.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._holdings = Holdings()

    def snapshot(self) -> Iterator[tuple[int, Sequence[bytes]]]:
        """Everything, tier by tier, each as it is when it is reached.  Changes go on meanwhile."""
        with self._lock:
            tiers = self._holdings.tiers()
        for tier in tiers:
            with self._lock:
                hashes = self._holdings.held(tier)
            yield tier, hashes

    def counts(self) -> dict[int, int]:
        """Hashes per tier.  Never waits: a change that is under way may be in it already, or not yet."""
        return self._holdings.counts()

    def apply(self, source: str, word: Word, changes: Changes) -> None:
        """``source`` says ``word``; what that changes for the node goes into ``changes``.

        Raises ``TypeError`` for hashes that are no bytes: in the mirror they would stop all that is told.
        """
        kind, tier, hashes = word
        if not _BYTES.issuperset(map(type, hashes)):
            raise TypeError(f"hashes that are told are bytes; {source} says {word!r:.200}")
        with self._lock:
            if kind is WordKind.ADD:
                changes.come(tier, self._holdings.add(source, tier, hashes))
            elif kind is WordKind.REMOVE:
                changes.go(tier, self._holdings.remove(source, tier, hashes))
            elif kind is WordKind.CLEAR:
                self._clear(source, tier, changes)
            else:
                added, removed = self._holdings.replace(source, tier, hashes)
                changes.go(tier, removed)
                changes.come(tier, added)

    def forget(self, source: str, changes: Changes) -> None:
        """Nothing is known of ``source`` any more."""
        with self._lock:
            for tier in self._holdings.tiers_of(source):
                self._clear(source, tier, changes)

    def _clear(self, source: str, tier: int, changes: Changes) -> None:
        removed = self._holdings.clear(source, tier)
        if self._holdings.count(tier):
            changes.go(tier, removed)
        else:
            changes.clear(tier, len(removed))


class Changes:
    """Changes on their way to ``told``, those of a kind joined to one call.

    Calls for one tier are made in the order of the changes; between tiers there is no order.
    """

    def __init__(self, told: Told) -> None:
        self._told = told
        self._runs: dict[int, tuple[bool, list[bytes]]] = {}
        self.came: Counter[int] = Counter()
        """Hashes that came, per tier."""
        self.left: Counter[int] = Counter()
        """Hashes that left, per tier."""

    def come(self, tier: int, hashes: list[bytes]) -> None:
        """``hashes`` came to ``tier``."""
        self.came[tier] += len(hashes)
        self._join(tier, True, hashes)

    def go(self, tier: int, hashes: list[bytes]) -> None:
        """``hashes`` left ``tier``."""
        self.left[tier] += len(hashes)
        self._join(tier, False, hashes)

    def clear(self, tier: int, count: int) -> None:
        """Everything left ``tier``, the last ``count`` hashes now: what was to be said of it does not matter."""
        self.left[tier] += count
        self._runs.pop(tier, None)
        self._told.clear(tier)

    def pass_on(self) -> None:
        """Make the calls that are left."""
        while self._runs:
            tier, (held, hashes) = self._runs.popitem()
            self._say(tier, held, hashes)

    def _join(self, tier: int, held: bool, hashes: list[bytes]) -> None:
        if not hashes:
            return
        before = self._runs.get(tier)
        if before is not None and before[0] is held:
            before[1].extend(hashes)
            return
        if before is not None:
            self._say(tier, *before)
        self._runs[tier] = (held, hashes)

    def _say(self, tier: int, held: bool, hashes: list[bytes]) -> None:
        if held:
            self._told.report(hashes, tier)
        else:
            self._told.revoke(hashes, tier)
