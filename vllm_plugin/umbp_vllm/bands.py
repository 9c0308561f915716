"""Layers that are loaded together: neighbours in the order in which an object holds them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from umbp_vllm.geometry import GroupGeometry, KvGeometry, LayerPages, Region, merged

BAND_BYTES = 256 << 10
"""A band holds at least this much of a block: a copy costs little beside it, and there are bands enough to overlap."""


@dataclass(frozen=True)
class Band:
    """Layers of a group that go together: where their bytes are, and where they begin in an object."""

    layers: tuple[str, ...]
    regions: tuple[Region, ...]
    in_object: int


def bands_of(group: GroupGeometry) -> tuple[Band, ...]:
    """The bands of ``group``; a single one where the layers of a block cannot be told apart, or there are none."""
    pages = group.layer_pages or (LayerPages(group.layers, group.regions),)
    return tuple(_bands(pages, BAND_BYTES))


def _bands(pages: Sequence[LayerPages], least_bytes: int) -> Iterator[Band]:
    layers: list[str] = []
    regions: list[Region] = []
    begin = size = 0
    for number, page in enumerate(pages, 1):
        layers += page.layers
        regions += page.regions
        size += sum(region.nbytes for region in page.regions)
        if size >= least_bytes or number == len(pages):
            yield Band(tuple(layers), merged(regions), begin)
            begin, size = begin + size, 0
            layers, regions = [], []


def bands_needed(geometry: KvGeometry) -> dict[str, int]:
    """For each layer, how many bands of its group must be there before it is computed."""
    return {
        layer: number
        for group in geometry.groups
        for number, band in enumerate(bands_of(group), 1)
        for layer in band.layers
    }
