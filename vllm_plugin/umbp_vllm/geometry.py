"""Where the bytes of a block lie: plain numbers and flat storages, without any engine.

A *region* is an arithmetic pattern of pieces; a block of a KV group is the concatenation, in order, of all
pieces of all its regions.  That concatenation is the *object* the pool keeps.  Everything that moves
KV (the copiers, their tests, the benchmarks) works on these patterns and on raw bytes only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from umbp_core.errors import ConfigError

ARENA_ALIGNMENT = 4096
"""Arena pages are multiples of this many bytes: what direct I/O and huge pages ask for."""


@dataclass(frozen=True, slots=True)
class Region:
    """Pieces of a block inside one storage; all numbers are bytes except ``storage`` and ``pieces``.

    Piece ``i`` of block ``b`` starts at ``offset + i * piece_stride + b * block_stride`` of storage number
    ``storage`` and is ``piece_bytes`` long.
    """

    storage: int
    offset: int
    pieces: int
    piece_stride: int
    block_stride: int
    piece_bytes: int

    @property
    def nbytes(self) -> int:
        """Bytes of one block in this region."""
        return self.pieces * self.piece_bytes

    def end(self, num_blocks: int) -> int:
        """One past the last byte that any of ``num_blocks`` blocks touches."""
        last = self.offset + (num_blocks - 1) * self.block_stride + (self.pieces - 1) * self.piece_stride
        return last + self.piece_bytes


def merged(regions: Sequence[Region]) -> tuple[Region, ...]:
    """The same bytes in the same order with fewer regions and pieces.

    Pieces that touch become one piece, a region that continues the one before it is joined to it, until
    nothing is left to join.
    """
    before, result = None, tuple(_dense(region) for region in regions)
    while result != before:
        before, result = result, _merged_once(result)
    return result


def _dense(region: Region) -> Region:
    """``region`` with one piece where its pieces touch."""
    if region.pieces > 1 and region.piece_stride != region.piece_bytes:
        return region
    return replace(region, pieces=1, piece_stride=region.nbytes, piece_bytes=region.nbytes)


def _merged_once(regions: Sequence[Region]) -> tuple[Region, ...]:
    result: list[Region] = []
    for region in regions:
        joined = _joined(result[-1], region) if result else None
        if joined is None:
            result.append(region)
        else:
            result[-1] = joined
    return tuple(result)


def _joined(before: Region, after: Region) -> Region | None:
    """``before`` and ``after`` as one region, or ``None`` when no single pattern describes both."""
    if before.storage != after.storage or before.block_stride != after.block_stride:
        return None
    gap = after.offset - before.offset
    if before.pieces == after.pieces == 1 and gap == before.piece_bytes:
        nbytes = before.piece_bytes + after.piece_bytes
        return replace(before, piece_stride=nbytes, piece_bytes=nbytes)
    stride = before.piece_stride if before.pieces > 1 else gap
    continues = stride > 0 and gap == before.pieces * stride and before.piece_bytes == after.piece_bytes
    if continues and (after.pieces == 1 or after.piece_stride == stride):
        return replace(before, pieces=before.pieces + after.pieces, piece_stride=stride)
    return None


@dataclass(frozen=True, slots=True)
class LayerPages:
    """The regions of one layer, or of several whose bytes cannot be told apart, as one stretch of an object."""

    layers: tuple[str, ...]
    regions: tuple[Region, ...]


@dataclass(frozen=True, slots=True)
class GroupGeometry:
    """One KV group of this rank.

    ``index`` is the engine's group number and ``layers`` the layers whose pages make up an object, in
    the object's order; both are empty of bytes when a pipeline stage holds no layer of the group.
    ``page_orders`` describes the inside of the pages (see :func:`umbp_vllm.layout_views.page_order`).
    ``layer_pages`` are the same bytes as ``regions``, in the same order, layer by layer; empty where nobody asked.
    """

    index: int
    kind: str
    block_tokens: int
    layers: tuple[str, ...]
    regions: tuple[Region, ...]
    page_orders: tuple[tuple[tuple[int, int], ...], ...] = ()
    layer_pages: tuple[LayerPages, ...] = ()

    @property
    def object_bytes(self) -> int:
        """Bytes of one block of this group over all layers of this rank; 0 without layers."""
        return sum(region.nbytes for region in self.regions)


@dataclass(frozen=True)
class KvGeometry:
    """The KV cache of one rank as raw bytes.

    ``storages`` are flat ``uint8`` tensors over the engine's own allocations; holding them keeps that memory
    alive.  Groups may share bytes: a block id belongs to one group at a time.  Immutable; any thread.
    """

    num_blocks: int
    groups: tuple[GroupGeometry, ...]
    storages: tuple[torch.Tensor, ...]
    layout_name: str = ""

    def __post_init__(self) -> None:
        for group in self.groups:
            for region in group.regions:
                self._check(group, region)

    @classmethod
    def from_config(cls, kv_cache_config: Any, kv_caches: Mapping[str, torch.Tensor]) -> KvGeometry:
        """The geometry of ``kv_caches`` as vLLM registers them, laid out as its ``kv_cache_config`` says.

        Raises ``ConfigError`` when a group cannot be kept per block, or when configuration and tensors
        contradict each other.
        """
        from umbp_vllm.layout_groups import geometry_of  # the only part that needs the engine

        return geometry_of(kv_cache_config, kv_caches)

    def _check(self, group: GroupGeometry, region: Region) -> None:
        room = self.storages[region.storage].numel()
        smallest = min(region.offset, region.piece_stride, region.block_stride, region.piece_bytes - 1)
        if smallest < 0 or region.pieces < 1 or region.end(self.num_blocks) > room:
            raise ConfigError(
                f"KV group {group.index}: {region} does not fit its allocation of {room} bytes with {self.num_blocks} "
                "blocks; this KV layout is not understood, start the engine without umbp and report its version"
            )

    @property
    def device(self) -> torch.device:
        """The device that holds the KV cache."""
        return self.storages[0].device

    def object_bytes(self, group: int) -> int:
        """Bytes of one object of KV group ``group``."""
        return self.groups[group].object_bytes

    @property
    def page_bytes(self) -> int:
        """The arena page that holds an object of any group: the largest object, rounded up to 4096."""
        largest = max(group.object_bytes for group in self.groups)
        return max(1, -(-largest // ARENA_ALIGNMENT)) * ARENA_ALIGNMENT


def flat_storage(tensor: torch.Tensor) -> torch.Tensor:
    """The whole allocation behind ``tensor`` as a flat ``uint8`` tensor (no copy)."""
    return torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(tensor.untyped_storage())
