"""The models that the kit is driven with: small, and with every kind of pool that has a host side on plain memory."""

from __future__ import annotations

from sglang.srt.mem_cache.unified_cache.components.base import ComponentType
from sglang.test.kits.unified_radix_cache.config import CacheConfig

from tests.sglang.kit.content import Prompt

SIZE = {"num_layers": 4, "full_attention_layer_ids": (1, 3), "head_dim": 16}

FULL = CacheConfig(page_size=4, components=(ComponentType.FULL,), **SIZE)
LARGE_PAGES = CacheConfig(page_size=64, components=(ComponentType.FULL,), kv_size=1024, max_context_len=1024, **SIZE)
SWA = CacheConfig(page_size=4, components=(ComponentType.FULL, ComponentType.SWA), sliding_window_size=8, **SIZE)
MAMBA = CacheConfig(
    page_size=4,
    components=(ComponentType.FULL, ComponentType.MAMBA),
    enable_mamba_extra_buffer=True,
    mamba_cache_size=60,
    **SIZE,
)


def prompt_of(cfg: CacheConfig, pages: int, start: int = 1) -> Prompt:
    """``pages`` whole pages of tokens, counted up from ``start``."""
    return Prompt(tuple(range(start, start + pages * cfg.page_size)))


def branch(prompt: Prompt, pages: int, more: int = 4, page_size: int = 4) -> Prompt:
    """A prompt that is the same for ``pages`` pages and then goes another way for ``more`` pages."""
    return Prompt(prompt.tokens[: pages * page_size] + tuple(range(9000, 9000 + more * page_size)))
