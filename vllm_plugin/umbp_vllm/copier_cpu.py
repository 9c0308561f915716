"""The device copier for KV caches in host memory.

A batch is one call of torch's ``_foreach_copy_`` over views, so Python lets go of the GIL once per batch
and not once per piece: the engine's step loop holds the GIL and gives it back only every 5 ms.  Each view stays
so small that torch copies it in the calling thread; larger ones would start a second OpenMP pool, which fights the
model's threads for the cores.  ``benchmarks/copiers.py`` measures this against the alternatives.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch

from umbp_core.errors import StateError, TransferError
from umbp_vllm.bands import bands_of
from umbp_vllm.block_views import GroupViews, band_views, group_views
from umbp_vllm.copy_plan import PageArena, checked_batch, reject_repeats
from umbp_vllm.geometry import KvGeometry

SERIAL_WORDS = 32768
"""Words that torch copies without asking its thread pool (``at::internal::GRAIN_SIZE``)."""


_Chunk = tuple[torch.Tensor, torch.Tensor]
"""A part of every block as (blocks, pieces, words), and the same part of every page."""


class _GroupChunks(NamedTuple):
    """The parts of a group's blocks: of all layers, and band by band."""

    whole: list[_Chunk]
    bands: list[list[_Chunk]]
    layers: list[tuple[str, ...]]


_Part = Callable[[_GroupChunks], list[_Chunk]]
"""Which of them."""


class CpuCopier:
    """``DeviceCopier`` for a KV cache in host memory; ``open`` before use, while ``arena`` is open.

    A step has ended when the forward thread says so, hence a fence is ``None`` and not looked at.  ``gather`` and
    ``scatter`` may run in any thread, also in several at once.
    """

    def __init__(self, geometry: KvGeometry, arena: PageArena) -> None:
        self._geometry = geometry
        self._arena = arena
        self._groups: tuple[_GroupChunks, ...] | None = None

    @property
    def on_host(self) -> bool:
        """True: the calling thread copies."""
        return True

    def open(self) -> None:
        """Look at the memory; nothing is copied.  Raises ``ConfigError`` when the arena's pages are too small."""
        pages = torch.from_numpy(self._arena.array)
        page_bytes = pages.shape[1]
        self._groups = tuple(
            _GroupChunks(
                list(_chunks(whole, pages)),
                [list(_chunks(band, pages)) for band in bands],
                [band.layers for band in bands_of(group)],
            )
            for group, whole, bands in zip(
                self._geometry.groups,
                group_views(self._geometry, page_bytes),
                band_views(self._geometry, page_bytes),
                strict=True,
            )
        )

    def close(self) -> None:
        """Let go of the arena's memory.  Idempotent."""
        self._groups = None

    def fence(self) -> object:
        """``None``: host memory is written when the step that writes it returns."""
        return None

    def gather(self, group: int, blocks: Sequence[int], pages: Sequence[int], fence: object) -> None:
        """Copy ``blocks`` of KV ``group`` into arena ``pages``.  Raises ``TransferError``."""
        self._gather(group, lambda chunks: chunks.whole, blocks, pages)

    def scatter(self, group: int, blocks: Sequence[int], pages: Sequence[int], fence: object) -> None:
        """Copy arena ``pages`` into ``blocks`` of KV ``group``.  Raises ``TransferError``."""
        self._scatter(group, lambda chunks: chunks.whole, blocks, pages)

    def bands(self, group: int) -> int:
        """How many bands of layers KV ``group`` has."""
        return len(self._opened()[group].bands)

    def band_layers(self, group: int, band: int) -> Sequence[str]:
        """The layers of a band."""
        return self._opened()[group].layers[band]

    def gather_band(self, group: int, band: int, blocks: Sequence[int], pages: Sequence[int], fence: object) -> None:
        """Copy one band of layers of ``blocks`` of KV ``group`` into arena ``pages``.  Raises ``TransferError``."""
        self._gather(group, lambda chunks: chunks.bands[band], blocks, pages)

    def scatter_band(self, group: int, band: int, blocks: Sequence[int], pages: Sequence[int], fence: object) -> None:
        """Copy one band of layers of arena ``pages`` into ``blocks`` of KV ``group``.  Raises ``TransferError``."""
        self._scatter(group, lambda chunks: chunks.bands[band], blocks, pages)

    def _gather(self, group: int, part: _Part, blocks: Sequence[int], pages: Sequence[int]) -> None:
        _, page_array = checked_batch(self._geometry, self._arena.array, group, blocks, pages)
        reject_repeats("arena page", page_array)
        with torch.inference_mode():
            kv, paged = _views(part(self._opened()[group]), blocks, pages)
            _copy(paged, kv)

    def _scatter(self, group: int, part: _Part, blocks: Sequence[int], pages: Sequence[int]) -> None:
        block_array, _ = checked_batch(self._geometry, self._arena.array, group, blocks, pages)
        reject_repeats("block", block_array)
        with torch.inference_mode():
            kv, paged = _views(part(self._opened()[group]), blocks, pages)
            _copy(kv, paged)

    def _opened(self) -> tuple[_GroupChunks, ...]:
        if self._groups is None:
            raise StateError("this copier is not open: call open() before the first copy and none after close()")
        return self._groups


def _views(
    chunks: Sequence[_Chunk], blocks: Sequence[int], pages: Sequence[int]
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """The parts of blocks and of pages that ``chunks`` name, pairwise.

    In inference mode a view costs half: nothing about it is noted for autograd.
    """
    kv = [chunk.select(0, block) for chunk, _ in chunks for block in blocks]
    paged = [chunk.select(0, page) for _, chunk in chunks for page in pages]
    return kv, paged


def _chunks(views: GroupViews, pages: torch.Tensor) -> Iterator[_Chunk]:
    """The parts of a group's blocks, none of more than ``SERIAL_WORDS`` words per block."""
    for region in views.regions:
        paged = region.pages(pages.view(views.word))
        _, pieces, words = region.blocks.shape
        width = min(words, SERIAL_WORDS)
        height = max(1, SERIAL_WORDS // width)
        for piece in range(0, pieces, height):
            for word in range(0, words, width):
                part = (slice(None), slice(piece, piece + height), slice(word, word + width))
                yield region.blocks[part], paged[part]


def _copy(destinations: list[torch.Tensor], sources: list[torch.Tensor]) -> None:
    """In inference mode, since the engine's tensors may be inference tensors."""
    if not destinations:
        return
    try:
        torch._foreach_copy_(destinations, sources)
    except RuntimeError as error:
        raise TransferError(f"copying {len(destinations)} pieces of KV failed: {error}") from error
