"""Routes of whole requests, in steps."""

from __future__ import annotations

import random
from collections.abc import Collection, Sequence

from umbp_core.block_index import BlockIndex
from umbp_core.master.changes import Steps
from umbp_core.master.clients import ClientTable
from umbp_core.master.model import GetRoute, MasterSettings, NodeStatus, PutRoute
from umbp_core.master.routing import ALREADY_EXISTS, Offer, PutRouter, choose_copy


class Routes:
    """Routes to and from ``clients`` of ``blocks``, ``size`` keys in a step."""

    def __init__(
        self, settings: MasterSettings, clients: ClientTable, blocks: BlockIndex, rng: random.Random, size: int
    ) -> None:
        self._lease = settings.lease_duration
        self._router = PutRouter(settings.put_select, settings.put_affinity, rng)
        self._clients = clients
        self._blocks = blocks
        self._rng = rng
        self._size = size

    def puts(
        self, requester: str, keys: Sequence[bytes], sizes: Sequence[int], exclude: Collection[str], now: float
    ) -> Steps[list[PutRoute]]:
        """Steps of routes for blocks to put; the room is that at the first of them.

        Blocks that exist are not put again and take no room.
        """
        exists = yield from self.lookups(keys)
        total = sum(size for size, known in zip(sizes, exists, strict=True) if not known)
        place = self._router.begin(self._offers(requester, exclude, now), requester, total)
        routes: list[PutRoute] = []
        for start in range(0, len(keys), self._size):
            part = slice(start, start + self._size)
            routes += [
                ALREADY_EXISTS if known else place(size) for size, known in zip(sizes[part], exists[part], strict=True)
            ]
            yield
        return routes

    def gets(
        self, requester: str, keys: Sequence[bytes], exclude: Collection[str], now: float
    ) -> Steps[list[GetRoute | None]]:
        """Steps of routes for blocks to get; what is found is leased and counts as used."""
        routes: list[GetRoute | None] = []
        for start in range(0, len(keys), self._size):
            excluded = {*exclude, *self._clients.silent(now)}
            for copies in self._blocks.route(keys[start : start + self._size], now, self._lease, excluded):
                if copies:
                    node, tier, size = choose_copy(copies, requester, self._rng)
                    routes.append(GetRoute(node, tier, size, self._clients.peer_address(node)))
                else:
                    routes.append(None)
            yield
        return routes

    def lookups(self, keys: Sequence[bytes]) -> Steps[list[bool]]:
        """Steps of an answer whether there is any copy of each key."""
        found: list[bool] = []
        for start in range(0, len(keys), self._size):
            found += self._blocks.exists(keys[start : start + self._size])
            yield
        return found

    def _offers(self, requester: str, exclude: Collection[str], now: float) -> list[Offer]:
        """The nodes that blocks may be put to: alive and heard, and reachable by who asks."""
        excluded = {*exclude, *self._clients.silent(now)}
        return [
            client.offer
            for client in self._clients
            if client.heard and client.status is NodeStatus.ALIVE and client.node_id not in excluded
            if client.peer_address or client.node_id == requester
        ]
