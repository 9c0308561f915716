"""What becomes of the objects of a put or get: the core's words, under the name that the pool uses."""

from __future__ import annotations

from umbp_core.outcomes import GetStatus, PoolCounters, PoolStats, PutStatus

__all__ = ["GetStatus", "PoolCounters", "PoolStats", "PutStatus"]
