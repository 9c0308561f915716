"""The engine's HBM blocks as the leader handles them: where a request's blocks are, and holding them.

A held block has one more reference in vLLM's own block pool, so vLLM neither reuses nor frees it while
an op reads it (law L3), whatever happens to the request.  Only a reset of vLLM's prefix cache, which suffers no
reference, takes blocks away from ops; the workers end these before they write anything (``StepMetadata.fences``).
No request is ever reported through ``finished_sending``; therefore no report can name a request that vLLM has
already forgotten.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from umbp_core.errors import StateError
from umbp_vllm import compat

NULL_BLOCK = 0
"""vLLM's placeholder for blocks that a window has left behind; it is never read or written."""


class HeldBlocks:
    """References on HBM blocks, by op.  Scheduler thread only."""

    def __init__(self) -> None:
        self._pool: Any = None
        self.bound = False
        """Whether vLLM has given its block pool; without it nothing may be stored."""
        self._held: dict[str, list[Any]] = {}

    def __len__(self) -> int:
        return len(self._held)

    def __iter__(self) -> Iterator[str]:
        """The ops that hold blocks."""
        return iter(self._held)

    def bind(self, block_pool: Any) -> bool:
        """Take vLLM's ``BlockPool``; False when it has been taken already."""
        if self._pool is block_pool:
            return False
        self._pool = block_pool
        self.bound = True
        return True

    def hold(self, op_id: str, blocks: Iterable[int]) -> None:
        """Keep ``blocks`` until :meth:`release`.  Raises ``StateError`` when an op holds twice."""
        if op_id in self._held:
            raise StateError(f"op {op_id} already holds HBM blocks; release them first")
        held = [self._pool.blocks[block] for block in blocks]
        self._pool.touch(held)
        self._held[op_id] = held

    def release(self, op_id: str) -> None:
        """Give the blocks of ``op_id`` back; nothing happens when it holds none."""
        held = self._held.pop(op_id, None)
        if held:
            self._pool.free_blocks(reversed(held))

    def unlist(self, blocks: Iterable[int]) -> None:
        """Have vLLM find ``blocks`` by no hash any more: they do not hold what it believes.  Whose they are, stays."""
        if self._pool is not None:
            self._pool.evict_blocks(set(blocks))

    def let_go(self) -> list[str]:
        """Give all blocks back although ops still read them; which ops must end before any block is written."""
        ops = list(self._held)
        for op_id in ops:
            self.release(op_id)
        return ops


class BlockTables:
    """A request's block list per group, always the engine's whole truth.

    From vLLM 0.30 on the cache manager is asked.  Before that the lists are followed through the
    scheduler's outputs (:meth:`set` and :meth:`extend`).
    """

    def __init__(self) -> None:
        self._manager: Any = None
        self._lists: Sequence[Mapping[str, Sequence[Any]]] | None = None
        self._tables: dict[str, tuple[list[int], ...]] = {}

    @property
    def follows_outputs(self) -> bool:
        """Whether :meth:`set` and :meth:`extend` must be called for every change."""
        return self._manager is None

    def bind(self, manager: Any) -> None:
        """Take vLLM's ``KVCacheManager`` (``bind_kv_cache_manager``)."""
        self._manager = manager
        self._lists = compat.block_lists(manager)
        self._tables.clear()

    def set(self, request_id: str, tables: Sequence[Sequence[int]]) -> None:
        """The request's whole lists are ``tables``."""
        if self._manager is None:
            self._tables[request_id] = tuple(list(table) for table in tables)

    def extend(self, request_id: str, new: Sequence[Sequence[int]] | None) -> None:
        """``new`` blocks were appended to the request's lists."""
        if self._manager is None and new is not None and request_id in self._tables:
            for table, more in zip(self._tables[request_id], new, strict=True):
                table.extend(more)

    def blocks(self, request_id: str, group: int, first: int, end: int) -> list[int]:
        """The ids of the request's blocks ``first`` (included) to ``end`` (excluded) in ``group``, those that exist."""
        if self._lists is not None:
            return [block.block_id for block in self._lists[group].get(request_id, ())[first:end]]
        if self._manager is not None:
            blocks = self._manager.get_blocks(request_id).blocks[group]
            return [block.block_id for block in blocks[first:end]]
        tables = self._tables.get(request_id)
        return tables[group][first:end] if tables else []

    def forget(self, request_id: str) -> None:
        """The request is gone."""
        self._tables.pop(request_id, None)
