"""What a registered KV tensor's own strides say: its block dimension, the order inside a page, its pieces.

Needed where the configuration has no strides (vLLM 0.28), and for the layout's identity everywhere.
"""

from __future__ import annotations

import torch

from umbp_core.errors import ConfigError
from umbp_vllm.geometry import Region


def block_dimension(view: torch.Tensor, num_blocks: int) -> int:
    """The dimension of ``view`` that counts blocks (or kernel blocks, a fixed number of them per block).

    It is the first, except in K/V-first layouts ``(2, blocks, ...)``.  Raises ``ConfigError`` when neither
    of the first two dimensions can be it, or when both could with two or fewer blocks.
    """
    first = view.shape[0] % num_blocks == 0
    second = view.dim() > 1 and view.shape[1] % num_blocks == 0
    if not (first or second) or (first and second and num_blocks <= 2):
        raise ConfigError(
            f"a KV tensor of shape {tuple(view.shape)} has no dimension for {num_blocks} blocks; give the engine more "
            "KV cache, or start it without umbp"
        )
    return 0 if first else 1


def page_order(view: torch.Tensor, blocks: int, num_blocks: int) -> tuple[tuple[int, int], ...]:
    """The dimensions of ``view`` from the largest stride to the smallest, as (dimension, size).

    The block dimension ``blocks`` appears with the number of kernel blocks per block; dimensions of size 1 are left
    out.  Thus the order tells HND from NHD, K/V-first from K/V-inside and split kernel blocks from whole
    ones, and does not depend on the number of blocks or on padding.
    """
    sizes = [size // num_blocks if dim == blocks else size for dim, size in enumerate(view.shape)]
    order = sorted(range(view.dim()), key=lambda dim: (-view.stride(dim), dim))
    return tuple((dim, sizes[dim]) for dim in order if dim == blocks or sizes[dim] > 1)


def view_regions(view: torch.Tensor, storage: int, num_blocks: int, page_bytes: int) -> list[Region]:
    """The regions of one layer whose blocks hold ``page_bytes`` bytes each, from the strides of ``view``.

    Dimensions with a larger stride than the block's lie outside the blocks and cut the page into slices
    (K and V in ``(2, blocks, ...)``).  Raises ``ConfigError`` when the bytes of a block are no such pattern.
    """
    size = view.element_size()
    blocks = block_dimension(view, num_blocks)
    kernel_blocks = view.shape[blocks] // num_blocks
    kernel_stride = view.stride(blocks) * size
    outer = [dim for dim in range(view.dim()) if dim != blocks and view.stride(dim) * size > kernel_stride]
    slices = 1
    for dim in outer:
        slices *= view.shape[dim]
    piece, rest = divmod(page_bytes, slices)
    dense = kernel_blocks == 1 or kernel_stride * kernel_blocks == piece
    if rest or len(outer) > 1 or not dense or view.numel() * size != num_blocks * page_bytes:
        raise ConfigError(
            f"a KV tensor of shape {tuple(view.shape)} and strides {view.stride()} does not hold blocks of "
            f"{page_bytes} bytes in a known pattern; start the engine without umbp and report its version and "
            "attention backend"
        )
    stride = view.stride(outer[0]) * size if outer else piece
    start = view.storage_offset() * size
    return [Region(storage, start, slices, stride, kernel_stride * kernel_blocks, piece)]
