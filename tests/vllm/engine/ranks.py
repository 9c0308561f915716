"""What a test asks the ranks of an engine that runs in processes of their own."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from vllm.distributed.kv_transfer import get_kv_transfer_group


def memory_at(address: int) -> str:
    """Device and inode of what is mapped there in this process."""
    for line in Path("/proc/self/maps").read_text(encoding="utf-8").splitlines():
        span, _, _, device, inode, *_ = line.split()
        first, last = (int(end, 16) for end in span.split("-"))
        if first <= address < last:
            return f"{device}:{inode}"
    raise LookupError(f"nothing is mapped at {address:#x}")


class RankView:
    """Methods that vLLM adds to its workers (``worker_extension_cls``) and runs by ``LLM.collective_rpc``."""

    vllm_config: Any
    model_runner: Any

    def compare_stored(self) -> dict[str, Any]:
        """How the pages of this rank's arena compare with the KV blocks that this rank has computed.

        ``stored`` pages hold something, ``foreign`` of them no block of the KV cache, bit by bit over all layers.
        ``memory`` names what the arena is a view of: the same for those that share one.
        """
        layers = self.model_runner.kv_cache_config.kv_cache_groups[0].layer_names
        context = self.vllm_config.compilation_config.static_forward_context
        caches = [context[name].kv_cache for name in layers]
        computed = {
            b"".join(cache[block].contiguous().numpy().tobytes() for cache in caches)
            for block in range(caches[0].shape[0])
        }
        length = len(next(iter(computed)))
        arena = get_kv_transfer_group()._worker.engine._tools.pages
        pages = [bytes(arena.page(page))[:length] for page in range(arena.pages)]
        stored = [page for page in pages if any(page)]
        content = hashlib.sha256(b"".join(sorted(stored))).hexdigest()
        return {
            "stored": len(stored),
            "different": len(set(stored)),
            "foreign": len(set(stored) - computed),
            "content": content,
            "memory": memory_at(arena.address),
        }
