"""One arena and one slab for all tensor-parallel ranks that hold the same KV (MLA).

The first rank opens and writes them; the others map the very same memory through ``/proc`` and read the
same file.  An SSD load is then read by every rank into the same page: the same bytes, whoever is last.
Either all of them can, or none shares: a mixture would leave ranks without copies.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from vllm.distributed import parallel_state

from umbp_connectors.pool.arena import Arena
from umbp_connectors.pool.folder import RankSlab
from umbp_connectors.pool.slab import SlabFile
from umbp_connectors.tier_ports import DramTier, SsdTier
from umbp_core.errors import TierUnavailable

logger = logging.getLogger("vllm.umbp.sharing")


@dataclass(frozen=True, slots=True)
class SharedSlab:
    """Another rank's slab, open for reading."""

    slab: SlabFile

    def close(self) -> None:
        """Close the file here; idempotent."""
        self.slab.close()


def share_slab(owned: SsdTier | None, problem: str) -> tuple[SsdTier | SharedSlab | None, str]:
    """The writer's slab on every TP rank: its own on the first one, opened for reading on the others.

    Collective.  Without a slab on the first rank, ``None`` and the first rank's sentence everywhere.
    """
    group: Any = parallel_state.get_tp_group()
    offer = (str(owned.slab.path), owned.slab.slot_bytes, owned.slots) if isinstance(owned, RankSlab) else None
    offer, problem = group.broadcast_object((offer, problem), src=0)
    if owned is not None or offer is None:
        return owned, problem
    slab = SlabFile(*offer)
    try:
        slab.open(read_only=True)
    except TierUnavailable as error:
        return None, str(error)
    return SharedSlab(slab), ""


def share_arena(tp_rank: int, open_arena: Callable[[], DramTier]) -> DramTier | None:
    """The arena of the first TP rank, mapped here; ``None`` on every rank when one of them cannot map it.

    Collective: every TP rank calls it at the same point of its start.  ``None`` as well where vLLM has no
    process groups (one process only).
    """
    if not parallel_state.model_parallel_is_initialized():
        return None
    group: Any = parallel_state.get_tp_group()
    arena: DramTier | None = open_arena() if tp_rank == 0 else None
    offer = _offer(arena) if isinstance(arena, Arena) else None
    offer = group.broadcast_object(offer, src=0)
    if arena is None and offer is not None:
        try:
            arena = Arena.attach(*offer)
        except TierUnavailable as error:
            logger.warning("umbp: every rank keeps its own copy of the KV: %s", error)
    mapped: list[Any] = [None] * group.world_size
    torch.distributed.all_gather_object(mapped, arena is not None, group=group.cpu_group)
    if offer is not None and all(mapped):
        return arena
    if arena is not None:
        arena.close()
    return None


def _offer(arena: Arena) -> tuple[int, int, int, int, int]:
    """What another process needs to map ``arena``: the arguments of ``Arena.attach``."""
    return os.getpid(), arena.fd, arena.page_bytes, arena.pages, arena.staging_pages
