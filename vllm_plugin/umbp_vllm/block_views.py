"""The blocks of a KV group as tensors of whole words, on the KV cache's own device, and the same in a page."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from umbp_core.errors import ConfigError
from umbp_vllm.geometry import GroupGeometry, KvGeometry

_WORDS: tuple[tuple[int, torch.dtype], ...] = (
    (8, torch.int64),
    (4, torch.int32),
    (2, torch.int16),
    (1, torch.uint8),
)


def word_of(group: GroupGeometry, page_bytes: int) -> tuple[int, torch.dtype]:
    """The widest integer (bytes, dtype) that divides every number of ``group`` and ``page_bytes``."""
    numbers = [8, page_bytes]
    for region in group.regions:
        numbers += [region.offset, region.piece_stride, region.block_stride, region.piece_bytes]
    alignment = math.gcd(*numbers)
    return next((size, dtype) for size, dtype in _WORDS if alignment % size == 0)


@dataclass(frozen=True)
class RegionView:
    """A region as a tensor (blocks, pieces, words); its pieces begin ``in_page`` words into an object's page."""

    blocks: torch.Tensor
    in_page: int

    def pages(self, pages: torch.Tensor) -> torch.Tensor:
        """The same pieces inside ``pages`` (pages, words), as a tensor (pages, pieces, words)."""
        _, pieces, words = self.blocks.shape
        return pages.as_strided(
            (pages.shape[0], pieces, words),
            (pages.stride(0), words, 1),
            pages.storage_offset() + self.in_page,
        )


@dataclass(frozen=True)
class GroupViews:
    """All regions of one KV group, in the object's order; ``word`` is the dtype of every tensor."""

    word: torch.dtype
    regions: tuple[RegionView, ...]

    @property
    def is_one_run(self) -> bool:
        """Whether each block is one contiguous run of bytes."""
        return len(self.regions) == 1 and self.regions[0].blocks.shape[1] == 1


def group_views(geometry: KvGeometry, page_bytes: int) -> tuple[GroupViews, ...]:
    """The views of every group of ``geometry`` for pages of ``page_bytes`` bytes; no bytes are copied.

    Raises ``ConfigError`` when an object is larger than a page.
    """
    return tuple(_views(geometry, group, page_bytes) for group in geometry.groups)


def _views(geometry: KvGeometry, group: GroupGeometry, page_bytes: int) -> GroupViews:
    if group.object_bytes > page_bytes:
        raise ConfigError(
            f"an object of KV group {group.index} has {group.object_bytes} bytes and an arena page {page_bytes}; "
            "the arena was made for another layout"
        )
    size, word = word_of(group, page_bytes)
    regions, in_page = [], 0
    for region in group.regions:
        blocks = torch.empty(0, dtype=word, device=geometry.device).set_(
            geometry.storages[region.storage].untyped_storage(),
            region.offset // size,
            (geometry.num_blocks, region.pieces, region.piece_bytes // size),
            (region.block_stride // size, region.piece_stride // size, 1),
        )
        regions.append(RegionView(blocks, in_page // size))
        in_page += region.nbytes
    return GroupViews(word, tuple(regions))
