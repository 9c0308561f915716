"""Hooks in vLLM's block pool: who is interested hears which blocks may hold another hash than before.

Set on the instance, so that other pools of the process are what they were.  Each runs on the scheduler's thread and
costs a reference to a list and a few hundred nanoseconds; none of them can raise by itself.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

from umbp_vllm.compat import optional

Touched = Callable[[Sequence[Any]], None]
"""Takes blocks; the list is the taker's."""

_CHANGES_BLOCKS: dict[str, tuple[str, ...]] = {
    "get_new_blocks": ("num_blocks",),
    "cache_full_blocks": (
        "request",
        "blocks",
        "num_cached_blocks",
        "num_full_blocks",
        "block_size",
        "kv_cache_group_id",
        "block_mask",
    ),
    "cache_partial_block": ("request", "block"),
    "move_block_hashes": ("src_block", "dst_block"),
    "evict_blocks": ("block_ids",),
    "reset_prefix_cache": (),
}
"""The methods of vLLM's ``BlockPool`` that change what blocks hold, and their first parameters; the same since 0.28."""


def cannot_watch(block_pool: Any) -> str | None:
    """Why :func:`watch_blocks` would not see every change of ``block_pool``; ``None`` when it would."""
    for name, expected in _CHANGES_BLOCKS.items():
        method = optional(block_pool, name)
        if method is None:
            return f"its block pool has no {name}"
        parameters = tuple(inspect.signature(method).parameters)
        if parameters[: len(expected)] != expected:
            return f"its block pool's {name} takes {', '.join(parameters)}"
    if not isinstance(further_hashes(block_pool), dict) or optional(block_pool, "blocks") is None:
        return "its block pool keeps blocks and their hashes in another way"
    return None


def further_hashes(block_pool: Any) -> Any:
    """The hashes of blocks that have several, by block number; each block has its first one itself."""
    return optional(block_pool, "cached_block_hashes_by_block")


def watch_blocks(block_pool: Any, touched: Touched, emptied: Callable[[], None]) -> None:
    """Have ``touched`` called with blocks after each call that may have changed their hashes.

    When all have lost theirs, ``emptied`` is called instead.  Both must not raise.  Only for a ``block_pool`` that
    :func:`cannot_watch` has nothing against.
    """
    block_pool.get_new_blocks = _after_taking(block_pool.get_new_blocks, touched)
    block_pool.cache_full_blocks = _after_filling(block_pool.cache_full_blocks, touched)
    cache_partial, move = block_pool.cache_partial_block, block_pool.move_block_hashes
    evict, reset = block_pool.evict_blocks, block_pool.reset_prefix_cache

    def cache_partial_block(request: Any, block: Any, *more: Any, **others: Any) -> Any:
        key = cache_partial(request, block, *more, **others)
        touched((block,))
        return key

    def move_block_hashes(src_block: Any, dst_block: Any) -> None:
        move(src_block, dst_block)
        touched((src_block, dst_block))

    def evict_blocks(block_ids: Any) -> None:
        evict(block_ids)
        touched([block_pool.blocks[number] for number in block_ids])

    def reset_prefix_cache() -> bool:
        done = bool(reset())
        if done:
            emptied()
        return done

    for method in (cache_partial_block, move_block_hashes, evict_blocks, reset_prefix_cache):
        setattr(block_pool, method.__name__, method)


def _after_taking(get_new: Callable[[int], Any], touched: Touched) -> Callable[[int], Any]:
    def get_new_blocks(num_blocks: int) -> Any:
        taken = get_new(num_blocks)
        if taken:
            touched(taken[:])
        return taken

    return get_new_blocks


def _after_filling(cache_full: Callable[..., None], touched: Touched) -> Callable[..., None]:
    """Called for every request that fills a block: arguments in their places cost a third of those given by name."""

    def cache_full_blocks(
        request: Any,
        blocks: Any,
        num_cached_blocks: int,
        num_full_blocks: int,
        block_size: int,
        kv_cache_group_id: int,
        block_mask: Any = None,
        **others: Any,
    ) -> None:
        given = request, blocks, num_cached_blocks, num_full_blocks, block_size, kv_cache_group_id, block_mask
        if others:
            cache_full(*given, **others)
        else:
            cache_full(*given)
        if num_cached_blocks < num_full_blocks:
            touched(blocks[num_cached_blocks:num_full_blocks])

    return cache_full_blocks
