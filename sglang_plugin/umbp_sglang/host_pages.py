"""Where the pages of SGLang's host pools lie: as arrays over the pool's own memory wherever that is possible.

A host pool tells the addresses of a page's parts itself (``get_page_buffer_meta``), one page per turn of a Python
loop.  They are regular in every layout: part ``s`` of page ``p`` lies at ``base[s] + p * stride[s]``.  So the addresses
of a few pages are asked for once, and a strided array over the whole pool gives any page in one step.  Pools whose
addresses are not regular, or who do not tell any, are read and written through SGLang's own flat copies of a page.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.lib.stride_tricks import as_strided
from numpy.typing import NDArray

from umbp_connectors.pool.rows import ObjectRows
from umbp_sglang import compat

logger = logging.getLogger(__name__)

Bytes: TypeAlias = NDArray[np.uint8]
PageBuffer: TypeAlias = "Bytes | tuple[Bytes, ...]"
"""One object's memory: an array whose last axis is contiguous, or several in the order of the object's bytes."""

_PROBES = 16
"""Pages whose addresses must be where the rule says before it is trusted."""


class PageAccess(ABC):
    """The pages of one host pool as buffers.

    ``rows`` is the number of host indices per page, ``parts`` the number of objects that each page is cut into (ranges
    of heads), ``segments`` the sizes in bytes of the pieces of one object.  Any thread.
    """

    name = ""

    def __init__(self, pool: Any, rows: int, pages: int, segments: Sequence[int], parts: int = 1) -> None:
        self.pool = pool
        self.rows = rows
        self.page_count = pages
        self.segments = tuple(segments)
        self.parts = parts

    @property
    def object_bytes(self) -> int:
        """Bytes of one object."""
        return sum(self.segments)

    @abstractmethod
    def sources(self, indices: Any, pages: int) -> list[Sequence[PageBuffer]]:
        """The memory to read ``pages`` pages from, whose rows ``indices`` names: a list of buffers for each part.

        Raises ``ValueError`` when the indices are not those of so many whole pages.
        """

    @abstractmethod
    def targets(self, indices: Any, pages: int) -> list[Sequence[PageBuffer]]:
        """The memory to write them to."""

    @abstractmethod
    def deliver(self, indices: Any, targets: list[Sequence[PageBuffer]], arrived: Sequence[bool]) -> None:
        """Called when :meth:`targets` were written: those that arrived belong into the pool."""

    def page_numbers(self, indices: Any, pages: int) -> list[int]:
        """The page that each group of ``rows`` indices names.

        Raises ``ValueError`` unless they are ``pages`` whole pages of the pool.
        """
        flat: NDArray[np.int64] = indices.numpy()
        rows = self.rows
        if len(flat) != pages * rows:
            raise ValueError(f"{pages} pages of {rows} rows need as many host indices, got {len(flat)}")
        # Lists: numpy's arithmetic on so few numbers costs more than Python's after a large copy, with cold caches.
        first, last = flat[::rows].tolist(), flat[rows - 1 :: rows].tolist()
        numbers: list[int] = [row // rows for row in first]
        whole = [number * rows for number in numbers] == first and [row + rows - 1 for row in first] == last
        if not whole or (numbers and not 0 <= min(numbers) <= max(numbers) < self.page_count):
            raise ValueError("host indices that are not whole pages of the host pool")
        return numbers


class StridedPages(PageAccess):
    """Pages addressed by arrays over the pool's memory: ``views[k][p]`` is part ``k`` of page ``p``."""

    name = "direct"

    def __init__(
        self, pool: Any, rows: int, pages: int, segments: Sequence[int], views: Sequence[tuple[Bytes, ...]]
    ) -> None:
        super().__init__(pool, rows, pages, segments, len(views))
        self._views = views

    def sources(self, indices: Any, pages: int) -> list[Sequence[PageBuffer]]:
        """See :class:`PageAccess`."""
        numbers = self.page_numbers(indices, pages)
        return [_rows_of(views, numbers) for views in self._views]

    def targets(self, indices: Any, pages: int) -> list[Sequence[PageBuffer]]:
        """See :class:`PageAccess`."""
        return self.sources(indices, pages)

    def deliver(self, indices: Any, targets: list[Sequence[PageBuffer]], arrived: Sequence[bool]) -> None:
        """Nothing to do: the targets are the pool."""


class FlatPages(PageAccess):
    """Pages copied out and in by the pool itself, as one flat tensor each."""

    name = "flat"

    def sources(self, indices: Any, pages: int) -> list[Sequence[PageBuffer]]:
        """See :class:`PageAccess`."""
        self.page_numbers(indices, pages)
        starts = indices[:: self.rows].tolist()
        return [[tensor_bytes(self.pool.get_data_page(start, flat=True).contiguous()) for start in starts]]

    def targets(self, indices: Any, pages: int) -> list[Sequence[PageBuffer]]:
        """See :class:`PageAccess`."""
        self.page_numbers(indices, pages)
        return [[np.empty(self.object_bytes, dtype=np.uint8) for _ in range(pages)]]

    def deliver(self, indices: Any, targets: list[Sequence[PageBuffer]], arrived: Sequence[bool]) -> None:
        """Copy what arrived into the pool."""
        for start, data, there in zip(indices[:: self.rows].tolist(), targets[0], arrived, strict=True):
            if there:
                page = self.pool.get_dummy_flat_data_page()
                tensor_bytes(page)[:] = data
                self.pool.set_from_flat_data_page(start, page)


def page_access(pool: Any, parts: int = 1) -> PageAccess:
    """How to get at the pages of SGLang's host pool ``pool``, each cut into ``parts`` ranges of heads.

    Raises ``ValueError`` with one sentence when there is no way: such a pool cannot be stored.
    """
    rows = int(compat.optional(pool, "logical_page_size") or pool.page_size)
    pages = int(compat.optional(pool, "logical_size") or pool.size) // rows
    try:
        return _strided(pool, rows, pages, parts)
    except (AssertionError, AttributeError, RuntimeError, ValueError) as error:
        if parts > 1:
            raise ValueError(f"the heads of {type(pool).__name__} cannot be cut: {error}") from error
        logger.debug("umbp: %s is copied page by page: %s", type(pool).__name__, error)
    try:
        sample = pool.get_data_page(0, flat=True)
        blank = pool.get_dummy_flat_data_page()
    except (AssertionError, AttributeError, RuntimeError, ValueError) as error:
        raise ValueError(f"{type(pool).__name__} in layout {layout_of(pool)} has no pages to store: {error}") from error
    if tensor_bytes(sample.contiguous()).nbytes != tensor_bytes(blank).nbytes:
        raise ValueError(f"{type(pool).__name__} in layout {layout_of(pool)} reads and writes pages of different sizes")
    return FlatPages(pool, rows, pages, (tensor_bytes(blank).nbytes,))


def layout_of(pool: Any) -> str:
    """SGLang's name of the order of bytes in ``pool``."""
    return str(compat.optional(pool, "layout", ""))


def is_logical(pool: Any) -> bool:
    """Whether ``pool`` only counts pages and has no bytes (the anchor of a model whose KV lies in side pools)."""
    return compat.optional(pool, "kv_buffer", pool) is None


@dataclass(frozen=True, slots=True)
class _Place:
    """One segment of page 0 in the pool's memory, and how far the next page's is."""

    storage: int
    offset: int
    stride: int
    nbytes: int


def _strided(pool: Any, rows: int, pages: int, parts: int) -> StridedPages:
    """Raises ``ValueError`` when the addresses are not regular, and what the pool raises when it tells none."""
    storages = _storages(pool)
    first, sizes = _meta(pool, rows, 0, parts)
    second = _meta(pool, rows, min(1, pages - 1), parts)[0]
    strides = [b - a if pages > 1 else size for a, b, size in zip(first, second, sizes, strict=True)]
    for page in sorted({pages * k // _PROBES for k in range(_PROBES)} | {pages - 1}):
        found, found_sizes = _meta(pool, rows, page, parts)
        if found_sizes != sizes or found != [a + page * s for a, s in zip(first, strides, strict=True)]:
            raise ValueError(f"page {page} does not lie where the distance of the first two says")
    places = [
        _place(storages, address, stride, nbytes, pages)
        for address, stride, nbytes in zip(first, strides, sizes, strict=True)
    ]
    each = len(places) // parts
    if not each or sizes != sizes[:each] * parts:
        raise ValueError(f"{len(places)} segments are not {parts} equal parts")
    # In the order of addresses, which is also the order of SGLang's flat pages.
    objects = [sorted(places[start : start + each], key=_by_address) for start in range(0, len(places), each)]
    views = [_views(storages, places_of_one, pages) for places_of_one in objects]
    return StridedPages(pool, rows, pages, [place.nbytes for place in objects[0]], views)


def _meta(pool: Any, rows: int, page: int, parts: int) -> tuple[list[int], list[int]]:
    """Addresses and sizes in bytes of the segments of one page."""
    indices = torch.arange(page * rows, (page + 1) * rows, dtype=torch.int64)
    if parts > 1:
        addresses, sizes = pool.get_split_heads_page_buffer_meta(indices, parts)
    else:
        addresses, sizes = pool.get_page_buffer_meta(indices)
    return [int(address) for address in addresses], [int(size) for size in sizes]


def _storages(pool: Any) -> list[Bytes]:
    """The pool's memory, each allocation once, as arrays that keep it alive."""
    owned = compat.optional(pool, "get_hybrid_pool_buffer")
    tensors = list(owned()) if owned is not None else []
    buffer = compat.optional(pool, "kv_buffer")
    tensors += list(buffer) if isinstance(buffer, (list, tuple)) else [buffer]
    found: dict[int, Bytes] = {}
    for tensor in tensors:
        if isinstance(tensor, torch.Tensor) and tensor.device.type == "cpu" and tensor.numel():
            storage = tensor.untyped_storage()
            flat = torch.empty(0, dtype=torch.uint8).set_(storage, 0, (storage.nbytes(),))
            found.setdefault(storage.data_ptr(), flat.numpy())
    return list(found.values())


def _place(storages: list[Bytes], address: int, stride: int, nbytes: int, pages: int) -> _Place:
    for number, storage in enumerate(storages):
        offset = address - _address(storage)
        if offset >= 0 and stride >= 0 and offset + (pages - 1) * stride + nbytes <= storage.nbytes:
            return _Place(number, offset, stride, nbytes)
    raise ValueError("a page lies outside of the memory that the pool shows")


def _by_address(place: _Place) -> tuple[int, int]:
    return place.storage, place.offset


def _views(storages: list[Bytes], places: list[_Place], pages: int) -> tuple[Bytes, ...]:
    """One array [page][...][bytes] over all segments if they are evenly spaced, else one [page][bytes] for each."""
    first = places[0]
    alike = {(place.storage, place.stride, place.nbytes) for place in places}
    if len(alike) == 1:
        for inner in range(1, len(places) + 1):
            grid = _grid([place.offset for place in places], inner)
            if grid is not None:
                shape = (pages, len(places) // inner, inner, first.nbytes)
                return (_squeezed(storages[first.storage][first.offset :], shape, (first.stride, *grid, 1)),)
    return tuple(
        as_strided(storages[place.storage][place.offset :], (pages, place.nbytes), (place.stride, 1))
        for place in places
    )


def _grid(offsets: list[int], inner: int) -> tuple[int, int] | None:
    """The two distances, if ``offsets`` is a grid whose rows have ``inner`` entries."""
    if len(offsets) % inner:
        return None
    across = offsets[1] - offsets[0] if inner > 1 else 0
    down = offsets[inner] - offsets[0] if len(offsets) > inner else 0
    expected = [offsets[0] + k // inner * down + k % inner * across for k in range(len(offsets))]
    return (down, across) if expected == offsets else None


def _squeezed(base: Bytes, shape: tuple[int, ...], strides: tuple[int, ...]) -> Bytes:
    """A strided array without axes of length 1, first and last excepted."""
    keep = [axis for axis in range(len(shape)) if axis in (0, len(shape) - 1) or shape[axis] > 1]
    return as_strided(base, [shape[axis] for axis in keep], [strides[axis] for axis in keep])


def _rows_of(views: tuple[Bytes, ...], numbers: list[int]) -> Sequence[PageBuffer]:
    if len(views) == 1:
        return ObjectRows(views[0], numbers)
    return [tuple(view[number] for view in views) for number in numbers]


def tensor_bytes(tensor: torch.Tensor) -> Bytes:
    """A contiguous CPU tensor's memory."""
    flat: Bytes = tensor.view(-1).view(torch.uint8).numpy()
    return flat


def _address(array: Bytes) -> int:
    address: int = array.__array_interface__["data"][0]
    return address
