"""UMBP's allocator of host memory, which engines use for pools of their own."""

from __future__ import annotations

import enum
from dataclasses import dataclass

from umbp_connectors.pool.arena import Arena
from umbp_connectors.pool.buffers import round_up
from umbp_connectors.pool.slab import ALIGNMENT
from umbp_core.errors import UmbpError


class UMBPHostBufferBacking(enum.IntEnum):
    """What host memory is made of."""

    Anonymous = 0
    AnonymousHugetlb = 1
    AnonymousShm = 2
    AnonymousShmHugetlb = 3


_DEMOTED = {
    UMBPHostBufferBacking.AnonymousHugetlb: UMBPHostBufferBacking.Anonymous,
    UMBPHostBufferBacking.AnonymousShmHugetlb: UMBPHostBufferBacking.AnonymousShm,
}
"""What huge pages become where there are none."""


@dataclass
class UMBPHostBufferHandle:
    """Memory that was allocated; false when there is none."""

    ptr: int
    mapped_size: int
    actual_backing: UMBPHostBufferBacking
    actual_alignment: int
    arena: Arena | None

    def __bool__(self) -> bool:
        """Whether there is memory."""
        return self.arena is not None


class UMBPHostMemAllocator:
    """Host memory for an engine's own pool: a memfd, with huge pages where they are wanted and there are any."""

    def alloc(
        self,
        size: int,
        backing: UMBPHostBufferBacking = UMBPHostBufferBacking.Anonymous,
        hugepage_size: int = 2 << 20,
        numa_node: int = -1,
        prefault: bool = True,
    ) -> UMBPHostBufferHandle:
        """``size`` bytes; the handle is false when the system refuses them."""
        del hugepage_size
        mapped = round_up(size, ALIGNMENT)
        arena = Arena(mapped, 1, 0, backing in _DEMOTED, numa_node, prefault)
        try:
            arena.open()
        except UmbpError:
            return UMBPHostBufferHandle(0, 0, backing, 0, None)
        actual = backing if arena.huge else _DEMOTED.get(backing, backing)
        return UMBPHostBufferHandle(arena.address, mapped, actual, ALIGNMENT, arena)

    def free(self, handle: UMBPHostBufferHandle) -> None:
        """Give the memory back; idempotent."""
        arena, handle.arena = handle.arena, None
        if arena is not None:
            arena.close()
