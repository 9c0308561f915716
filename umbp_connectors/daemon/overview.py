"""What the daemon says about itself: its pools, how full they are, what happened, who uses them."""

from __future__ import annotations

import contextlib
import os
import time
from dataclasses import asdict

from umbp_connectors.daemon.keeper import PoolKeeper
from umbp_connectors.daemon.kept import KeptPool
from umbp_connectors.daemon.listing import (
    NAMED,
    PART_BYTES,
    FetchedPart,
    FetchPart,
    ListedObject,
    Listing,
    ListObjects,
    Verified,
    VerifiedPool,
    VerifyObjects,
)
from umbp_connectors.daemon.messages import LENT, Overview, PoolStats, PoolView, TierFill
from umbp_core.errors import StateError
from umbp_core.tiers import Tier

TRIMMED = "trimmed"
"""How the counter of what was evicted to keep room begins; the tier follows."""
_TIERS = frozenset((Tier.DRAM, Tier.SSD))


def stats_of(kept: KeptPool) -> PoolStats:
    """How full a pool is and what happened in it.  Raises ``StateError`` when it is closed."""
    pool, fills = kept.pool, []
    for tier in (Tier.DRAM, Tier.SSD):
        stats = pool.stats(tier)
        if stats is not None:
            fills.append(TierFill(tier=int(tier), **asdict(stats)))
    counted = pool.counters()
    counters = {f"put_{status.value}": count for status, count in counted.puts.items()}
    counters |= {f"get_{status.value}": kept.lent[status] for status in LENT}
    counters |= {
        "restored": counted.restored,
        "demoted": counted.demoted,
        "demotions_failed": counted.demotions_failed,
        "fenced": counted.fenced,
        "fenced_loads": counted.fenced_loads,
        "demotions_dropped": counted.demotions_dropped,
        "demotions_refused": sum(counted.demotions_refused.values()),
    }
    counters |= {f"{TRIMMED}_{tier.name.lower()}": count for tier, count in counted.trimmed.items()}
    return PoolStats(fills, counters)


def overview_of(keeper: PoolKeeper) -> Overview:
    """Everything there is."""
    views = []
    for kept in keeper.pools():
        with contextlib.suppress(StateError):  # it is being closed
            views.append(_view(kept))
    return Overview(os.getpid(), keeper.dram_bytes, views)


def listing_of(keeper: PoolKeeper, wanted: ListObjects) -> Listing:
    """The objects that ``wanted`` describes, the latest of each pool first."""
    found, listed = 0, []
    starts = tuple(wanted.starts) or (b"",)
    for kept in keeper.pools():
        if wanted.name not in kept.namespace or wanted.tier not in _TIERS:
            continue
        with contextlib.suppress(StateError):  # it is being closed
            copies = kept.pool.copies(Tier(wanted.tier))
            fits = [
                (key, copy)
                for key, copy in reversed(copies)
                if wanted.least <= copy.nbytes <= wanted.most and key.startswith(starts)
            ]
            found += len(fits)
            pool = kept.pool.identity.digest.hex()[:12]
            listed += [
                ListedObject(key, copy.nbytes, copy.depth, copy.pages[0], pool, kept.namespace)
                for key, copy in fits[: wanted.limit]
            ]
    return Listing(found, listed[: wanted.limit])


def verdict_on(keeper: PoolKeeper, wanted: VerifyObjects) -> Verified:
    """Whether what lies in memory is what was stored, as far as there is time; what is not is forgotten."""
    deadline = time.monotonic() + wanted.timeout_ms / 1000
    complete, verdicts = True, []
    for kept in keeper.pools():
        if wanted.name not in kept.namespace or not complete:
            continue
        with contextlib.suppress(StateError):  # it is being closed
            complete, verdict = _verified(kept, deadline)
            verdicts.append(verdict)
    return Verified(complete, verdicts)


def part_of(keeper: PoolKeeper, wanted: FetchPart) -> FetchedPart:
    """Verified bytes of an object in memory, if exactly one pool has it."""
    found = []
    for kept in keeper.pools():
        if wanted.name in kept.namespace:
            with contextlib.suppress(StateError):  # it is being closed
                found += kept.pool.read(wanted.key, wanted.start, PART_BYTES)
    if len(found) != 1:
        return FetchedPart(len(found))
    ((copy, data),) = found
    return FetchedPart(1, copy.nbytes, copy.checksum, data)


def _verified(kept: KeptPool, deadline: float) -> tuple[bool, VerifiedPool]:
    pool, objects, nbytes = kept.pool, 0, 0
    bad: list[bytes] = []
    copies = pool.copies(Tier.DRAM)
    for key, copy in copies:
        if time.monotonic() >= deadline:
            break
        objects, nbytes = objects + 1, nbytes + copy.nbytes
        if pool.check([key]):
            bad.append(key)
    name = pool.identity.digest.hex()[:12]
    verdict = VerifiedPool(name, kept.namespace, objects, nbytes, len(bad), bad[:NAMED])
    return objects == len(copies), verdict


def _view(kept: KeptPool) -> PoolView:
    stats = stats_of(kept)
    return PoolView(
        kept.pool.identity.digest.hex(),
        kept.namespace,
        kept.page_bytes,
        kept.nbytes,
        kept.clients,
        stats.fills,
        stats.counters,
    )
