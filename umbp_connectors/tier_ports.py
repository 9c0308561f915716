"""What the makers of tiers and clients return: Protocols of the core, under the name that authors of plug-ins use.

The built-in ones are in ``umbp_connectors.pool``; ``umbp_core.testing.suite_tier`` tests any.
"""

from __future__ import annotations

from umbp_core.ports import DramTier, PoolClient, SlotRuns, Slots, SsdTier

__all__ = ["DramTier", "PoolClient", "SlotRuns", "Slots", "SsdTier"]
