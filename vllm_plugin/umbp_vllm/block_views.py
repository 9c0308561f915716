"""The blocks of a KV group as tensors of whole words, on the KV cache's own device, and the same in a page."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from umbp_core.errors import ConfigError
from umbp_vllm.bands import bands_of
from umbp_vllm.geometry import GroupGeometry, KvGeometry, Region

_WORDS: tuple[tuple[int, torch.dtype], ...] = (
    (8, torch.int64),
    (4, torch.int32),
    (2, torch.int16),
    (1, torch.uint8),
)


def word_of(regions: Sequence[Region], page_bytes: int, in_page: int = 0) -> tuple[int, torch.dtype]:
    """The widest integer (bytes, dtype) that divides every number of ``regions``, ``page_bytes`` and ``in_page``."""
    numbers = [8, page_bytes, in_page]
    for region in regions:
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

    def in_page(self) -> tuple[int, int]:
        """The words of a page that hold these regions: first, and one past the last; (0, 0) without any."""
        if not self.regions:
            return 0, 0
        last = self.regions[-1]
        return self.regions[0].in_page, last.in_page + last.blocks[0].numel()


def group_views(geometry: KvGeometry, page_bytes: int) -> tuple[GroupViews, ...]:
    """The views of every group of ``geometry`` for pages of ``page_bytes`` bytes; no bytes are copied.

    Raises ``ConfigError`` when an object is larger than a page.
    """
    return tuple(_views(geometry, group, page_bytes) for group in geometry.groups)


def band_views(geometry: KvGeometry, page_bytes: int) -> tuple[tuple[GroupViews, ...], ...]:
    """The views of every band of every group, each in words of its own; otherwise as :func:`group_views`."""
    return tuple(
        tuple(_region_views(geometry, page_bytes, band.regions, band.in_object) for band in bands_of(group))
        for group in geometry.groups
    )


def _views(geometry: KvGeometry, group: GroupGeometry, page_bytes: int) -> GroupViews:
    if group.object_bytes > page_bytes:
        raise ConfigError(
            f"an object of KV group {group.index} has {group.object_bytes} bytes and an arena page {page_bytes}; "
            "the arena was made for another layout"
        )
    return _region_views(geometry, page_bytes, group.regions, 0)


def _region_views(geometry: KvGeometry, page_bytes: int, regions: Sequence[Region], in_page: int) -> GroupViews:
    """The views of ``regions``, which begin ``in_page`` bytes into an object."""
    size, word = word_of(regions, page_bytes, in_page)
    views = []
    for region in regions:
        blocks = torch.empty(0, dtype=word, device=geometry.device).set_(
            geometry.storages[region.storage].untyped_storage(),
            region.offset // size,
            (geometry.num_blocks, region.pieces, region.piece_bytes // size),
            (region.block_stride // size, region.piece_stride // size, 1),
        )
        views.append(RegionView(blocks, in_page // size))
        in_page += region.nbytes
    return GroupViews(word, tuple(views))
