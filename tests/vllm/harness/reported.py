"""What a master must know of an engine, read from the engine's own structures, and what it knows."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable
from typing import Any

from vllm.v1.core.kv_cache_utils import maybe_convert_block_hash
from vllm.v1.kv_cache_interface import ChunkedLocalAttentionSpec, SlidingWindowSpec

from tests.master.app.master_process import CALL
from umbp_connectors.client.native_blocking import NativeBlockingClient
from umbp_connectors.reporting.reporter import Reporter
from umbp_core.tiers import Tier

Held = dict[Tier, set[bytes]]
FLUSH = 60.0
AGAIN = 60.0
"""Seconds for a master to be told by an engine that cannot be asked to flush."""


def published(block_hash: bytes) -> bytes:
    """A block hash as vLLM's events show it, as a master's key."""
    shown = maybe_convert_block_hash(block_hash)
    return str(shown).encode() if isinstance(shown, int) else shown.hex().encode()


def counting(kv_cache_config: Any) -> list[int]:
    """The KV groups that keep all tokens, or all when there is none."""
    groups = [group.kv_cache_spec for group in kv_cache_config.kv_cache_groups]
    windows = (SlidingWindowSpec, ChunkedLocalAttentionSpec)
    return [index for index, spec in enumerate(groups) if not isinstance(spec, windows)] or list(range(len(groups)))


def in_all_groups(keys: Iterable[bytes], groups: list[int]) -> set[bytes]:
    """The published hashes that are among ``keys`` (hash and group) for each of ``groups``."""
    keys = set(keys)
    suffixes = [group.to_bytes(4, "big") for group in groups]
    return {published(key[:-4]) for key in keys if all(key[:-4] + suffix in keys for suffix in suffixes)}


def held_by(scheduler: Any, pool: Any) -> Held:
    """What vLLM's ``scheduler`` and our ``pool`` (``None``: not open) can serve from, at this moment."""
    manager = scheduler.kv_cache_manager
    groups = counting(manager.kv_cache_config)
    cached = manager.block_pool.cached_block_hash_to_block._cache
    held = {Tier.HBM: in_all_groups(cached, groups), Tier.DRAM: set(), Tier.SSD: set()}
    for tier in (Tier.DRAM, Tier.SSD) if pool is not None else ():
        held[tier] = in_all_groups(pool.directory.keys(tier), groups)
    return held


def known_at(master: NativeBlockingClient, node_id: str) -> Held:
    """What ``master`` knows of a node, every hash on every tier.  Fails when it names one twice."""
    known: Held = {tier: set() for tier in (Tier.HBM, Tier.DRAM, Tier.SSD)}
    for info in master.list_nodes(CALL):
        if info.node_id != node_id:
            continue
        for tier, count in info.external_counts.items():
            pages = []
            cursor = 0
            for _ in itertools.count():
                page = master.list_blocks(node_id, tier, cursor, 1000, CALL)
                pages.append(page.hashes)
                cursor = page.cursor
                if not cursor:
                    break
            hashes = list(itertools.chain.from_iterable(pages))
            assert len(hashes) == len(set(hashes)) == count
            known[Tier(tier)] = set(hashes)
    return known


def reporter_of(connector: Any) -> Reporter:
    """The reporter of the scheduler's connector."""
    reporter: Reporter = connector._reporting.reporter
    return reporter


def difference(known: Held, held: Held) -> dict[str, tuple[int, int]]:
    """Per tier that differs: how many hashes the master misses, and how many it believes wrongly."""
    return {
        tier.name: (len(held[tier] - known[tier]), len(known[tier] - held[tier]))
        for tier in held
        if held[tier] != known[tier]
    }


def sizes(held: Held) -> dict[str, int]:
    """Hashes per tier."""
    return {tier.name: len(hashes) for tier, hashes in held.items()}


def until_known(known: Callable[[], Held], held: Held) -> None:
    """Wait until a master knows this and nothing else."""
    deadline = time.monotonic() + AGAIN
    while (told := known()) != held:
        assert time.monotonic() < deadline, difference(told, held)
