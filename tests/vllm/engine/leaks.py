"""What an engine must not have lost when nothing runs in it any more."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from tests.vllm.engine.local import Engine
from umbp_core.tiers import Tier


def free_blocks(opened: Engine) -> int:
    """The blocks that vLLM could give to a request now."""
    return opened.core.scheduler.kv_cache_manager.block_pool.get_num_free_blocks()


@contextmanager
def nothing_lost(opened: Engine) -> Iterator[None]:
    """vLLM has as many free blocks afterwards as before, and nothing of ours is left in flight."""
    opened.drain()
    before = free_blocks(opened)
    yield
    opened.drain()
    assert not opened.llm.llm_engine.has_unfinished_requests(), "the test left requests behind"
    assert free_blocks(opened) == before
    leader = opened.leader
    left = {
        "requests": leader.live_requests,
        "ops": len(leader.pool.ledger),
        "held": len(leader.held),
        "staged": leader.pool.loads.staged,
        "quarantined": leader.pool.ledger.quarantined,
        "worker ops": opened.worker.engine.pending(),
        "pins": leader.pool.directory.stats(Tier.DRAM).pinned,
        "reserved": leader.pool.directory.stats(Tier.DRAM).reserved,
    }
    assert {what: count for what, count in left.items() if count} == {}
