"""Where to put a block, and where to get one from.

Puts go to the fastest tier that has room, HBM before DRAM; never to SSD, which nodes fill themselves.  Room is what
the nodes said last, less what this batch was given already: one batch does not flood one node, and nothing is written
back.  Which of several nodes is a matter of choice (``SELECTS``) and of affinity (``AFFINITIES``).

Gets come from the fastest tier that has a copy: the requester's own if it is there, else any at random.
"""

from __future__ import annotations

import heapq
import random
from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from itertools import accumulate
from typing import Protocol

from umbp_core.block_index import Location
from umbp_core.errors import ConfigError
from umbp_core.master.model import PutOutcome, PutRoute, TierCapacity
from umbp_core.tiers import Tier

PUT_TIERS: tuple[int, ...] = (Tier.HBM, Tier.DRAM)
"""Tiers that blocks are put to, in this order."""
_TRIES = 16
"""Draws among all nodes before those that have room are looked for one by one."""

UNAVAILABLE = PutRoute(PutOutcome.UNAVAILABLE)
ALREADY_EXISTS = PutRoute(PutOutcome.ALREADY_EXISTS)


class Offer:
    """The room that one node says it has: bytes of each tier."""

    __slots__ = ("available", "node_id", "peer_address")

    def __init__(self, node_id: str, peer_address: str, capacities: Iterable[TierCapacity]) -> None:
        self.node_id = node_id
        self.peer_address = peer_address
        self.available: Mapping[int, int] = {capacity.tier: max(0, capacity.available) for capacity in capacities}


Left = Callable[[Offer], int]
"""What is left of an offer on one tier."""


class Select(Protocol):
    """Chooses one of the nodes that have room on one tier, of which less and less is left."""

    def __call__(self, size: int) -> Offer | None:
        """A node with room for ``size`` bytes, if there is one."""
        ...


class MostAvailable:
    """The node with most room; of several the one that came first.  Constant time, nearly."""

    def __init__(self, offers: Sequence[Offer], tier: int, left: Left, rng: random.Random) -> None:
        self._left = left
        self._offers = offers
        self._heap = [(-offer.available[tier], number) for number, offer in enumerate(offers)]
        heapq.heapify(self._heap)

    def __call__(self, size: int) -> Offer | None:
        """See ``Select``."""
        while self._heap:
            known, number = self._heap[0]
            left = self._left(self._offers[number])
            if -known == left:
                return self._offers[number] if left >= size else None
            heapq.heapreplace(self._heap, (-left, number))
        return None


class WeightedRandom:
    """Any node that has room, one with twice the room twice as often."""

    def __init__(self, offers: Sequence[Offer], tier: int, left: Left, rng: random.Random) -> None:
        self._left = left
        self._offers = offers
        self._rng = rng
        self._weights = [offer.available[tier] for offer in offers]
        self._sums = list(accumulate(self._weights))

    def __call__(self, size: int) -> Offer | None:
        """See ``Select``.

        Draws by the room that there was, and takes a draw as often as there is room left; that comes to the same as
        drawing among those that fit, by what is left.
        """
        total = self._sums[-1] if self._sums else 0
        for _ in range(_TRIES if total else 0):
            number = bisect_right(self._sums, self._rng.randrange(total))
            left = self._left(self._offers[number])
            if left >= size and self._rng.randrange(self._weights[number]) < left:
                return self._offers[number]
        fitting = [(offer, left) for offer in self._offers if (left := self._left(offer)) >= size]
        if not fitting:
            return None
        weights = [left for _, left in fitting]
        return self._rng.choices(fitting, weights if any(weights) else None)[0][0]


SelectFactory = Callable[[Sequence[Offer], int, Left, random.Random], Select]
SELECTS: Mapping[str, SelectFactory] = {"most_available": MostAvailable, "random": WeightedRandom}


class Room:
    """What all candidates have left for one batch, and how one of them is chosen.

    ``offers`` are not changed: a batch costs what it takes, and a look at every offer for each tier that it needs.
    """

    def __init__(self, offers: Sequence[Offer], select: SelectFactory, rng: random.Random) -> None:
        self._offers = offers
        self._select = select
        self._rng = rng
        self._selects: dict[int, Select] = {}
        self._taken: dict[str, dict[int, int]] = {}

    def offer_of(self, node_id: str) -> Offer | None:
        """What the node offers, if it is a candidate."""
        return next((offer for offer in self._offers if offer.node_id == node_id), None)

    def left(self, offer: Offer, tier: int) -> int:
        """Bytes that are left of ``offer`` on ``tier``; negative when it has none."""
        return self._taken.get(offer.node_id, offer.available).get(tier, -1)

    def take(self, offer: Offer, tier: int, size: int) -> PutRoute:
        """Give ``size`` bytes of ``tier``, which fit, to a block."""
        left = self._taken.get(offer.node_id)
        if left is None:
            left = self._taken[offer.node_id] = dict(offer.available)
        left[tier] -= size
        return PutRoute(PutOutcome.ROUTED, offer.node_id, tier, offer.peer_address)

    def find(self, size: int, preferred: Offer | None = None) -> tuple[Offer, int] | None:
        """A node and a tier for ``size`` bytes; within a tier ``preferred``, if it has room there."""
        for tier in PUT_TIERS:
            if preferred is not None and self.left(preferred, tier) >= size:
                return preferred, tier
            offer = self._select_in(tier)(size)
            if offer is not None:
                return offer, tier
        return None

    def place(self, size: int) -> PutRoute:
        """Put ``size`` bytes where :meth:`find` says."""
        found = self.find(size)
        return UNAVAILABLE if found is None else self.take(*found, size)

    def _select_in(self, tier: int) -> Select:
        """The choice on ``tier``, made when it is needed first: what was taken before, it finds out by itself."""
        select = self._selects.get(tier)
        if select is None:
            offers = [offer for offer in self._offers if tier in offer.available]
            select = self._select(offers, tier, partial(self.left, tier=tier), self._rng)
            self._selects[tier] = select
        return select


class Affinity(Protocol):
    """Where the blocks of one batch go, in relation to each other and to who asks."""

    def __call__(self, size: int) -> PutRoute:
        """A place for the next block of the batch."""
        ...


class Spread:
    """Every block by itself."""

    def __init__(self, room: Room, requester: str, total: int) -> None:
        self._room = room

    def __call__(self, size: int) -> PutRoute:
        """See ``Affinity``."""
        return self._room.place(size)


class KeepTogether:
    """All blocks to one tier of one node, where one has the room; else each tier first to the node of the last block.

    Like everybody, a block goes to another node's HBM before it goes to DRAM.
    """

    def __init__(self, room: Room, requester: str, total: int) -> None:
        self._room = room
        self._whole = room.find(total)
        self._anchor: Offer | None = None

    def __call__(self, size: int) -> PutRoute:
        """See ``Affinity``."""
        if self._whole is not None:
            return self._room.take(*self._whole, size)
        found = self._room.find(size, self._anchor)
        if found is None:
            return UNAVAILABLE
        self._anchor, tier = found
        return self._room.take(self._anchor, tier, size)


class StayLocal:
    """To the node that asks, whichever of its tiers has room; else anywhere."""

    def __init__(self, room: Room, requester: str, total: int) -> None:
        self._room = room
        self._own = room.offer_of(requester)

    def __call__(self, size: int) -> PutRoute:
        """See ``Affinity``."""
        if self._own is not None:
            for tier in PUT_TIERS:
                if self._room.left(self._own, tier) >= size:
                    return self._room.take(self._own, tier, size)
        return self._room.place(size)


AffinityFactory = Callable[[Room, str, int], Affinity]
AFFINITIES: Mapping[str, AffinityFactory] = {"none": Spread, "same": KeepTogether, "local": StayLocal}


class PutRouter:
    """Routes of puts; raises ``ConfigError`` for a ``select`` or ``affinity`` that is in no table."""

    def __init__(self, select: str, affinity: str, rng: random.Random) -> None:
        if select not in SELECTS:
            raise ConfigError(f"put_select {select!r} is unknown; use one of {', '.join(SELECTS)}")
        if affinity not in AFFINITIES:
            raise ConfigError(f"put_affinity {affinity!r} is unknown; use one of {', '.join(AFFINITIES)}")
        self._select = SELECTS[select]
        self._affinity = AFFINITIES[affinity]
        self._rng = rng

    def begin(self, offers: Sequence[Offer], requester: str, total: int) -> Affinity:
        """Begin a batch of ``requester``, whose blocks that do not exist yet have ``total`` bytes together."""
        return self._affinity(Room(offers, self._select, self._rng), requester, total)


def choose_copy(copies: Sequence[Location], requester: str, rng: random.Random) -> Location:
    """The copy to read: of the fastest tier the requester's own, else any.  ``copies`` come fastest tier first."""
    if len(copies) == 1:
        return copies[0]
    best = [copy for copy in copies if copy.tier == copies[0].tier]
    own = next((copy for copy in best if copy.node == requester), None)
    return rng.choice(best) if own is None else own
