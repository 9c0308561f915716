"""Where to put a block, and where to get one from.

Puts go to the fastest tier that has room, HBM before DRAM; never to SSD, which nodes fill themselves.  Room is what
the nodes said last, less what this batch was given already: one batch does not flood one node, and nothing is written
back.  Which of several nodes is a matter of choice (``SELECTS``) and of affinity (``AFFINITIES``).

Gets come from the fastest tier that has a copy: the requester's own if it is there, else any at random.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Protocol

from umbp_core.block_index import Location
from umbp_core.errors import ConfigError
from umbp_core.master.model import PutOutcome, PutRoute, TierCapacity
from umbp_core.tiers import Tier

PUT_TIERS: tuple[int, ...] = (Tier.HBM, Tier.DRAM)
"""Tiers that blocks are put to, in this order."""

UNAVAILABLE = PutRoute(PutOutcome.UNAVAILABLE)
ALREADY_EXISTS = PutRoute(PutOutcome.ALREADY_EXISTS)


class Offer:
    """The room that one node has left for this batch."""

    __slots__ = ("available", "node_id", "peer_address")

    def __init__(self, node_id: str, peer_address: str, capacities: Iterable[TierCapacity]) -> None:
        self.node_id = node_id
        self.peer_address = peer_address
        self.available = {capacity.tier: capacity.available for capacity in capacities}

    def fits(self, tier: int, size: int) -> bool:
        """Whether the node has the tier, with room for ``size`` bytes."""
        return self.available.get(tier, -1) >= size

    def take(self, tier: int, size: int) -> PutRoute:
        """Give ``size`` bytes of ``tier``, which fit, to a block."""
        self.available[tier] -= size
        return PutRoute(PutOutcome.ROUTED, self.node_id, tier, self.peer_address)


class Select(Protocol):
    """Chooses one of the nodes that have room."""

    def __call__(self, offers: Sequence[Offer], tier: int) -> Offer:
        """One of ``offers``, of which there is at least one."""
        ...


class MostAvailable:
    """The node with most room; of several the one that came first."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng

    def __call__(self, offers: Sequence[Offer], tier: int) -> Offer:
        """See ``Select``."""
        return max(offers, key=lambda offer: offer.available[tier])


class WeightedRandom:
    """Any node, one with twice the room twice as often."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng

    def __call__(self, offers: Sequence[Offer], tier: int) -> Offer:
        """See ``Select``."""
        weights = [offer.available[tier] for offer in offers]
        return self._rng.choices(offers, weights if any(weights) else None)[0]


class Room:
    """What all candidates have left for one batch, and how one of them is chosen."""

    def __init__(self, offers: Sequence[Offer], select: Select) -> None:
        self.offers = {offer.node_id: offer for offer in offers}
        self._select = select

    def find(self, size: int, preferred: str = "") -> tuple[Offer, int] | None:
        """A node and a tier for ``size`` bytes; within a tier ``preferred``, if it has room there."""
        favourite = self.offers.get(preferred)
        for tier in PUT_TIERS:
            if favourite is not None and favourite.fits(tier, size):
                return favourite, tier
            fitting = [offer for offer in self.offers.values() if offer.fits(tier, size)]
            if fitting:
                return self._select(fitting, tier), tier
        return None

    def place(self, size: int, preferred: str = "") -> PutRoute:
        """Put ``size`` bytes where :meth:`find` says."""
        found = self.find(size, preferred)
        return UNAVAILABLE if found is None else found[0].take(found[1], size)


class Affinity(Protocol):
    """Where the blocks of one batch go, in relation to each other and to who asks."""

    def __call__(self, room: Room, requester: str, sizes: Sequence[int]) -> list[PutRoute]:
        """A route for each of ``sizes``."""
        ...


def spread(room: Room, requester: str, sizes: Sequence[int]) -> list[PutRoute]:
    """Every block by itself."""
    return [room.place(size) for size in sizes]


def keep_together(room: Room, requester: str, sizes: Sequence[int]) -> list[PutRoute]:
    """All blocks to one tier of one node where one has the room; else each tier first to the node of the last block."""
    whole = room.find(sum(sizes))
    if whole is not None:
        offer, tier = whole
        return [offer.take(tier, size) for size in sizes]
    routes = []
    anchor = ""
    for size in sizes:
        route = room.place(size, anchor)
        anchor = route.node_id or anchor
        routes.append(route)
    return routes


def stay_local(room: Room, requester: str, sizes: Sequence[int]) -> list[PutRoute]:
    """To the node that asks, whichever of its tiers has room; else anywhere."""
    own = room.offers.get(requester)
    routes = []
    for size in sizes:
        tier = None if own is None else next((tier for tier in PUT_TIERS if own.fits(tier, size)), None)
        routes.append(room.place(size) if own is None or tier is None else own.take(tier, size))
    return routes


SELECTS: Mapping[str, Callable[[random.Random], Select]] = {
    "most_available": MostAvailable,
    "random": WeightedRandom,
}
AFFINITIES: Mapping[str, Affinity] = {"none": spread, "same": keep_together, "local": stay_local}


class PutRouter:
    """Routes of puts; raises ``ConfigError`` for a ``select`` or ``affinity`` that is in no table."""

    def __init__(self, select: str, affinity: str, rng: random.Random) -> None:
        if select not in SELECTS:
            raise ConfigError(f"put_select {select!r} is unknown; use one of {', '.join(SELECTS)}")
        if affinity not in AFFINITIES:
            raise ConfigError(f"put_affinity {affinity!r} is unknown; use one of {', '.join(AFFINITIES)}")
        self._select = SELECTS[select](rng)
        self._affinity = AFFINITIES[affinity]

    def route(
        self, requester: str, sizes: Sequence[int], exists: Sequence[bool], offers: Sequence[Offer]
    ) -> list[PutRoute]:
        """A route for each of ``sizes``; blocks that exist take no room."""
        wanted = [size for size, known in zip(sizes, exists, strict=True) if not known]
        routes = iter(self._affinity(Room(offers, self._select), requester, wanted))
        return [ALREADY_EXISTS if known else next(routes) for known in exists]


def choose_copy(copies: Sequence[Location], requester: str, rng: random.Random) -> Location:
    """The copy to read: of the fastest tier the requester's own, else any.  ``copies`` come fastest tier first."""
    best = [copy for copy in copies if copy.tier == copies[0].tier]
    own = next((copy for copy in best if copy.node == requester), None)
    return rng.choice(best) if own is None else own
