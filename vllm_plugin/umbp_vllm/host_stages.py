"""What the pages of an engine's pipeline stages are, where one page of the host's daemon has the parts of all of them.

Stages have other layers, so their parts of a block may differ in size.  Each gets as much of a page as the largest
needs, and its checksum covers as many bytes: what lies behind its own is whatever was there before, and nobody copies
it.  So all parts of an object are equally long, for the daemon and on SSD.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from vllm.distributed import parallel_state

from umbp_core.errors import ConfigError, UmbpError
from umbp_vllm.geometry import KvGeometry
from umbp_vllm.layout import kv_is_replicated, layout_digest
from umbp_vllm.metadata import RankHello


@dataclass(frozen=True, slots=True)
class StagePages:
    """What a rank has of a block; all tensor-parallel ranks of a stage have the same.

    ``layout`` is the layout digest, ``object_bytes`` the size of its part by KV group: 0 where the stage has no layer
    of the group.  ``replicated``: all tensor-parallel ranks hold the same bytes.
    """

    layout: bytes
    page_bytes: int
    object_bytes: tuple[int, ...]
    replicated: bool


def largest(stages: Sequence[StagePages]) -> tuple[int, ...]:
    """How many bytes each stage's part of an object counts, by KV group."""
    return tuple(max(sizes) for sizes in zip(*(stage.object_bytes for stage in stages), strict=True))


def pages_of(kv_cache_config: Any, geometry: KvGeometry, tp_size: int, vllm_config: Any) -> StagePages:
    """What this rank has."""
    return StagePages(
        layout_digest(kv_cache_config, geometry, vllm_config),
        geometry.page_bytes,
        tuple(geometry.object_bytes(group.index) for group in geometry.groups),
        kv_is_replicated(kv_cache_config, geometry, tp_size),
    )


def writer_of(stages: Sequence[StagePages], tp_size: int, rank: int) -> tuple[int, int]:
    """The world rank that writes the part of an object that world rank ``rank`` reads, and the number of that part."""
    stage, tp_rank = divmod(rank, tp_size)
    inside = 0 if stages[stage].replicated else tp_rank
    before = sum(1 if pages.replicated else tp_size for pages in stages[:stage])
    return stage * tp_size + inside, before + inside


def share_stages(look: Callable[[], StagePages], count: int) -> tuple[StagePages, ...]:
    """What ``look`` finds on each of the ``count`` stages, in their order.

    Collective: the ranks of all stages call it at the same point of their start.  Raises what ``look`` raises, and
    ``ConfigError`` when that of another stage has raised, or there are no process groups.
    """
    if count == 1:
        return (look(),)
    if not parallel_state.model_parallel_is_initialized():
        raise ConfigError(f"this process knows nothing of the other {count - 1} pipeline stage(s); set mode 'local'")
    group: Any = parallel_state.get_pp_group()
    told: list[Any] = [None] * group.world_size
    try:
        own = look()
    except UmbpError as error:
        torch.distributed.all_gather_object(told, str(error), group=group.cpu_group)  # or the others wait for ever
        raise
    torch.distributed.all_gather_object(told, own, group=group.cpu_group)
    stages = tuple(each for each in told if isinstance(each, StagePages))
    if len(stages) != count:
        problems = [each for each in told if isinstance(each, str)]
        raise ConfigError(f"{count} pipeline stages, of which {len(stages)} can be used: {'; '.join(problems)}")
    return stages


def stages_of(hellos: Sequence[RankHello], tp_size: int) -> tuple[StagePages, ...]:
    """The same, from what all ranks told the leader.  Raises ``ConfigError`` when the ranks of a stage differ."""
    stages = []
    for start in range(0, len(hellos), tp_size):
        first, *others = hellos[start : start + tp_size]
        replicated = tp_size > 1 and all(hello.writer_rank == first.world_rank for hello in others)
        pages = StagePages(first.layout, first.page_bytes, first.object_bytes, replicated)
        for hello in others:
            if StagePages(hello.layout, hello.page_bytes, hello.object_bytes, replicated) != pages:
                raise ConfigError(
                    f"the pages of rank {hello.world_rank} are of another kind than those of rank {first.world_rank}, "
                    "which mode 'daemon' cannot keep together; set mode 'local'"
                )
        stages.append(pages)
    return tuple(stages)
