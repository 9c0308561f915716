"""Which blocks nodes should evict, so that puts find room.

A tier that is filled to the high watermark or beyond is to be emptied to the low one, by its least recently used
blocks that nobody leases.  HBM and DRAM only: nodes look after their SSD themselves.  The master only asks; blocks
leave its index when their node says that they are gone.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence

from umbp_core.block_index import BlockIndex, Victim
from umbp_core.master.clients import Client
from umbp_core.master.model import EvictionOrder, MasterSettings, TierCapacity
from umbp_core.master.routing import PUT_TIERS

MAX_VICTIMS = 1 << 14
"""Blocks that one call plans: some milliseconds.  A tier that has to give up more of them is asked again next round."""
ORDER_KEYS = 4096
"""Blocks that one order names: peers take messages of 4 MiB."""


class EvictionPlanner:
    """Plans rounds of evictions, each in slices: one tier of one node, or several with few blocks to evict."""

    def __init__(self, settings: MasterSettings, blocks: BlockIndex) -> None:
        self._high = settings.eviction_high_watermark
        self._low = settings.eviction_low_watermark
        self._blocks = blocks
        self._round: deque[tuple[Client, TierCapacity]] = deque()

    @property
    def pending(self) -> bool:
        """Whether a round was begun and not planned to its end."""
        return bool(self._round)

    def begin(self, clients: Iterable[Client]) -> None:
        """Begin a round with those tiers of ``clients`` that are too full now."""
        self._round = deque(
            (client, capacity)
            for client in clients
            if client.peer_address
            for capacity in client.capacities
            if capacity.tier in PUT_TIERS and self._excess(capacity)
        )

    def plan(self, now: float) -> list[EvictionOrder]:
        """Go on with the round: orders to some tiers, which name at most ``MAX_VICTIMS`` blocks."""
        orders: list[EvictionOrder] = []
        left = MAX_VICTIMS
        while self._round and left > 0:
            client, capacity = self._round.popleft()
            victims = self._choose(client, capacity, now, left)
            left -= len(victims)
            orders += _orders(client, victims)
        return orders

    def _excess(self, capacity: TierCapacity) -> int:
        """Bytes that ``capacity`` holds too much; 0 while it is below the high watermark."""
        used = capacity.total - capacity.available
        if used < self._high * capacity.total:
            return 0
        return max(0, used - int(self._low * capacity.total))

    def _choose(self, client: Client, capacity: TierCapacity, now: float, limit: int) -> list[Victim]:
        """The victims of one tier: as many as it takes, or ``limit``."""
        excess = self._excess(capacity)
        chosen: list[Victim] = []
        for victim in self._blocks.victims(client.node_id, capacity.tier, now):
            if excess <= 0 or len(chosen) >= limit:
                break
            chosen.append(victim)
            excess -= victim.size
        return chosen


def _orders(client: Client, victims: Sequence[Victim]) -> Iterator[EvictionOrder]:
    for start in range(0, len(victims), ORDER_KEYS):
        part = victims[start : start + ORDER_KEYS]
        keys = tuple(victim.key for victim in part)
        yield EvictionOrder(client.node_id, client.peer_address, keys, sum(victim.size for victim in part))
