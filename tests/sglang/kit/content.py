"""What every slot of every pool holds: a function of the tokens up to it, so that a wrong byte anywhere is seen.

The bytes of a page are derived from the pool, the layer, the tensor and all tokens up to the page's end
(and the request's namespace), never from where the page lies.  Whoever reads a page can therefore say what
must be in it without having kept a copy.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from sglang.srt.mem_cache.hicache_storage import PoolName
from sglang.srt.mem_cache.unified_cache.components.base import ComponentType

POOL_OF = {ComponentType.FULL: PoolName.KV, ComponentType.SWA: PoolName.SWA, ComponentType.MAMBA: PoolName.MAMBA}


@dataclass(frozen=True)
class Prompt:
    """Tokens and the namespace that a request gives them."""

    tokens: tuple[int, ...]
    extra_key: str | None = None
    cache_salt: str | None = None

    def __len__(self) -> int:
        return len(self.tokens)

    def cut(self, length: int) -> Prompt:
        """The same request, of its first ``length`` tokens."""
        return Prompt(self.tokens[:length], self.extra_key, self.cache_salt)

    def seeds(self, page_size: int) -> list[bytes]:
        """One digest per whole page: of the namespace and of all tokens up to the page's end."""
        state = hashlib.sha256(repr((self.extra_key, self.cache_salt)).encode())
        seeds = []
        for end in range(page_size, len(self.tokens) + 1, page_size):
            state.update(repr(self.tokens[end - page_size : end]).encode())
            seeds.append(state.digest())
        return seeds


def page_bytes(pool: str, row: str, seed: bytes, size: int) -> bytes:
    """The ``size`` bytes that tensor ``row`` of ``pool`` holds for the page with this seed."""
    return hashlib.shake_128(f"{pool}/{row}/".encode() + seed).digest(size)


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """``tensor`` as ``[slots, bytes of a slot]``; a copy if it is not contiguous."""
    return tensor.contiguous().view(torch.uint8).reshape(tensor.shape[0], -1)


@dataclass(frozen=True)
class Share:
    """Part ``rank`` of ``size`` equal parts of each slot: the heads that one of several ranks has."""

    rank: int = 0
    size: int = 1

    def of(self, rows: torch.Tensor) -> torch.Tensor:
        """The columns of ``rows`` that are this part."""
        width = rows.shape[1] // self.size
        return rows[:, self.rank * width : (self.rank + 1) * width]


def expected(
    pool: str, row: str, prompt: Prompt, positions: range, page_size: int, width: int, share: Share
) -> torch.Tensor:
    """What ``positions`` of ``prompt`` hold in one tensor of a rank: ``[positions, width]`` bytes."""
    seeds = prompt.seeds(page_size)
    first, last = positions.start // page_size, (positions.stop - 1) // page_size
    size = page_size * width * share.size
    data = b"".join(page_bytes(pool, row, seeds[page], size) for page in range(first, last + 1))
    rows = torch.frombuffer(bytearray(data), dtype=torch.uint8).reshape(-1, width * share.size)
    return share.of(rows[positions.start - first * page_size :][: len(positions)])


def device_tensors(component: ComponentType, allocator: Any, reqs: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """The device tensors of one component's pool, the slot axis first; writing to them writes to the pool."""
    pool = allocator.get_kvcache()
    if component is ComponentType.MAMBA:
        states = reqs.mamba_pool.mamba_cache
        for layer, state in enumerate(states.temporal):
            yield f"temporal{layer}", state
        for index, conv in enumerate(states.conv):
            for layer, state in enumerate(conv):
                yield f"conv{index}.{layer}", state
        return
    if component is ComponentType.SWA:
        pool = pool.swa_kv_pool
    elif hasattr(pool, "full_kv_pool"):
        pool = pool.full_kv_pool
    if hasattr(pool, "k_buffer"):
        for layer, (key, value) in enumerate(zip(pool.k_buffer, pool.v_buffer, strict=True)):
            yield f"k{layer}", key
            yield f"v{layer}", value
    else:
        for layer, latent in enumerate(pool.kv_buffer):
            yield f"c{layer}", latent


def host_rows(pool: Any, slots: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """What a host pool holds for ``slots``, tensor by tensor; read as the layout is defined, by no code of SGLang."""
    if hasattr(pool, "temporal_buffer"):
        for layer in range(pool.num_mamba_layers):
            yield f"temporal{layer}", pool.temporal_buffer[slots, layer]
            for index, conv in enumerate(pool.conv_buffer):
                yield f"conv{index}.{layer}", conv[slots, layer]
        return
    page, offset = slots // pool.page_size, slots % pool.page_size
    halves: Sequence[tuple[str, torch.Tensor]] = [("c", pool.kv_buffer)]
    if pool.kv_buffer.shape[0] == 2 and hasattr(pool, "k_buffer"):
        halves = [("k", pool.kv_buffer[0]), ("v", pool.kv_buffer[1])]
    for layer in range(pool.layer_num):
        for name, half in halves:
            yield f"{name}{layer}", _layer_rows(pool.layout, half, layer, slots, page, offset)


def _layer_rows(
    layout: str, half: torch.Tensor, layer: int, slots: torch.Tensor, page: torch.Tensor, offset: torch.Tensor
) -> torch.Tensor:
    if layout == "layer_first":
        return half[layer, slots]
    if layout == "page_first":
        return half[slots, layer]
    if layout == "page_first_direct":
        return half[page, layer, offset]
    if layout == "page_head":
        return half[page, :, offset, layer]
    raise ValueError(f"{layout}: this layout is not described here; read init_kv_buffer of the host pool and add it")
