"""An observer that keeps beside a pool what it was told, and compares it with what the pool says of itself."""

from __future__ import annotations

from collections.abc import Sequence

from umbp_connectors.pool.books import Contents
from umbp_core.directory import Change, EventKind
from umbp_core.tiers import Tier


class Follower:
    """``held`` is what was told; every difference to the pool's own word is in ``faults``."""

    def __init__(self) -> None:
        self.held: dict[Tier, set[bytes]] = {Tier.DRAM: set(), Tier.SSD: set()}
        self.faults: list[str] = []
        self.calls = 0

    def changed(self, changes: Sequence[Change], contents: Contents) -> None:
        self.calls += 1
        for change in changes:
            keys, mine = set(change.keys), self.held[change.tier]
            if len(keys) != len(change.keys) or len(keys) != len(change.copies):
                self.faults.append(f"{change} names a key twice")
            if change.kind is EventKind.ADDED:
                if keys & mine:
                    self.faults.append(f"{change.tier.name}: {keys & mine} came twice")
                mine |= keys
            else:
                if not keys <= mine:
                    self.faults.append(f"{change.tier.name}: {keys - mine} left and had not come")
                mine -= keys
        for tier, keys in contents():
            if set(keys) != self.held[tier]:
                self.faults.append(f"{tier.name}: told {sorted(self.held[tier])}, there is {sorted(keys)}")
