"""Somebody who is told what a pool holds, and notices when he is told what cannot be."""

from __future__ import annotations

from collections.abc import Sequence

from tests.connectors.daemon.conftest import Daemon
from umbp_connectors.pool.books import Contents
from umbp_core.directory import Change, EventKind
from umbp_core.tiers import Tier

Held = dict[Tier, set[bytes]]


class Told:
    """An observer that keeps what it was told."""

    def __init__(self) -> None:
        self.held: Held = {Tier.DRAM: set(), Tier.SSD: set()}

    def changed(self, changes: Sequence[Change], contents: Contents) -> None:
        for change in changes:
            keys, held = set(change.keys), self.held[change.tier]
            assert len(keys) == len(change.keys) > 0
            if change.kind is EventKind.ADDED:
                assert not keys & held, "it is there already"
                held |= keys
            else:
                assert keys <= held, "it was not there"
                held -= keys
        assert {tier: set(keys) for tier, keys in contents()} == self.held


def truth(daemon: Daemon) -> Held:
    """What the daemon's only pool holds."""
    (kept,) = daemon.keeper.pools()
    holdings = kept.pool.holdings()
    return {tier: set(holdings[tier]) for tier in (Tier.DRAM, Tier.SSD)}
