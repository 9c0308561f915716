"""Gathering and scattering blocks through staging memory on the KV cache's own device.

A device moves many small pieces fast but crosses the host link best in long copies.  So blocks are collected on the
device into rows of one page each, and whole rows go to and from the arena; neighbouring pages go together.
Blocks that already are one contiguous run each need no staging and are copied directly.

Only torch operators are used, on whatever stream is current; this code runs on any torch device.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from umbp_vllm.copy_plan import Numbers, page_runs
from umbp_vllm.geometry import GroupGeometry, KvGeometry, Region

_WORDS: tuple[tuple[int, torch.dtype], ...] = (
    (8, torch.int64),
    (4, torch.int32),
    (2, torch.int16),
    (1, torch.uint8),
)


def batch_parts(count: int, rows: int) -> Iterator[slice]:
    """Slices of a batch of ``count`` that fit ``rows`` staging rows each."""
    for first in range(0, count, rows):
        yield slice(first, min(first + rows, count))


def word_of(group: GroupGeometry) -> tuple[int, torch.dtype]:
    """The widest integer (bytes, dtype) to which every number of ``group`` is aligned."""
    numbers = [8]
    for region in group.regions:
        numbers += [region.offset, region.piece_stride, region.block_stride, region.piece_bytes]
    alignment = math.gcd(*numbers)
    return next((size, dtype) for size, dtype in _WORDS if alignment % size == 0)


@dataclass(frozen=True)
class _RegionView:
    """A region as (blocks, pieces, words), and where it lies in a staging row, in words."""

    blocks: torch.Tensor
    in_row: int

    def rows(self, staging: torch.Tensor) -> torch.Tensor:
        """The same pieces inside ``staging`` rows (rows, words)."""
        _, pieces, words = self.blocks.shape
        return staging.as_strided(
            (staging.shape[0], pieces, words),
            (staging.stride(0), words, 1),
            staging.storage_offset() + self.in_row,
        )


@dataclass(frozen=True)
class _GroupViews:
    word_dtype: torch.dtype
    regions: tuple[_RegionView, ...]
    direct: Region | None
    object_bytes: int


class StagedCopies:
    """The copies of a batch between KV blocks and arena rows, issued on the current stream.

    ``arena`` is the ``uint8`` tensor (pages, page bytes) in host memory; ``slice_pages`` the borders that no copy
    may cross.  Nothing here waits for the device.  Calls that share a staging tensor must be on one stream.
    """

    def __init__(self, geometry: KvGeometry, arena: torch.Tensor, slice_pages: int) -> None:
        self._arena = arena
        self._slice_pages = slice_pages
        self._storages = geometry.storages
        self._groups = tuple(_views(geometry, group) for group in geometry.groups)

    def gather(self, group: int, blocks: Numbers, pages: Numbers, index: torch.Tensor, staging: torch.Tensor) -> None:
        """Issue the copies of ``blocks`` into ``pages``; ``index`` holds the same blocks on the device."""
        views = self._groups[group]
        if views.direct is not None:
            for block, page in zip(blocks.tolist(), pages.tolist(), strict=True):
                kv, row = self._direct(views.direct, block, page)
                row.copy_(kv, non_blocking=True)
            return
        for part in batch_parts(blocks.size, staging.shape[0]):
            rows = staging[: part.stop - part.start]
            words = rows.view(views.word_dtype)
            for region in views.regions:
                torch.index_select(region.blocks, 0, index[part], out=region.rows(words))
            for row, page, count in page_runs(pages[part], self._slice_pages):
                self._arena[page : page + count].copy_(rows[row : row + count], non_blocking=True)

    def scatter(self, group: int, blocks: Numbers, pages: Numbers, index: torch.Tensor, staging: torch.Tensor) -> None:
        """Issue the copies of ``pages`` into ``blocks``; ``index`` holds the same blocks on the device."""
        views = self._groups[group]
        if views.direct is not None:
            for block, page in zip(blocks.tolist(), pages.tolist(), strict=True):
                kv, row = self._direct(views.direct, block, page)
                kv.copy_(row, non_blocking=True)
            return
        for part in batch_parts(blocks.size, staging.shape[0]):
            rows = staging[: part.stop - part.start]
            for row, page, count in page_runs(pages[part], self._slice_pages):
                rows[row : row + count].copy_(self._arena[page : page + count], non_blocking=True)
            words = rows.view(views.word_dtype)
            for region in views.regions:
                region.blocks.index_copy_(0, index[part], region.rows(words))

    def _direct(self, region: Region, block: int, page: int) -> tuple[torch.Tensor, torch.Tensor]:
        start = region.offset + block * region.block_stride
        kv = self._storages[region.storage][start : start + region.piece_bytes]
        return kv, self._arena[page, : region.piece_bytes]


def _views(geometry: KvGeometry, group: GroupGeometry) -> _GroupViews:
    word, dtype = word_of(group)
    regions, in_row = [], 0
    for region in group.regions:
        storage = geometry.storages[region.storage].untyped_storage()
        blocks = torch.empty(0, dtype=dtype, device=geometry.device).set_(
            storage,
            region.offset // word,
            (geometry.num_blocks, region.pieces, region.piece_bytes // word),
            (region.block_stride // word, region.piece_stride // word, 1),
        )
        regions.append(_RegionView(blocks, in_row // word))
        in_row += region.nbytes
    whole = len(group.regions) == 1 and group.regions[0].pieces == 1
    return _GroupViews(dtype, tuple(regions), group.regions[0] if whole else None, group.object_bytes)
