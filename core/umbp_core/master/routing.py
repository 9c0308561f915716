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
    """The room that one node has left for this batch."""

    __slots__ = ("available", "node_id", "peer_address")

    def __init__(self, node_id: str, peer_address: str, capacities: Iterable[TierCapacity]) -> None:
        self.node_id = node_id
        self.peer_address = peer_address
        self.available = {capacity.tier: max(0, capacity.available) for capacity in capacities}

    def fits(self, tier: int, size: int) -> bool:
        """Whether the node has the tier, with room for ``size`` bytes."""
        return self.available.get(tier, -1) >= size

    def take(self, tier: int, size: int) -> PutRoute:
        """Give ``size`` bytes of ``tier``, which fit, to a block."""
        self.available[tier] -= size
        return PutRoute(PutOutcome.ROUTED, self.node_id, tier, self.peer_address)


class Select(Protocol):
    """Chooses one of the nodes that have room on one tier, of which less and less is left."""

    def __call__(self, size: int) -> Offer | None:
        """A node with room for ``size`` bytes, if there is one."""
        ...


class MostAvailable:
    """The node with most room; of several the one that came first.  Constant time, nearly."""

    def __init__(self, offers: Sequence[Offer], tier: int, rng: random.Random) -> None:
        self._tier = tier
        self._offers = offers
        self._heap = [(-offer.available[tier], number) for number, offer in enumerate(offers)]
        heapq.heapify(self._heap)

    def __call__(self, size: int) -> Offer | None:
        """See ``Select``."""
        while self._heap:
            known, number = self._heap[0]
            available = self._offers[number].available[self._tier]
            if -known == available:
                return self._offers[number] if available >= size else None
            heapq.heapreplace(self._heap, (-available, number))
        return None


class WeightedRandom:
    """Any node that has room, one with twice the room twice as often."""

    def __init__(self, offers: Sequence[Offer], tier: int, rng: random.Random) -> None:
        self._tier = tier
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
            available = self._offers[number].available[self._tier]
            if available >= size and self._rng.randrange(self._weights[number]) < available:
                return self._offers[number]
        fitting = [offer for offer in self._offers if offer.fits(self._tier, size)]
        if not fitting:
            return None
        weights = [offer.available[self._tier] for offer in fitting]
        return self._rng.choices(fitting, weights if any(weights) else None)[0]


SelectFactory = Callable[[Sequence[Offer], int, random.Random], Select]
SELECTS: Mapping[str, SelectFactory] = {"most_available": MostAvailable, "random": WeightedRandom}


class Room:
    """What all candidates have left for one batch, and how one of them is chosen."""

    def __init__(self, offers: Sequence[Offer], select: SelectFactory, rng: random.Random) -> None:
        self.offers = {offer.node_id: offer for offer in offers}
        self._selects = {
            tier: select([offer for offer in offers if tier in offer.available], tier, rng) for tier in PUT_TIERS
        }

    def find(self, size: int, preferred: str = "") -> tuple[Offer, int] | None:
        """A node and a tier for ``size`` bytes; within a tier ``preferred``, if it has room there."""
        favourite = self.offers.get(preferred)
        for tier, select in self._selects.items():
            if favourite is not None and favourite.fits(tier, size):
                return favourite, tier
            offer = select(size)
            if offer is not None:
                return offer, tier
        return None

    def place(self, size: int, preferred: str = "") -> PutRoute:
        """Put ``size`` bytes where :meth:`find` says."""
        found = self.find(size, preferred)
        return UNAVAILABLE if found is None else found[0].take(found[1], size)


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
        self._anchor = ""

    def __call__(self, size: int) -> PutRoute:
        """See ``Affinity``."""
        if self._whole is not None:
            offer, tier = self._whole
            return offer.take(tier, size)
        route = self._room.place(size, self._anchor)
        self._anchor = route.node_id or self._anchor
        return route


class StayLocal:
    """To the node that asks, whichever of its tiers has room; else anywhere."""

    def __init__(self, room: Room, requester: str, total: int) -> None:
        self._room = room
        self._own = room.offers.get(requester)

    def __call__(self, size: int) -> PutRoute:
        """See ``Affinity``."""
        if self._own is not None:
            for tier in PUT_TIERS:
                if self._own.fits(tier, size):
                    return self._own.take(tier, size)
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
