"""What one batch of copies touches, as numpy arrays; no bytes are moved here."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from umbp_core.errors import TransferError
from umbp_vllm.geometry import KvGeometry

Numbers = npt.NDArray[np.int64]


class PageArena(Protocol):
    """What a copier needs of an arena: where it starts, and all its pages as a writable array.

    ``array`` is ``uint8`` of shape (pages, page bytes) over the memory at ``address``, where its pages may lie apart;
    both stay valid until the copier is closed.
    """

    @property
    def address(self) -> int:
        """Address of page 0."""
        ...

    @property
    def array(self) -> npt.NDArray[np.uint8]:
        """All pages, staging pages included."""
        ...


def checked_batch(
    geometry: KvGeometry, arena: npt.NDArray[Any], group: int, blocks: Sequence[int], pages: Sequence[int]
) -> tuple[Numbers, Numbers]:
    """``blocks`` and ``pages`` as arrays.

    Raises ``TransferError`` when the group does not exist, the lengths differ or a number is out of range; a batch
    that fails here has moved nothing.
    """
    if not 0 <= group < len(geometry.groups):
        raise TransferError(f"KV group {group} does not exist; this rank has {len(geometry.groups)}")
    if len(blocks) != len(pages):
        raise TransferError(f"{len(blocks)} blocks cannot be copied to or from {len(pages)} pages; nothing was moved")
    return (
        _in_range("block", blocks, geometry.num_blocks),
        _in_range("arena page", pages, arena.shape[0]),
    )


def _in_range(what: str, numbers: Sequence[int], limit: int) -> Numbers:
    array = np.asarray(numbers, dtype=np.int64).reshape(-1)
    outside = array[(array < 0) | (array >= limit)]
    if outside.size:
        raise TransferError(f"{what} {int(outside[0])} does not exist, there are {limit}; nothing was moved")
    return array


def reject_repeats(what: str, destinations: Numbers) -> None:
    """Raise ``TransferError`` when two copies of one batch go to the same place: the result would be chance."""
    ordered = np.sort(destinations)
    repeated = ordered[1:][ordered[1:] == ordered[:-1]]
    if repeated.size:
        raise TransferError(f"{what} {int(repeated[0])} is the destination of two copies of a batch; nothing was moved")


def page_runs(pages: Numbers, slice_pages: int) -> Iterator[tuple[int, int, int]]:
    """Neighbouring pages as runs (row of the batch, first page, number of pages).

    Rows and pages both count up by one inside a run, and no run crosses a multiple of ``slice_pages``: memory
    that was pinned in two parts cannot be copied as one.
    """
    if not pages.size:
        return
    breaks = (np.diff(pages) != 1) | (pages[1:] % slice_pages == 0)
    firsts = np.concatenate(([0], np.flatnonzero(breaks) + 1))
    lasts = np.append(firsts[1:], pages.size)
    for first, last in zip(firsts.tolist(), lasts.tolist(), strict=True):
        yield first, int(pages[first]), last - first
