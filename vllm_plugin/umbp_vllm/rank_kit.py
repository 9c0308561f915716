"""What copies between a rank's HBM and one arena: the copier, the transfer engine on it, and the gate of its layers."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, cast

from umbp_connectors.config import UmbpConfig
from umbp_connectors.plugins import PluginHost
from umbp_connectors.tier_ports import DramTier, SsdTier
from umbp_connectors.transfer.engine import TransferEngine
from umbp_core.ids import Identity
from umbp_core.ports import DeviceCopier
from umbp_core.scheduler import Limits
from umbp_vllm import compat
from umbp_vllm.bands import bands_needed
from umbp_vllm.copiers import make_copier
from umbp_vllm.copy_plan import PageArena
from umbp_vllm.geometry import KvGeometry
from umbp_vllm.layer_gate import LayerGate
from umbp_vllm.sharing import SharedSlab

logger = logging.getLogger("vllm.umbp.setup")

BY_LAYER = "layer"
"""The value of ``store_granularity``."""


class Closable(Protocol):
    """What a kit closes when it is retired."""

    def close(self) -> None:
        """Give everything back; idempotent."""
        ...


@dataclass(frozen=True, slots=True)
class RankKit:
    """What copies between HBM and one arena, running.

    ``arena`` is the name of the daemon's; it is empty where there is none.  ``resources`` are closed after the engine,
    in this order.
    """

    arena: bytes
    engine: TransferEngine
    copier: DeviceCopier
    gate: LayerGate
    resources: Sequence[Closable] = field(default=())

    def close(self, timeout: float) -> bool:
        """End everything within ``timeout`` seconds; false when a copy hangs, whose memory stays."""
        if not self.engine.close(timeout):
            return False
        for resource in self.resources:
            resource.close()
        return True


def kit_maker(
    config: UmbpConfig,
    plugins: PluginHost,
    geometry: KvGeometry,
    identity: Identity,
    world_rank: int,
    slab: SsdTier | SharedSlab | None = None,
    object_bytes: Sequence[int] = (),
) -> Callable[[bytes, DramTier], RankKit]:
    """Makes what copies between HBM and an arena of a given name, running.  ``slab`` is the SSD tier behind it.

    ``object_bytes`` is what an object counts in its page, by KV group, where that is more than this rank has of it.
    """
    sizes = object_bytes or [geometry.object_bytes(group.index) for group in geometry.groups]

    def make(name: bytes, arena: DramTier) -> RankKit:
        copier = make_copier(geometry, cast(PageArena, arena))
        copier.open()
        limits = _limits(config)
        engine = TransferEngine(
            copier,
            arena,
            slab.slab if slab is not None else None,
            identity,
            layers=copier,
            world_rank=world_rank,
            object_bytes={group.index: nbytes for group, nbytes in zip(geometry.groups, sizes, strict=True)},
            clock=time.monotonic,
            io_threads=config.io_threads,
            observer=plugins,
            limits=limits,
            scheduler=plugins.make_scheduler(limits),
        )
        engine.start()
        gate = LayerGate(engine, bands_needed(geometry), time.monotonic)
        return RankKit(name, engine, copier, gate, [copier, arena, *([slab] if slab else [])])

    return make


def asks_by_layer(vllm_config: Any, geometry: KvGeometry, config: UmbpConfig) -> bool:
    """Whether the forward pass asks for every layer that it reads."""
    silent = compat.layers_that_do_not_ask(vllm_config, list(bands_needed(geometry)))
    _look_at_bands(geometry, silent, config)
    return not silent


def _limits(config: UmbpConfig) -> Limits:
    return Limits(
        loads=config.max_concurrent_loads,
        stores=config.max_concurrent_stores,
        demotions=config.max_concurrent_demotions,
        blocks=config.max_transfer_blocks,
    )


def warn_of_whole_blocks(reason: str) -> None:
    """Say that stores by layer were asked for in vain."""
    logger.warning("umbp: blocks are stored whole although store_granularity is %s: %s", BY_LAYER, reason)


def _look_at_bands(geometry: KvGeometry, silent: Sequence[str], config: UmbpConfig) -> None:
    """Say where stores by layer change nothing on this rank; they are right all the same."""
    if config.store_granularity != BY_LAYER:
        return
    pages = [page.layers for group in geometry.groups for page in group.layer_pages]
    if pages and all(len(layers) > 1 for layers in pages):
        warn_of_whole_blocks(f"in the KV layout {geometry.layout_name} the layers of a block cannot be told apart")
    elif silent:
        logger.warning("umbp: layers %s are stored when their step has ended: they do not say before", silent)
