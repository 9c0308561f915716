"""The model's KV groups as the leader sees them: block sizes, hashes per block, and what a hit needs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from umbp_core.errors import ConfigError


@dataclass(frozen=True, slots=True)
class KvGroup:
    """One KV group.

    ``block_tokens`` is the group's block size in tokens and ``hashes_per_block`` the number of engine
    hashes that cover it; the last of them names the block.  ``reach`` is the number of tokens before a
    position that vLLM keeps, which are at least those that its attention can still see: ``None`` means all of them.
    """

    index: int
    block_tokens: int
    hashes_per_block: int
    reach: int | None
    chunk: int | None
    volatile_tail: bool

    def first_block_needed(self, end: int) -> int:
        """The first block that must be there when ``end`` tokens are computed and the next one comes.

        Sliding windows see the ``window - 1`` tokens before the next one, and vLLM may keep some more
        (``SlidingWindowManager.get_num_skipped_tokens``); chunked attention sees its own chunk only.
        """
        if self.reach is not None:
            return max(0, end - self.reach) // self.block_tokens
        if self.chunk is not None:
            return (end // self.chunk * self.chunk) // self.block_tokens
        return 0


def _full(_spec: Any) -> tuple[int | None, int | None]:
    return None, None


def _sliding_window(spec: Any) -> tuple[int | None, int | None]:
    """What its attention sees, and what vLLM keeps (so allocates, and lists by hash) behind that for some drafts."""
    return int(spec.sliding_window) - 1 + int(spec.extra_retained_tokens), None


def _chunked(spec: Any) -> tuple[int | None, int | None]:
    return None, int(spec.attention_chunk_size)


_REACH: dict[str, Callable[[Any], tuple[int | None, int | None]]] = {
    "FullAttentionSpec": _full,
    "MLAAttentionSpec": _full,
    "SlidingWindowSpec": _sliding_window,
    "SlidingWindowMLASpec": _sliding_window,
    "ChunkedLocalAttentionSpec": _chunked,
}
"""Spec class name -> (reach, chunk).  Everything else has state that is not a list of blocks per token."""


def kv_groups(kv_cache_config: Any, hash_tokens: int) -> tuple[KvGroup, ...]:
    """The groups of ``kv_cache_config``; ``hash_tokens`` is the engine's tokens per block hash.

    Raises ``ConfigError`` for kinds of groups that cannot be kept per block (Mamba, linear attention,
    cross attention): vLLM must then be started without the connector.
    """
    groups = []
    for index, group in enumerate(kv_cache_config.kv_cache_groups):
        spec = group.kv_cache_spec
        uniform = layer_specs(spec)
        kinds = {type(member).__name__ for member in uniform}
        unknown = sorted(kinds - _REACH.keys())
        if unknown:
            raise ConfigError(
                f"KV group {index} ({', '.join(unknown)}) is not a per-block KV cache; umbp supports full, MLA, "
                "sliding-window and chunked attention. Start this model without --kv-connector umbp."
            )
        member = uniform[0]
        reach, chunk = _REACH[type(member).__name__](member)
        if spec.block_size % hash_tokens:
            raise ConfigError(
                f"KV group {index} has blocks of {spec.block_size} tokens, which is no multiple of the engine's hash "
                f"unit of {hash_tokens} tokens; set --prefix-match-unit to a divisor of all block sizes."
            )
        groups.append(
            KvGroup(
                index=index,
                block_tokens=spec.block_size,
                hashes_per_block=spec.block_size // hash_tokens,
                reach=reach,
                chunk=chunk,
                volatile_tail=bool(group.is_eagle_group),
            )
        )
    if not groups:
        raise ConfigError("this model has no KV cache; start it without --kv-connector umbp")
    return tuple(groups)


def failures_by_block(kv_cache_config: Any) -> bool:
    """Whether vLLM may hear of a failed load by its blocks; otherwise only by the request.

    With several groups block numbers are ambiguous.  With a single one that has a window, vLLM would go on right
    before the first bad block, where the window of the tokens to compute again was neither loaded nor allocated.
    """
    groups = kv_cache_config.kv_cache_groups
    if len(groups) != 1:
        return False
    members = layer_specs(groups[0].kv_cache_spec)
    return all(_REACH.get(type(member).__name__, _full)(member) == (None, None) for member in members)


def layer_specs(spec: Any) -> list[Any]:
    """The layer specs of a group: those of a uniform-type group, or the spec itself."""
    if type(spec).__name__ == "UniformTypeKVCacheSpecs":
        return list(spec.kv_cache_specs.values())
    return [spec]
