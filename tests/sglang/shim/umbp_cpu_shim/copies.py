"""TEST-ONLY.  The kernels that copy between SGLang's device pool and its host pool, as copies by index.

Names and parameters are those of SGLang's kernels.  ``lf`` in a name is layer first (an array per layer, a row per
token), ``pf`` page first (a row holds all layers), ``ph`` page head (``[page, head, token, layer, dim]``).  Copies of
one layer read the host pool, copies of all layers write it.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor


def transfer_kv_per_layer(
    src_k: Tensor, dst_k: Tensor, src_v: Tensor, dst_v: Tensor, src_indices: Tensor, dst_indices: Tensor, **_: Any
) -> None:
    transfer_kv_per_layer_mla(src_k, dst_k, src_indices, dst_indices)
    transfer_kv_per_layer_mla(src_v, dst_v, src_indices, dst_indices)


def transfer_kv_per_layer_mla(src: Tensor, dst: Tensor, src_indices: Tensor, dst_indices: Tensor, **_: Any) -> None:
    dst[_rows(dst_indices)] = src[_rows(src_indices)]


def transfer_kv_per_layer_pf_lf(
    src_k: Tensor,
    dst_k: Tensor,
    src_v: Tensor,
    dst_v: Tensor,
    src_indices: Tensor,
    dst_indices: Tensor,
    layer_id: int,
    **_: Any,
) -> None:
    transfer_kv_per_layer_mla_pf_lf(src_k, dst_k, src_indices, dst_indices, layer_id)
    transfer_kv_per_layer_mla_pf_lf(src_v, dst_v, src_indices, dst_indices, layer_id)


def transfer_kv_per_layer_mla_pf_lf(
    src: Tensor, dst: Tensor, src_indices: Tensor, dst_indices: Tensor, layer_id: int, **_: Any
) -> None:
    dst[_rows(dst_indices)] = src[_rows(src_indices), layer_id]


def transfer_kv_per_layer_ph_lf(
    src_k: Tensor,
    dst_k: Tensor,
    src_v: Tensor,
    dst_v: Tensor,
    src_indices: Tensor,
    dst_indices: Tensor,
    layer_id: int,
    page_size: int,
    **_: Any,
) -> None:
    page, place = _split(src_indices, page_size)
    for src, dst in ((src_k, dst_k), (src_v, dst_v)):
        dst[_rows(dst_indices)] = src[page, :, place, layer_id]


def transfer_kv_per_layer_direct_pf_lf(
    src_ptrs: Iterable[Tensor],
    dst_ptrs: Iterable[Tensor],
    src_indices: Tensor,
    dst_indices: Tensor,
    layer_id: int,
    page_size: int,
    **_: Any,
) -> None:
    page, place = _split(src_indices, page_size)
    for src, dst in zip(src_ptrs, dst_ptrs, strict=True):
        dst[_rows(dst_indices)] = src[page, layer_id, place]


def transfer_kv_direct(
    src_layers: Iterable[Tensor], dst_layers: Iterable[Tensor], src_indices: Tensor, dst_indices: Tensor, **_: Any
) -> None:
    for src, dst in zip(src_layers, dst_layers, strict=False):
        transfer_kv_per_layer_mla(src, dst, src_indices, dst_indices)


def transfer_kv_all_layer(
    src_k_layers: Tensor,
    dst_k_layers: Tensor,
    src_v_layers: Tensor,
    dst_v_layers: Tensor,
    src_indices: Tensor,
    dst_indices: Tensor,
    item_size: int,
    **_: Any,
) -> None:
    transfer_kv_all_layer_mla(src_k_layers, dst_k_layers, src_indices, dst_indices, item_size)
    transfer_kv_all_layer_mla(src_v_layers, dst_v_layers, src_indices, dst_indices, item_size)


def transfer_kv_all_layer_mla(
    src_layers: Tensor, dst_layers: Tensor, src_indices: Tensor, dst_indices: Tensor, item_size: int, **_: Any
) -> None:
    source, target = _rows(src_indices), _rows(dst_indices)
    for src, dst in zip(src_layers.tolist(), dst_layers.tolist(), strict=True):
        _memory(dst, target, item_size)[target] = _memory(src, source, item_size)[source]


def transfer_kv_all_layer_lf_pf(
    src_k_layers: Tensor,
    dst_k: Tensor,
    src_v_layers: Tensor,
    dst_v: Tensor,
    src_indices: Tensor,
    dst_indices: Tensor,
    item_size: int,
    **_: Any,
) -> None:
    transfer_kv_all_layer_mla_lf_pf(src_k_layers, dst_k, src_indices, dst_indices, item_size)
    transfer_kv_all_layer_mla_lf_pf(src_v_layers, dst_v, src_indices, dst_indices, item_size)


def transfer_kv_all_layer_mla_lf_pf(
    src_layers: Tensor, dst: Tensor, src_indices: Tensor, dst_indices: Tensor, item_size: int, **_: Any
) -> None:
    source = _rows(src_indices)
    by_layer = dst.view(torch.uint8).view(dst.shape[0], -1, item_size)
    for layer, src in enumerate(src_layers.tolist()):
        by_layer[_rows(dst_indices), layer] = _memory(src, source, item_size)[source]


def transfer_kv_all_layer_lf_ph(
    src_k_layers: Tensor,
    dst_k: Tensor,
    src_v_layers: Tensor,
    dst_v: Tensor,
    src_indices: Tensor,
    dst_indices: Tensor,
    item_size: int,
    page_size: int,
    head_num: int,
    **_: Any,
) -> None:
    source = _rows(src_indices)
    page, place = _split(dst_indices, page_size)
    for layers, dst in ((src_k_layers, dst_k), (src_v_layers, dst_v)):
        for layer, src in enumerate(layers.tolist()):
            rows = _memory(src, source, item_size)[source].view(dst.dtype)
            dst[page, :, place, layer] = rows.view(len(source), head_num, -1)


def transfer_kv_all_layer_direct_lf_pf(
    src_ptrs: list[Tensor],
    dst_ptrs: list[Tensor],
    src_indices: Tensor,
    dst_indices: Tensor,
    page_size: int,
    **_: Any,
) -> None:
    page, place = _split(dst_indices, page_size)
    layers = len(src_ptrs) // len(dst_ptrs)
    for number, src in enumerate(src_ptrs):
        dst_ptrs[number // layers][page, number % layers, place] = src[_rows(src_indices)]


KERNELS = {name: function for name, function in vars().items() if name.startswith("transfer_kv_")}


def _rows(indices: Tensor) -> Tensor:
    return indices.to("cpu", torch.int64)


def _split(indices: Tensor, page_size: int) -> tuple[Tensor, Tensor]:
    """The page and the place in it of each row."""
    rows = _rows(indices)
    return rows // page_size, rows % page_size


def _memory(address: int, rows: Tensor, item_size: int) -> Tensor:
    """The memory at ``address`` as far as ``rows`` reach into it: ``uint8[row, item_size]``."""
    count = int(rows.max()) + 1 if len(rows) else 0
    if count == 0:
        return torch.empty((0, item_size), dtype=torch.uint8)
    raw = (ctypes.c_uint8 * (count * item_size)).from_address(address)
    return torch.frombuffer(raw, dtype=torch.uint8).view(count, item_size)
