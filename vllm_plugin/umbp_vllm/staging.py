"""Gathering and scattering blocks through staging memory on the KV cache's own device.

A device moves many small pieces fast but crosses the host link best in long copies.  So blocks are collected on the
device into rows of one page each, and whole rows go to and from the arena; neighbouring pages go together.
Blocks that already are one contiguous run each need no staging and are copied directly.

Only torch operators are used, on whatever stream is current; this code runs on any torch device.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from umbp_vllm.bands import bands_of
from umbp_vllm.block_views import GroupViews, band_views, group_views
from umbp_vllm.copy_plan import Numbers, page_runs
from umbp_vllm.geometry import KvGeometry


def batch_parts(count: int, rows: int) -> Iterator[slice]:
    """Slices of a batch of ``count`` that fit ``rows`` staging rows each."""
    for first in range(0, count, rows):
        yield slice(first, min(first + rows, count))


class StagedCopies:
    """The copies of a batch between KV blocks and arena rows, issued on the current stream.

    ``arena`` is the ``uint8`` tensor (pages, page bytes) in host memory, the bytes of a page side by side;
    ``slice_pages`` the borders that no copy may cross: 1 where the pages lie apart, or torch would copy them through
    memory of its own.  Nothing here waits for the device.  Calls that share a staging tensor (rows, page
    bytes) must be on one stream.
    """

    def __init__(self, geometry: KvGeometry, arena: torch.Tensor, slice_pages: int) -> None:
        self._arena = arena
        self._slice_pages = slice_pages
        self._groups = group_views(geometry, arena.shape[1])
        self._bands = band_views(geometry, arena.shape[1])
        self._layers = [[band.layers for band in bands_of(group)] for group in geometry.groups]

    def gather(self, group: int, blocks: Numbers, pages: Numbers, index: torch.Tensor, staging: torch.Tensor) -> None:
        """Issue the copies of ``blocks`` into ``pages``; ``index`` holds the same blocks on the device."""
        views = self._groups[group]
        if views.is_one_run:
            for kv, page in self._runs(views, blocks, pages):
                page.copy_(kv, non_blocking=True)
            return
        for part in batch_parts(blocks.size, staging.shape[0]):
            rows = staging[: part.stop - part.start]
            for region in views.regions:
                torch.index_select(region.blocks, 0, index[part], out=region.pages(rows.view(views.word)))
            for row, page, count in page_runs(pages[part], self._slice_pages):
                self._arena[page : page + count].copy_(rows[row : row + count], non_blocking=True)

    def scatter(self, group: int, blocks: Numbers, pages: Numbers, index: torch.Tensor, staging: torch.Tensor) -> None:
        """Issue the copies of ``pages`` into ``blocks``; ``index`` holds the same blocks on the device."""
        views = self._groups[group]
        if views.is_one_run:
            for kv, page in self._runs(views, blocks, pages):
                kv.copy_(page, non_blocking=True)
            return
        for part in batch_parts(blocks.size, staging.shape[0]):
            rows = staging[: part.stop - part.start]
            for row, page, count in page_runs(pages[part], self._slice_pages):
                rows[row : row + count].copy_(self._arena[page : page + count], non_blocking=True)
            for region in views.regions:
                region.blocks.index_copy_(0, index[part], region.pages(rows.view(views.word)))

    def bands(self, group: int) -> int:
        """How many bands of layers ``group`` has."""
        return len(self._bands[group])

    def band_layers(self, group: int, band: int) -> Sequence[str]:
        """The layers of a band."""
        return self._layers[group][band]

    def gather_band(
        self, group: int, band: int, blocks: Numbers, pages: Numbers, index: torch.Tensor, staging: torch.Tensor
    ) -> None:
        """Issue the copies of one band of ``blocks`` into its part of each of ``pages``, which is one run there."""
        views = self._bands[group][band]
        begin, end = (words * views.word.itemsize for words in views.in_page())
        for part in batch_parts(blocks.size, staging.shape[0]):
            rows = staging[: part.stop - part.start]
            for region in views.regions:
                torch.index_select(region.blocks, 0, index[part], out=region.pages(rows.view(views.word)))
            for row, page in zip(rows, pages[part].tolist(), strict=True):
                self._arena[page, begin:end].copy_(row[begin:end], non_blocking=True)

    def scatter_band(
        self, group: int, band: int, blocks: Numbers, pages: Numbers, index: torch.Tensor, staging: torch.Tensor
    ) -> None:
        """Issue the copies of one band of ``pages`` into ``blocks``: its part of each page, which is one run there."""
        views = self._bands[group][band]
        begin, end = (words * views.word.itemsize for words in views.in_page())
        for part in batch_parts(blocks.size, staging.shape[0]):
            rows = staging[: part.stop - part.start]
            for row, page in zip(rows, pages[part].tolist(), strict=True):
                row[begin:end].copy_(self._arena[page, begin:end], non_blocking=True)
            for region in views.regions:
                region.blocks.index_copy_(0, index[part], region.pages(rows.view(views.word)))

    def _runs(self, views: GroupViews, blocks: Numbers, pages: Numbers) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Each block and its page's beginning, both contiguous."""
        region = views.regions[0]
        arena = region.pages(self._arena.view(views.word))
        for block, page in zip(blocks.tolist(), pages.tolist(), strict=True):
            yield region.blocks[block], arena[page]
