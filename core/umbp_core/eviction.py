"""Eviction policies: in which order the objects of a full tier should go.

A policy only orders keys.  It knows neither pins nor leases nor pages: the directory walks over
:meth:`EvictionPolicy.victims` and takes what it may.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from types import MappingProxyType
from typing import Protocol, runtime_checkable

from umbp_core.errors import StateError
from umbp_core.offload import DEFAULT_PRIORITY


class EvictionPolicy(Protocol):
    """Orders the keys of one tier.  One thread; every call but ``victims`` should cost O(1)."""

    def added(self, key: bytes, depth: int) -> None:
        """``key`` became readable now.  ``depth`` is its block's index in its prefix chain, 0 at the root."""
        ...

    def touched(self, key: bytes) -> None:
        """``key`` was used now.  Keys that were never added are ignored."""
        ...

    def removed(self, key: bytes) -> None:
        """``key`` is gone.  Keys that were never added are ignored."""
        ...

    def victims(self) -> Iterator[bytes]:
        """Every key once, the best to evict first; the caller skips what it must keep.

        Lazy.  The iterator is void after any other call.
        """
        ...


@runtime_checkable
class PrioritisedPolicy(EvictionPolicy, Protocol):
    """One that can be told what a key is worth (:mod:`umbp_core.offload` has the scale)."""

    def prioritise(self, key: bytes, priority: int) -> None:
        """``key`` goes before keys of a higher priority from now on.  Keys that were never added are ignored."""
        ...

    def priority(self, key: bytes) -> int:
        """What was told of ``key``; the default when nothing was, or it is not there."""
        ...


class LruPolicy:
    """Least recently used first.  O(1) per call and per victim."""

    def __init__(self) -> None:
        self._order: OrderedDict[bytes, None] = OrderedDict()

    def added(self, key: bytes, depth: int) -> None:
        """Make ``key`` the most recent; ``depth`` does not count."""
        self._order[key] = None
        self._order.move_to_end(key)

    def touched(self, key: bytes) -> None:
        """Make ``key`` the most recent."""
        if key in self._order:
            self._order.move_to_end(key)

    def removed(self, key: bytes) -> None:
        """Forget ``key``."""
        self._order.pop(key, None)

    def victims(self) -> Iterator[bytes]:
        """Keys from the least to the most recently used."""
        return iter(self._order)


class PrefixAwareLruPolicy:
    """Among the ``candidate_window`` least recently used keys, the deepest first.

    A block is of use only while all blocks before it in its chain are there; so of candidates of about
    the same age the end of a chain goes first.  Equal depths go oldest first.  O(log window) per victim.
    Raises ``StateError`` when the window is below 1.
    """

    def __init__(self, candidate_window: int = 16) -> None:
        if candidate_window < 1:
            raise StateError(f"a candidate window of {candidate_window} holds no candidate; give at least 1")
        self._window = candidate_window
        self._depths: OrderedDict[bytes, int] = OrderedDict()

    def added(self, key: bytes, depth: int) -> None:
        """Make ``key`` the most recent and remember its depth."""
        self._depths[key] = depth
        self._depths.move_to_end(key)

    def touched(self, key: bytes) -> None:
        """Make ``key`` the most recent."""
        if key in self._depths:
            self._depths.move_to_end(key)

    def removed(self, key: bytes) -> None:
        """Forget ``key``."""
        self._depths.pop(key, None)

    def victims(self) -> Iterator[bytes]:
        """Each time the deepest of the oldest keys that were not given yet."""
        by_age = ((-depth, age, key) for age, (key, depth) in enumerate(self._depths.items()))
        window = list(islice(by_age, self._window))
        heapq.heapify(window)
        for newcomer in by_age:
            yield heapq.heapreplace(window, newcomer)[2]
        while window:
            yield heapq.heappop(window)[2]


class PriorityLruPolicy:
    """The lowest priority first, among equals the least recently used.  O(1) per call and per victim."""

    def __init__(self) -> None:
        self._priorities: dict[bytes, int] = {}
        self._orders: dict[int, OrderedDict[bytes, None]] = {}

    def added(self, key: bytes, depth: int) -> None:
        """Make ``key`` the most recent of the default priority; ``depth`` does not count."""
        self._move(key, DEFAULT_PRIORITY)

    def touched(self, key: bytes) -> None:
        """Make ``key`` the most recent of its priority."""
        if key in self._priorities:
            self._orders[self._priorities[key]].move_to_end(key)

    def removed(self, key: bytes) -> None:
        """Forget ``key``."""
        priority = self._priorities.pop(key, None)
        if priority is not None:
            order = self._orders[priority]
            del order[key]
            if not order:
                del self._orders[priority]

    def prioritise(self, key: bytes, priority: int) -> None:
        """Make ``key`` the most recent of ``priority``."""
        if key in self._priorities:
            self._move(key, priority)

    def priority(self, key: bytes) -> int:
        """What was told of ``key``."""
        return self._priorities.get(key, DEFAULT_PRIORITY)

    def victims(self) -> Iterator[bytes]:
        """Keys from the lowest priority to the highest, each from the least to the most recently used."""
        for priority in sorted(self._orders):
            yield from self._orders[priority]

    def _move(self, key: bytes, priority: int) -> None:
        self.removed(key)
        self._priorities[key] = priority
        self._orders.setdefault(priority, OrderedDict())[key] = None


POLICIES: Mapping[str, Callable[[], EvictionPolicy]] = MappingProxyType(
    {"lru": LruPolicy, "prefix_aware_lru": PrefixAwareLruPolicy, "priority_lru": PriorityLruPolicy}
)
"""The built-in policies by the name that the configuration uses."""
